"""Graph evaluations: plan, lower, ship once; then one message per worker and step."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.graph.node import Graph
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.inputs import Array
from coordinator.runtime.memory import Memory
from coordinator.schedule.lower import Keep, Lowered, lower
from coordinator.schedule.plan import Plan
from coordinator.schedule.scheduler import Scheduler
from protocol import messages as m
from protocol.program import NOWHERE, Kind, pack_instructions, pack_ops

MAX_KEPT = 64
"""Programs kept per session; the one that was not used for longest goes first."""


@dataclass(frozen=True, slots=True)
class Shipped:
    """A program that every worker of `workers` holds."""

    number: int
    name: str
    scheduler: int
    lowered: Lowered
    workers: tuple[int, ...]

    @property
    def plan(self) -> Plan:
        """The plan it was lowered from."""
        return self.lowered.plan


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outputs by tensor name (raw bytes), digests by tensor name, and what it took."""

    outputs: dict[str, memoryview]
    digests: dict[str, str]
    wall_ns: int
    done: dict[int, m.Done]


class Evaluator:
    """Plans graphs on numbered schedulers, keeps shipped programs, and runs them. Lives as long as the run."""

    def __init__(self, fleet: Fleet, memory: Memory, schedulers: Sequence[Scheduler]) -> None:
        self.fleet, self.memory, self.schedulers = fleet, memory, tuple(schedulers)
        self.programs: dict[Hashable, Shipped] = {}

    def program(
        self,
        key: Hashable,
        scheduler: int,
        build: Callable[[], Graph],
        *,
        outputs: Sequence[str] = (),
        digests: Sequence[str] = (),
        keeps: Sequence[Keep] = (),
    ) -> Shipped:
        """The program under `key`, planned and shipped when it is not there yet.

        `key` must hold everything that the graph depends on: its shapes, options and what it reads.
        """
        known = self.programs.pop(key, None)
        if known is not None:
            self.programs[key] = known  # the latest last
            return known
        if len(self.programs) >= MAX_KEPT:
            self._forget([next(iter(self.programs))])
        plan = self.schedulers[scheduler].allocate(build())
        if self.memory.fit_compute(scheduler, plan.buffer_sizes):
            self.drop(scheduler)
        lowered = lower(plan, self.memory.homes(scheduler), outputs=outputs, digests=digests, keeps=keeps)
        shipped = self._ship(plan.graph.name, scheduler, lowered)
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

    def _ship(self, name: str, scheduler: int, lowered: Lowered) -> Shipped:
        number = next(self.fleet.program_numbers)
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
            )
            tables = (pack_ops(program.ops).tobytes(), pack_instructions(program.instructions).tobytes())
            self.fleet.send(worker, message, tables)
            workers.append(worker)
        self.fleet.doing = f"the {name} graph"
        self.fleet.gather(workers)
        return Shipped(number, name, scheduler, lowered, tuple(workers))

    def run(self, shipped: Shipped, inputs: Mapping[str, Array]) -> StepResult:
        """One evaluation. Inputs that are not given (unused debug tensors) stay as they are."""
        start = time.perf_counter_ns()
        step = next(self.fleet.step_numbers)
        self.fleet.doing = f"the {shipped.name} graph"
        for worker in shipped.workers:
            ports = shipped.lowered.programs[worker].inputs
            buffers = [_raw(inputs[port.name]) if port.name in inputs else b"" for port in ports]
            self.fleet.send(worker, m.Step(shipped.number, step), buffers)
        answers = self.fleet.gather(shipped.workers)
        outputs: dict[str, memoryview] = {}
        digests: dict[str, str] = {}
        done: dict[int, m.Done] = {}
        for worker, envelope in answers.items():
            program, message = shipped.lowered.programs[worker], envelope.message
            assert isinstance(message, m.Done)
            done[worker] = message
            outputs |= {port.name: data for port, data in zip(program.outputs, envelope.buffers, strict=True)}
            digests |= {port.name: text for port, text in zip(program.digests, message.digests, strict=True)}
        return StepResult(outputs, digests, time.perf_counter_ns() - start, done)


def _raw(array: Array) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
