"""Where a simulation is: workers and their queues, evaluations under way, sequences of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from coordinator.simulate.timed import Act, Job, Timed
from coordinator.simulate.timeline import WorkerTotals


class Worker:
    """A queue of evaluations, and where in the first of them the worker is."""

    __slots__ = ("acts", "blocked", "index", "is_async", "is_pooled", "job", "pc", "queue", "since", "totals")

    def __init__(self, index: int, is_async: bool) -> None:
        self.index, self.is_async, self.is_pooled = index, is_async, False
        self.queue: deque[Running] = deque()
        self.job: Running | None = None
        self.acts: tuple[Act, ...] = ()
        self.pc, self.since = 0, 0.0
        self.blocked = -1  # the hop it waits for
        self.totals = WorkerTotals()


class Running:
    """An evaluation under way: the state of its hops, and what is not finished yet."""

    __slots__ = ("hops", "number", "open", "parts", "program", "released", "sequence", "tag", "timed")

    def __init__(
        self, number: int, spec: Job, timed: Timed, sequence: Evaluations, parts: Parts, released: float
    ) -> None:
        self.number, self.timed, self.sequence, self.parts = number, timed, sequence, parts
        self.program, self.tag, self.released = spec.program, spec.tag, released
        self.hops = bytearray(len(timed.hops))
        self.open = len(parts)


Parts = list[tuple[Worker, tuple[Act, ...]]]
"""The workers that take part in a program, and what they do."""


class Evaluations:
    """Evaluations in order, and those of them that are under way."""

    __slots__ = ("jobs", "next", "number", "running")

    def __init__(self, number: int, jobs: Iterator[Job]) -> None:
        self.number, self.jobs = number, jobs
        self.running = 0
        self.next = next(jobs, None)
