"""What is known about a hazard: the facts of its story, without words around them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Ways in which somebody reads or writes memory that is not theirs any more."""

    STALE_READ = "stale-read"
    UNWRITTEN_READ = "unwritten-read"
    LOST_STATE = "lost-state"
    INPUT_ACCUMULATED = "input-accumulated"
    INPUT_CONSUMED = "input-consumed"
    CONFLICTING_PLACES = "conflicting-places"
    OVERWRITTEN_IN_FLIGHT = "overwritten-in-flight"
    FREED_IN_FLIGHT = "freed-in-flight"
    READ_TOO_EARLY = "read-too-early"
    STALE_PLAN = "stale-plan"
    STALE_HANDLE = "stale-handle"
    OVERFLOW = "overflow"
    OVERLAP = "overlap"
    UNPROTECTED_OUTPUT = "unprotected-output"
    INTERMEDIATE_READ = "intermediate-read"
    LOST_WRITE = "lost-write"
    WRONG_COPY = "wrong-copy"
    UNPLACED_INPUT = "unplaced-input"
    CANNOT_RUN = "cannot-run"
    DROPPED_PINS = "dropped-pins"
    NEEDLESS_REALLOC = "needless-realloc"


COSTS = frozenset({Kind.DROPPED_PINS, Kind.NEEDLESS_REALLOC})
"""Kinds that cost time but never an answer."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, end) of a memory: a compute buffer's chunk, a resident tensor, memory of its own, or the host's."""

    memory: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Access:
    """Who touched a tensor: a node of a graph, a copy before a split, or the host (`graph` empty or `node` -1).

    `what` is the act ("MUL_MAT", "copy", "set", "read" ...), `step` counts the acts of the program from 0.
    """

    what: str
    tensor: str
    graph: str
    evaluation: int
    split: int
    node: int
    device: str
    step: int
    epoch: int
    extent: Extent | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One hazard. `latent`: the bytes are intact in this plan, by luck.

    `tensor` is what the reader wants; `writer` wrote it in `extent`, `overwriter` is what lies there instead,
    `reader` is who would read that. `hidden_by` are changes to the program that leave the bytes intact, `shown_by`
    those that do not (computed by planning them); `would_help` are those that protect them.
    """

    kind: Kind
    tensor: str
    why: str
    extent: Extent | None = None
    epoch: int = 0
    epoch_now: int = 0
    writer: Access | None = None
    overwriter: Access | None = None
    reader: Access | None = None
    latent: bool = False
    hidden_by: tuple[str, ...] = ()
    shown_by: tuple[str, ...] = ()
    would_help: tuple[str, ...] = ()

    @property
    def is_cost(self) -> bool:
        """True when answers stay right."""
        return self.kind in COSTS


HELP: dict[Kind, tuple[str, ...]] = {
    Kind.STALE_READ: ("separate schedulers", "--ownership safe", "copying {tensor} into a buffer of its own"),
    Kind.UNWRITTEN_READ: ("a view of the tensor that is meant", "flagging it INPUT and setting it"),
    Kind.LOST_STATE: ("keeping the state with its sequence instead of the call",),
    Kind.INPUT_ACCUMULATED: ("setting {tensor} before each evaluation", "accumulating into a tensor that is no input"),
    Kind.INPUT_CONSUMED: ("setting {tensor} before each evaluation", "flagging {tensor} OUTPUT as well"),
    Kind.CONFLICTING_PLACES: ("a buffer of its own for {tensor}", "a scheduler for each graph"),
    Kind.OVERWRITTEN_IN_FLIGHT: ("waiting for {reader} before the bytes are written again", "--ownership safe"),
    Kind.FREED_IN_FLIGHT: ("synchronising all devices before buffers are replaced", "--ownership safe"),
    Kind.READ_TOO_EARLY: ("synchronising {writer} before reading",),
    Kind.STALE_PLAN: ("planning by identity: a plan's key holds all that it depends on", "--ownership safe"),
    Kind.STALE_HANDLE: ("copying the bytes when the handle is taken", "--ownership safe"),
    Kind.OVERFLOW: ("comparing each chunk's size, not their sum",),
    Kind.OVERLAP: ("an allocator that checks its plan (crossdock plan --check)",),
    Kind.UNPROTECTED_OUTPUT: ("flagging the tensor that {tensor} is a view of OUTPUT", "copying {tensor} (CONT)"),
    Kind.INTERMEDIATE_READ: ("flagging {tensor} OUTPUT", "an eval callback that reads it when it is made"),
    Kind.LOST_WRITE: ("running the op where its result lies", "copying the result back"),
    Kind.WRONG_COPY: ("setting the copy that the plan reads",),
    Kind.UNPLACED_INPUT: ("adding {tensor} to the graph (expand)", "not setting an input that no node uses"),
    Kind.CANNOT_RUN: ("placing {tensor} where a device can run the op",),
    Kind.DROPPED_PINS: ("pinning again before each reservation",),
    Kind.NEEDLESS_REALLOC: ("reserving for both placements before the first evaluation",),
}
"""What would have protected a tensor, by kind."""
