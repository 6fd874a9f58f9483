"""ADD, SUB, MUL and DIV with ggml's broadcasting: the second operand is repeated over the first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import (
    FLOATS,
    INNER,
    SEGMENT,
    SEGMENT_NBYTES,
    contiguous,
    extent,
    fetch,
    nelements,
    place,
    put,
    read_float,
    row_address,
    share,
    stride,
    word,
)
from workers.kernels.jit import njit
from workers.kernels.loops import LANES, loops
from workers.kernels.simd import splat_f32x8, store_f32, store_f32x8
from workers.kernels.stage import Operand, Stage, kernel

_CODES = {Op.ADD: 0, Op.SUB: 1, Op.MUL: 2, Op.DIV: 3}
_SPLAT, _DIRECT, _REPEAT = 0, 1, 2
"""How a row of the second operand covers one of the first: one value, as long, or several times."""

_UNUSED = np.float32(0.0)
_SCRATCH = 3 * SEGMENT_NBYTES

DST, A, B = row.DST, row.SRC[0], row.SRC[1]


_combine = loops(
    {
        _CODES[Op.ADD]: lambda b, x, y, p, q: b.fadd(x, y),
        _CODES[Op.SUB]: lambda b, x, y, p, q: b.fsub(x, y),
        _CODES[Op.MUL]: lambda b, x, y, p, q: b.fmul(x, y),
        _CODES[Op.DIV]: lambda b, x, y, p, q: b.fdiv(x, y),
    }
)


@njit(**INNER)
def _fetch_second(r: int, i1: int, i2: int, i3: int, at: int, n: int, mode: int, scratch: int) -> int:
    """The piece [at, at + n) of the second operand's row, as the loops want it."""
    base = row_address(r, B, i1 % extent(r, B, 1), i2 % extent(r, B, 2), i3 % extent(r, B, 3))
    dtype, step = word(r, B + row.DTYPE), stride(r, B, 0)
    if mode == _DIRECT:
        return fetch(base + at * step, step, dtype, n, scratch)
    if mode == _SPLAT:
        for i in range(0, 4 * LANES, 32):
            store_f32x8(scratch + i, splat_f32x8(read_float(base, dtype)))
        return scratch
    period = extent(r, B, 0)
    for i in range(n):
        store_f32(scratch + 4 * i, read_float(base + (at + i) % period * step, dtype))
    return scratch


@kernel
def binary(r: int, ith: int, nth: int) -> None:
    """AUX: op code, how b repeats in a row, elements in a row, rows (flattened where layouts allow)."""
    code, mode = word(r, row.AUX), word(r, row.AUX + 1)
    n0, rows = word(r, row.AUX + 2), word(r, row.AUX + 3)
    n1, n2 = extent(r, DST, 1), extent(r, DST, 2)
    a_type, a_step = word(r, A + row.DTYPE), stride(r, A, 0)
    o_type, o_step = word(r, DST + row.DTYPE), stride(r, DST, 0)
    scratch = word(r, row.WORK) + ith * _SCRATCH
    b_step = 0 if mode == _SPLAT else 4
    pieces = (n0 + SEGMENT - 1) // SEGMENT
    first, last = share(rows * pieces, ith, nth)
    for unit in range(first, last):
        i = unit // pieces
        at = (unit - i * pieces) * SEGMENT
        n = min(SEGMENT, n0 - at)
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a = fetch(row_address(r, A, i1, i2, i3) + at * a_step, a_step, a_type, n, scratch)
        b = _fetch_second(r, i1, i2, i3, at, n, mode, scratch + SEGMENT_NBYTES)
        target = row_address(r, DST, i1, i2, i3) + at * o_step
        o = place(target, o_step, o_type, scratch + 2 * SEGMENT_NBYTES)
        _combine(code, a, b, b_step, o, n, _UNUSED, _UNUSED)
        put(o, target, o_step, o_type, n)


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """ADD, SUB, MUL, DIV of F32, F16 and BF16; None for other types or shapes that do not repeat."""
    if op not in _CODES or len(src) < 2 or src[0] is None or src[1] is None:
        return None
    a, b = src[0], src[1]
    if {dst.dtype, a.dtype, b.dtype} - FLOATS or dst.ne != a.ne or any(n % m for n, m in zip(a.ne, b.ne, strict=True)):
        return None
    mode = _DIRECT if a.ne[0] == b.ne[0] else _SPLAT if b.ne[0] == 1 else _REPEAT
    n0, rows = a.ne[0], nelements(a) // a.ne[0]
    scalar, same = nelements(b) == 1, b.ne == a.ne and contiguous(b)
    if contiguous(dst) and contiguous(a) and (scalar or same):
        mode, n0, rows = (_SPLAT if scalar else _DIRECT), nelements(a), 1
    return (Stage(binary, work_nbytes=threads * _SCRATCH, aux=(_CODES[op], mode, n0, rows)),)
