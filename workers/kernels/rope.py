"""ROPE: rotates pairs of a head's elements by angles that grow with the position."""

from __future__ import annotations

import math
from collections.abc import Sequence

from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import (
    INNER,
    contiguous,
    dense_rows,
    extent,
    float_param,
    int_param,
    nelements,
    row_address,
    share,
    stride,
    word,
)
from workers.kernels.jit import float64, njit
from workers.kernels.simd import (
    fma_f32x8,
    load_f32,
    load_f32x8,
    load_f32x8_part,
    load_i32,
    mul_f32x8,
    store_f32,
    store_f32x8,
    store_f32x8_part,
    store_f64,
)
from workers.kernels.stage import Operand, Stage, kernel
from workers.kernels.vecmath import alternate8, neg8, spread_high8, spread_low8, swap_pairs8, turn8

DST, A, POSITIONS, FACTORS = row.DST, row.SRC[0], row.SRC[1], row.SRC[2]
_NEOX = 2
_MODES = (0, _NEOX)


@njit(**INNER)
def _angles(r: int, position: float, step: float, n_dims: int, mode: int, cos: int, sin: int, angles: int) -> None:
    """Fill the tables of a position, in float64 but for the result; `step` leads from one frequency to the next.

    Mode 0: n_dims values each, one per element, the sine's sign turned for the first of a pair; mode 2: n_dims / 2
    values each, one per pair.
    """
    frequency = float64(float_param(r, 6))
    factors = word(r, FACTORS)
    for i in range(n_dims // 2):
        angle = position * frequency
        if factors != 0:
            angle /= float64(load_f32(factors + i * stride(r, FACTORS, 0)))
        store_f64(angles + 8 * i, angle)
        frequency *= step
    magnitude = float64(float_param(r, 8))
    for i in range(0, n_dims // 2, 8):
        turn8(angles + 8 * i, magnitude)
        c, s = load_f32x8(angles + 8 * i), load_f32x8(angles + 8 * i + 32)
        if mode == _NEOX:
            store_f32x8(cos + 4 * i, c)
            store_f32x8(sin + 4 * i, s)
        else:
            store_f32x8(cos + 8 * i, spread_low8(c))
            store_f32x8(cos + 8 * i + 32, spread_high8(c))
            store_f32x8(sin + 8 * i, alternate8(spread_low8(s)))
            store_f32x8(sin + 8 * i + 32, alternate8(spread_high8(s)))


@njit(**INNER)
def _rotate_neighbours(a: int, o: int, n: int, cos: int, sin: int) -> None:
    """Pairs (2i, 2i + 1)."""
    whole = n & ~7
    for i in range(0, 4 * whole, 32):
        x = load_f32x8(a + i)
        turned = mul_f32x8(swap_pairs8(x), load_f32x8(sin + i))
        store_f32x8(o + i, fma_f32x8(x, load_f32x8(cos + i), turned))
    rest, i = n - whole, 4 * whole
    if rest > 0:
        x = load_f32x8_part(a + i, rest)
        turned = mul_f32x8(swap_pairs8(x), load_f32x8_part(sin + i, rest))
        store_f32x8_part(o + i, fma_f32x8(x, load_f32x8_part(cos + i, rest), turned), rest)


@njit(**INNER)
def _rotate_halves(a: int, o: int, half: int, cos: int, sin: int) -> None:
    """Pairs (i, i + half)."""
    far = 4 * half
    whole = half & ~7
    for i in range(0, 4 * whole, 32):
        x, y, c, s = load_f32x8(a + i), load_f32x8(a + far + i), load_f32x8(cos + i), load_f32x8(sin + i)
        store_f32x8(o + i, fma_f32x8(x, c, neg8(mul_f32x8(y, s))))
        store_f32x8(o + far + i, fma_f32x8(y, c, mul_f32x8(x, s)))
    rest, i = half - whole, 4 * whole
    if rest > 0:
        x, y = load_f32x8_part(a + i, rest), load_f32x8_part(a + far + i, rest)
        c, s = load_f32x8_part(cos + i, rest), load_f32x8_part(sin + i, rest)
        store_f32x8_part(o + i, fma_f32x8(x, c, neg8(mul_f32x8(y, s))), rest)
        store_f32x8_part(o + far + i, fma_f32x8(y, c, mul_f32x8(x, s)), rest)


@kernel
def rope(r: int, ith: int, nth: int) -> None:
    """AUX: rows, bytes of scratch per thread."""
    rows, room = word(r, row.AUX), word(r, row.AUX + 1)
    n_dims, mode = int_param(r, 1), int_param(r, 2)
    n0, n1, n2 = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2)
    cos = word(r, row.WORK) + ith * room
    sin, angles = cos + room // 3, cos + 2 * (room // 3)
    step = math.pow(float64(float_param(r, 5)), -2.0 / n_dims)
    known = -1  # the token that the tables are for
    first, last = share(rows, ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        if i2 != known:
            known = i2
            position = load_i32(word(r, POSITIONS) + i2 * stride(r, POSITIONS, 0))
            _angles(r, float64(position), step, n_dims, mode, cos, sin, angles)
        a, o = row_address(r, A, i1, i2, i3), row_address(r, DST, i1, i2, i3)
        if mode == _NEOX:
            _rotate_halves(a, o, n_dims // 2, cos, sin)
        else:
            _rotate_neighbours(a, o, n_dims, cos, sin)
        if a != o:
            for j in range(4 * n_dims, 4 * n0, 4):
                store_f32(o + j, load_f32(a + j))


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """ROPE of F32 in modes 0 and 2 without YaRN's ramp; None for anything else."""
    if op is not Op.ROPE or len(src) < 2 or src[0] is None or src[1] is None or len(params) < 9:
        return None
    x, positions, factors = src[0], src[1], src[2] if len(src) > 2 else None
    n_dims, mode, ext_factor = params[1], params[2], params[7]
    if mode not in _MODES or ext_factor != 0 or n_dims % 2 or not 0 < n_dims <= x.ne[0]:
        return None
    if (dst.dtype, x.dtype, positions.dtype) != (DType.F32, DType.F32, DType.I32) or dst.ne != x.ne:
        return None
    if not dense_rows(x) or not dense_rows(dst) or positions.ne[0] < x.ne[2] or not contiguous(positions):
        return None
    if factors is not None and (factors.dtype != DType.F32 or factors.ne[0] < n_dims // 2):
        return None
    room = 3 * 4 * -(-int(n_dims) // 16) * 16  # cosines, sines and angles, by eight pairs
    return (Stage(rope, work_nbytes=threads * room, aux=(nelements(x) // x.ne[0], room)),)
