"""Graph evaluations: plan, lower, ship once; then one message per worker and step."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.graph.node import Graph
from coordinator.ownership.expect import WorkerExpectations, expect
from coordinator.ownership.violation import OwnershipError, tell
from coordinator.runtime.awaited import Violation
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.inputs import Array
from coordinator.runtime.memory import Memory
from coordinator.runtime.quirks import unwritten
from coordinator.runtime.stopwatch import Evaluation, Stopwatch
from coordinator.runtime.taps import Patterns, Tap, Watched, compile_patterns, watch
from coordinator.schedule.lower import Keep, Lowered, lower
from coordinator.schedule.plan import Plan
from coordinator.schedule.scheduler import Scheduler
from protocol import messages as m
from protocol.doorbell import Patience
from protocol.errors import ProtocolError
from protocol.mailbox import StepRecord
from protocol.program import NOWHERE, Kind, pack_instructions, pack_ops
from protocol.timing import Cost, Times, pack_costs, unpack_times
from protocol.wire import Envelope

MAX_KEPT = 64
"""Programs kept per session; the one that was not used for longest goes first."""

_PLACES_NBYTES = 1 << 16
"""Bytes of inputs that are written in place: more than a token's."""


@dataclass(frozen=True, slots=True)
class Shipped:
    """A program that every worker of `workers` holds, in the order in which they take their turns."""

    number: int
    name: str
    scheduler: int
    lowered: Lowered
    workers: tuple[int, ...]
    awaited: tuple[int, ...]  # the same, in the order in which they are probably through
    expectations: tuple[WorkerExpectations, ...] = ()  # of each worker, in strict ownership
    watched: Watched | None = None  # when tensors are looked at
    costs: Sequence[Sequence[Cost]] = ()  # of each worker's instructions, with a virtual clock
    patience: Patience = field(default_factory=Patience)  # how long its answers are polled for

    @property
    def plan(self) -> Plan:
        """The plan it was lowered from."""
        return self.lowered.plan


@dataclass(frozen=True, slots=True)
class Places:
    """Inputs of a program's steps that are written where they are sent from: `inputs` by tensor name, all of them."""

    records: Mapping[int, StepRecord]  # by worker
    inputs: Mapping[str, memoryview]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outputs by tensor name (raw bytes), digests by tensor name, what it took, and taps in the plan's order."""

    outputs: dict[str, memoryview]
    digests: dict[str, str]
    wall_ns: int
    done: dict[int, m.Done]
    taps: tuple[Tap, ...] = ()
    virtual_ps: int = 0  # by the virtual clock, when there is one


class Evaluator:
    """Plans graphs on numbered schedulers, keeps shipped programs, and runs them. Lives as long as the run."""

    def __init__(
        self,
        fleet: Fleet,
        memory: Memory,
        schedulers: Sequence[Scheduler],
        *,
        overlaps: bool = False,
        taps: Patterns | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.fleet, self.memory, self.schedulers = fleet, memory, tuple(schedulers)
        self.overlaps = overlaps  # results may lie on bytes that are still read: plans of ggml's that are wrong
        self.taps = compile_patterns(()) if taps is None else taps
        self.stopwatch = stopwatch  # when times are taken
        self.evaluations: Counter[str] = Counter()  # by graph
        self.programs: dict[Hashable, Shipped] = {}
        self.history: list[tuple[int, Shipped]] = []  # first step of each run of steps of one program, when strict

    def program(
        self,
        key: Hashable,
        scheduler: int,
        build: Callable[[], Graph],
        *,
        outputs: Sequence[str] = (),
        digests: Sequence[str] = (),
        keeps: Sequence[Keep] = (),
        takes: Mapping[str, int] | None = None,
    ) -> Shipped:
        """The program under `key`, planned and shipped when it is not there yet.

        `key` must hold everything that the graph depends on: its shapes, options and what it reads. `takes` are slots
        for tensors that other graphs read where this one leaves them (strict ownership remembers whose they are).
        """
        key = (key, self.taps.texts)
        known = self.programs.pop(key, None)
        if known is not None:
            self.programs[key] = known  # the latest last
            return known
        if len(self.programs) >= MAX_KEPT:
            self._forget([next(iter(self.programs))])
        plan = self.schedulers[scheduler].allocate(build())
        if not self.overlaps:
            found = unwritten(plan.graph, plan.sources)
            if found is not None:
                raise OwnershipError(found)
        if self.memory.fit_compute(scheduler, plan.buffer_sizes):
            self.drop(scheduler)
        homes = self.memory.homes(scheduler)
        wanted = self.taps if self.taps.texts else None
        lowered = lower(plan, homes, outputs=outputs, digests=digests, keeps=keeps, taps=wanted)
        watched = watch(lowered, self.taps) if lowered.taps else None
        expectations = expect(lowered, homes, takes or {}) if self.memory.shadows else ()
        shipped = self.ship(plan.graph.name, scheduler, lowered, expectations, watched)
        self.programs[key] = shipped
        return shipped

    def drop(self, scheduler: int | None = None) -> None:
        """Forget the programs of a scheduler, whose arenas were replaced, or all of them."""
        self._forget([k for k, shipped in self.programs.items() if scheduler in (None, shipped.scheduler)])

    def _forget(self, keys: Sequence[Hashable]) -> None:
        for key in keys:
            shipped = self.programs.pop(key)
            for worker in shipped.workers:
                self.fleet.send(worker, m.Forget((shipped.number,)))

    def ship(
        self,
        name: str,
        scheduler: int,
        lowered: Lowered,
        expectations: tuple[WorkerExpectations, ...],
        watched: Watched | None,
    ) -> Shipped:
        """Send a program to the workers that have a part in it."""
        number = next(self.fleet.program_numbers)
        costs = self.stopwatch.costs(lowered) if self.stopwatch is not None else []
        workers = []
        for worker, program in enumerate(lowered.programs):
            if not program.instructions and not program.outputs and not program.digests:
                continue
            received = {(i.peer, i.src[0]) for i in program.instructions if i.kind is Kind.RECV and i.src[0] != NOWHERE}
            message = m.ProgramMessage(
                number,
                name,
                len(lowered.transfers),
                program.inputs,
                program.outputs,
                program.digests,
                tuple(self.memory.peer_arena(*pair) for pair in sorted(received)),
                self.overlaps,
                "" if self.stopwatch is None else self.stopwatch.timing,
            )
            tables = [pack_ops(program.ops).tobytes(), pack_instructions(program.instructions).tobytes()]
            if expectations:
                tables.append(expectations[worker].table.tobytes())
            if costs:
                tables.append(pack_costs(costs[worker]).tobytes())
            self.fleet.send(worker, message, tables)
            workers.append(worker)
        self.fleet.doing = f"the {name} graph"
        self.fleet.gather(workers)
        return Shipped(number, name, scheduler, lowered, *_orders(lowered, workers), expectations, watched, costs)

    def places(self, shipped: Shipped) -> Places | None:
        """Where to write the inputs of a small program's steps in place. None for one with more than a few pages."""
        records = {}
        for worker in shipped.workers:
            sizes = [port.nbytes for port in shipped.lowered.programs[worker].inputs]
            if sum(sizes) > _PLACES_NBYTES:
                return None
            records[worker] = StepRecord(shipped.number, sizes)
        return Places(
            records,
            {
                port.name: place
                for worker, record in records.items()
                for port, place in zip(shipped.lowered.programs[worker].inputs, record.inputs, strict=True)
            },
        )

    def run(self, shipped: Shipped, inputs: Mapping[str, Array] | Places) -> StepResult:
        """One evaluation. Inputs that are not given (unused debug tensors) stay as they are."""
        start = time.monotonic_ns()
        step = next(self.fleet.step_numbers)
        self.fleet.doing = f"the {shipped.name} graph"
        if shipped.expectations and (not self.history or self.history[-1][1] is not shipped):
            self.history.append((step, shipped))
        try:
            answers = self._step(shipped, step, inputs)
        except Violation as violation:
            raise OwnershipError(tell(violation.report, violation.worker, self._program_at)) from None
        outputs: dict[str, memoryview] = {}
        digests: dict[str, str] = {}
        done: dict[int, m.Done] = {}
        tapped: dict[int, memoryview] = {}
        times: dict[int, list[Times]] = {}
        for worker, envelope in answers.items():
            message, buffers = envelope.message, envelope.buffers
            assert isinstance(message, m.Done)
            if message.step != step or message.program != shipped.number:
                name = self.fleet.topology.names[worker]
                raise ProtocolError(f"{name}: expected the end of step {step}, got that of step {message.step}")
            done[worker] = message
            if not buffers and not message.digests:
                continue
            program = shipped.lowered.programs[worker]
            n_outputs = len(program.outputs)
            for port, data in zip(program.outputs, buffers[:n_outputs], strict=True):
                outputs[port.name] = data
            others = list(buffers[n_outputs:])
            if self.stopwatch is not None:
                times[worker] = unpack_times(others.pop())
            for data in others:
                tapped[worker] = data
            digests |= {port.name: text for port, text in zip(program.digests, message.digests, strict=True)}
        wall_ns = time.monotonic_ns() - start
        self.evaluations[shipped.name] += 1
        taps: tuple[Tap, ...] = ()
        if shipped.watched is not None:
            taps = tuple(shipped.watched.taps(shipped.name, self.evaluations[shipped.name], step, tapped))
        virtual_ps = 0
        if self.stopwatch is not None:
            virtual_ps = self.stopwatch.took(
                Evaluation(
                    shipped.name, shipped.lowered, start, start + wall_ns, self.stopwatch.now_ps, times, shipped.costs
                )
            )
        return StepResult(outputs, digests, wall_ns, done, taps, virtual_ps)

    def _step(self, shipped: Shipped, step: int, inputs: Mapping[str, Array] | Places) -> Mapping[int, Envelope]:
        """Every worker's answer to one step."""
        fleet = self.fleet
        with fleet.whole():
            for worker in shipped.workers:
                if isinstance(inputs, Places):
                    record = inputs.records[worker]
                    record.set_step(step)
                    fleet.send_step(worker, record)
                    continue
                ports = shipped.lowered.programs[worker].inputs
                buffers = [_raw(inputs[port.name]) if port.name in inputs else b"" for port in ports]
                fleet.send(worker, m.Step(shipped.number, step), buffers)
            return fleet.gather(shipped.awaited, shipped.patience)

    def _program_at(self, step: int) -> Shipped:
        """The program that ran in a step, as strict ownership remembers."""
        return self.history[bisect_right(self.history, step, key=lambda entry: entry[0]) - 1][1]


def _orders(lowered: Lowered, workers: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Who begins without a peer comes first, and is woken first. Who has outputs is probably the last to be through."""
    programs = lowered.programs

    def begins_late(worker: int) -> bool:
        instructions = programs[worker].instructions
        return bool(instructions) and instructions[0].kind is Kind.RECV

    woken = sorted(workers, key=lambda worker: (begins_late(worker), bool(programs[worker].outputs)))
    return tuple(woken), tuple(sorted(woken, key=lambda worker: bool(programs[worker].outputs)))


def _raw(array: Array) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
