"""SOFT_MAX over rows with scale and mask, and DIAG_MASK_INF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import (
    INNER,
    SEGMENT,
    SEGMENT_NBYTES,
    dense_rows,
    extent,
    fetch,
    float_param,
    int_param,
    nelements,
    row_address,
    share,
    stride,
    word,
)
from workers.kernels.jit import float32, njit
from workers.kernels.simd import (
    add_f32x8,
    load_f32,
    load_f32x8,
    load_f32x8_part,
    max_f32x8,
    max_of_f32x8,
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
from workers.kernels.vecmath import exp8

DST, A, MASK = row.DST, row.SRC[0], row.SRC[1]
_MINUS_INFINITY = np.float32(-np.inf)


@njit(**INNER)
def _scaled(a: int, mask: int, o: int, n: int, scale: float, top: Any) -> Any:
    """o[i] = a[i] * scale + mask[i] (no mask: address 0); returns the larger of `top` and each lane's largest."""
    factor = splat_f32x8(scale)
    whole = n & ~7
    for i in range(0, 4 * whole, 32):
        x = mul_f32x8(load_f32x8(a + i), factor)
        if mask != 0:
            x = add_f32x8(x, load_f32x8(mask + i))
        store_f32x8(o + i, x)
        top = max_f32x8(x, top)
    for i in range(4 * whole, 4 * n, 4):
        y = load_f32(a + i) * scale
        if mask != 0:
            y += load_f32(mask + i)
        store_f32(o + i, y)
        top = max_f32x8(splat_f32x8(y), top)
    return top


@njit(**INNER)
def _exponentials(o: int, n: int, top: float) -> float:
    """o[i] = exp(o[i] - top); returns their sum."""
    t = splat_f32x8(top)
    s0, s1 = zero_f32x8(), zero_f32x8()
    i = 0
    while i + 16 <= n:
        x, y = exp8(sub_f32x8(load_f32x8(o + 4 * i), t)), exp8(sub_f32x8(load_f32x8(o + 4 * i + 32), t))
        store_f32x8(o + 4 * i, x)
        store_f32x8(o + 4 * i + 32, y)
        s0, s1 = add_f32x8(s0, x), add_f32x8(s1, y)
        i += 16
    while i < n:
        rest = min(8, n - i)
        if rest == 8:
            x = exp8(sub_f32x8(load_f32x8(o + 4 * i), t))
            store_f32x8(o + 4 * i, x)
        else:
            x = exp8(sub_f32x8(load_f32x8_part(o + 4 * i, rest), t))
            store_f32x8_part(o + 4 * i, x, rest)
            x = load_f32x8_part(o + 4 * i, rest)
        s0 = add_f32x8(s0, x)
        i += rest
    return sum_f32x8(add_f32x8(s0, s1))


@njit(**INNER)
def _times(o: int, n: int, factor: float) -> None:
    f = splat_f32x8(factor)
    whole = n & ~7
    for i in range(0, 4 * whole, 32):
        store_f32x8(o + i, mul_f32x8(load_f32x8(o + i), f))
    for i in range(4 * whole, 4 * n, 4):
        store_f32(o + i, load_f32(o + i) * factor)


@kernel
def soft_max(r: int, ith: int, nth: int) -> None:
    """AUX: rows. A row in which everything is masked becomes zeros."""
    scale, masked = float_param(r, 0), word(r, MASK) != 0
    n, n1, n2 = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2)
    mask_type, mask_step = word(r, MASK + row.DTYPE), stride(r, MASK, 0)
    scratch = word(r, row.WORK) + ith * SEGMENT_NBYTES
    first, last = share(word(r, row.AUX), ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a, o = row_address(r, A, i1, i2, i3), row_address(r, DST, i1, i2, i3)
        base = 0
        if masked:
            base = row_address(r, MASK, i1, i2 % extent(r, MASK, 2), i3 % extent(r, MASK, 3))
        lanes = splat_f32x8(_MINUS_INFINITY)
        for at in range(0, n, SEGMENT):
            size = min(SEGMENT, n - at)
            mask = fetch(base + at * mask_step, mask_step, mask_type, size, scratch) if masked else 0
            lanes = _scaled(a + 4 * at, mask, o + 4 * at, size, scale, lanes)
        top = max_of_f32x8(lanes)
        if top == _MINUS_INFINITY:
            for j in range(n):
                store_f32(o + 4 * j, float32(0.0))
        else:
            _times(o, n, float32(1.0) / _exponentials(o, n, top))


@kernel
def diag_mask_inf(r: int, ith: int, nth: int) -> None:
    """AUX: rows. Elements beyond n_past + row become -inf, the others are copied."""
    n_past = int_param(r, 0)
    n, n1, n2 = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2)
    first, last = share(word(r, row.AUX), ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a, o = row_address(r, A, i1, i2, i3), row_address(r, DST, i1, i2, i3)
        for j in range(n):
            store_f32(o + 4 * j, load_f32(a + 4 * j) if j <= n_past + i1 else _MINUS_INFINITY)


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """SOFT_MAX (no ALiBi; mask F32 or F16) and DIAG_MASK_INF of F32 with dense rows; None for anything else."""
    if not src or src[0] is None or (dst.dtype, src[0].dtype) != (DType.F32, DType.F32) or dst.ne != src[0].ne:
        return None
    if not dense_rows(dst) or not dense_rows(src[0]) or not params:
        return None
    rows = nelements(dst) // dst.ne[0]
    if op is Op.DIAG_MASK_INF:
        return (Stage(diag_mask_inf, aux=(rows,)),)
    if op is not Op.SOFT_MAX or any(s is not None for s in src[2:]) or (len(params) > 1 and params[1] != 0):
        return None
    mask = src[1] if len(src) > 1 else None
    if mask is not None and not _fits(mask, dst):
        return None
    return (Stage(soft_max, work_nbytes=threads * SEGMENT_NBYTES, aux=(rows,)),)


def _fits(mask: Operand, x: Operand) -> bool:
    """A mask of as many columns and at least as many rows, repeated over heads and batches."""
    types = (DType.F32, DType.F16)
    repeats = x.ne[2] % mask.ne[2] == 0 and x.ne[3] % mask.ne[3] == 0
    return mask.dtype in types and mask.ne[0] == x.ne[0] and mask.ne[1] >= x.ne[1] and repeats
