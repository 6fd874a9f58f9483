"""Workers that are born of one process: they are as if they had been started one by one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from coordinator.runtime.nursery import Born
from protocol import messages as m
from protocol.errors import WorkerError
from protocol.features import has
from tests.integration.describing import fleet_of
from tests.patience import LATE_S

pytestmark = pytest.mark.skipif(not has("fork"), reason="workers are started one by one here")


def fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on: state, parent, process group, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_they_become_our_children_under_their_own_names() -> None:
    with fleet_of("cpu:1,accel:2") as fleet:
        assert fleet._nursery is not None
        assert fleet._nursery.process.wait(LATE_S) == 0  # the last one may be ready before it has come to its end
        for worker, process in enumerate(fleet.processes):
            fleet.request(worker, m.StatsRequest())
            state, parent, group = fields(process.pid)[:3]
            assert (state != "Z", int(parent), int(group)) == (True, os.getpid(), process.pid)
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            assert words[1:] == [b"-P", b"-m", b"workers", fleet.directory.encode(), process.spec.name.encode()]
        pids = [process.pid for process in fleet.processes]
        assert len(set(pids)) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_has_little_memory_of_its_own() -> None:
    with fleet_of("cpu:1,accel:1") as fleet:
        fleet.request(0, m.StatsRequest())
        for process in fleet.processes:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            sizes = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines}
            assert sizes["Pss"] <= 60, sizes  # MiB; nothing has been loaded or allocated yet


def test_how_a_worker_ended_is_known() -> None:
    with fleet_of("null:2") as fleet:
        fleet.request(0, m.StatsRequest())
        os.kill(fleet.processes[1].pid, signal.SIGTERM)
        with pytest.raises(WorkerError, match="null1 was killed by SIGTERM"):
            fleet.request(1, m.StatsRequest())


def test_waiting_has_an_end() -> None:
    with fleet_of("null:1") as fleet:
        born = fleet.processes[0].process
        assert isinstance(born, Born)
        began = time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired):
            born.wait(0.05)
        assert time.monotonic() - began < LATE_S
        fleet.processes[0].kill()
        assert born.wait(LATE_S) == -signal.SIGKILL


def test_what_a_nursery_says_last_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that cannot even import its workers."""
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text("raise RuntimeError('the wrong workers')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    last = r"ended with status 1 .*its last words: RuntimeError: the wrong workers"
    with pytest.raises(WorkerError, match=last), fleet_of("null:1"):
        pass
