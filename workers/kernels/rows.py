"""GET_ROWS and SET_ROWS: rows picked and written by index, to and from floats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import (
    FLOATS,
    INNER,
    SEGMENT,
    dense_rows,
    extent,
    fetch,
    nelements,
    put,
    row_address,
    share,
    stride,
    word,
)
from workers.kernels.copy import move
from workers.kernels.dequantise import TYPES, dequantise
from workers.kernels.jit import njit
from workers.kernels.simd import load_i32, load_i64, store_f32
from workers.kernels.stage import Operand, Stage, kernel

DST, A, INDEX = row.DST, row.SRC[0], row.SRC[1]
_I32, _F32 = int(DType.I32), int(DType.F32)
_NAN = np.float32(np.nan)
_INDICES = frozenset({DType.I32, DType.I64})

_STRIPE = 64
"""Columns that SET_ROWS gives to a thread at a time."""


@njit(**INNER)
def _index(r: int, i: int, j: int, k: int) -> int:
    """An element of the indices."""
    at = row_address(r, INDEX, j, k, 0) + i * stride(r, INDEX, 0)
    return int(load_i32(at)) if word(r, INDEX + row.DTYPE) == _I32 else load_i64(at)


@kernel
def get_rows(r: int, ith: int, nth: int) -> None:
    """AUX: rows, elements per block, bytes per block. A row outside of the table reads as NaN."""
    rows, block, block_nbytes = word(r, row.AUX), word(r, row.AUX + 1), word(r, row.AUX + 2)
    dtype = word(r, A + row.DTYPE)
    n0, n1, n2 = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2)
    pieces = (n0 + SEGMENT - 1) // SEGMENT
    first, last = share(rows * pieces, ith, nth)
    for unit in range(first, last):
        i = unit // pieces
        at = (unit - i * pieces) * SEGMENT
        n = min(SEGMENT, n0 - at)
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        index = _index(r, i1, i2, i3)
        o = row_address(r, DST, i1, i2, i3) + 4 * at
        source = row_address(r, A, index, i2, i3) + at // block * block_nbytes
        if index < 0 or index >= extent(r, A, 1):
            for j in range(n):
                store_f32(o + 4 * j, _NAN)
        elif block > 1:
            dequantise(dtype, source, n, o)
        elif dtype in (_I32, _F32):
            move(source, 4, o, 4, 4, n)
        else:
            fetch(source, 2, dtype, n, o)


@kernel
def set_rows(r: int, ith: int, nth: int) -> None:
    """AUX: stripes of columns. Threads share columns, so that of two rows with one index always the later one stays."""
    n0, n1, n2, n3 = extent(r, A, 0), extent(r, A, 1), extent(r, A, 2), extent(r, A, 3)
    o_type, o_step = word(r, DST + row.DTYPE), stride(r, DST, 0)
    limit, j_period, k_period = extent(r, DST, 1), extent(r, INDEX, 1), extent(r, INDEX, 2)
    first, last = share(word(r, row.AUX), ith, nth)
    at = first * _STRIPE
    n = min(last * _STRIPE, n0) - at
    for i3 in range(n3):
        for i2 in range(n2):
            for i1 in range(n1):
                index = _index(r, i1, i2 % j_period, i3 % k_period)
                if n > 0 and 0 <= index < limit:
                    source = row_address(r, A, i1, i2, i3) + 4 * at
                    target = row_address(r, DST, index, i2, i3) + o_step * at
                    if o_type == _F32:
                        move(source, 4, target, 4, 4, n)
                    else:
                        put(source, target, o_step, o_type, n)


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """GET_ROWS of plain and quantised types, SET_ROWS of F32 into F32, F16 and BF16; None for anything else."""
    if op not in (Op.GET_ROWS, Op.SET_ROWS) or len(src) < 2 or src[0] is None or src[1] is None:
        return None
    a, index = src[0], src[1]
    if index.dtype not in _INDICES or not dense_rows(a) or not dense_rows(dst):
        return None
    if op is Op.GET_ROWS:
        plain = (a.dtype in FLOATS and dst.dtype == DType.F32) or (a.dtype, dst.dtype) == (DType.I32, DType.I32)
        quantised = a.dtype in TYPES and dst.dtype == DType.F32
        shapes = dst.ne == (a.ne[0], *index.ne[:3]) and a.ne[2:] == index.ne[1:3]
        if not (plain or quantised) or not shapes:
            return None
        return (Stage(get_rows, aux=(nelements(index), a.dtype.block, a.dtype.block_nbytes)),)
    if a.dtype != DType.F32 or dst.dtype not in FLOATS or index.ne[0] != a.ne[1] or dst.ne[0] != a.ne[0]:
        return None
    if a.ne[2:] != dst.ne[2:] or a.ne[2] % index.ne[1] or a.ne[3] % index.ne[2]:
        return None
    return (Stage(set_rows, aux=(-(-a.ne[0] // _STRIPE),)),)
