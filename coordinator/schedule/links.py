"""Bytes that go from device to device in each evaluation: what a plan copies, what its programs send."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from coordinator.schedule.lower import Lowered
from coordinator.schedule.plan import Plan

Place = TypeVar("Place")


def copied_bytes(plan: Plan) -> dict[tuple[str, str], int]:
    """By (from, to) device names, in the order of the splits."""
    tensors, names = plan.graph.tensors, [device.name for device in plan.devices]
    return _sums(
        ((names[plan.backend[ident]], names[split.backend]), tensors[ident].nbytes)
        for split in plan.splits
        for ident in split.inputs
    )


def sent_bytes(lowered: Lowered) -> dict[tuple[int, int], int]:
    """By (source, target) workers, in the order of the transfers."""
    return _sums(((t.source, t.target), t.nbytes) for t in lowered.transfers)


def _sums(parts: Iterable[tuple[tuple[Place, Place], int]]) -> dict[tuple[Place, Place], int]:
    total: dict[tuple[Place, Place], int] = {}
    for link, nbytes in parts:
        total[link] = total.get(link, 0) + nbytes
    return total
