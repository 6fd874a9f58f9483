"""Shared memory, the board and the run's directory, with and without what Linux offers."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol import board as board_module
from protocol import features, rundir, sharedmem
from protocol.board import Board, Progress, State
from protocol.errors import CapacityError, ProtocolError, UsageError, WorkerError
from tests.patience import LATE_S


@pytest.fixture(params=["", "memfd", "futex", "memfd,futex"])
def switched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(features.VARIABLE, request.param)
    features.has.cache_clear()
    yield request.param
    features.has.cache_clear()


def test_segment_is_shared(switched: str, tmp_path: Path) -> None:
    segment = sharedmem.create(5000, str(tmp_path), "kv")
    assert (segment.nbytes, segment.address % 64, int(segment.view[:5000].max())) == (5000, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == (["kv.mem"] if "memfd" in switched else [])
    other = sharedmem.attach(segment.path, 5000)
    segment.view[4999] = 7
    assert other.view[4999] == 7
    with pytest.raises(ValueError, match="read-only"):
        other.view[0] = 1
    with pytest.raises(ProtocolError, match=r"expected 9,000,000 bytes, it has 5,000"):
        sharedmem.attach(segment.path, 9_000_000)
    segment.close()
    assert other.view[4999] == 7  # it stays as long as somebody has it
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WorkerError, match="cannot open"):
        sharedmem.attach(segment.path, 5000)


def open_files() -> set[str]:
    """Descriptors of this process, without that of the listing itself."""
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


def test_segments_leave_nothing_open(switched: str, tmp_path: Path) -> None:
    before = open_files()
    for _ in range(20):
        first = sharedmem.create(100, str(tmp_path), "a")
        second = sharedmem.attach(first.path, 100)
        first.close()
        second.close()
        with pytest.raises(CapacityError, match="cannot get"):
            sharedmem.create(1 << 62, str(tmp_path), "b")
    assert open_files() - before == set()
    assert list(tmp_path.iterdir()) == []


def test_private_memory_has_its_limits() -> None:
    assert sharedmem.private(100, "kv").view[:100].max() == 0
    with pytest.raises(CapacityError, match="kv: cannot get"):
        sharedmem.private(1 << 62, "kv")


def _echo(path: str, steps: int) -> None:
    """Another process: acknowledge what is published."""
    board = Board.attach(path)
    for step in range(1, steps + 1):
        board.wait_published(3, step)
        board.acknowledge(3, step)


def test_board_between_processes(switched: str, tmp_path: Path) -> None:
    board = Board.create(str(tmp_path))
    steps = 200
    other = multiprocessing.get_context("spawn").Process(target=_echo, args=(board.segment.path, steps))
    other.start()
    for step in range(1, steps + 1):
        board.publish(3, step)
        board.wait_acknowledged(3, step)
    other.join(60)
    assert other.exitcode == 0
    board.segment.close()


def test_board_waits_for_its_own_word(switched: str, tmp_path: Path) -> None:
    board = Board.create(str(tmp_path))
    waiter = threading.Thread(target=board.wait_published, args=(5, 1 << 32 | 9), daemon=True)
    waiter.start()
    board.publish(4, 9)
    board.acknowledge(5, 9)
    board.publish(5, 8)
    time.sleep(0.05)
    assert waiter.is_alive()
    board.publish(5, 1 << 32 | 9)  # steps are compared by their low 32 bits
    waiter.join(LATE_S)
    assert not waiter.is_alive()


def test_board_shows_progress(tmp_path: Path) -> None:
    board = Board.create(str(tmp_path))
    assert board.progress(63) == Progress(0, 0, 0, State.IDLE)
    board.show(63, 1 << 32 | 5, 12, 3, State.WAITING)
    assert board.progress(63) == (5, 12, 3, State.WAITING)
    board.rest(63)
    assert board.progress(63).state is State.IDLE
    assert board.progress(62) == Progress(0, 0, 0, State.IDLE)
    board.segment.view[: board_module.NBYTES] = 255  # a worker gone mad
    assert board.progress(0).state is State.IDLE


def test_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    stale, young, foreign = (tmp_path / name for name in ("crossdock-run-1", "crossdock-run-2", "other"))
    for path in (stale, young, foreign):
        path.mkdir(mode=0o700)
        (path / "control.sock").touch()
    for path in (stale, foreign):
        os.utime(path, (1, 1))
    mine = rundir.run_directory()
    assert os.stat(mine).st_mode & 0o777 == 0o700
    assert (stale.exists(), young.exists(), foreign.exists()) == (False, True, True)
    os.utime(mine, (1, 1))
    other = rundir.run_directory()
    assert os.path.isdir(mine), "a run that lives keeps its directory"
    for path in (mine, other, str(foreign), str(tmp_path), "", "crossdock-run-2"):
        rundir.remove_run_directory(path)
        rundir.remove_run_directory(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crossdock-run-2", "other"]


def test_run_directory_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(WorkerError, match="TMPDIR"):
        rundir.run_directory()


def test_switches_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(features.VARIABLE, " MemFD , avx2,")
    features.check_switches()
    assert features.disabled() == {"memfd", "avx2"}
    monkeypatch.setenv(features.VARIABLE, "memfd,futx")
    with pytest.raises(UsageError, match="unknown feature 'futx'"):
        features.check_switches()
