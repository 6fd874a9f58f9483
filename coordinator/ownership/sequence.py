"""A host program: graphs, and what the host does with them on one or several schedulers, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.graph.node import Graph
from coordinator.schedule.plan import Device

MAIN = "main"
"""The scheduler where none is named."""

QUIRKS = {
    "no-split-wait": "a split without inputs does not wait for the split before it (as before the fix of 2026)",
    "reserve-in-flight": "reserve replaces buffers without synchronising",
    "grow-by-total": "a buffer is replaced only when the sum of its chunks grows",
    "reserve-drops-pins": "reserve forgets the pins of its graph",
}
"""Historic behaviour that a program can ask for, by name."""


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """A graph and what a plain graph does not say.

    `borrows`: leafs whose memory is a tensor of another graph (`graph.tensor`). `shared`: tensors that are one object
    with a tensor of another graph, planned with each. `values` are the first contents of resident tensors. `places`
    overrides planned offsets (bytes), as a faulty allocator gave them.
    """

    graph: Graph
    borrows: Mapping[int, str] = field(default_factory=dict)
    shared: Mapping[int, str] = field(default_factory=dict)
    values: Mapping[int, float] = field(default_factory=dict)
    places: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One act of the host; which fields mean something depends on `do`.

    allocate graph [on] [reuse] [state otherwise] | reserve graph [on] | set tensor value [copy] | host tensor value
    | upload tensor source (asynchronously) | copy source tensor | compute graph [asynchronous] | read tensor [right]
    | pointer tensor name | keep tensor | sync [device] | state name value [lives] | end_call
    """

    do: str
    graph: str = ""
    tensor: str = ""
    on: str = MAIN
    source: str = ""
    name: str = ""
    value: float = 0.0
    right: float | None = None
    copy: int | None = None
    reuse: str = ""
    state: str = ""
    otherwise: str = ""
    lives: str = "sequence"
    device: str = ""
    asynchronous: bool = False


@dataclass(frozen=True, slots=True)
class Sequence:
    """Devices, graphs by name, and the steps. `queues` are the devices that compute asynchronously."""

    devices: tuple[Device, ...]
    graphs: Mapping[str, GraphSpec]
    steps: tuple[Step, ...]
    queues: frozenset[str] = frozenset()
    quirks: frozenset[str] = frozenset()
    parallel: bool = False
    op_offload: bool = False
