"""Who holds a scheduler's memory: the dock, and the graphs that were allocated on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from coordinator.graph.node import Graph
from coordinator.ownership.actions import Key, Operand, Region
from coordinator.ownership.facts import Finding
from coordinator.ownership.sequence import GraphSpec
from coordinator.schedule.plan import Plan
from coordinator.schedule.runs import Runs
from coordinator.schedule.scheduler import Scheduler
from protocol.ops import Flag


@dataclass(slots=True)
class Dock:
    """A scheduler and whose its buffers are. `epoch` grows whenever another graph takes them over."""

    name: str
    scheduler: Scheduler
    epoch: int = 0
    tenant: int = -1
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    reserved_by: tuple[object, ...] = ()
    seen: set[tuple[object, ...]] = field(default_factory=set)
    dropped: set[tuple[object, ...]] = field(default_factory=set)


@dataclass(slots=True)
class Instance:
    """A graph that was allocated: its plan, where its chunks start, and what it was given."""

    number: int
    name: str
    spec: GraphSpec
    plan: Plan
    dock: Dock
    chunks: dict[tuple[str, int], tuple[Region, int, int]]  # region, first byte, size
    released: frozenset[int]
    stale: bool = False  # places were made for another graph
    evaluation: int = 0
    problem: Finding | None = None
    given: dict[int, Operand] = field(default_factory=dict)  # inputs that the host keeps, in safe ownership
    set_contents: dict[Key, Runs] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The planned graph."""
        return self.plan.graph

    @property
    def is_homeless(self) -> bool:
        """True when a buffer that it was planned in was replaced since."""
        return any(r.generation != self.dock.generations[r.buft] for r, _, _ in self.chunks.values())


def traits_of(instance: Instance, ident: int) -> frozenset[str]:
    """Facts about a tensor that tell hazards apart."""
    tensor = instance.graph.tensors[ident]
    root = tensor if tensor.view_src is None else instance.graph.tensors[tensor.view_src]
    facts = {
        "input": bool((tensor.flags | root.flags) & Flag.INPUT),
        "output": bool(tensor.flags & Flag.OUTPUT),
        "root-output": bool(root.flags & Flag.OUTPUT),
        "view": tensor.view_src is not None,
        "released": root.id in instance.released,
        "stale-plan": instance.stale,
        "shared": root.id in instance.spec.shared,
    }
    return frozenset(name for name, holds in facts.items() if holds)


def chunks_of(dock: Dock) -> dict[tuple[str, int], tuple[Region, int, int]]:
    """Region, first byte and size of each chunk of each buffer as it is now."""
    out = {}
    for buft, sizes in dock.sizes.items():
        first = 0
        for chunk, size in enumerate(sizes):
            out[buft, chunk] = (Region("compute", dock.name, buft, dock.generations[buft]), first, size)
            first += size
    return out


def difference(name: str, new: Graph, old: Graph) -> str:
    """The first tensor in which two graphs differ."""
    for a, b in zip(new.tensors, old.tensors, strict=False):
        if replace(a, name="") != replace(b, name="") or (a.buffer is not None and a.name != b.name):
            return f"{name}.{a.name}"
    return name
