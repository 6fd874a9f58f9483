"""How much of its compute buffer each device really uses while a plan is evaluated."""

from __future__ import annotations

from coordinator.graph.node import ABSENT
from coordinator.schedule.plan import Plan


def live_bytes(plan: Plan) -> list[int]:
    """The most bytes of compute memory that hold something still to be read, by split, on the split's own device.

    A tensor holds its bytes from the node that makes it (an input: from the start) to the last that reads it or a view
    of it, a split's copies from the split's start.
    """
    tensors, n = plan.graph.tensors, len(plan.graph.tensors)
    birth: dict[int, int] = {}
    death: dict[int, int] = {}
    for index, ident in enumerate(plan.graph.nodes):
        root = _root(plan, ident)
        birth.setdefault(root, index)
        death[root] = index
        for source in plan.sources[index]:
            if source == ABSENT:
                continue
            owner = source if source >= n else _root(plan, source)
            birth.setdefault(owner, 0)
            death[owner] = index
    for split in plan.splits:
        for copy, made in enumerate(plan.copies):
            if made.backend == split.backend and made.tensor in split.inputs and n + copy in birth:
                birth[n + copy] = split.start
    changes: dict[str, list[int]] = {}
    for ident, first in birth.items():
        place = plan.copies[ident - n].place if ident >= n else plan.places[ident]
        if place is not None and place.chunk is not None:
            nbytes = tensors[plan.copies[ident - n].tensor if ident >= n else ident].nbytes
            line = changes.setdefault(place.buft, [0] * (len(plan.graph.nodes) + 1))
            line[first] += nbytes
            line[death[ident] + 1] -= nbytes
    return [_peak(plan, changes, number) for number in range(len(plan.splits))]


def _root(plan: Plan, ident: int) -> int:
    view = plan.graph.tensors[ident].view_src
    return ident if view is None else view


def _peak(plan: Plan, changes: dict[str, list[int]], number: int) -> int:
    split = plan.splits[number]
    device = plan.devices[split.backend]
    line = changes.get(device.buft or device.name, [0])
    level = sum(line[: split.start])
    most = 0
    for change in line[split.start : split.end]:
        level += change
        most = max(most, level)
    return most
