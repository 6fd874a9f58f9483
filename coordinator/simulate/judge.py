"""Judging the laws on devices that their constants have not seen, in random splits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Final

from coordinator.simulate.calibrate_rates import factors
from coordinator.simulate.claims import PROMISES, Promise, fault_of, group_of
from coordinator.simulate.fit import Measured, defaults, fit_class
from coordinator.simulate.hosts import calibrate_host, host_name, usual_host
from coordinator.simulate.law import Constants
from coordinator.simulate.rates import Ask, tokens_per_s

N_SPLITS: Final = 20
HELD_OUT: Final = 0.5
"""The share of a class's devices that is judged; the constants are fitted to the others."""

FITTED: Final = ("nvidia", "nvidia-old", "amd", "apple", "intel", "cpu")
_KINDS: Final = ("decode", "prompt")


@dataclass(frozen=True, slots=True)
class Judged:
    """A row that was predicted by constants fitted without its device; `error` is predicted / measured - 1."""

    ident: str
    group: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative error of the rate."""
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A promise against the splits: median and worst mean absolute error, the share of rows within 15 %."""

    promise: Promise
    n_rows: int
    n_devices: int
    median: float
    worst: float
    within: float

    @property
    def kept(self) -> bool:
        """True when the data support the promise."""
        return self.n_rows > 0 and self.median <= self.promise.limit


def plain(measured: Measured) -> Measured:
    """The same with nothing known of its devices but their specifications."""
    specs = tuple(replace(spec, k_decode=1.0, k_prompt=1.0) for spec in measured.case.specs)
    return Measured(replace(measured.case, specs=specs), measured.tps)


def fair(cases: Sequence[Measured]) -> list[Measured]:
    """Rows that are no faults."""
    return [plain(m) for m in cases if not fault_of(m.case)]


def fitting(cases: Sequence[Measured], cls: str) -> list[Measured]:
    """The rows that a class's constants are fitted to: one device, dense models, its usual backend and host."""
    return [
        m for m in cases
        if m.case.mode == "one" and m.case.specs[0].cls == cls and not m.case.load.experts and not m.case.row.group
    ]  # fmt: skip


def layered(cases: Sequence[Measured]) -> list[Measured]:
    """The rows that the constants of layer splits are fitted to."""
    return [m for m in cases if group_of(m.case) in ("decode layers", "prompt layers")]


def fit_all(cases: Sequence[Measured]) -> dict[str, Constants]:
    """The constants of all classes from fair rows, those of layer splits last."""
    base = defaults()
    found = {cls: fit_class(cls, fitting(cases, cls), Ask(base)) for cls in FITTED}
    found["layers"] = fit_class("layers", layered(cases), Ask(lambda cls: found.get(cls) or base(cls)))
    return found


def judge(cases: Sequence[Measured], *, n_splits: int = N_SPLITS, seed: int = 0,
          progress: Callable[[int], None] = lambda _: None) -> tuple[list[Verdict], list[Judged]]:  # fmt: skip
    """Every promise against `n_splits` random splits by device; and all judged rows."""
    fair_cases = fair(cases)
    draws: list[list[Judged]] = []
    for i in range(n_splits):
        draws.append(_split(fair_cases, random.Random(seed * 1_000_003 + i)))
        progress(i + 1)
    fixed = _offload(fair_cases)
    verdicts = [_verdict(p, [*draws, fixed] if p.group == "decode offload" else draws, fair_cases) for p in PROMISES]
    return verdicts, [*(row for draw in draws for row in draw), *fixed]


def _split(cases: Sequence[Measured], draw: random.Random) -> list[Judged]:
    devices = sorted({m.case.specs[0].name for m in cases if m.case.specs})
    by_class: dict[str, list[str]] = {}
    for name in devices:
        cls = next(m.case.specs[0].cls for m in cases if m.case.specs and m.case.specs[0].name == name)
        by_class.setdefault(cls, []).append(name)
    held: set[str] = set()
    for names in by_class.values():
        held |= set(draw.sample(names, max(1, round(len(names) * HELD_OUT))))
    seen = [m for m in cases if m.case.specs and not any(spec.name in held for spec in m.case.specs)]
    unseen = [m for m in cases if m.case.specs and any(spec.name in held for spec in m.case.specs)]
    laws = fit_all(seen)
    ask = Ask(laws.__getitem__)
    judged = [_judged(m, ask) for m in unseen if group_of(m.case) not in ("decode cpu", "decode rpc", "decode offload")]
    return judged + _cpus(unseen, ask, draw) + _rpc(unseen, ask)


def _judged(measured: Measured, ask: Ask) -> Judged:
    case = measured.case
    return Judged(case.row.ident, group_of(case), measured.tps, tokens_per_s(case, ask))


def _cpus(unseen: Sequence[Measured], ask: Ask, draw: random.Random) -> list[Judged]:
    """Each CPU is calibrated by one of its rows and judged by the others."""
    found = []
    cpus = [m for m in unseen if group_of(m.case) == "decode cpu"]
    for name in sorted({m.case.specs[0].name for m in cpus}):
        rows = [m for m in cpus if m.case.specs[0].name == name]
        chosen = draw.choice(rows)
        k = factors([chosen], ask, shrink=0.0)[name].decode
        for m in rows:
            if m is not chosen:
                specs = tuple(replace(spec, k_decode=k) for spec in m.case.specs)
                found.append(_judged(Measured(replace(m.case, specs=specs), m.tps), ask))
    return found


def _rpc(unseen: Sequence[Measured], ask: Ask) -> list[Judged]:
    """RPC is judged where the same model was measured on one such device without it."""
    alone = {
        (m.case.specs[0].name, m.case.row.model, m.case.row.quant): m
        for m in unseen if m.case.test.kind == "decode" and not m.case.remote and len(m.case.specs) == 1
    }  # fmt: skip
    found = []
    for m in unseen:
        key = (m.case.specs[0].name, m.case.row.model, m.case.row.quant)
        if group_of(m.case) == "decode rpc" and m.case.remote and key in alone:
            k = factors([alone[key]], ask, shrink=0.0)[key[0]].decode
            specs = tuple(replace(spec, k_decode=k) for spec in m.case.specs)
            found.append(_judged(Measured(replace(m.case, specs=specs), m.tps), ask))
    return found


def _offload(cases: Sequence[Measured]) -> list[Judged]:
    """Each machine is calibrated by its rows with the fewest and with the most layers on the GPU."""
    machines: dict[tuple[str, str, str], list[Measured]] = {}
    for m in cases:
        if group_of(m.case) == "decode offload":
            machines.setdefault((m.case.row.hardware, m.case.row.model, m.case.test.kind), []).append(m)
    found = []
    for rows in machines.values():
        rows.sort(key=lambda m: m.case.share)
        if len(rows) > 2:
            ends = [rows[0], rows[-1]]
            host = calibrate_host([(m.case, m.tps) for m in ends], usual_host(rows[0].case))
            ask = Ask(defaults(), {host_name(rows[0].case.row.hardware, rows[0].case.row.model): host})
            found += [_judged(m, ask) for m in rows[1:-1]]
    return found


def _verdict(promise: Promise, draws: Sequence[Sequence[Judged]], cases: Sequence[Measured]) -> Verdict:
    errors = [[abs(row.error) for row in draw if row.group == promise.group] for draw in draws]
    errors = [found for found in errors if found]
    idents = {row.ident for draw in draws for row in draw if row.group == promise.group}
    names = {m.case.row.hardware for m in cases if m.case.row.ident in idents}
    if not errors:
        return Verdict(promise, 0, 0, 0.0, 0.0, 0.0)
    means = [mean(found) for found in errors]
    within = mean(mean(e <= 0.15 for e in found) for found in errors)
    return Verdict(promise, len(idents), len(names), median(means), max(means), within)


def summary(rows: Sequence[Judged]) -> Mapping[str, tuple[int, float, float]]:
    """By group: how many rows, their mean absolute error, and the median signed error."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row.error)
    return {group: (len(e), mean(abs(x) for x in e), median(e)) for group, e in sorted(groups.items())}
