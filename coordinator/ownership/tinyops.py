"""A few ops on float32 arrays: enough to see whose bytes are read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from protocol.errors import InputError
from protocol.ops import MAX_SRC

Floats = npt.NDArray[np.float32]
Params = tuple[int | float, ...]


def _scale(params: Params, x: Floats) -> Floats:
    scale, bias = (*params, 0.0, 0.0)[:2] if params else (1.0, 0.0)
    return x * np.float32(scale) + np.float32(bias)


def _concat(params: Params, *parts: Floats) -> Floats:
    return np.concatenate(parts)


TINY: dict[str, Callable[..., Floats]] = {
    "ADD": lambda params, x, y: x + _like(y, x),
    "SUB": lambda params, x, y: x - _like(y, x),
    "MUL": lambda params, x, y: x * _like(y, x),
    "MUL_MAT": lambda params, x, y: _like(x, y) * y,
    "SCALE": _scale,
    "SQR": lambda params, x: x * x,
    "DUP": lambda params, x: x,
    "CONT": lambda params, x: x,
    "CPY": lambda params, x: x,
    "CONCAT": _concat,
    "REPEAT": lambda params, x: x,
}
"""What each op gives. MUL_MAT is a product element by element here: shapes do not matter to ownership."""

SOURCES = {
    "ADD": (2, 2), "SUB": (2, 2), "MUL": (2, 2), "MUL_MAT": (2, 2), "SCALE": (1, 1), "SQR": (1, 1), "DUP": (1, 1),
    "CONT": (1, 1), "CPY": (1, 2), "CONCAT": (1, MAX_SRC), "REPEAT": (1, 1),
}  # fmt: skip
"""Least and most sources of each; the second of CPY is where it writes."""


def compute(op: str, params: Params, sources: list[Floats], size: int) -> Floats:
    """`size` elements. Raises InputError for an op that scenarios do not have."""
    if op not in TINY:
        raise InputError(f"scenarios have no op {op}: expected one of {', '.join(TINY)}")
    out = TINY[op](params, *sources)
    return np.resize(out, size).astype(np.float32)


def _like(y: Floats, x: Floats) -> Floats:
    return y if y.size == x.size else np.resize(y, x.size)
