"""Real steps on this machine against simulated ones: calibrated first, then every split and whole decode steps."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.measure import Row, quartiles
from benchmarks.models import model_file
from benchmarks.rivals import tokens
from benchmarks.seen import Pair, Placement, Seen
from coordinator.cli.calibrate import Calibrator, Measured, fitted, write
from coordinator.cli.calibrate_measure import Effort, Operations, Raw
from coordinator.cli.calibrate_rig import Timed, timed_step
from coordinator.cli.options import DEMO_IMAGE
from coordinator.cli.simulate_model import machine_of
from coordinator.config import parse_workers
from coordinator.model.gguf_file import open_model
from coordinator.model.image import Tiles, load_image, preprocess
from coordinator.model.params import read_params
from coordinator.runtime.evaluate import Evaluator, Shipped, StepResult
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.generate import Prompt, Timings, encode_images
from coordinator.runtime.session import Session, SessionOptions
from coordinator.runtime.stopwatch import Stopwatch
from coordinator.schedule.lower import Lowered
from coordinator.schedule.placement import PlacementOptions
from coordinator.simulate.calibrate_fit import typical
from coordinator.simulate.calibrate_layers import MIDDLE, SMALL
from coordinator.simulate.engine import simulate
from coordinator.simulate.lowered import time_program
from coordinator.simulate.machine import Machine
from coordinator.simulate.timed import Do, Job

Work = Callable[[], tuple[StepResult, Shipped]]

WORKERS = ("cpu:1", "cpu:1,accel:1", "cpu:1,accel:2")
LAYERS = {"demo": (0, 1, 2, 3, 4, 5, 6), "smollm2-q4_1": (0, 1, 8, 15, 22, 30, 31)}
"""Layers on accelerators; the last is all, the output among them."""
DEPTH = 250
"""Of 256 positions that are read, so many hold something: what is masked is left out by the kernels, not by the law."""
FURTHER, PROMPT = 2, 64
"""Prompts, of so many tokens, and images of a placement in each round, and as many of which runs are noted."""
SPLIT_WITHIN, STEP_WITHIN, FURTHER_WITHIN = 0.20, 0.10, 0.15
ROUNDS = 5
"""How often everything is measured."""
STEPS_S, FURTHER_S = 1.0, 0.15
"""For so long decode steps of a placement, and each further graph, are measured each time: what is short would else be
taken in one moment, which may be a neighbour's."""
WARM, COLD = f"few layers of {SMALL[0]}", f"layers of {MIDDLE[1]} from memory"
"""Calibrated cases, of weights in the cache and from memory."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Steps in a row that do not count, and that do: who has just run another program is not yet where tokens find it.
    Before them a calibrated case is measured, so often."""

    settling: int
    settled: int
    case: str
    probes: int


PACES = {"demo": Pace(16, 64, WARM, 8), "smollm2-q4_1": Pace(3, 8, COLD, 2)}
FURTHER_PACE = Pace(1, FURTHER, WARM, 8)
EFFORT, BETWEEN = Effort(3, 4, quick=True), 5
"""A calibration, and before how many placements."""
LONG_S = 20e-6
"""Shorter runs of ops, an embedding or the last norm, are also counted for themselves."""


def rows(quick: bool) -> Iterator[Row]:
    """A row for each placement, then the shares that are close enough.

    How much of the machine neighbours leave changes from minute to minute: calibrations and placements are measured in
    turns, round after round, and what counts is what all rounds say together. What is simulated is multiplied by what
    a calibrated case took in the same moments as the placement, over what it took in calibrations. Models are copied
    first: where the pages of a file lie in memory depends on how it came there, and some files were a third slower to
    read than a copy of them.
    """
    placements, raw = list(_placements(quick)), Raw({}, {}, {})
    rounds: list[list[Seen]] = []
    with tempfile.TemporaryDirectory() as folder, Calibrator(1, quick=True, messages=False) as calibrator:
        files = {name: Path(shutil.copy(model_file(name), f"{folder}/{name}.gguf")) for name in LAYERS}
        for _ in range(2 if quick else ROUNDS):
            rounds.append(_round(calibrator, raw, [(p, files[p.model]) for p in placements]))
    calibration = fitted(raw, 1, EFFORT)
    yield Row("simulated", "noise of operations while calibrating", 100 * calibration.noise, "%")
    yield Row("simulated", "noise of steps while calibrating", 100 * calibration.shared.noise, "%")
    splits: list[Pair] = []
    steps: list[Pair] = []
    unscaled: list[Pair] = []
    further: dict[str, tuple[list[Pair], list[Pair]]] = {}
    for placement, of_rounds in zip(placements, zip(*rounds, strict=True), strict=True):
        seen, modelled = Seen(), _machine(placement, calibration)
        for one in of_rounds:
            seen.add(one)
        slower = seen.slower(raw.ops)
        step_s, parts = _compare(placement, seen, modelled, slower)
        step = Pair(str(placement), typical(seen.walls), step_s, [typical(one.walls) for one in of_rounds])
        steps.append(step)
        unscaled.append(replace(step, simulated=step.simulated / slower))
        splits += parts
        for name, of_name in seen.further.items():
            whole_s, of_whole = _compare(placement, of_name, modelled, of_name.slower(raw.ops))
            wholes, its_splits = further.setdefault(name, ([], []))
            wholes.append(Pair(str(placement), typical(of_name.walls), whole_s))
            its_splits += of_whole
        yield _row(step, parts, f"machine {slower - 1.0:+.0%}; {typical(seen.outside) * 1e6:.0f} us outside of ops")
    yield _share(f"decode steps within {STEP_WITHIN:.0%}", steps, STEP_WITHIN)
    yield _share(f"for information: decode steps within {STEP_WITHIN:.0%}, as calibrated", unscaled, STEP_WITHIN)
    yield _share(f"splits within {SPLIT_WITHIN:.0%}", splits, SPLIT_WITHIN)
    longer = [pair for pair in splits if pair.real >= LONG_S]
    yield _share(f"splits of {LONG_S * 1e6:.0f} us or more within {SPLIT_WITHIN:.0%}", longer, SPLIT_WITHIN)
    shorter = [pair for pair in splits if pair.real < LONG_S]
    yield _absolute(shorter, steps)
    for name, (wholes, its_splits) in further.items():
        yield _share(f"for information: {name} within {FURTHER_WITHIN:.0%}", wholes, FURTHER_WITHIN)
        yield _share(f"for information: splits of {name} within {SPLIT_WITHIN:.0%}", its_splits, SPLIT_WITHIN)


def _round(calibrator: Calibrator, raw: Raw, placements: Sequence[tuple[Placement, Path]]) -> list[Seen]:
    """All placements once, with calibrations in between, whose samples are put to `raw`."""
    found = []
    for number, (placement, file) in enumerate(placements):
        if number % BETWEEN == 0:
            raw.add(calibrator.measure(EFFORT, lambda _: None))
        found.append(_measure(placement, file, calibrator.operations))
    return found


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


def _measure(placement: Placement, file: Path, operations: Operations) -> Seen:
    """Whole steps, and in between steps in which workers note when each run of ops began and ended."""
    alone, seen = placement.workers == WORKERS[0], Seen()
    with Fleet(parse_workers(placement.workers, 1), FleetOptions()) as fleet:
        layers = None if alone else placement.layers
        session, images = _opened(fleet, placement, file, layers)
        while session.n_past < DEPTH:
            session.evaluate([5] * min(64, DEPTH - session.n_past))
        sampler = _Sampler(session, operations)
        sampler.sample(seen, lambda: _decode(session), STEPS_S, PACES[placement.model])
        graphs: dict[str, Work] = {"a prompt": lambda: _prompt(session)}
        if images:
            graphs["an image"] = lambda: session.encode(0, images[0])
        for name, work in graphs.items():
            seen.further[name] = Seen()
            sampler.sample(seen.further[name], work, FURTHER_S, FURTHER_PACE)
    return seen


class _Sampler:
    """Takes samples of a session's steps, and of a calibrated case in between."""

    def __init__(self, session: Session, operations: Operations) -> None:
        self._session, self._operations, self._watch = session, operations, Stopwatch(keep=True)
        self._plain = session.evaluator
        self._noting = Evaluator(session.fleet, session.memory, session.schedulers, stopwatch=self._watch)

    def sample(self, seen: Seen, work: Work, seconds: float, pace: Pace) -> None:
        """For so long: steps as they are and steps that are noted, in turns."""
        seen.case = pace.case
        for _ in _again(seconds):
            self._probe(seen, pace)
            self._session.evaluator = self._plain
            for number in range(pace.settling + pace.settled):
                timed, _ = _timed(work)
                if number >= pace.settling:
                    seen.take(timed)
            self._probe(seen, pace)
            self._session.evaluator = self._noting
            for number in range(pace.settling + pace.settled):
                _, shipped = work()
                times = self._watch.taken.pop().times
                if number >= pace.settling:
                    seen.note(self._session, shipped, times)

    def _probe(self, seen: Seen, pace: Pace) -> None:
        self._operations.once(pace.case)  # finds neither its code in the cache nor where its weights are: 2 % slower
        seen.probes += [self._operations.once(pace.case) for _ in range(pace.probes)]


def _again(seconds: float) -> Iterator[None]:
    """Once, and until so much time has passed."""
    until = time.monotonic() + seconds
    yield
    while time.monotonic() < until:
        yield


def _opened(fleet: Fleet, placement: Placement, file: Path, layers: int | None) -> tuple[Session, tuple[Tiles, ...]]:
    """A started session, with an image encoded where the model takes one."""
    model = open_model(file)
    params = read_params(model)
    fleet.start()
    options = SessionOptions(PlacementOptions(layers), n_ctx=512)
    session = Session(model, params, parse_workers(placement.workers, 1), options, n_images=int(bool(params.vision)))
    fleet.handshake()
    session.open(fleet)
    images: tuple[Tiles, ...] = ()
    if params.vision is not None:
        assert params.image_token is not None
        ids = (params.image_token, *tokens(15, params.text.n_vocab))
        images = (preprocess(load_image(DEMO_IMAGE), params.vision),)
        encode_images(session, Prompt(ids, images), Timings())
        session.evaluate(ids)
    return session, images


def _decode(session: Session) -> tuple[StepResult, Shipped]:
    """One token at DEPTH."""
    session.n_past = DEPTH
    return session.evaluate([5])[1:]


def _prompt(session: Session) -> tuple[StepResult, Shipped]:
    """A prompt that ends at DEPTH."""
    session.n_past = DEPTH - PROMPT
    return session.evaluate([5] * PROMPT)[1:]


def _timed(work: Work) -> tuple[Timed, Shipped]:
    """One evaluation, and what ran."""
    result, shipped = work()
    return timed_step(result), shipped


def _compare(placement: Placement, seen: Seen, machine: Machine, slower: float) -> tuple[float, list[Pair]]:
    """Seconds of the simulated step, and each run of ops, measured and simulated; the machine was so much slower."""
    assert seen.lowered is not None
    step_s, runs_s = _simulated(seen.lowered, machine)
    splits = [
        Pair(f"{placement}: {name}", real, slower * seconds)
        for (name, real), seconds in zip(seen.splits(), runs_s, strict=True)
    ]
    return slower * step_s, splits


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


def _row(step: Pair, splits: Sequence[Pair], about: str) -> Row:
    note = "; ".join(f"{p.name.rpartition(': ')[2]} {p.real * 1e6:.0f} us {p.error:+.0%}" for p in splits)
    low, high = quartiles(sorted(step.simulated / real for real in step.rounds))
    return Row(
        "simulated", step.name, step.real * 1e6, "us", step.simulated * 1e6, "simulated", 1.0 + step.error, low, high,
        len(step.rounds), f"{about}; {note}",
    )  # fmt: skip


def _absolute(pairs: Sequence[Pair], steps: Sequence[Pair]) -> Row:
    """By how much short splits are wrong, and what that is of the shortest step."""
    wrong = sorted(abs(pair.simulated - pair.real) for pair in pairs) or [0.0]
    share = wrong[-1] / min(step.real for step in steps)
    note = f"of {len(pairs)}; worst {wrong[-1] * 1e6:.1f} us, {share:.1%} of the shortest step"
    name = f"splits of less than {LONG_S * 1e6:.0f} us: median error"
    return Row("simulated", name, median(wrong) * 1e6, "us", samples=len(pairs), note=note)


def _share(name: str, pairs: Sequence[Pair], within: float) -> Row:
    errors = sorted(abs(pair.error) for pair in pairs)
    share = 100.0 * sum(error <= within for error in errors) / len(errors)
    _, high = quartiles(errors)
    note = f"of {len(errors)}; median error {median(errors):.0%}, upper quartile {high:.0%}, worst {errors[-1]:.0%}"
    return Row("simulated", name, share, "%", samples=len(errors), note=note)
