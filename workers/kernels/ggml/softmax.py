"""SOFT_MAX: ggml's own exponentials; vectors of eight are added up in F32, their sums in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import INNER, extent, float_param, nelements, read_float, row_address, share, stride, word
from workers.kernels.ggml.functions import exp8, expf
from workers.kernels.jit import float32, float64, njit
from workers.kernels.simd import (
    load_f32,
    load_f32x8,
    max_f32,
    splat_f32x8,
    store_f32,
    store_f32x8,
    sub_f32x8,
    sum_f32x8,
)
from workers.kernels.stage import Operand, Stage, kernel

DST, A, MASK = row.DST, row.SRC[0], row.SRC[1]
_LOW = np.float32(-np.inf)


@njit(**INNER)
def _exponentials(o: int, n: int, top: float) -> float:
    """o[i] = exp(o[i] - top); returns their sum."""
    total, whole = float64(0.0), n & ~7
    for i in range(0, 4 * whole, 32):
        x = exp8(sub_f32x8(load_f32x8(o + i), splat_f32x8(top)))
        store_f32x8(o + i, x)
        total += float64(sum_f32x8(x))
    for i in range(4 * whole, 4 * n, 4):
        y = expf(load_f32(o + i) - top)
        store_f32(o + i, y)
        total += float64(y)
    return total


@kernel
def ggml_soft_max(r: int, ith: int, nth: int) -> None:
    """AUX: rows."""
    n, n1, n2, scale = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2), float_param(r, 0)
    mask_type, step = word(r, MASK + row.DTYPE), stride(r, MASK, 0)
    first, last = share(word(r, row.AUX), ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a, o = row_address(r, A, i1, i2, i3), row_address(r, DST, i1, i2, i3)
        mask, top = 0, _LOW
        if word(r, MASK) != 0:
            mask = row_address(r, MASK, i1, i2 % extent(r, MASK, 2), i3 % extent(r, MASK, 3))
        for j in range(n):
            x = load_f32(a + 4 * j) * scale
            if mask != 0:
                x = x + read_float(mask + j * step, mask_type)
            store_f32(o + 4 * j, x)
            top = max_f32(x, top)
        if top == _LOW:
            for j in range(n):
                store_f32(o + 4 * j, float32(0.0))
        else:
            factor = float32(float64(1.0) / _exponentials(o, n, top))
            for j in range(n):
                store_f32(o + 4 * j, load_f32(o + 4 * j) * factor)


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """SOFT_MAX of what the default kernel takes."""
    return (Stage(ggml_soft_max, aux=(nelements(dst) // dst.ne[0],)),)
