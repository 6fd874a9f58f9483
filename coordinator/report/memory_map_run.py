"""The picture of a real run's compute memory: who held which bytes when, by the clock of its workers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Final

from coordinator.ownership.spans import Occupancy, Overwrite, Span, occupancy
from coordinator.report.memory_map import View, check_map, draw
from coordinator.runtime.stopwatch import Evaluation
from coordinator.simulate.work import work_of
from protocol.errors import UsageError
from protocol.program import Kind, OpRecord
from protocol.timing import Times

_FLOPS_PER_BYTE: Final = 10
"""Which part of a split an op takes nobody notes: it is shared out by bytes and FLOPs, so many to a byte."""

_TITLE_WIDTH: Final = 0.007
"""Of the picture, per letter: narrower evaluations have no title."""

_SHOWN: Final = 4
"""Of evaluations of one kind in a row, tokens for example, so many are drawn: the others put the same bytes there."""

_MS: Final = 1e6


def draw_run_map(path: Path, taken: Sequence[Evaluation], *, apart: bool, kept: bool) -> Occupancy:
    """Draw the evaluations of a run; `apart`: the vision graph has a scheduler of its own, `kept`: what outlives its
    graph was copied before it was overwritten.

    Rectangles begin and end with the ops that make and last read a tensor. Workers note when each run of ops of a split
    began and ended; within it the ops share the time. What is between evaluations is cut out. Returns the occupancy in
    ns of that clock. Raises UsageError without matplotlib, for a kind of file that is not written or a run without
    evaluations; InputError when the file cannot be written.
    """
    check_map(path)
    if not taken:
        raise UsageError(f"--memory-map {path}: nothing was evaluated")
    groups = [list(group) for _, group in groupby(taken, key=lambda evaluation: evaluation.title)]
    drawn = [evaluation for group in groups for evaluation in group[:_SHOWN]]
    plans = [evaluation.lowered.plan for evaluation in drawn]
    schedulers = [int(apart and evaluation.name != "vision") for evaluation in drawn]
    found = _Clock(drawn).timed(occupancy(plans, schedulers))
    lost = "red: overwritten though a later graph reads it" + (" (there is a copy: safe ownership)" if kept else "")
    label = "milliseconds, without what is between evaluations"
    draw(path, found, plans, View(tuple(_titles(groups, found.starts, taken[0].start_ns)), label, _MS, lost))
    return found


class _Clock:
    """Nodes of all evaluations, each of which begins when the one before it ends, in ns."""

    def __init__(self, taken: Sequence[Evaluation]) -> None:
        self.starts = [0]
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.spans: list[tuple[int, int]] = []
        for evaluation in taken:
            start = self.spans[-1][1] if self.spans else 0
            self.spans.append((start, start + evaluation.end_ns - evaluation.start_ns))
            begins, ends = _node_times(evaluation, evaluation.start_ns - start)
            self.begins += begins
            self.ends += ends
            self.starts.append(len(self.begins))

    def timed(self, found: Occupancy) -> Occupancy:
        """The same occupancy by the clock."""
        spans = sorted((self._span(span) for span in found.spans), key=lambda span: span.birth)
        return Occupancy(
            tuple(spans),
            tuple(self._overwrite(loss) for loss in found.overwrites),
            (*(start for start, _ in self.spans), self.spans[-1][1]),
            tuple(self.begins[node] for node in found.splits),
            found.sizes,
        )

    def _span(self, span: Span) -> Span:
        """What is there from the beginning, or to the end, is there as long as the evaluation lasts."""
        first, last = self.starts[span.graph], self.starts[span.graph + 1]
        start, end = self.spans[span.graph]
        birth = start if span.birth == first else self.begins[span.birth]
        death = end if span.death >= last else self.ends[span.death - 1]
        return replace(span, birth=birth, death=max(death, birth + 1))

    def _overwrite(self, loss: Overwrite) -> Overwrite:
        graph = bisect_right(self.starts, loss.at) - 1
        at = self.spans[graph][0] if loss.at == self.starts[graph] else self.begins[loss.at]
        return replace(loss, at=at, until=max(at + 1, self.ends[loss.until - 1]))


def _node_times(evaluation: Evaluation, zero: int) -> tuple[list[int], list[int]]:
    """When each node began and ended, since `zero`; what no worker computes, such as views, takes no time behind the
    node before."""
    n = len(evaluation.lowered.plan.graph.nodes)
    begins, ends = [-1] * n, [-1] * n
    for worker, rows in evaluation.times.items():
        program = evaluation.lowered.programs[worker]
        for item, row in zip(program.instructions, rows, strict=False):
            if item.kind is Kind.RUN:
                for op, begin, end in shared(program.ops[item.first : item.last], row):
                    begins[op.node], ends[op.node] = begin - zero, end - zero
    for node in range(n):
        if begins[node] < 0:
            begins[node] = ends[node] = ends[node - 1] if node else evaluation.start_ns - zero
    return begins, ends


def shared(ops: Sequence[OpRecord], row: Times) -> Iterator[tuple[OpRecord, int, int]]:
    """The time of a run of ops by what each of them has to do."""
    works = [work_of(op) for op in ops]
    weights = [1 + w.weight_nbytes + w.read_nbytes + w.write_nbytes + w.flops // _FLOPS_PER_BYTE for w in works]
    total, done = sum(weights), 0
    length = row.end_ns - row.start_ns
    for op, weight in zip(ops, weights, strict=True):
        begin = row.start_ns + length * done // total
        done += weight
        yield op, begin, row.start_ns + length * done // total


def _titles(groups: Sequence[Sequence[Evaluation]], starts: Sequence[int], zero: int) -> Iterator[tuple[str, int, int]]:
    """`vision, at 0.0 ms`, `4 of 11 x token, at 13.1 ms`: evaluations of one kind in a row have one title."""
    number = 0
    for group in groups:
        shown = min(len(group), _SHOWN)
        many = "" if len(group) == 1 else f"{shown} of {len(group)} x " if shown < len(group) else f"{shown} x "
        text = f"{many}{group[0].title}, at {(group[0].start_ns - zero) / _MS:.1f} ms"
        start, end = starts[number], starts[number + shown]
        if end - start >= _TITLE_WIDTH * len(text) * starts[-1]:
            yield text, start, end
        number += shown
