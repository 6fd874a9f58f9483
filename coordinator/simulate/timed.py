"""A lowered plan with durations: what each worker does for how long, and what travels."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Do(IntEnum):
    """What a worker does: the instructions of a program, and results that go back to the coordinator."""

    RUN = 0
    COPY = 1
    SEND = 2
    RECV = 3
    WAIT = 4
    OUT = 5  # hand an output to the coordinator, which is always ready to take it


class Act(NamedTuple):
    """One instruction: `seconds` of RUN and COPY, `hop` of the others."""

    do: int
    seconds: float
    hop: int
    split: int


class Hop(NamedTuple):
    """One transfer; `extra_s` is added to its way (an RPC server's fixed cost), and its link is `slower` for it by this
    factor (pageable memory)."""

    source: int
    target: int
    nbytes: int
    split: int
    name: str
    route: int
    extra_s: float = 0.0
    slower: float = 1.0


class Timed(NamedTuple):
    """The timed programs of one evaluation by worker. `buffered`: every evaluation has slots of its own to receive
    into (n_copies > 1), so bytes may arrive before their receiver is there."""

    name: str
    workers: tuple[tuple[Act, ...], ...]
    hops: tuple[Hop, ...]
    buffered: bool = False


class Job(NamedTuple):
    """One evaluation of a sequence: program number `program`, released `gap_s` after all but the last `window` - 1 jobs
    before it are complete (1: after all of them)."""

    program: int
    window: int = 1
    gap_s: float = 0.0
    tag: str = ""
