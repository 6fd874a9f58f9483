"""What a program really does to memory: one record per act, in the order in which the host issues them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from coordinator.ownership.facts import Access, Extent, Finding
from coordinator.schedule.runs import Run

HOST = "host"
"""The agent that issues everything and computes what is not asynchronous."""

Key = tuple[str, str, str, int]
"""Identity of a logical tensor, whatever memory it lies in: kind, two names, number."""


class Do(StrEnum):
    """Acts."""

    LOAD = "load"  # a resident tensor's first bytes
    SET = "set"
    COPY = "copy"
    NODE = "node"
    READ = "read"
    FREE = "free"
    WAIT = "wait"  # the host, for all that the queue `device` was given
    NOTE = "note"  # touches nothing: carries a problem that no byte shows
    CRASH = "crash"


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of memory: `compute` (a scheduler's buffer), `resident`, `kept` (of its own) or `host`.

    Chunks of a buffer lie one behind the other: what overflows one lands in the next. `generation` counts how often
    the buffer was replaced.
    """

    kind: str
    owner: str
    buft: str = ""
    generation: int = 0

    @property
    def label(self) -> str:
        """In words."""
        if self.kind == "compute":
            return f"{self.buft} compute buffer"
        if self.kind == "resident":
            return f"{self.buft} memory of {self.owner}"
        return f"host memory {self.owner}" if self.kind == "host" else f"memory of its own of {self.owner}"


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor as an act sees it: bytes [start, end) of `region`, and what they should hold.

    `base` is where the tensor that `key` names starts (that of a view is its root's). `wants` are the acts that should
    have written them last. `epoch` is the region's when the act was issued. `traits` are facts that tell hazards
    apart: input, output, view, root-output, released, stale-plan, shared, handle.
    """

    region: Region
    start: int
    end: int
    tensor: str
    key: Key
    base: int = 0
    epoch: int = 0
    wants: tuple[Run, ...] = ()
    traits: frozenset[str] = frozenset()

    @property
    def extent(self) -> Extent:
        """Where it is, for stories."""
        return Extent(self.region.label, self.start, self.end)


@dataclass(frozen=True, slots=True)
class Action:
    """One act. `agent` is the host or the device on whose queue it waits; `after` are acts that it waits for.

    `right` is what a READ should find, `value` what a SET or LOAD fills in, `problem` a hazard that no byte shows.
    """

    number: int
    do: Do
    agent: str
    step: int
    tensor: str = ""
    reads: tuple[Operand, ...] = ()
    writes: tuple[Operand, ...] = ()
    after: tuple[int, ...] = ()
    graph: str = ""
    instance: int = -1
    evaluation: int = 0
    split: int = -1
    node: int = -1
    op: str = ""
    device: str = ""
    params: tuple[int | float, ...] = ()
    value: float = 0.0
    right: float | None = None
    problem: Finding | None = None

    def access(self, operand: Operand | None = None) -> Access:
        """The act as a story tells it."""
        if operand is None and self.writes:
            operand = self.writes[0]
        return Access(
            self.op or str(self.do), self.tensor, self.graph, self.evaluation, self.split, self.node, self.device,
            self.step, 0 if operand is None else operand.epoch, None if operand is None else operand.extent,
        )  # fmt: skip
