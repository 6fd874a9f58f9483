"""RMS_NORM, NORM and SUM_ROWS: one number per row, from sums in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import INNER, dense_rows, extent, float_param, nelements, row_address, share, word
from workers.kernels.jit import float32, float64, njit
from workers.kernels.simd import (
    add_f32x8,
    fma_f32x8,
    load_f32,
    load_f32x8,
    load_f32x8_part,
    mul_f32x8,
    splat_f32x8,
    store_f32,
    store_f32x8,
    store_f32x8_part,
    sub_f32x8,
    sum_f32x8,
    zero_f32x8,
)
from workers.kernels.stage import Operand, Stage, kernel

DST, A = row.DST, row.SRC[0]


@njit(**INNER)
def _sum(a: int, n: int) -> float:
    """Sum of n floats in 32 lanes."""
    s0, s1, s2, s3 = zero_f32x8(), zero_f32x8(), zero_f32x8(), zero_f32x8()
    i = 0
    while i + 32 <= n:
        s0 = add_f32x8(s0, load_f32x8(a + 4 * i))
        s1 = add_f32x8(s1, load_f32x8(a + 4 * i + 32))
        s2 = add_f32x8(s2, load_f32x8(a + 4 * i + 64))
        s3 = add_f32x8(s3, load_f32x8(a + 4 * i + 96))
        i += 32
    while i + 8 <= n:
        s0 = add_f32x8(s0, load_f32x8(a + 4 * i))
        i += 8
    if i < n:
        s1 = add_f32x8(s1, load_f32x8_part(a + 4 * i, n - i))
    return sum_f32x8(add_f32x8(add_f32x8(s0, s1), add_f32x8(s2, s3)))


@njit(**INNER)
def _sum_squares(a: int, n: int, mean: float) -> float:
    """Sum of (a[i] - mean)**2 in 32 lanes."""
    m = splat_f32x8(mean)
    s0, s1, s2, s3 = zero_f32x8(), zero_f32x8(), zero_f32x8(), zero_f32x8()
    i = 0
    while i + 32 <= n:
        v0, v1 = sub_f32x8(load_f32x8(a + 4 * i), m), sub_f32x8(load_f32x8(a + 4 * i + 32), m)
        v2, v3 = sub_f32x8(load_f32x8(a + 4 * i + 64), m), sub_f32x8(load_f32x8(a + 4 * i + 96), m)
        s0, s1, s2, s3 = fma_f32x8(v0, v0, s0), fma_f32x8(v1, v1, s1), fma_f32x8(v2, v2, s2), fma_f32x8(v3, v3, s3)
        i += 32
    while i + 8 <= n:
        v0 = sub_f32x8(load_f32x8(a + 4 * i), m)
        s0 = fma_f32x8(v0, v0, s0)
        i += 8
    total = sum_f32x8(add_f32x8(add_f32x8(s0, s1), add_f32x8(s2, s3)))
    while i < n:
        x = load_f32(a + 4 * i) - mean
        total += x * x
        i += 1
    return total


@njit(**INNER)
def _shift_scale(a: int, o: int, n: int, mean: float, factor: float) -> None:
    """o[i] = (a[i] - mean) * factor."""
    m, f = splat_f32x8(mean), splat_f32x8(factor)
    whole = n & ~7
    for i in range(0, whole, 8):
        store_f32x8(o + 4 * i, mul_f32x8(sub_f32x8(load_f32x8(a + 4 * i), m), f))
    if n > whole:
        x = load_f32x8_part(a + 4 * whole, n - whole)
        store_f32x8_part(o + 4 * whole, mul_f32x8(sub_f32x8(x, m), f), n - whole)


@kernel
def norm(r: int, ith: int, nth: int) -> None:
    """AUX: 1 to subtract the mean (NORM), 0 to leave it (RMS_NORM); rows."""
    centred, rows, eps = word(r, row.AUX), word(r, row.AUX + 1), float64(float_param(r, 0))
    n, n1, n2 = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2)
    first, last = share(rows, ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a = row_address(r, A, i1, i2, i3)
        mean = float32(0.0)
        if centred:
            mean = float32(_sum(a, n) / float64(n))
        variance = _sum_squares(a, n, mean) / float64(n)
        factor = float32(1.0 / np.sqrt(variance + eps))
        _shift_scale(a, row_address(r, DST, i1, i2, i3), n, mean, factor)


@kernel
def sum_rows(r: int, ith: int, nth: int) -> None:
    """AUX: rows."""
    n, n1, n2 = extent(r, A, 0), extent(r, A, 1), extent(r, A, 2)
    first, last = share(word(r, row.AUX), ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        store_f32(row_address(r, DST, i1, i2, i3), _sum(row_address(r, A, i1, i2, i3), n))


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """RMS_NORM, NORM and SUM_ROWS of F32 with dense rows; None for anything else."""
    if not src or src[0] is None or dst.dtype != DType.F32 or src[0].dtype != DType.F32:
        return None
    a = src[0]
    if not dense_rows(a) or not dense_rows(dst) or dst.ne[1:] != a.ne[1:]:
        return None
    rows = nelements(a) // a.ne[0]
    if op is Op.SUM_ROWS and dst.ne[0] == 1:
        return (Stage(sum_rows, aux=(rows,)),)
    if op in (Op.NORM, Op.RMS_NORM) and dst.ne == a.ne and params:
        return (Stage(norm, aux=(int(op is Op.NORM), rows)),)
    return None
