"""Copies: DUP, CONT, CPY between layouts and types, and runs of elements for other families."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.dtypes import DType
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
    put,
    row_address,
    share,
    stride,
    word,
)
from workers.kernels.jit import njit
from workers.kernels.simd import (
    load_i8x32,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    store_i8x32,
    store_i64,
    store_u8,
    store_u16,
    store_u32,
)
from workers.kernels.stage import Operand, Stage, kernel

DST, A = row.DST, row.SRC[0]
_F32 = int(DType.F32)

_GRAIN = 64
"""Elements: threads share the work in whole multiples, a cache line or more."""


@njit(**INNER)
def move(source: int, source_step: int, target: int, target_step: int, size: int, n: int) -> None:
    """Copy n elements of `size` (1, 2, 4 or 8) bytes, the steps in bytes from one to the next."""
    if source_step == size and target_step == size:
        nbytes = n * size
        whole = nbytes & ~31
        for i in range(0, whole, 32):
            store_i8x32(target + i, load_i8x32(source + i))
        for i in range(whole, nbytes):
            store_u8(target + i, load_u8(source + i))
    elif size == 4:
        for i in range(n):
            store_u32(target + i * target_step, load_u32(source + i * source_step))
    elif size == 2:
        for i in range(n):
            store_u16(target + i * target_step, load_u16(source + i * source_step))
    elif size == 8:
        for i in range(n):
            store_i64(target + i * target_step, load_i64(source + i * source_step))
    else:
        for i in range(n):
            store_u8(target + i * target_step, load_u8(source + i * source_step))


@njit(**INNER)
def _locate(r: int, operand: int, i: int, flat: int) -> tuple[int, int]:
    """Address of element i in row-major order, and how many elements follow in the same row."""
    n0, step = extent(r, operand, 0), stride(r, operand, 0)
    if flat:
        return word(r, operand) + i * step, 1 << 62
    n1, n2 = extent(r, operand, 1), extent(r, operand, 2)
    i0, i = i % n0, i // n0
    return row_address(r, operand, i % n1, i // n1 % n2, i // (n1 * n2)) + i0 * step, n0 - i0


@njit(**INNER)
def _convert(
    source: int, a_step: int, a_type: int, target: int, o_step: int, o_type: int, n: int, scratch: int
) -> None:
    """Copy n floats from one type to another."""
    for at in range(0, n, SEGMENT):
        size = min(SEGMENT, n - at)
        to = target + at * o_step
        if o_step == 4 and o_type == _F32:
            fetch(source + at * a_step, a_step, a_type, size, to)
        else:
            put(fetch(source + at * a_step, a_step, a_type, size, scratch), to, o_step, o_type, size)


@kernel
def copy(r: int, ith: int, nth: int) -> None:
    """AUX: elements, bytes of an element (0: types differ), 1 for a contiguous source + 2 for a contiguous result."""
    total, size, flat = word(r, row.AUX), word(r, row.AUX + 1), word(r, row.AUX + 2)
    a_type, a_step = word(r, A + row.DTYPE), stride(r, A, 0)
    o_type, o_step = word(r, DST + row.DTYPE), stride(r, DST, 0)
    scratch = word(r, row.WORK) + ith * SEGMENT_NBYTES
    first, last = share((total + _GRAIN - 1) // _GRAIN, ith, nth)
    at, last = first * _GRAIN, min(last * _GRAIN, total)
    while at < last:
        source, a_run = _locate(r, A, at, flat & 1)
        target, o_run = _locate(r, DST, at, flat & 2)
        n = min(min(a_run, o_run), last - at)
        if size == 0:
            _convert(source, a_step, a_type, target, o_step, o_type, n, scratch)
        elif source != target:
            move(source, a_step, target, o_step, size, n)
        at += n


def copy_stage(dst: Operand, src: Operand, threads: int) -> Stage | None:
    """A stage that copies all elements of src0 to dst in row-major order, or None where types do not fit."""
    if nelements(dst) != nelements(src) or dst.dtype.quantised or src.dtype.quantised:
        return None
    size = src.dtype.block_nbytes if dst.dtype == src.dtype else 0
    if size == 0 and {dst.dtype, src.dtype} - FLOATS:
        return None
    flat = int(contiguous(src)) + 2 * int(contiguous(dst))
    return Stage(copy, work_nbytes=threads * SEGMENT_NBYTES, aux=(nelements(dst), size, flat))


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """DUP, CONT and CPY between any layouts; of one plain type, or between F32, F16 and BF16. Else None."""
    if op not in (Op.DUP, Op.CONT, Op.CPY) or not src or src[0] is None:
        return None
    stage = copy_stage(dst, src[0], threads)
    return None if stage is None else (stage,)
