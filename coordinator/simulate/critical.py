"""The critical path: from the end of a simulation back to its start, what each moment was spent on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from coordinator.simulate.timed import Do
from coordinator.simulate.timeline import Carried, Slice, Timeline

_EPS = 1e-12


class Part(NamedTuple):
    """A stretch of the path. `kind`: `compute` (of worker `where`), `bytes` (on route `where`), `latency` (of it),
    `fixed` (its cost per evaluation), `queue` (behind other transfers on it), or `host` (between evaluations)."""

    tag: str
    kind: str
    where: int
    split: int
    name: str
    seconds: float


def critical_path(timeline: Timeline) -> list[Part]:
    """The parts of the path in order of time; their seconds add up to the timeline's end. It must be recorded."""
    return _Walk(timeline).run()


def totals(parts: Iterable[Part], tags: Iterable[str] | None = None) -> dict[tuple[str, int], dict[int, float]]:
    """Seconds by (kind, where) and split, of the evaluations with these tags (None: all)."""
    wanted = None if tags is None else set(tags)
    found: dict[tuple[str, int], dict[int, float]] = {}
    for part in parts:
        if wanted is None or part.tag in wanted:
            splits = found.setdefault((part.kind, part.where), {})
            splits[part.split] = splits.get(part.split, 0.0) + part.seconds
    return found


class _Walk:
    """Where the walk is: a worker at a time, on behalf of an evaluation; or the end of an evaluation."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.of_worker: list[list[Slice]] = [[] for _ in timeline.workers]
        for piece in timeline.slices:
            self.of_worker[piece.worker].append(piece)
        self.ends = [[piece.end for piece in pieces] for pieces in self.of_worker]
        self.seen = [len(pieces) for pieces in self.of_worker]
        self.carried = {(c.job, c.hop): c for c in timeline.carried}
        self.results: dict[int, Carried] = {}
        self.last_slice: dict[int, Slice] = {}
        for c in timeline.carried:
            if timeline.programs[timeline.jobs[c.job].program].hops[c.hop].target < 0:
                before = self.results.get(c.job)
                self.results[c.job] = c if before is None or c.arrived > before.arrived else before
        for piece in timeline.slices:
            known = self.last_slice.get(piece.job)
            if known is None or piece.end >= known.end:
                self.last_slice[piece.job] = piece
        self.parts: list[Part] = []

    def run(self) -> list[Part]:
        jobs = self.timeline.jobs
        job = max(range(len(jobs)), key=lambda number: (jobs[number].end, number), default=-1)
        while job >= 0:
            job = self._evaluation(job)
        return self.parts[::-1]

    def _evaluation(self, job: int) -> int:
        """Walk back to the start of an evaluation; returns the one whose end released it, -1 at the beginning."""
        ran = self.timeline.jobs[job]
        result, piece = self.results.get(job), self.last_slice.get(job)
        if result is not None and result.arrived >= ran.end - _EPS:
            worker, time = self._wire(result, result.arrived)
        elif piece is not None:
            worker, time = piece.worker, ran.end
        else:
            worker, time = -1, ran.released
        while worker >= 0 and (found := self._before(worker, time)) is not None:
            job, worker, time = found
        ran = self.timeline.jobs[job]
        before = self.timeline.jobs[ran.cause].end if ran.cause >= 0 else 0.0
        self._add(job, "host", -1, 0, "", ran.released - before)
        return ran.cause

    def _before(self, worker: int, time: float) -> tuple[int, int, float] | None:
        """What the worker did until `time`: (evaluation, worker, time) to go on with; None when it did nothing, since
        its evaluation was only released then."""
        number = bisect_right(self.ends[worker], time + _EPS, hi=self.seen[worker]) - 1
        if number < 0 or self.ends[worker][number] < time - _EPS:
            return None
        self.seen[worker] = number  # the path never goes through a slice twice, however short
        piece = self.of_worker[worker][number]
        if piece.do in (Do.RUN, Do.COPY):
            self._add(piece.job, "compute", worker, piece.split, "", time - piece.start)
            return piece.job, worker, piece.start
        carried = self.carried[piece.job, piece.hop]
        return (piece.job, *self._wire(carried, time))

    def _wire(self, carried: Carried, time: float) -> tuple[int, float]:
        """Waiting for a transfer until `time`, when it had arrived or left; then who made it ready, and when."""
        program = self.timeline.programs[self.timeline.jobs[carried.job].program]
        hop = program.hops[carried.hop]
        left = min(time, carried.left)
        fixed = min(hop.extra_s, time - left)
        for kind, seconds in (
            ("fixed", fixed), ("latency", time - left - fixed), ("bytes", left - carried.start),
            ("queue", carried.start - carried.ready),
        ):  # fmt: skip
            self._add(carried.job, kind, carried.route, hop.split, hop.name, seconds)
        return carried.last, carried.ready

    def _add(self, job: int, kind: str, where: int, split: int, name: str, seconds: float) -> None:
        if seconds > 0.0:
            self.parts.append(Part(self.timeline.jobs[job].tag, kind, where, split, name, seconds))
