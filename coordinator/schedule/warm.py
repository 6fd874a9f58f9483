"""Compiles the planner ahead of time: `python -m coordinator.schedule.warm`."""

from __future__ import annotations

from coordinator.graph.build import Builder
from coordinator.graph.node import BufferRef
from coordinator.schedule.plan import Device
from coordinator.schedule.scheduler import Scheduler
from protocol.dtypes import DType
from protocol.ops import Usage


def warm() -> None:
    """Plan a small graph over two devices, twice, so that everything is compiled and cached."""
    devices = (Device("accel0", buft="accel0", alignment=128), Device("cpu0", kind="cpu", buft="cpu0", is_host=True))
    b = Builder({}, lambda name: BufferRef(name.partition(".")[0], Usage.WEIGHTS))
    x = b.input("x", DType.F32, 32, 4)
    for device in ("accel0", "cpu0"):
        x = b.mul_mat(b.resident(f"{device}.w", DType.F32, 32, 32), b.add(x, x))
    b.expand(b.output(x))
    graph = b.graph("warm")
    scheduler = Scheduler(devices)
    scheduler.reserve(graph)
    scheduler.allocate(graph)
    scheduler.allocate(graph)


if __name__ == "__main__":
    warm()
