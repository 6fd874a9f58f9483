"""A fleet over many sessions: nothing is left behind, and a failed request ends it with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coordinator.cli.options import DEMO_IMAGE, DEMO_MODEL
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
