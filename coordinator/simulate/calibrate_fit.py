"""From measured times to the costs of a device model: least squares of relative errors, nothing below zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.simulate.hardware import Cost, Toll, Work

_TERMS: Final = ("op_s", "weight_s", "missed_s", "byte_s", "flop_s", "missed_op_s", "line_s", "exp_s")


@dataclass(frozen=True, slots=True)
class Sample:
    """`seconds` of one op of this work. `missed`: its weights came from memory, not out of the cache."""

    work: Work
    seconds: float
    missed: bool = False
    name: str = ""


def fit_costs(samples: Sequence[Sample]) -> dict[str, Cost]:
    """The cost of every kind of op that was measured, by `Work.key`."""
    by_key: dict[str, list[Sample]] = {}
    for sample in samples:
        by_key.setdefault(sample.work.key, []).append(sample)
    return {key: fit_cost(found) for key, found in sorted(by_key.items())}


def fit_cost(samples: Sequence[Sample]) -> Cost:
    """The cost that comes closest to all samples of one kind, relative to each."""
    rows = [_features(sample) for sample in samples]
    seconds = np.array([sample.seconds for sample in samples])
    found = dict(zip(_TERMS, _non_negative(np.array(rows), seconds), strict=True))
    found["missed_s"] = max(found["missed_s"], found["weight_s"])
    return Cost(**found)


def _features(sample: Sample) -> tuple[float, ...]:
    work = sample.work
    hot, cold = (0, work.weight_nbytes) if sample.missed else (work.weight_nbytes, 0)
    moved = work.read_nbytes + work.write_nbytes + work.hidden_nbytes
    return 1.0, hot, cold, moved, work.flops, float(sample.missed), work.lines, work.exps


def _non_negative(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> list[float]:
    """Coefficients >= 0 with the smallest sum of squared relative errors: the best of all subsets of the terms."""
    relative = rows / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    usable = [i for i in range(rows.shape[1]) if scale[i] > 0.0]
    best, least = np.zeros(rows.shape[1]), np.inf
    for size in range(1, len(usable) + 1):
        for chosen in combinations(usable, size):
            columns = relative[:, chosen] / scale[list(chosen)]
            found, *_ = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=1e-9)
            error = float(((columns @ found - 1.0) ** 2).sum())
            if (found >= 0.0).all() and error < least * (1.0 - 1e-9):
                best, least = np.zeros(rows.shape[1]), error
                best[list(chosen)] = found / scale[list(chosen)]
    return [float(x) for x in best]


def errors(samples: Sequence[Sample], costs: Mapping[str, Cost]) -> dict[str, list[float]]:
    """Relative errors of the fitted costs on their own samples, by key."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        cost = costs[sample.work.key]
        predicted = cost.seconds(sample.work, 1.0 if sample.missed else 0.0)
        found.setdefault(sample.work.key, []).append(predicted / sample.seconds - 1.0)
    return found


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(constant, slope) of y over x by relative errors, neither below zero."""
    rows = np.array([(1.0, x) for x, _ in points])
    constant, slope = _non_negative(rows, np.array([y for _, y in points]))
    return constant, slope


def fit_mixed(
    mixtures: Sequence[tuple[Sequence[Work], float, bool]], costs: Mapping[str, Cost], samples: Sequence[Sample] = ()
) -> Toll:
    """What an operation costs more among others than after its own kind: middle of what mixtures (works, seconds,
    missed) say, in the cache and from memory; nothing below zero.

    Where there is a sample of the same work alone it counts, and not what was fitted: of differences as small as these
    a fit's errors would be most.
    """
    known = {(sample.work, sample.missed): sample.seconds for sample in samples}
    found: dict[bool, list[float]] = {False: [0.0], True: [0.0]}
    for works, seconds, missed in mixtures:
        alone_s = sum(known.get((work, missed)) or costs[work.key].seconds(work, float(missed)) for work in works)
        found[missed].append((seconds - alone_s) / len(works))
    hot, cold = (max(0.0, median(found[missed][1:] or found[missed])) for missed in (False, True))
    return Toll(hot, max(0.0, cold - hot))


def fit_sums(rows: Sequence[tuple[Sequence[float], float]]) -> list[float]:
    """Prices >= 0 from rows of (how many of each, seconds of all): least squares of relative errors."""
    return _non_negative(np.array([counts for counts, _ in rows]), np.array([seconds for _, seconds in rows]))


def typical(values: Sequence[float]) -> float:
    """What work takes when nobody disturbs it: the median of the lowest eighth of its samples, at least three. On a
    busy machine most samples say what the neighbours do."""
    ordered = sorted(values)
    return median(ordered[: max(3, len(ordered) // 8)])


def noise(values: Sequence[float]) -> float:
    """How much longer the middle sample took than a typical one, as a fraction."""
    return median(values) / typical(values) - 1.0
