"""A simulated run as a trace: requests, devices and links, arrows for copies, counters for memory and queues."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cache

from coordinator.report.plan_why import because
from coordinator.report.trace import Arrow, Counter, Slice, Trace, Track
from coordinator.simulate import timeline as tl
from coordinator.simulate.live import live_bytes
from coordinator.simulate.predict import Prediction
from coordinator.simulate.timed import Do

_VERBS = {Do.SEND: "send", Do.RECV: "wait for", Do.WAIT: "lends"}


def simulated_trace(found: Prediction) -> Trace:
    """Everything that happened; times are virtual."""
    shown = _Shown(found)
    slices = (*shown.evaluations(), *shown.workers(), *shown.links())
    return Trace(slices, tuple(shown.arrows()), (*shown.queues(), *shown.memory()))


class _Shown:
    """One conversion: names and tracks of what a timeline knows by number."""

    def __init__(self, found: Prediction) -> None:
        self.timeline, self.series = found.timeline, found.series
        self.routes = found.series.machine.fabric.routes
        self.devices = [Track("devices", name) for name in found.series.machine.names]
        names = found.series.machine.names
        pairs = {number: pair for pair, number in found.series.machine.fabric.index.items()}
        wires = (f"{names[a]} -> {names[b]}" for a, b in (pairs[k] for k in range(len(self.routes))))
        self.wires = [Track("links", name) for name in wires]  # as in traces of real runs
        self.why = cache(lambda program, split: because(self.series.lowered[program].plan, split))
        self.live = [live_bytes(lowered.plan) for lowered in self.series.lowered]

    def program(self, job: int) -> int:
        return self.timeline.jobs[job].program

    def evaluations(self) -> Iterator[Slice]:
        """A track per request; evaluations that overlap in a pipeline get tracks of their own."""
        free: dict[int, list[float]] = {}
        for number, job in enumerate(self.timeline.jobs):
            lanes = free.setdefault(job.sequence, [])
            lane = next((k for k, end in enumerate(lanes) if end <= job.released), len(lanes))
            lanes[lane : lane + 1] = [job.end]
            name = f"request {job.sequence}" + (f", {lane + 1}" if lane else "")
            program = self.timeline.programs[job.program]
            yield Slice(Track("requests", name), program.name, job.released, job.end - job.released,
                        {"evaluation": number}, job.tag)  # fmt: skip

    def workers(self) -> Iterator[Slice]:
        """What each device did, and what it waited for."""
        for piece in self.timeline.slices:
            program = self.program(piece.job)
            plan, timed = self.series.lowered[program].plan, self.timeline.programs[program]
            if piece.do in (Do.RUN, Do.COPY):
                yield self._ran(piece, program)
                continue
            hop = timed.hops[piece.hop]
            args: dict[str, str | int | float] = {
                "graph": timed.name, "bytes": hop.nbytes, "split": hop.split, "link": self.routes[hop.route].name,
            }  # fmt: skip
            yield Slice(self.devices[piece.worker], f"{_VERBS[Do(piece.do)]} {hop.name or plan.graph.name}",
                        piece.start, piece.end - piece.start, args, "wait")  # fmt: skip

    def _ran(self, piece: tl.Slice, program: int) -> Slice:
        plan, timed = self.series.lowered[program].plan, self.timeline.programs[program]
        args: dict[str, str | int | float] = {"graph": timed.name}
        name = "copy" if piece.do == Do.COPY else "evaluation"
        if piece.split < len(plan.splits) and plan.splits[piece.split].backend == piece.worker:
            split = plan.splits[piece.split]
            name = f"split {piece.split}" + (": copy" if piece.do == Do.COPY else "")
            args |= {
                "nodes": split.end - split.start,
                "bytes in": sum(plan.graph.tensors[ident].nbytes for ident in split.inputs),
                "cause": self.why(program, piece.split),
            }
        return Slice(self.devices[piece.worker], name, piece.start, piece.end - piece.start, args, "run")

    def links(self) -> Iterator[Slice]:
        """What each link carried, from the first byte to the last."""
        for carried in self.timeline.carried:
            timed = self.timeline.programs[self.program(carried.job)]
            hop = timed.hops[carried.hop]
            seconds = carried.left - carried.start
            args: dict[str, str | int | float] = {
                "graph": timed.name, "bytes": hop.nbytes, "split": hop.split,
                "link": self.routes[hop.route].name,
                "queued us": _us(carried.start - carried.ready), "latency us": _us(carried.arrived - carried.left),
            }  # fmt: skip
            yield Slice(self.wires[carried.route], hop.name or "copy", carried.start, seconds, args, "copy")

    def arrows(self) -> Iterator[Arrow]:
        """From the device that sends, over the link, to the one that receives."""
        of_worker: dict[int, list[tl.Slice]] = {}
        for piece in self.timeline.slices:
            of_worker.setdefault(piece.worker, []).append(piece)
        places = {worker: [piece.start for piece in pieces] for worker, pieces in of_worker.items()}
        for carried in self.timeline.carried:
            hop = self.timeline.programs[self.program(carried.job)].hops[carried.hop]
            points = []
            before = _at(of_worker.get(hop.source, []), places.get(hop.source, []), carried.ready, earlier=True)
            if before is not None:
                points.append((self.devices[hop.source], before))
            points.append((self.wires[carried.route], (carried.start + carried.left) / 2))
            after = _at(of_worker.get(hop.target, []), places.get(hop.target, []), carried.arrived, earlier=False)
            if after is not None:
                points.append((self.devices[hop.target], after))
            if len(points) > 1:
                yield Arrow(hop.name or "copy", tuple(points))

    def queues(self) -> Iterator[Counter]:
        """Evaluations that each device has been given and has not finished."""
        for depth in self.timeline.depths:
            name = f"{self.series.machine.names[depth.worker]} queue"
            yield Counter(Track("devices", name), depth.time, depth.depth, "depth")

    def memory(self) -> Iterator[Counter]:
        """Bytes of its compute arena that hold something still to be read, as each split begins; 0 between."""
        for piece in self.timeline.slices:
            live = self.live[self.program(piece.job)]
            splits = self.series.lowered[self.program(piece.job)].plan.splits
            if piece.do == Do.RUN and piece.split < len(live) and splits[piece.split].backend == piece.worker:
                track = Track("devices", f"{self.series.machine.names[piece.worker]} arena")
                yield Counter(track, piece.start, live[piece.split], "bytes")
                yield Counter(track, piece.end, 0, "bytes")


def _at(pieces: list[tl.Slice], starts: list[float], time: float, *, earlier: bool) -> float | None:
    """A time within the last slice that began before `time`, or within the first one that ends after it."""
    number = bisect_left(starts, time)
    if earlier:
        return (pieces[number - 1].start + min(time, pieces[number - 1].end)) / 2 if number else None
    while number < len(pieces) and pieces[number].end <= time:
        number += 1
    return (max(time, pieces[number].start) + pieces[number].end) / 2 if number < len(pieces) else None


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
