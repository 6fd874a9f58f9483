"""Ops that arrange elements anew: CONCAT, PAD, UNPAD, REPEAT, ACC and IM2COL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import (
    FLOATS,
    INNER,
    dense_rows,
    extent,
    int_param,
    nelements,
    read_float,
    row_address,
    share,
    stride,
    word,
    write_float,
)
from workers.kernels.copy import copy_stage, move
from workers.kernels.jit import njit
from workers.kernels.simd import (
    add_f32x8,
    load_f32,
    load_f32x8,
    store_f32,
    store_f32x8,
    store_u8,
    store_u32,
)
from workers.kernels.stage import Operand, Stage, kernel

DST, A, B = row.DST, row.SRC[0], row.SRC[1]

_ZERO = np.float32(0.0)
_MOVABLE = frozenset({DType.F32, DType.F16, DType.BF16, DType.I32})


@njit(**INNER)
def _clear(target: int, step: int, size: int, n: int) -> None:
    """Write n zeros of `size` bytes."""
    for i in range(n):
        if size == 4:
            store_u32(target + i * step, 0)
        else:
            for j in range(size):
                store_u8(target + i * step + j, 0)


@kernel
def concat(r: int, ith: int, nth: int) -> None:
    """AUX: axis, rows, bytes of an element."""
    axis, rows, size = word(r, row.AUX), word(r, row.AUX + 1), word(r, row.AUX + 2)
    n0, n1, n2 = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2)
    a_step, b_step, o_step = stride(r, A, 0), stride(r, B, 0), stride(r, DST, 0)
    edge = extent(r, A, axis)
    first, last = share(rows, ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        o = row_address(r, DST, i1, i2, i3)
        along = i1 if axis == 1 else i2 if axis == 2 else i3
        if axis == 0:
            move(row_address(r, A, i1, i2, i3), a_step, o, o_step, size, edge)
            move(row_address(r, B, i1, i2, i3), b_step, o + edge * o_step, o_step, size, n0 - edge)
        elif along < edge:
            move(row_address(r, A, i1, i2, i3), a_step, o, o_step, size, n0)
        else:
            i1 -= edge if axis == 1 else 0
            i2 -= edge if axis == 2 else 0
            i3 -= edge if axis == 3 else 0
            move(row_address(r, B, i1, i2, i3), b_step, o, o_step, size, n0)


@kernel
def window(r: int, ith: int, nth: int) -> None:
    """AUX: rows, bytes of an element. The source's first elements along each axis, zeros where there are none."""
    rows, size = word(r, row.AUX), word(r, row.AUX + 1)
    n0, n1, n2 = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2)
    a_step, o_step = stride(r, A, 0), stride(r, DST, 0)
    first, last = share(rows, ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        inside = i1 < extent(r, A, 1) and i2 < extent(r, A, 2) and i3 < extent(r, A, 3)
        n = min(n0, extent(r, A, 0)) if inside else 0
        o = row_address(r, DST, i1, i2, i3)
        move(row_address(r, A, i1, i2, i3), a_step, o, o_step, size, n)
        _clear(o + n * o_step, o_step, size, n0 - n)


@kernel
def repeat(r: int, ith: int, nth: int) -> None:
    """AUX: rows, bytes of an element."""
    rows, size = word(r, row.AUX), word(r, row.AUX + 1)
    n0, n1, n2 = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2)
    a_step, o_step, period = stride(r, A, 0), stride(r, DST, 0), extent(r, A, 0)
    first, last = share(rows, ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a = row_address(r, A, i1 % extent(r, A, 1), i2 % extent(r, A, 2), i3 % extent(r, A, 3))
        o = row_address(r, DST, i1, i2, i3)
        for at in range(0, n0, period):
            move(a, a_step, o + at * o_step, o_step, size, period)


@kernel
def acc(r: int, ith: int, nth: int) -> None:
    """AUX: rows of src1. Adds them to the part of dst that the op's parameters name."""
    n0, n1, n2 = extent(r, B, 0), extent(r, B, 1), extent(r, B, 2)
    step = stride(r, B, 0)
    first, last = share(word(r, row.AUX), ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        b = row_address(r, B, i1, i2, i3)
        o = word(r, DST) + int_param(r, 3) + i1 * int_param(r, 0) + i2 * int_param(r, 1) + i3 * int_param(r, 2)
        at = 0
        while step == 4 and at + 8 <= n0:
            store_f32x8(o + 4 * at, add_f32x8(load_f32x8(o + 4 * at), load_f32x8(b + 4 * at)))
            at += 8
        while at < n0:
            store_f32(o + 4 * at, load_f32(o + 4 * at) + load_f32(b + step * at))
            at += 1


@njit(**INNER)
def _patch_row(r: int, image: int, x: int, y: int, o: int, width: int) -> None:
    """One channel's window at (x, y), kernel rows one after the other; outside of the image are zeros."""
    kw, kh = extent(r, A, 0), extent(r, A, 1)
    iw, ih = extent(r, B, 0), extent(r, B, 1)
    d0, d1 = int_param(r, 4), int_param(r, 5)
    a_type, o_type = word(r, B + row.DTYPE), word(r, DST + row.DTYPE)
    step, line = stride(r, B, 0), stride(r, B, 1)
    for dy in range(kh):
        v = y + dy * d1
        for dx in range(kw):
            u = x + dx * d0
            inside = 0 <= u < iw and 0 <= v < ih
            value = read_float(image + u * step + v * line, a_type) if inside else _ZERO
            write_float(o, o_type, value)
            o += width


@kernel
def im2col(r: int, ith: int, nth: int) -> None:
    """AUX: rows of the result, one per output pixel."""
    n1, n2 = extent(r, DST, 1), extent(r, DST, 2)
    area, channels = extent(r, A, 0) * extent(r, A, 1), extent(r, A, 2)
    width = stride(r, DST, 0)
    first, last = share(word(r, row.AUX), ith, nth)
    for i in range(first, last):
        ox, oy, batch = i % n1, i // n1 % n2, i // (n1 * n2)
        x, y = ox * int_param(r, 0) - int_param(r, 2), oy * int_param(r, 1) - int_param(r, 3)
        o = row_address(r, DST, ox, oy, batch)
        for c in range(channels):
            _patch_row(r, row_address(r, B, 0, c, batch), x, y, o + c * area * width, width)


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """CONCAT, PAD (on the right), UNPAD, REPEAT, ACC and two-dimensional IM2COL; None for anything else."""
    present = tuple(s for s in src if s is not None)
    if op in (Op.PAD, Op.UNPAD, Op.REPEAT) and len(present) == 1:
        return _unary_stages(op, dst, present[0], params)
    if len(present) != 2 or not params:
        return None
    a, b = present
    if op is Op.CONCAT:
        return _concat_stages(dst, a, b, int(params[0]))
    if op is Op.ACC:
        return _acc_stages(dst, a, b, params, threads)
    if op is Op.IM2COL:
        return _im2col_stages(dst, a, b, params)
    return None


def _rows(dst: Operand) -> int:
    return nelements(dst) // dst.ne[0]


def _unary_stages(op: Op, dst: Operand, a: Operand, params: tuple[int | float, ...]) -> tuple[Stage, ...] | None:
    if a.dtype != dst.dtype or a.dtype not in _MOVABLE:
        return None
    aux = (_rows(dst), dst.dtype.block_nbytes)
    if op is Op.REPEAT:
        return None if any(n % m for n, m in zip(dst.ne, a.ne, strict=True)) else (Stage(repeat, aux=aux),)
    if op is Op.PAD and any(params[0:8:2]):
        return None
    grows, shrinks = (any(f(n, m) for n, m in zip(dst.ne, a.ne, strict=True)) for f in (int.__gt__, int.__lt__))
    return None if (shrinks if op is Op.PAD else grows) else (Stage(window, aux=aux),)


def _concat_stages(dst: Operand, a: Operand, b: Operand, axis: int) -> tuple[Stage, ...] | None:
    if not 0 <= axis < 4 or a.dtype not in _MOVABLE or not a.dtype == b.dtype == dst.dtype:
        return None
    expected = tuple(m + n if i == axis else m for i, (m, n) in enumerate(zip(a.ne, b.ne, strict=True)))
    others = all(m == n for i, (m, n) in enumerate(zip(a.ne, b.ne, strict=True)) if i != axis)
    if not others or expected != dst.ne:
        return None
    return (Stage(concat, aux=(axis, _rows(dst), dst.dtype.block_nbytes)),)


def _acc_stages(
    dst: Operand, a: Operand, b: Operand, params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    if {dst.dtype, a.dtype, b.dtype} != {DType.F32} or dst.ne != a.ne or not dense_rows(dst) or len(params) < 4:
        return None
    end = int(params[3]) + 4 * b.ne[0] + sum((n - 1) * int(nb) for n, nb in zip(b.ne[1:], params[:3], strict=True))
    before = copy_stage(dst, a, threads)
    if before is None or int(params[3]) < 0 or end > 4 * nelements(dst):
        return None
    return (before, Stage(acc, aux=(_rows(b),)))


def _im2col_stages(dst: Operand, a: Operand, b: Operand, params: tuple[int | float, ...]) -> tuple[Stage, ...] | None:
    if len(params) < 7 or not params[6] or b.dtype not in FLOATS or dst.dtype not in FLOATS:
        return None
    if dst.ne[0] != a.ne[0] * a.ne[1] * a.ne[2] or b.ne[2] != a.ne[2] or dst.ne[3] != b.ne[3]:
        return None
    return (Stage(im2col, aux=(_rows(dst),)),)
