"""A few lines per graph: tensors by name, for tests of planning."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.graph.node import ABSENT, NO_FLAGS, BufferRef, Dims, Graph, Tensor, contiguous_nb, make_graph
from coordinator.schedule.plan import Device, Plan
from protocol.dtypes import DType
from protocol.ops import Flag, Op, Usage

GPU = Device("GPU0", alignment=32)
GPU1 = Device("GPU1", "gpu", alignment=32)
CPU = Device("CPU", "cpu", alignment=32, is_host=True)


class Maker:
    """Adds tensors (f32, 8 elements unless said otherwise) and freezes them into a graph."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.ids: dict[str, int] = {}

    def add(
        self, name: str, op: Op = Op.NONE, src: Sequence[str | None] = (), ne: Sequence[int] = (8,),
        flags: Flag = NO_FLAGS, view: str | None = None, offs: int = 0, buffer: BufferRef | None = None,
    ) -> str:  # fmt: skip
        """Append a tensor; returns its name."""
        full: Dims = tuple([*ne, 1, 1, 1][:4])  # type: ignore[assignment]
        ids = tuple(ABSENT if s is None else self.ids[s] for s in src)
        view_src = None if view is None else self.ids[view]
        self.ids[name] = len(self.tensors)
        self.tensors.append(
            Tensor(self.ids[name], name, DType.F32, full, contiguous_nb(DType.F32, full), op, (), flags, ids, view_src,
                   offs, buffer)
        )  # fmt: skip
        return name

    def input(self, name: str, *ne: int) -> str:
        """A tensor that the user fills."""
        return self.add(name, ne=ne or (8,), flags=Flag.INPUT)

    def weight(self, name: str, buft: str, *ne: int, usage: Usage = Usage.WEIGHTS) -> str:
        """A tensor that lies in a buffer already."""
        return self.add(name, ne=ne or (8,), buffer=BufferRef(buft, usage))

    def graph(self, *expand: str, pins: Sequence[tuple[str, str]] = ()) -> Graph:
        """The graph of what `expand` needs."""
        return make_graph("g", self.tensors, [self.ids[e] for e in expand], [(self.ids[t], d) for t, d in pins])


def backends(plan: Plan) -> dict[str, str]:
    """Device name per tensor name, where one was assigned."""
    return {t.name: plan.devices[b].name for t, b in zip(plan.graph.tensors, plan.backend, strict=True) if b >= 0}


def causes(plan: Plan) -> dict[str, str]:
    """Cause label per tensor name."""
    return {t.name: c for t, c in zip(plan.graph.tensors, plan.cause, strict=True)}


def offset(plan: Plan, name: str) -> int | None:
    """Offset of a tensor in its chunk."""
    place = plan.places[plan.graph.by_name[name]]
    return None if place is None else place.offset


def names(plan: Plan, ids: Sequence[int]) -> list[str]:
    """Names of tensors and copies."""
    n = len(plan.graph.tensors)
    return [plan.graph.tensors[i].name if i < n else plan.copies[i - n].name for i in ids]
