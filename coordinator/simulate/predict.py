"""What a simulated request comes to: rates, shares of devices and links, and what the time went into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.simulate.critical import Part, critical_path
from coordinator.simulate.engine import simulate
from coordinator.simulate.pool import demands_of
from coordinator.simulate.series import Series
from coordinator.simulate.timed import Do
from coordinator.simulate.timeline import Timeline

PHASES = ("vision", "prompt", "token")
"""Tags of evaluations: images, micro-batches of the prompt, tokens after it."""


@dataclass(frozen=True, slots=True)
class LinkUse:
    """A route in one phase: bytes and transfers of an evaluation on average, and the share of the phase it is busy."""

    route: int
    nbytes: float
    transfers: float
    busy: float


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase: how many evaluations, seconds from the first's release to the last's end, the share of it that each
    device computes, links that carry something, and the parts of the critical path in it."""

    tag: str
    n: int
    seconds: float
    busy: tuple[float, ...]
    links: tuple[LinkUse, ...]
    path: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A request's times in seconds, for all requests together where there are several.

    `encode_s` per image, `first_token_s` until the last request's first token is known, `prompt_rate` and
    `decode_rate` in tokens per second (0: there are none), `end_s` all of it.
    """

    series: Series
    timeline: Timeline
    encode_s: float
    first_token_s: float
    prompt_rate: float
    decode_rate: float
    end_s: float
    phases: tuple[Phase, ...]

    @property
    def fits(self) -> bool:
        """True when every device has the memory."""
        return not self.series.short


def predict(series: Series, *, seed: int = 0, check: bool = False) -> Prediction:
    """Simulate a request with every slice kept. Raises PlanError when its programs wait for each other for ever."""
    load, machine = series.load, series.machine
    timeline = simulate(
        [model.async_copies for model in machine.models], machine.fabric, series.programs,
        [series.jobs] * load.n_requests, seed=seed, check=check, record=True,
        demands=demands_of(series.lowered, series.programs, machine.models) if machine.fabric.shares_memory else (),
    )  # fmt: skip
    phases = tuple(_phase(timeline, tag) for tag in PHASES if tag in timeline.tallies)
    spans = {phase.tag: phase.seconds for phase in phases}
    many, images = load.batch * load.n_requests, timeline.tallies.get("vision")
    return Prediction(
        series,
        timeline,
        encode_s=images.seconds / images.n if images is not None else 0.0,
        first_token_s=timeline.tallies["prompt"].last_s,
        prompt_rate=load.n_prompt * many / spans["prompt"] if spans.get("prompt") else 0.0,
        decode_rate=load.n_predict * many / spans["token"] if spans.get("token") else 0.0,
        end_s=timeline.end_s,
        phases=_with_paths(timeline, phases),
    )


def _phase(timeline: Timeline, tag: str) -> Phase:
    jobs, span = timeline.jobs, timeline.span(tag)
    n = timeline.tallies[tag].n
    busy = [0.0] * len(timeline.workers)
    for piece in timeline.slices:
        if piece.do in (Do.RUN, Do.COPY) and jobs[piece.job].tag == tag:
            busy[piece.worker] += piece.end - piece.start
    links: dict[int, list[float]] = {}
    for carried in timeline.carried:
        if jobs[carried.job].tag == tag:
            use = links.setdefault(carried.route, [0.0, 0.0, 0.0])
            use[0] += timeline.programs[jobs[carried.job].program].hops[carried.hop].nbytes
            use[1] += 1
            use[2] += carried.left - carried.start
    shares = tuple(seconds / span if span else 0.0 for seconds in busy)
    uses = tuple(LinkUse(r, u[0] / n, u[1] / n, u[2] / span if span else 0.0) for r, u in sorted(links.items()))
    return Phase(tag, n, span, shares, uses, ())


def _with_paths(timeline: Timeline, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    path = critical_path(timeline)
    return tuple(
        Phase(p.tag, p.n, p.seconds, p.busy, p.links, tuple(part for part in path if part.tag == p.tag)) for p in phases
    )


@dataclass(frozen=True, slots=True)
class Cause:
    """A share of the critical path: `kind` as in Part, `where` the worker or route; `splits` have seconds and the name
    of a tensor that was waited for, the most expensive first."""

    kind: str
    where: int
    seconds: float
    splits: tuple[tuple[int, float, str], ...]


def causes(parts: Iterable[Part]) -> list[Cause]:
    """What the path's time went into, the most first: computing by device, waiting by link and kind."""
    seconds: dict[tuple[str, int], dict[int, float]] = {}
    names: dict[tuple[str, int, int], tuple[float, str]] = {}
    for part in parts:
        splits = seconds.setdefault((part.kind, part.where), {})
        splits[part.split] = splits.get(part.split, 0.0) + part.seconds
        key = part.kind, part.where, part.split
        names[key] = max(names.get(key, (0.0, "")), (part.seconds, part.name))
    found = [
        Cause(kind, where, sum(splits.values()),
              tuple((s, t, names[kind, where, s][1]) for s, t in sorted(splits.items(), key=lambda i: (-i[1], i[0]))))
        for (kind, where), splits in seconds.items()
    ]  # fmt: skip
    return sorted(found, key=lambda cause: (-cause.seconds, cause.kind, cause.where))
