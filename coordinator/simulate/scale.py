"""Strong and weak scaling in virtual time: pipelines of a few devices, and as many of them as there are workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from coordinator.model.presets import Blueprint
from coordinator.simulate.engine import simulate
from coordinator.simulate.fabric import Fabric, Route
from coordinator.simulate.machine import Machine
from coordinator.simulate.pool import Demands, demands_of
from coordinator.simulate.predict import PHASES
from coordinator.simulate.series import Load, Options, Series, make_series
from coordinator.simulate.timed import Job, Timed
from coordinator.simulate.timeline import Timeline
from protocol.errors import UsageError

MODES = ("strong", "weak")
"""The same requests for all numbers of workers, or as many for each worker."""

MAX_STAGES = 4
"""Accelerators of one pipeline where nothing else is said; more of them become further pipelines."""

MAX_SCALE = 4096


@dataclass(frozen=True, slots=True)
class ScalePoint:
    """Rates with `workers` accelerators in `pipelines`, and what limits them: all images, all prompts, all tokens.

    Tokens after the prompt and tokens of prompts per second; `end_s` when all is done; speed-up over the first point
    and its share per worker; the mean share of the time that accelerators and the host compute; the busiest link;
    whether the model fits the memory; and what the simulation itself took, in events and seconds.
    """

    workers: int
    pipelines: int
    requests: int
    tokens_per_s: float
    prompt_per_s: float
    end_s: float
    speedup: float
    efficiency: float
    busy: float
    host_busy: float
    link: str
    link_busy: float
    fits: bool
    n_events: int
    wall_s: float


MachineOf = Callable[[int], Machine]
"""The machine of one pipeline with so many accelerators."""


def scaling(
    blueprint: Blueprint,
    machine_of: MachineOf,
    options: Options,
    load: Load,
    workers: Sequence[int],
    *,
    mode: str = "strong",
    stages: int = MAX_STAGES,
    seed: int = 0,
) -> list[ScalePoint]:
    """A point for each number of accelerators, in order.

    Up to `stages` of them are one pipeline; more are further pipelines with copies of the model, beside the same host,
    whose segments (a network card) all of them share. `load.n_requests` are under way in all (strong) or for each
    worker (weak). Raises UsageError for numbers that cannot be meant.
    """
    if mode not in MODES:
        raise UsageError(f"scaling: mode {mode!r}: expected {' or '.join(MODES)}")
    points: list[ScalePoint] = []
    made: dict[int, Series] = {}
    for n in workers:
        depth = min(n, stages)
        if not 1 <= n <= MAX_SCALE or (n > depth and n % depth):
            raise UsageError(f"scaling: {n} workers: expected 1 to {MAX_SCALE}, from {stages} on a multiple of it")
        if depth not in made:
            made[depth] = make_series(blueprint, machine_of(depth), options, replace(load, n_requests=1))
        requests = load.n_requests * (n if mode == "weak" else 1)
        points.append(_point(made[depth], n, requests, seed, points[0] if points else None))
    return points


def _point(series: Series, n: int, requests: int, seed: int, first: ScalePoint | None) -> ScalePoint:
    """All images, then all prompts, then all tokens: the rate of one is not mixed with the others."""
    pipelines = n // (len(series.machine.models) - 1)
    start = time.perf_counter()
    parts = {tag: _part(series, tag, pipelines, requests, seed) for tag in PHASES}
    wall, load = time.perf_counter() - start, series.load
    done, end = list(parts.values()), sum(part.end_s for part in parts.values())
    busy = [sum(part.workers[k].busy_s for part in done) / end for k in range(len(done[0].workers))]
    routes = [sum(part.route_busy_s[k] for part in done) for k in range(len(done[0].fabric.routes))]
    share, route = max((seconds / end, -k) for k, seconds in enumerate([*routes, 0.0]))
    token_s = parts["token"].end_s
    point = ScalePoint(
        workers=n, pipelines=pipelines, requests=requests,
        tokens_per_s=load.n_predict * load.batch * requests / token_s if token_s else 0.0,
        prompt_per_s=load.n_prompt * load.batch * requests / parts["prompt"].end_s,
        end_s=end, speedup=1.0, efficiency=1.0, busy=sum(busy[:-1]) / n, host_busy=busy[-1],
        link=done[0].fabric.routes[-route].name if share else "", link_busy=share, fits=not series.short,
        n_events=sum(part.n_events for part in done), wall_s=wall,
    )  # fmt: skip
    if first is None:
        return point
    speedup = (requests / end) / (first.requests / first.end_s)
    return replace(point, speedup=speedup, efficiency=speedup * first.workers / n)


def _part(series: Series, tag: str, pipelines: int, requests: int, seed: int) -> Timeline:
    jobs = tuple(job for job in series.jobs if job.tag == tag)
    return run_pipelines(replace(series, jobs=jobs), pipelines, requests, seed=seed)


def run_pipelines(series: Series, pipelines: int, requests: int, *, seed: int = 0, check: bool = False) -> Timeline:
    """Simulate `requests`, dealt out in turn to `pipelines` copies of the series' machine around one host."""
    machine = series.machine
    stages, n_programs = len(machine.models) - 1, len(series.programs)
    fabric = _fabric(machine.fabric, stages, pipelines)
    programs = [
        _copy(timed, stages, p, pipelines, machine.fabric) for p in range(pipelines) for timed in series.programs
    ]
    is_async = [model.async_copies for model in machine.models[:-1]] * pipelines + [machine.models[-1].async_copies]
    requested = (_shifted(series.jobs, k % pipelines * n_programs) for k in range(requests))
    return simulate(
        is_async, fabric, programs, requested, seed=seed, check=check, demands=_demands(series, stages, pipelines)
    )


def _demands(series: Series, stages: int, pipelines: int) -> Demands:
    """What the copies of each program ask of the memory, where workers share it."""
    if not series.machine.fabric.shares_memory:
        return ()
    found: list[tuple[float, ...]] = []
    for p in range(pipelines):
        for demand in demands_of(series.lowered, series.programs, series.machine.models):
            row = [0.0] * (stages * pipelines + 1)
            for worker, asked in enumerate(demand):
                row[_worker(worker, stages, p, pipelines)] = asked
            found.append(tuple(row))
    return found


def _shifted(jobs: Sequence[Job], first: int) -> Iterator[Job]:
    """A copy of a series' jobs, made as they are asked for: there may be a thousand copies."""
    return (job._replace(program=job.program + first) for job in jobs)


def _worker(worker: int, stages: int, pipeline: int, pipelines: int) -> int:
    """A pipeline's worker among all: the host, its last, is everybody's last."""
    return worker + pipeline * stages if worker < stages else stages * pipelines


def _fabric(fabric: Fabric, stages: int, pipelines: int) -> Fabric:
    """Routes of every pipeline; media that have a segment's name are everybody's, and so are processors."""
    routes: list[Route] = []
    index = {}
    everybody = range(pipelines)
    for p in everybody:
        for (a, b), number in fabric.index.items():
            index[_worker(a, stages, p, pipelines), _worker(b, stages, p, pipelines)] = p * len(fabric.routes) + number
        routes += [replace(route, name=f"{route.name} ({p})") if pipelines > 1 else route for route in fabric.routes]
    pools = tuple(
        replace(pool, workers=frozenset(_worker(k, stages, p, pipelines) for k in pool.workers for p in everybody))
        for pool in fabric.pools
    )
    return Fabric(tuple(routes), index, fabric.capacity, fabric.media, pools)


def _copy(timed: Timed, stages: int, pipeline: int, pipelines: int, fabric: Fabric) -> Timed:
    workers: list[tuple[object, ...]] = [()] * (stages * pipelines + 1)
    for worker, acts in enumerate(timed.workers):
        workers[_worker(worker, stages, pipeline, pipelines)] = acts
    hops = tuple(
        hop._replace(
            source=_worker(hop.source, stages, pipeline, pipelines),
            target=_worker(hop.target, stages, pipeline, pipelines) if hop.target >= 0 else -1,
            route=hop.route + pipeline * len(fabric.routes),
        )
        for hop in timed.hops
    )
    return timed._replace(workers=tuple(workers), hops=hops)  # type: ignore[arg-type]
