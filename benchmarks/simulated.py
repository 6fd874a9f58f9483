"""Real steps on this machine against simulated ones: calibrated first, then every split and whole decode steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.measure import Row, quartiles
from benchmarks.process import opened
from coordinator.cli.calibrate import measured, write
from coordinator.cli.calibrate_measure import QUICK, Effort
from coordinator.cli.calibrate_rig import ProcessorTime, Timed
from coordinator.cli.simulate_model import machine_of
from coordinator.config import parse_workers
from coordinator.runtime.evaluate import Evaluator, Shipped
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.session import Session
from coordinator.runtime.stopwatch import Stopwatch
from coordinator.simulate.calibrate_fit import low
from coordinator.simulate.engine import simulate
from coordinator.simulate.lowered import time_program
from coordinator.simulate.machine import Machine
from coordinator.simulate.timed import Do, Job
from protocol.program import Kind

WORKERS = ("cpu:1", "cpu:1,accel:1", "cpu:1,accel:2")
LAYERS = {"demo": (0, 1, 2, 3, 4, 5, 6), "smollm2-q4_1": (0, 1, 8, 15, 22, 30, 31)}
"""Layers on accelerators; the last is all, the output among them."""
DEPTH = 250
"""Of 256 positions that are read, so many hold something: what is masked is left out by the kernels, not by the law."""
SPLIT_WITHIN, STEP_WITHIN = 0.20, 0.10


@dataclass(frozen=True, slots=True)
class Pair:
    """Measured and simulated seconds of a split or a whole step."""

    name: str
    real: float
    simulated: float

    @property
    def error(self) -> float:
        """Relative error of the simulation."""
        return self.simulated / self.real - 1.0


def rows(quick: bool) -> Iterator[Row]:
    """A row for each placement, then the shares that are close enough."""
    splits: list[Pair] = []
    steps: list[Pair] = []
    with tempfile.TemporaryDirectory() as folder:
        found = measured(1, QUICK if quick else Effort(), lambda _: None)
        machines = {}
        for workers in WORKERS:
            system, network, _ = write(Path(folder) / "machine.toml", parse_workers(workers, 1), found)
            machines[workers] = machine_of(str(system), str(network))
    yield Row("simulated", "noise of operations while calibrating", 100 * found.noise, "%")
    yield Row("simulated", "noise of steps while calibrating", 100 * found.shared.noise, "%")
    for name in LAYERS:
        for workers in WORKERS:
            for layers in _layers(name, workers, quick):
                step, parts = _compare(name, workers, layers, machines[workers], 24 if quick else 80)
                steps.append(step)
                splits += parts
                yield _row(step, parts)
    yield _share(f"decode steps within {STEP_WITHIN:.0%}", steps, STEP_WITHIN)
    yield _share(f"splits within {SPLIT_WITHIN:.0%}", splits, SPLIT_WITHIN)


def _layers(name: str, workers: str, quick: bool) -> Sequence[int]:
    if workers == "cpu:1":
        return (0,)
    chosen = LAYERS[name] if workers.endswith("accel:1") else LAYERS[name][2:]
    return chosen[1::2] if quick else chosen


def _compare(name: str, workers: str, layers: int, machine: Machine, rounds: int) -> tuple[Pair, list[Pair]]:
    """One placement: whole steps, and in between steps in which workers note when each run of ops began and ended."""
    with Fleet(parse_workers(workers, 1), FleetOptions()) as fleet:
        session = opened(fleet, name, workers, layers if workers != "cpu:1" else None, int(name == "demo"))
        while session.n_past < DEPTH:
            session.evaluate([5] * min(64, DEPTH - session.n_past))
        plain, watch = session.evaluator, Stopwatch(keep=True)
        noting = Evaluator(fleet, session.memory, session.schedulers, stopwatch=watch)
        shipped = _decode(session)[1]
        runs = _runs(shipped)
        walls: list[float] = []
        spent: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            walls.append(_decode(session)[0].wall_s)
            session.evaluator = noting
            compute = _decode(session)[0].compute_s
            session.evaluator = plain
            times = watch.taken.pop().times
            for (worker, number), found in zip(runs, spent, strict=True):
                row = times[worker][number]
                found.append(min(compute[worker], (row.end_ns - row.start_ns) * 1e-9))
    title = f"{name}, {workers}, {layers} layers"
    step_s, split_s = _simulated(shipped, machine)
    programs = shipped.lowered.programs
    splits = [
        Pair(
            f"{title}: {session.devices[worker].name} split {programs[worker].instructions[number].split}",
            low(found), seconds,
        )
        for (worker, number), found, seconds in zip(runs, spent, split_s, strict=True)
    ]  # fmt: skip
    return Pair(title, low(walls), step_s), splits


def _decode(session: Session) -> tuple[Timed, Shipped]:
    """One token at DEPTH, and what ran."""
    session.n_past = DEPTH
    watch = ProcessorTime(session.fleet)
    _, result, shipped = session.evaluate([5])
    compute_s = {worker: done.compute_ns * 1e-9 for worker, done in result.done.items()}
    return watch.timed(result.wall_ns * 1e-9, compute_s), shipped


def _runs(shipped: Shipped) -> list[tuple[int, int]]:
    """Every run of ops: its worker, and its number among the worker's instructions."""
    programs = enumerate(shipped.lowered.programs)
    return [
        (worker, number)
        for worker, program in programs
        for number, item in enumerate(program.instructions)
        if item.kind is Kind.RUN
    ]


def _simulated(shipped: Shipped, machine: Machine) -> tuple[float, list[float]]:
    """Seconds of the step, and of each run of ops, in the order of `_runs`."""
    timed = time_program(shipped.lowered, machine.models, machine.fabric)
    is_async = [model.async_copies for model in machine.models]
    line = simulate(is_async, machine.fabric, [timed], [[Job(0)]], check=True)
    runs = []
    for acts, model, program in zip(timed.workers, machine.models, shipped.lowered.programs, strict=True):
        seconds = [act.seconds for act in acts if act.do == Do.RUN]
        runs += seconds[1:] if program.instructions and model.step_s else seconds
    return line.end_s, runs


def _row(step: Pair, splits: Sequence[Pair]) -> Row:
    errors = sorted(pair.error for pair in splits)
    note = "; ".join(f"{p.name.rpartition(': ')[2]} {p.real * 1e6:.0f} us {p.error:+.0%}" for p in splits)
    ratio = step.simulated / step.real
    return Row(
        "simulated", step.name, step.real * 1e6, "us", step.simulated * 1e6, "simulated", ratio,
        1.0 + errors[0], 1.0 + errors[-1], len(splits), note,
    )  # fmt: skip


def _share(name: str, pairs: Sequence[Pair], within: float) -> Row:
    errors = sorted(abs(pair.error) for pair in pairs)
    share = 100.0 * sum(error <= within for error in errors) / len(errors)
    _, high = quartiles(errors)
    note = f"of {len(errors)}; median error {median(errors):.0%}, upper quartile {high:.0%}, worst {errors[-1]:.0%}"
    return Row("simulated", name, share, "%", samples=len(errors), note=note)
