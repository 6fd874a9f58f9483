"""Fitting the constants of a class to measured rates: robust least squares of logarithms, with weak priors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coordinator.simulate.cases import Case
from coordinator.simulate.known import constants
from coordinator.simulate.law import Constants
from coordinator.simulate.rates import Ask, tokens_per_s

Array = NDArray[np.float64]

HUBER: Final = 0.05
"""Errors beyond this (of the logarithm) count linearly: tables have outliers."""

PRIOR_WEIGHT: Final = 0.03

PRIORS: Final[Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]] = {
    "nvidia": {
        "decode": {
            "eb": (0.9, 0.04), "q": (60, 0.4), "q@narrow": (0.75, 0.4), "c_us": (29, 0.4), "ekv": (0.4, 0.4),
            "q~2024.1": (0.77, 0.3), "q~2024.5": (0.83, 0.3), "c_us~2024.1": (1.1, 0.3), "c_us~2024.5": (1.1, 0.3),
            "q@q2_K": (0.25, 0.3), "q@q3_K": (0.25, 0.3),
        },
        "prompt": {
            "pp_quant": (0.55, 0.3), "pp_f16": (0.75, 0.3), "pp_quant@narrow": (0.65, 0.3), "pp_f16@wide": (1.5, 0.4),
            "power": (0.4, 0.5), "pp_quant~2024.1": (0.55, 0.4), "pp_quant~2024.5": (0.8, 0.3),
            "pp_f16~2024.1": (0.7, 0.3), "ppa": (0.2, 0.7),
        },
    },
    "nvidia-old": {
        "decode": {"eb": (0.8, 0.15), "q": (40, 0.5), "c_us": (40, 0.4), "q@q2_K": (0.4, 0.7), "q@q3_K": (0.4, 0.7)},
        "prompt": {"pp_quant": (0.3, 0.3), "pp_quant@maxwell": (0.5, 0.5)},
    },
    "amd": {
        "decode": {"eb": (0.9, 0.1), "c_us": (100, 0.4), "eb@cdna": (0.7, 0.5), "eb@gcn": (0.7, 0.5),
                   "c_us~2025.0": (1.3, 0.3)},
        "prompt": {"pp_quant": (0.35, 0.4), "pp_quant@rdna2": (1.5, 0.4), "pp_quant@gcn": (1.5, 0.4),
                   "pp_quant@cdna": (0.55, 0.4)},
    },
    "apple": {
        "decode": {"eb": (0.9, 0.05), "qk": (400, 0.7), "qk~2024.5": (0.5, 0.7), "c_us": (150, 0.4), "kvu": (4.5, 0.7),
                   "qk@m1": (0.8, 0.3), "c_us@m1": (1.1, 0.15), "c_us@m3": (0.9, 0.1), "c_us@m4": (0.8, 0.2),
                   "eb@ultra": (0.95, 0.1)},
        "prompt": {"pp_f16": (0.74, 0.2), "pp_quant": (0.75, 0.2), "pp_quant@K": (0.9, 0.1), "ppa": (0.3, 0.7),
                   "pp_quant@m3": (1.05, 0.1), "pp_quant@m4": (1.05, 0.1),
                   "pp_quant~2023.7": (0.5, 0.3), "pp_quant~2025.0": (0.9, 0.15)},
    },
    "intel": {
        "decode": {"eb": (0.6, 0.4), "c_us": (150, 0.5)},
        "prompt": {"pp_quant": (0.1, 0.7)},
    },
    "cpu": {
        "decode": {"eb": (0.65, 0.2), "c_us": (200, 0.5), "c_us_core": (5, 0.5)},
        "prompt": {"pp_quant": (0.6, 0.5)},
    },
    "layers": {
        "decode": {"hop_us": (200, 0.5)},
        "prompt": {"overlap": (0.75, 0.15), "overlap_layers": (17, 0.3)},
    },
}  # fmt: skip
"""What is fitted in each class, and what was believed before: a value, and how sure (of its logarithm)."""

FIXED: Final[Mapping[str, Mapping[str, float]]] = {
    "nvidia": {"watts": 2.4, "watts@ada": 2 / 3, "watts@blackwell": 2 / 3, "moe_us": 300, "pp_quant@vulkan": 0.75,
               "pp_f16~2024.5": 1.0},
    "nvidia-old": {"ekv": 0.36, "ppa": 0.2, "pp_f16": 0.15, "moe_us": 300},
    "amd": {"ekv": 0.3, "ppa": 0.2, "pp_f16": 0.4, "moe_us": 370},
    "apple": {"moe_us": 200},
    "intel": {"ekv": 0.3, "ppa": 0.1, "pp_f16": 0.2, "moe_us": 400},
    "cpu": {"ekv": 0.5, "ppa": 0.6, "pp_f16": 0.5, "moe_us": 400},
    "layers": {"hop_gbs": 4.8, "moe_prompt": 3.5},
}  # fmt: skip
"""What no rows of the class can tell apart, and was set."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A case with its measured rate in tokens/s."""

    case: Case
    tps: float


def fit_class(cls: str, cases: Sequence[Measured], ask: Ask | None = None) -> Constants:
    """The constants of a class from its cases, decode first and then prompts with those held."""
    values = dict(FIXED[cls])
    for stage in ("decode", "prompt"):
        values |= {name: prior for name, (prior, _) in PRIORS[cls][stage].items()}
    for stage in ("decode", "prompt"):
        chosen = [m for m in cases if m.case.test.kind == stage]
        if chosen:
            values |= _fit_stage(cls, values, PRIORS[cls][stage], chosen, ask or Ask())
    return Constants(values)


def _fit_stage(cls: str, held: Mapping[str, float], priors: Mapping[str, tuple[float, float]],
               cases: Sequence[Measured], ask: Ask) -> dict[str, float]:  # fmt: skip
    names = list(priors)
    start = np.log([value for value, _ in priors.values()])
    sure = np.array([sigma for _, sigma in priors.values()])
    often = Counter(_device(m.case) for m in cases)
    weights = np.array([often[_device(m.case)] ** -0.5 for m in cases])

    def residuals(x: Array) -> Array:
        law = Constants(dict(held) | {n: float(v) for n, v in zip(names, np.exp(x), strict=True)})
        asked = Ask(lambda other: law if other == cls else ask.constants(other), ask.hosts)
        errors = np.array([np.log(tokens_per_s(m.case, asked) / m.tps) for m in cases])
        return np.concatenate([weights * errors, PRIOR_WEIGHT * (x - start) / sure])

    found = minimise(residuals, start)
    return {name: float(value) for name, value in zip(names, np.exp(found), strict=True)}


def _device(case: Case) -> str:
    """Rows of one device weigh by the root of their number."""
    return case.row.hardware


def minimise(residuals: Callable[[Array], Array], start: Array, steps: int = 40) -> Array:
    """Levenberg and Marquardt on Huber's loss, reweighted in each step, with a numerical Jacobian."""
    x, damping = start.copy(), 1e-2
    r = residuals(x)
    cost = _huber(r)
    for _ in range(steps):
        jacobian = np.stack([(residuals(x + _unit(x, i)) - r) / 1e-5 for i in range(len(x))], axis=1)
        w = 1 / np.maximum(np.abs(r), HUBER)
        normal, gradient = (jacobian * w[:, None]).T @ jacobian, jacobian.T @ (w * r)
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -gradient)
            r_new = residuals(x + step)
            new = _huber(r_new)
            if new < cost:
                break
            damping *= 4
        else:
            return x
        x, r, gain, cost, damping = x + step, r_new, cost - new, new, max(damping / 4, 1e-7)
        if gain < 1e-6 * cost:
            return x
    return x


def _unit(x: Array, i: int) -> Array:
    step: Array = np.zeros_like(x)
    step[i] = 1e-5
    return step


def _huber(r: Array) -> float:
    a = np.abs(r)
    return float(np.sum(np.where(a < HUBER, a * a / 2, HUBER * (a - HUBER / 2))))


def defaults() -> Callable[[str], Constants]:
    """Constants as believed before any fit; for the first one."""
    found: dict[str, Any] = {}
    for cls, stages in PRIORS.items():
        values = dict(FIXED[cls])
        for priors in stages.values():
            values |= {name: value for name, (value, _) in priors.items()}
        found[cls] = Constants(values)
    return found.__getitem__


__all__ = ["FIXED", "PRIORS", "Measured", "constants", "defaults", "fit_class", "minimise"]
