"""What `crossdock bench scaling --simulate` measures: one sequence over more and more workers, or one for each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from coordinator.cli.bench_measure import begin, tiles_of
from coordinator.config import parse_workers
from coordinator.model.gguf_file import ModelFile
from coordinator.model.hparams import ModelParams
from coordinator.report.scaling import Real
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.session import Session, SessionOptions
from coordinator.simulate.series import Load

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rig:
    """What all measurements have in common; `load` is a sequence's."""

    model: ModelFile
    params: ModelParams
    options: SessionOptions
    fleet: FleetOptions
    load: Load
    threads: int
    repetitions: int


def measure_strong(rig: Rig, workers: Sequence[int], progress: Progress) -> list[Real]:
    """One sequence whose layers lie on so many accelerators. Raises what workers fail with."""
    with ExitStack() as stack:
        each = [_open(rig, stack, [n], progress) for n in workers]
        return _measure(rig, each, progress)


def measure_weak(rig: Rig, workers: Sequence[int], progress: Progress) -> list[Real]:
    """So many sequences at once, each on an accelerator of its own with a copy of the model and a host beside it."""
    with ExitStack() as stack:
        sessions = _open(rig, stack, [1] * max(workers), progress)
        return _measure(rig, [sessions[:n] for n in workers], progress)


def _open(rig: Rig, stack: ExitStack, sizes: Sequence[int], progress: Progress) -> list[Session]:
    """A session on each of several fleets with a host and so many accelerators."""
    topologies = [parse_workers(f"cpu:1,accel:{n}", rig.threads) for n in sizes]
    fleets = [stack.enter_context(Fleet(topology, rig.fleet)) for topology in topologies]
    progress(f"starting {sum(len(topology.workers) for topology in topologies)} workers")
    for fleet in fleets:
        fleet.start()
    for fleet in fleets:
        fleet.handshake()
    sessions = [
        Session(rig.model, rig.params, fleet.topology, rig.options, n_images=rig.load.n_images) for fleet in fleets
    ]
    for session, fleet in zip(sessions, fleets, strict=True):
        session.open(fleet)
        if session.n_images:
            session.encode(0, tiles_of(session))
    return sessions


def _measure(rig: Rig, each: Sequence[Sequence[Session]], progress: Progress) -> list[Real]:
    """Sessions of one entry run the request at the same time, entries in turn, so that neighbours disturb them alike.
    A repetition takes from the first one's start to the last one's end."""
    rounds = []
    for k in range(1 + rig.repetitions):
        progress(f"round {k} of {rig.repetitions}" if k else "warming up")
        rounds.append([_together(rig, sessions) for sessions in each])
    found = []
    for sessions, times in zip(each, zip(*rounds[1:], strict=True), strict=True):
        prompts, tokens = zip(*times, strict=True)
        found.append(Real(len(sessions), rig.load.n_prompt, rig.load.n_predict, tuple(prompts), tuple(tokens)))
    return found


def _together(rig: Rig, sessions: Sequence[Session]) -> tuple[float, float]:
    """Seconds of all prompts, then of all tokens after them."""
    ready = threading.Barrier(len(sessions))
    with ThreadPoolExecutor(len(sessions)) as pool:
        asked = [pool.submit(_request, session, rig.load, ready) for session in sessions]
    failed = [error for one in asked if (error := one.exception()) is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    spans = [one.result() for one in asked]
    starts, middles, again, ends = zip(*spans, strict=True)
    return max(middles) - min(starts), max(ends) - min(again)


def _request(session: Session, load: Load, ready: threading.Barrier) -> tuple[float, float, float, float]:
    """A prompt in micro-batches, then tokens one by one: when each of the two began and ended."""
    try:
        tokens = begin(session, load.n_prompt + load.n_predict)
        ready.wait()
        start = time.perf_counter()
        for first in range(0, load.n_prompt, load.n_ubatch):
            session.evaluate(tokens[first : min(first + load.n_ubatch, load.n_prompt)])
        middle = time.perf_counter()
        ready.wait()
        again = time.perf_counter()
        for token in tokens[load.n_prompt :]:
            session.evaluate([token])
        return start, middle, again, time.perf_counter()
    except BaseException:
        ready.abort()  # the others would wait for ever
        raise
