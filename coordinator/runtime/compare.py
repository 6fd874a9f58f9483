"""Where do two runs part? The first tensor that differs, by how much, and how far it spreads."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from coordinator.runtime.recording import Entry, Key, Recording
from coordinator.runtime.taps import Values
from protocol.errors import InputError

_LAYER = re.compile(r"(?:(global)\.)?blk\.(\d+)\.|(?:cache|cross)_[kv]_l(\d+)|-(\d+)(?: \(|$)")


@dataclass(frozen=True, slots=True)
class Change:
    """How two tensors of one shape differ: values that do, and the one that does most (numpy's order of extents).

    `distance` is its |a - b|, None where either is no finite number; then `at` is the first such.
    """

    n_values: int
    n_differ: int
    at: tuple[int, ...]
    a: float
    b: float
    distance: float | None


@dataclass(frozen=True, slots=True)
class Part:
    """`n_differ` of the `n` tensors of an evaluation, or of a layer of a graph ("vision 0", "language global 1")."""

    label: str
    n_differ: int
    n: int


@dataclass(frozen=True, slots=True)
class First:
    """The first tensor that differs, as each run has it, behind `n_equal` equal ones."""

    a: Entry
    b: Entry
    n_equal: int
    change: Change | None


@dataclass(frozen=True, slots=True)
class TokenChange:
    """The first output token that differs, counted from 1; None where an answer has ended."""

    number: int
    a: tuple[int, str] | None
    b: tuple[int, str] | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side. `n_later` are the tensors behind the first that differs, `only_a` and `only_b` those
    that the other run does not have."""

    a: Recording
    b: Recording
    n_common: int
    only_a: int
    only_b: int
    first: First | None
    n_later: int
    n_later_differ: int
    evaluations: tuple[Part, ...]
    layers: tuple[Part, ...]
    token: TokenChange | None

    @property
    def differs(self) -> bool:
        """True when a tensor of both differs, the answer does, or one run was stopped and not so the other."""
        return self.first is not None or self.token is not None or self.a.end.stopped != self.b.end.stopped


def compare(a: Recording, b: Recording) -> Comparison:
    """Match tensors by graph, evaluation and name, and walk them in the order of `a`'s evaluations.

    Raises InputError when no tensor is in both.
    """
    others = {entry.key: entry for entry in b.entries}
    pairs = [(entry, others[entry.key]) for entry in a.entries if entry.key in others]
    if not pairs and (a.entries or b.entries):
        raise InputError(f"{a.label} and {b.label} have no tensor in common: nothing to compare")
    differ = [not same(x, y) for x, y in pairs]
    at = differ.index(True) if True in differ else len(pairs)
    first = None
    if at < len(pairs):
        x, y = pairs[at]
        first = First(x, y, at, _change(a.values.get(x.key), b.values.get(x.key)))
    evaluations: dict[str, list[bool]] = {}
    layers: dict[str, list[bool]] = {}
    for (entry, _), changed in zip(pairs[at:], differ[at:], strict=True):
        evaluations.setdefault(f"{entry.graph} {entry.evaluation}", []).append(changed)
        layer = layer_of(entry.key)
        if layer:
            layers.setdefault(layer, []).append(changed)
    return Comparison(
        a,
        b,
        n_common=len(pairs),
        only_a=len(a.entries) - len(pairs),
        only_b=len(b.entries) - len(pairs),
        first=first,
        n_later=max(len(pairs) - at - 1, 0),
        n_later_differ=sum(differ[at + 1 :]),
        evaluations=_parts(evaluations),
        layers=tuple(sorted(_parts(layers), key=_layer_order)),
        token=first_token(a, b),
    )


def same(a: Entry, b: Entry) -> bool:
    """True for equal bytes of equal type and shape."""
    return a.sha256 == b.sha256 and a.type == b.type and a.ne == b.ne


def layer_of(key: Key) -> str:
    """`language 3`, `vision 0`, `vision global 1` by a tensor's name; "" where it names no layer."""
    found = _LAYER.search(key[2])
    if found is None:
        return ""
    middle = " global" if found[1] else ""
    return f"{key[0]}{middle} {found[2] or found[3] or found[4]}"


def first_token(a: Recording, b: Recording) -> TokenChange | None:
    """The first output token that differs, None when answers are equal."""
    tokens = [list(zip(run.end.tokens, run.end.texts, strict=True)) for run in (a, b)]
    for number in range(max(map(len, tokens))):
        x, y = (run[number] if number < len(run) else None for run in tokens)
        if x is None or y is None or x[0] != y[0]:
            return TokenChange(number + 1, x, y)
    return None


def _parts(found: dict[str, list[bool]]) -> tuple[Part, ...]:
    return tuple(Part(label, sum(changed), len(changed)) for label, changed in found.items())


def _layer_order(part: Part) -> tuple[bool, str, int]:
    """Vision before language, layers by number."""
    where, _, number = part.label.rpartition(" ")
    return where.startswith("language"), where, int(number)


def _change(a: Values | None, b: Values | None) -> Change | None:
    """None when values are not at hand, or are not comparable one by one."""
    if a is None or b is None or a.shape != b.shape:
        return None
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    differ = ~((wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b)))
    if not differ.any():  # other bytes of the same numbers: 0 and -0, or another NaN
        return Change(a.size, 0, (), 0.0, 0.0, 0.0)
    with np.errstate(invalid="ignore"):
        distance = np.where(differ, np.abs(wide_a - wide_b), 0.0)
    strange = differ & ~np.isfinite(distance)
    flat = int(np.argmax(strange if strange.any() else distance))
    at = tuple(map(int, np.unravel_index(flat, a.shape)))
    largest = None if strange.any() else float(distance[at])
    return Change(a.size, int(differ.sum()), at, float(wide_a[at]), float(wide_b[at]), largest)
