"""What a person sees while weights are loaded: on a terminal a bar with bytes, in a file nothing that moves."""

from __future__ import annotations

import os
import pty
import re
import subprocess

import pytest

from tests.faults.harness import COMMAND

RUN = [COMMAND, "run", "-w", "cpu:1,accel:2", "-p", "hello", "--no-image", "-n", "1"]


def on_terminal(command: list[str]) -> str:
    """What a command writes to stderr when that is a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, stderr=theirs, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"}
    ) as job:
        os.close(theirs)
        found = b""
        try:
            while data := os.read(ours, 4096):
                found += data
        except OSError:  # the other end was closed
            pass
        assert job.wait() == 0, found
    os.close(ours)
    return found.decode()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_loading_is_seen_on_a_terminal(transport: str) -> None:
    found = on_terminal([*RUN, "--transport", transport])
    assert "loading weights" in found
    bars = re.findall(r"([0-9.]+)/([0-9.]+) [KM]iB", found)
    assert bars
    assert bars[-1][0] == bars[-1][1]


@pytest.mark.slow
def test_nothing_moves_in_a_file() -> None:
    result = subprocess.run(RUN, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
    assert b"loading" not in result.stderr
    assert b"\x1b" not in result.stderr
    assert on_terminal([*RUN, "-q"]) == ""
