"""A nursery whose coordinator dies at an awkward moment: the run's files are removed before nobody is left to do it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.features import has
from protocol.rundir import PREFIX
from tests.patience import LATE_S

pytestmark = pytest.mark.skipif(not has("fork"), reason="workers are started one by one here")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / f"{PREFIX}abc"
    path.mkdir(mode=0o700)
    (path / "nursery.log").touch()
    return path


@pytest.fixture
def deaf() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def ended(command: list[str], stdin: bytes, fds: tuple[int, ...] = ()) -> None:
    result = subprocess.run(
        [sys.executable, "-P", *command], input=stdin, capture_output=True, pass_fds=fds, process_group=0,
        timeout=LATE_S,
    )  # fmt: skip
    assert (result.stdout, result.stderr) == (b"", b"")


def is_removed(directory: Path) -> bool:
    deadline = time.monotonic() + LATE_S
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    return not directory.exists()


def test_before_it_was_told_anything(directory: Path) -> None:
    ended(["-m", "workers.nursery", str(directory), "null0"], b"")
    assert is_removed(directory)


def test_while_kernels_are_compiled(directory: Path, deaf: int) -> None:
    """The pipe breaks before the signal comes that tells of the death."""
    command = f"from workers import nursery; nursery._report({deaf}, 'compiling', {str(directory)!r})"
    ended(["-c", command], b"", (deaf,))
    assert is_removed(directory)


def test_while_workers_are_born(directory: Path, deaf: int) -> None:
    """The nursery has ended already; a worker that cannot say that it is born is the only one left."""
    configuration = {
        "name": "null0", "kind": "null", "memory": None, "threads": 1, "unsupported_ops": [],
        "arithmetic": "exact", "transport": "ipc", "plane": "shared", "board": "", "token": "t",
        "endpoint": f"ipc://{directory}/control.sock", "run_directory": str(directory),
    }  # fmt: skip
    stdin, ours = os.pipe()
    os.write(ours, json.dumps(configuration).encode() + b"\n")
    os.close(ours)
    with (directory / "null0.log").open("wb") as log:
        birth = {"name": "null0", "stdin": stdin, "log": log.fileno()}
        births = {"parent": os.getpid(), "report": deaf, "arithmetic": "", "workers": [birth]}
        command = ["-m", "workers.nursery", str(directory), "null0"]
        ended(command, json.dumps(births).encode() + b"\n", (stdin, log.fileno(), deaf))
    os.close(stdin)
    assert is_removed(directory)
