"""A real run as a trace, and beside it the same run by its virtual clock: equal names of tracks and slices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from coordinator.report.plan_why import because
from coordinator.report.trace import Arrow, Counter, Slice, Trace, Track
from coordinator.runtime.stopwatch import Evaluation
from coordinator.schedule.lower import Transfer
from coordinator.simulate.live import live_bytes
from protocol.program import Instruction, Kind
from protocol.timing import PS, Times

Args = dict[str, str | int | float]


def run_trace(names: Sequence[str], taken: Sequence[Evaluation]) -> Trace:
    """Everything that the workers (by `names`) did; with a virtual clock a second time, in groups "simulated ..."."""
    trace = _Clock(names, taken, virtual=False).trace()
    return trace + _Clock(names, taken, virtual=True).trace() if any(e.costs for e in taken) else trace


class _Clock:
    """One conversion, by one of the clocks."""

    def __init__(self, names: Sequence[str], taken: Sequence[Evaluation], *, virtual: bool) -> None:
        self.names, self.taken, self.virtual = names, taken, virtual
        self.prefix = "simulated " if virtual else ""
        self.devices = [Track(f"{self.prefix}devices", name) for name in names]
        self.zero_ns = taken[0].start_ns if taken else 0
        self.slices: list[Slice] = []
        self.arrows: list[Arrow] = []
        self.counters: list[Counter] = []
        self.live = cache(lambda number: live_bytes(self.taken[number].lowered.plan))
        self.why = cache(lambda number, split: because(self.taken[number].lowered.plan, split))

    def trace(self) -> Trace:
        """Requests first, then devices, then links."""
        request = Track(f"{self.prefix}requests", "request 0")
        for number, evaluation in enumerate(self.taken):
            start, end = self._span(evaluation)
            self._add(request, evaluation.title, start, end, {"evaluation": number}, evaluation.name)
        sent: list[dict[int, tuple[float, float]]] = [{} for _ in self.taken]
        for number, evaluation in enumerate(self.taken):
            for worker, rows in sorted(evaluation.times.items()):
                sent[number] |= self._worker(number, worker, rows)
        for number, evaluation in enumerate(self.taken):
            for worker, rows in sorted(evaluation.times.items()):
                self._received(number, worker, rows, sent[number])
        return Trace(tuple(self.slices), tuple(self.arrows), tuple(self.counters))

    def _span(self, evaluation: Evaluation) -> tuple[float, float]:
        if self.virtual:
            return evaluation.start_ps / PS, (evaluation.start_ps + evaluation.virtual_ps) / PS
        return (evaluation.start_ns - self.zero_ns) / 1e9, (evaluation.end_ns - self.zero_ns) / 1e9

    def _times(self, evaluation: Evaluation, row: Times) -> tuple[float, float]:
        if self.virtual:
            return (evaluation.start_ps + row.start_ps) / PS, (evaluation.start_ps + row.end_ps) / PS
        return (row.start_ns - self.zero_ns) / 1e9, (row.end_ns - self.zero_ns) / 1e9

    def _worker(self, number: int, worker: int, rows: Sequence[Times]) -> dict[int, tuple[float, float]]:
        """What a worker did but for receiving; from when to when it sent each transfer."""
        evaluation, sent = self.taken[number], dict[int, tuple[float, float]]()
        instructions = evaluation.lowered.programs[worker].instructions
        for item, row in zip(instructions, rows, strict=False):
            start, end = self._times(evaluation, row)
            if item.kind is Kind.SEND:
                sent[item.transfer] = start, end
            if item.kind is Kind.RECV or (self.virtual and end == start):
                continue
            name, args, category = self._told(number, worker, item)
            self._add(self.devices[worker], name, start, end, args, category)
            if item.kind is Kind.RUN and item.split < len(evaluation.lowered.plan.splits):
                track = Track(f"{self.prefix}devices", f"{self.names[worker]} arena")
                live = self.live(number)[item.split]
                self.counters += [Counter(track, start, live, "bytes"), Counter(track, end, 0, "bytes")]
        return sent

    def _told(self, number: int, worker: int, item: Instruction) -> tuple[str, Args, str]:
        """Name, facts and category of an instruction that receives nothing."""
        evaluation = self.taken[number]
        plan, args = evaluation.lowered.plan, Args({"graph": evaluation.name})
        if item.kind in (Kind.RUN, Kind.COPY):
            name = f"split {item.split}" if item.split < len(plan.splits) else "evaluation"
            if item.split < len(plan.splits) and plan.splits[item.split].backend == worker:
                split = plan.splits[item.split]
                nbytes = sum(plan.graph.tensors[ident].nbytes for ident in split.inputs)
                args |= {"nodes": split.end - split.start, "bytes in": nbytes, "cause": self.why(number, item.split)}
            if item.kind is Kind.RUN:
                return name, args, "run"
            args |= {"tensor": plan.graph.tensors[item.first].name, "bytes": item.nbytes}
            return f"{name}: copy", args, "run"
        if item.kind is Kind.TAP:
            return f"look at {plan.graph.tensors[item.first].name}", args | {"bytes": item.nbytes}, "tap"
        transfer = evaluation.lowered.transfers[item.transfer]
        args |= {"bytes": transfer.nbytes, "split": transfer.split}
        waits = item.kind is Kind.WAIT
        return f"{'lends' if waits else 'send'} {transfer.name}", args, "wait" if waits or self.virtual else "copy"

    def _received(self, number: int, worker: int, rows: Sequence[Times], sent: dict[int, tuple[float, float]]) -> None:
        """What a worker received: waits, the copies on their links, and arrows between them."""
        evaluation = self.taken[number]
        for place, item in enumerate(evaluation.lowered.programs[worker].instructions):
            if item.kind is not Kind.RECV or place >= len(rows):
                continue
            transfer = evaluation.lowered.transfers[item.transfer]
            start, end = self._times(evaluation, rows[place])
            args: Args = {"graph": evaluation.name, "bytes": transfer.nbytes, "split": transfer.split}
            left, right = self._carried(evaluation, worker, place, rows[place], sent.get(item.transfer))
            stop = end if self.virtual else min(left, end)
            self._add(self.devices[worker], f"wait for {transfer.name}", start, stop, args, "wait")
            if not self.virtual:
                self._add(self.devices[worker], f"receive {transfer.name}", stop, end, args, "copy")
            link = Track(f"{self.prefix}links", f"{self.names[transfer.source]} -> {self.names[transfer.target]}")
            self._add(link, transfer.name, left, right, args, "copy")
            self._arrow(transfer, link, sent.get(item.transfer), (left, right), (start, end))

    def _carried(
        self, evaluation: Evaluation, worker: int, place: int, row: Times, sent: tuple[float, float] | None
    ) -> tuple[float, float]:
        """From when to when the link was busy: really, from when both sides were there until the copy was made."""
        if self.virtual:
            left = evaluation.start_ps + row.left_ps
            return (left - evaluation.costs[worker][place + 1].busy) / PS, left / PS
        start, end = self._times(evaluation, row)
        return min(end, max(start, sent[0] if sent is not None else start)), end

    def _arrow(
        self,
        transfer: Transfer,
        link: Track,
        sent: tuple[float, float] | None,
        carried: tuple[float, float],
        received: tuple[float, float],
    ) -> None:
        """From the sender's slice over the link's to the receiver's; where one took no time it has none.

        By the virtual clock a receiver waits until everything is there, so the arrow goes to what it does then: viewers
        turn an arrow round that goes to a slice which began earlier.
        """
        points: list[tuple[Track, float]] = []
        if sent is not None and sent[1] > sent[0]:
            points.append((self.devices[transfer.source], sent[0]))
        points.append((link, (carried[0] + carried[1]) / 2))
        if self.virtual:
            points.append((self.devices[transfer.target], received[1]))
        elif received[1] > received[0]:
            points.append((self.devices[transfer.target], (max(carried[0], received[0]) + received[1]) / 2))
        if len(points) > 1 and carried[1] > carried[0]:
            self.arrows.append(Arrow(transfer.name, tuple(points)))

    def _add(self, track: Track, name: str, start: float, end: float, args: Args, category: str) -> None:
        if end > start:
            self.slices.append(Slice(track, name, start, end - start, args, category))
