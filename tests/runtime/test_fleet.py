"""A fleet over many sessions: nothing is left behind, and a failed request ends it with a reason."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.options import DEMO_IMAGE, DEMO_MODEL
from coordinator.config import parse_workers
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.session import SessionOptions
from coordinator.schedule.placement import PlacementOptions
from protocol import messages as m
from protocol.errors import ProtocolError, WorkerError
from tests.integration.describing import answer, chat_prompt, fleet_of, load


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in Linux's /proc")
def test_sessions_leave_nothing_behind() -> None:
    demo = load(DEMO_MODEL)
    prompt = chat_prompt(demo, "Describe this image.", [DEMO_IMAGE])
    with fleet_of("cpu:1,accel:2") as fleet:
        counts = []
        for layers in (3, 5, 3, 5, 3):
            answer(fleet, demo, prompt, SessionOptions(PlacementOptions(layers)), 3)
            for worker in range(3):
                fleet.request(worker, m.StatsRequest())  # answered when everything before it is done
            counts.append([open_files(process.pid) for process in fleet.processes])
    assert counts[1] == counts[3]
    assert counts[2] == counts[4]


def test_a_failed_request_ends_the_fleet_with_its_reason() -> None:
    with fleet_of("cpu:1") as fleet:
        with pytest.raises(ProtocolError, match="unknown arena 99"):
            fleet.request(0, m.Read(99, 0, 1))
        with pytest.raises(WorkerError, match=r"this run has ended: .*unknown arena 99"):
            fleet.request(0, m.StatsRequest())


class SlowDeath:
    """A worker whose connection is closed already, and whose process takes three more seconds to end."""

    left_s = 3.0

    def wait(self, timeout_s: float) -> None:
        self.left_s -= timeout_s

    def died(self) -> str | None:
        return "was killed by SIGKILL" if self.left_s <= 0 else None

    def __getattr__(self, name: str) -> Any:
        return lambda *_: ""


def test_how_a_worker_ended_is_told_however_long_its_end_takes() -> None:
    with Fleet(parse_workers("null:1", 1), FleetOptions()) as fleet:
        dying = SlowDeath()
        dying.spec = fleet.topology.workers[0]  # type: ignore[attr-defined]
        fleet.processes.append(dying)  # type: ignore[arg-type]
        with pytest.raises(WorkerError, match="null0 was killed by SIGKILL"):
            fleet.send(0, m.StatsRequest())


@pytest.mark.slow
def test_a_worker_that_is_halted_for_seconds_keeps_its_connection() -> None:
    """As on a machine that is too busy for it: what is asked meanwhile it answers later."""
    with Fleet(parse_workers("null:1", 1), FleetOptions(transport="tcp")) as fleet:
        fleet.start()
        fleet.handshake()
        os.kill(fleet.processes[0].pid, signal.SIGSTOP)
        time.sleep(5.0)
        fleet.send(0, m.StatsRequest())
        os.kill(fleet.processes[0].pid, signal.SIGCONT)
        assert isinstance(fleet.gather([0])[0].message, m.Stats)
