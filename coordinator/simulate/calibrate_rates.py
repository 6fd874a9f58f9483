"""How far devices stand from the law of their class: factors from measured rows, drawn towards 1 when rows are few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median
from typing import Final

from coordinator.simulate.fit import Measured
from coordinator.simulate.rates import Ask, tokens_per_s

SHRINK: Final = 0.5
"""So many rows that say "as the law has it" are added to those of a device."""


@dataclass(frozen=True, slots=True)
class Factor:
    """Measured over predicted rate in decode and in prompts, and the rows behind it."""

    decode: float
    prompt: float
    rows: tuple[str, ...]


def factors(cases: Sequence[Measured], ask: Ask, shrink: float = SHRINK) -> dict[str, Factor]:
    """By device: rows of one device alone that is not calibrated yet (its spec's factors must be 1)."""
    by_device: dict[str, list[Measured]] = {}
    for measured in cases:
        by_device.setdefault(measured.case.specs[0].name, []).append(measured)
    return {name: _factor(rows, ask, shrink) for name, rows in sorted(by_device.items())}


def _factor(rows: Sequence[Measured], ask: Ask, shrink: float) -> Factor:
    logs: Mapping[str, list[float]] = {"decode": [], "prompt": []}
    for measured in rows:
        logs[measured.case.test.kind].append(log(measured.tps / tokens_per_s(measured.case, ask)))
    decode, prompt = (_pooled(logs[kind], shrink) for kind in ("decode", "prompt"))
    return Factor(decode, prompt, tuple(m.case.row.ident for m in rows))


def _pooled(logs: Sequence[float], shrink: float) -> float:
    return exp(median(logs) * len(logs) / (len(logs) + shrink)) if logs else 1.0
