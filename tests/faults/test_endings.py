"""Processes that are ended while they end: whoever is left removes the run's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.features import has
from tests.faults.harness import Job, end_unfinished
from tests.patience import LATE_S, comes_true

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    yield
    end_unfinished()


KILLED = """
import os, signal
from coordinator.runtime import {module} as module
module.{what} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
from coordinator.cli import main
main()
"""


@pytest.mark.parametrize(
    ("module", "what"),
    [
        pytest.param("fleet", "Fleet._dismiss", marks=pytest.mark.slow),
        ("process", "WorkerProcess.kill"),
        pytest.param("process", "WorkerProcess.reap", marks=pytest.mark.slow),
    ],
)
def test_coordinator_killed_while_it_ends_its_workers(module: str, what: str, model: Path) -> None:
    """Before it says so, when all of them have ended by themselves, and when it has killed them."""
    command = [sys.executable, "-c", KILLED.format(module=module, what=what)]
    result = Job(["run", "-m", model, "-p", "hello", "-n", 1, "-q"], command=command).finish()
    assert result.stdout
    assert (result.status, result.stderr, result.leftovers) == (-9, "", [])


BLIND = """
import threading
threading.Thread.start = lambda self: None  # the watch is too slow
from workers.cli import main
main()
"""


def gone_astray(directory: Path) -> dict[str, object]:
    """Of a worker whose coordinator cannot be reached."""
    return {
        "name": "null0", "kind": "null", "memory": None, "threads": 1, "unsupported_ops": [],
        "arithmetic": "exact", "transport": "ipc", "plane": "shared", "board": "", "token": "t",
        "endpoint": "gone", "run_directory": str(directory),
    }  # fmt: skip


@pytest.mark.parametrize("gone", [True, False])
def test_worker_that_fails_since_its_coordinator_is_gone(gone: bool, tmp_path: Path) -> None:
    """It must not end before the files are removed; those of a coordinator that lives are not its own."""
    directory = tmp_path / "crossdock-run-abc"
    directory.mkdir(mode=0o700)
    (directory / "null0.log").touch()
    configuration = gone_astray(directory)
    command = [sys.executable, "-P", "-c", BLIND, str(directory), "null0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stderr is not None
        worker.stdin.write(json.dumps(configuration).encode() + b"\n")
        worker.stdin.flush()
        if gone:
            worker.stdin.close()
        assert b"cannot connect to 'gone'" in worker.stderr.read()
        assert worker.wait(LATE_S) == 6
    assert os.path.exists(directory) != gone


ENDING = """
import ctypes, os, subprocess, sys, threading, time
from pathlib import Path
def main_is_gone():
    return Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
def last_thread():
    while not main_is_gone():
        time.sleep(0.001)
    worker.stdin.write(sys.argv[1].encode() + bytes([10]))
    worker.stdin.flush()
    told = worker.stderr.readline()
    time.sleep(0.5)
    os._exit(b"cannot connect to 'gone'" not in told)
worker = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
threading.Thread(target=last_thread).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.mark.skipif(not has("fork"), reason="needs Linux's /proc")
def test_worker_that_fails_while_its_coordinator_comes_to_its_end(tmp_path: Path) -> None:
    """On a busy machine a thread of a killed process may keep the pipe open for long: that one is gone, too."""
    directory = tmp_path / "crossdock-run-abc"
    directory.mkdir(mode=0o700)
    (directory / "null0.log").touch()
    worker = [sys.executable, "-P", "-c", BLIND, str(directory), "null0"]
    subprocess.run([sys.executable, "-c", ENDING, json.dumps(gone_astray(directory)), *worker], check=True)
    assert comes_true(lambda: not directory.exists())
