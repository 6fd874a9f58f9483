"""Real steps on this machine against simulated ones: calibrated first, then every split and whole decode steps."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.measure import Row, quartiles
from benchmarks.models import model_file
from benchmarks.rivals import tokens
from coordinator.cli.calibrate import Measured, fitted, measured, write
from coordinator.cli.calibrate_measure import Effort, Raw
from coordinator.cli.calibrate_rig import ProcessorTime, Timed
from coordinator.cli.options import DEMO_IMAGE
from coordinator.cli.simulate_model import machine_of
from coordinator.config import parse_workers
from coordinator.model.gguf_file import open_model
from coordinator.model.image import load_image, preprocess
from coordinator.model.params import read_params
from coordinator.runtime.evaluate import Evaluator, Shipped
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.generate import Prompt, Timings, encode_images
from coordinator.runtime.session import Session, SessionOptions
from coordinator.runtime.stopwatch import Stopwatch
from coordinator.schedule.lower import Lowered
from coordinator.schedule.placement import PlacementOptions
from coordinator.simulate.calibrate_fit import low
from coordinator.simulate.engine import simulate
from coordinator.simulate.lowered import time_program
from coordinator.simulate.machine import Machine
from coordinator.simulate.timed import Do, Job
from protocol.program import Kind
from protocol.timing import Times

WORKERS = ("cpu:1", "cpu:1,accel:1", "cpu:1,accel:2")
LAYERS = {"demo": (0, 1, 2, 3, 4, 5, 6), "smollm2-q4_1": (0, 1, 8, 15, 22, 30, 31)}
"""Layers on accelerators; the last is all, the output among them."""
DEPTH = 250
"""Of 256 positions that are read, so many hold something: what is masked is left out by the kernels, not by the law."""
SPLIT_WITHIN, STEP_WITHIN = 0.20, 0.10
LONG_S = 20e-6
"""Shorter runs of ops, an embedding or the last norm, are Python and sleep rather than kernels."""


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


@dataclass(frozen=True, slots=True)
class Placement:
    """What is measured: a model, workers, and how many layers lie on accelerators."""

    model: str
    workers: str
    layers: int

    def __str__(self) -> str:
        return f"{self.model}, {self.workers}, {self.layers} layers"


@dataclass(slots=True)
class Seen:
    """Samples of one placement: whole steps and what of them is outside of operations, and each run of ops with its
    worker's name and split; the program is the same whenever it is measured."""

    walls: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    runs: list[tuple[str, int, list[float]]] = field(default_factory=list)
    lowered: Lowered | None = None


def rows(quick: bool) -> Iterator[Row]:
    """A row for each placement, then the shares that are close enough.

    How much of the memory's bandwidth neighbours leave changes from minute to minute: calibration and placements are
    measured in turns, several times over, and compared only then. Models are copied first: where the pages of a file
    lie in memory depends on how it came there, and some files were a third slower to read than a copy of them.
    """
    effort = Effort(8, 10, quick=True) if quick else Effort(16, 20, quick=True)
    raw, seen = Raw({}, {}, {}), {placement: Seen() for placement in _placements(quick)}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(shutil.copy(model_file(name), f"{folder}/{name}.gguf")) for name in LAYERS}
        for _ in range(2 if quick else 5):
            raw.add(measured(1, effort, lambda _: None))
            for placement, found in seen.items():
                _measure(placement, files[placement.model], found, 16 if quick else 30)
    calibration = fitted(raw, 1, effort)
    yield Row("simulated", "noise of operations while calibrating", 100 * calibration.noise, "%")
    yield Row("simulated", "noise of steps while calibrating", 100 * calibration.shared.noise, "%")
    splits: list[Pair] = []
    steps: list[Pair] = []
    for placement, found in seen.items():
        step, parts = _compare(placement, found, _machine(placement, calibration))
        steps.append(step)
        splits += parts
        yield _row(step, parts, low(found.outside))
    yield _share(f"decode steps within {STEP_WITHIN:.0%}", steps, STEP_WITHIN)
    yield _share(f"splits within {SPLIT_WITHIN:.0%}", splits, SPLIT_WITHIN)
    longer = [pair for pair in splits if pair.real >= LONG_S]
    yield _share(f"splits of {LONG_S * 1e6:.0f} us or more within {SPLIT_WITHIN:.0%}", longer, SPLIT_WITHIN)


def _machine(placement: Placement, calibration: Measured) -> Machine:
    """The machine as the files say that `crossdock calibrate` writes."""
    with tempfile.TemporaryDirectory() as folder:
        system, network, _ = write(Path(folder) / "machine.toml", parse_workers(placement.workers, 1), calibration)
        return machine_of(str(system), str(network))


def _placements(quick: bool) -> Iterator[Placement]:
    for model, layers in LAYERS.items():
        yield Placement(model, WORKERS[0], 0)
        for number, workers in enumerate(WORKERS[1:]):
            chosen = layers[2 * number :]  # with two accelerators from two layers on
            yield from (Placement(model, workers, n) for n in (chosen[1::2] if quick else chosen))


def _measure(placement: Placement, file: Path, seen: Seen, rounds: int) -> None:
    """Whole steps, and in between steps in which workers note when each run of ops began and ended."""
    alone = placement.workers == WORKERS[0]
    with Fleet(parse_workers(placement.workers, 1), FleetOptions()) as fleet:
        layers = None if alone else placement.layers
        session = _opened(fleet, placement, file, layers)
        while session.n_past < DEPTH:
            session.evaluate([5] * min(64, DEPTH - session.n_past))
        plain, watch = session.evaluator, Stopwatch(keep=True)
        noting = Evaluator(fleet, session.memory, session.schedulers, stopwatch=watch)
        for _ in range(rounds):
            timed, shipped = _decode(session)
            seen.walls.append(timed.wall_s)
            seen.outside.append(timed.outside_s)
            session.evaluator = noting
            compute = _decode(session)[0].compute_s
            session.evaluator = plain
            _note(session, shipped, seen, compute, watch.taken.pop().times)


def _opened(fleet: Fleet, placement: Placement, file: Path, layers: int | None) -> Session:
    """A started session, with an image encoded where the model takes one."""
    model = open_model(file)
    params = read_params(model)
    fleet.start()
    options = SessionOptions(PlacementOptions(layers), n_ctx=512)
    session = Session(model, params, parse_workers(placement.workers, 1), options, n_images=int(bool(params.vision)))
    fleet.handshake()
    session.open(fleet)
    if params.vision is not None:
        assert params.image_token is not None
        ids = (params.image_token, *tokens(15, params.text.n_vocab))
        encode_images(session, Prompt(ids, (preprocess(load_image(DEMO_IMAGE), params.vision),)), Timings())
        session.evaluate(ids)
    return session


def _note(
    session: Session, shipped: Shipped, seen: Seen, compute: Mapping[int, float], times: Mapping[int, Sequence[Times]]
) -> None:
    """How long each run of ops took: no longer than its worker's processor time for all of them."""
    if seen.lowered is None:
        seen.lowered = shipped.lowered
        for worker, number in _runs(shipped.lowered):
            split = shipped.lowered.programs[worker].instructions[number].split
            seen.runs.append((session.devices[worker].name, split, []))
    for (worker, number), (_, _, found) in zip(_runs(shipped.lowered), seen.runs, strict=True):
        row = times[worker][number]
        found.append(min(compute[worker], (row.end_ns - row.start_ns) * 1e-9))


def _decode(session: Session) -> tuple[Timed, Shipped]:
    """One token at DEPTH, and what ran."""
    session.n_past = DEPTH
    watch = ProcessorTime(session.fleet)
    _, result, shipped = session.evaluate([5])
    compute_s = {worker: done.compute_ns * 1e-9 for worker, done in result.done.items()}
    return watch.timed(result.wall_ns * 1e-9, compute_s), shipped


def _runs(lowered: Lowered) -> list[tuple[int, int]]:
    """Every run of ops: its worker, and its number among the worker's instructions."""
    programs = enumerate(lowered.programs)
    return [
        (worker, number)
        for worker, program in programs
        for number, item in enumerate(program.instructions)
        if item.kind is Kind.RUN
    ]


def _compare(placement: Placement, seen: Seen, machine: Machine) -> tuple[Pair, list[Pair]]:
    """The whole step and each run of ops, measured and simulated."""
    assert seen.lowered is not None
    step_s, run_s = _simulated(seen.lowered, machine)
    splits = [
        Pair(f"{placement}: {name} split {split}", low(found), seconds)
        for (name, split, found), seconds in zip(seen.runs, run_s, strict=True)
    ]
    return Pair(str(placement), low(seen.walls), step_s), splits


def _simulated(lowered: Lowered, machine: Machine) -> tuple[float, list[float]]:
    """Seconds of the step, and of each run of ops, in the order of `_runs`."""
    timed = time_program(lowered, machine.models, machine.fabric)
    is_async = [model.async_copies for model in machine.models]
    line = simulate(is_async, machine.fabric, [timed], [[Job(0)]], check=True)
    runs = []
    for acts, model, program in zip(timed.workers, machine.models, lowered.programs, strict=True):
        seconds = [act.seconds for act in acts if act.do == Do.RUN]
        runs += seconds[1:] if program.instructions and model.step_s else seconds
    return line.end_s, runs


def _row(step: Pair, splits: Sequence[Pair], outside_s: float) -> Row:
    errors = sorted(pair.error for pair in splits)
    note = "; ".join(f"{p.name.rpartition(': ')[2]} {p.real * 1e6:.0f} us {p.error:+.0%}" for p in splits)
    note = f"{outside_s * 1e6:.0f} us outside of ops; {note}"
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
