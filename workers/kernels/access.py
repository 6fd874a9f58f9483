"""How kernels reach their operands: fields of the row, fair shares, and pieces of rows as contiguous floats."""

from __future__ import annotations

from numba import njit

from protocol.dtypes import DType
from workers.kernels import row
from workers.kernels.simd import (
    load_bf16,
    load_bf16x8,
    load_bf16x8_part,
    load_f16,
    load_f16x8,
    load_f16x8_part,
    load_f32,
    load_f32x8,
    load_f32x8_part,
    load_i32,
    load_i64,
    store_bf16,
    store_bf16x8,
    store_bf16x8_part,
    store_f16,
    store_f16x8,
    store_f16x8_part,
    store_f32,
    store_f32x8,
    store_f32x8_part,
)
from workers.kernels.stage import OPTIONS, Operand

SEGMENT = 1024
"""Elements of a row that a kernel takes at a time; a multiple of every block."""

SEGMENT_NBYTES = 4 * SEGMENT

FLOATS = frozenset({DType.F32, DType.F16, DType.BF16})
"""Types that `fetch` reads and `put` writes."""

_F32, _F16 = int(DType.F32), int(DType.F16)


def contiguous(operand: Operand) -> bool:
    """True when elements follow each other without gaps, in order."""
    expected = operand.dtype.block_nbytes
    for i, (n, nb) in enumerate(zip(operand.ne, operand.nb, strict=True)):
        if n != 1 and nb != expected:
            return False
        expected *= n if i else -(-n // operand.dtype.block)
    return True


def dense_rows(operand: Operand) -> bool:
    """True when neighbours in a row are neighbours in memory."""
    return operand.ne[0] == 1 or operand.nb[0] == operand.dtype.block_nbytes


def nelements(operand: Operand) -> int:
    """Number of elements."""
    n0, n1, n2, n3 = operand.ne
    return n0 * n1 * n2 * n3


@njit(**OPTIONS)
def word(r, index):
    """A 64-bit word of the row."""
    return load_i64(r + 8 * index)


@njit(**OPTIONS)
def float_param(r, index):
    """A float of the op's parameters."""
    return load_f32(r + 8 * row.PARAMS + 4 * index)


@njit(**OPTIONS)
def int_param(r, index):
    """An integer of the op's parameters."""
    return int(load_i32(r + 8 * row.PARAMS + 4 * index))


@njit(**OPTIONS)
def extent(r, operand, axis):
    """ne[axis] of an operand (row.DST or one of row.SRC)."""
    return load_i64(r + 8 * (operand + row.NE + axis))


@njit(**OPTIONS)
def stride(r, operand, axis):
    """nb[axis] of an operand."""
    return load_i64(r + 8 * (operand + row.NB + axis))


@njit(**OPTIONS)
def row_address(r, operand, i1, i2, i3):
    """Address of a row of an operand."""
    at = r + 8 * operand
    nb = at + 8 * row.NB
    return load_i64(at) + i1 * load_i64(nb + 8) + i2 * load_i64(nb + 16) + i3 * load_i64(nb + 24)


@njit(**OPTIONS)
def share(n, ith, nth):
    """The part [first, last) of n units of work that thread `ith` of `nth` does."""
    return n * ith // nth, n * (ith + 1) // nth


@njit(**OPTIONS)
def read_float(address, dtype):
    """One element as float32."""
    if dtype == _F32:
        return load_f32(address)
    if dtype == _F16:
        return load_f16(address)
    return load_bf16(address)


@njit(**OPTIONS)
def write_float(address, dtype, value):
    """One float32 as an element."""
    if dtype == _F32:
        store_f32(address, value)
    elif dtype == _F16:
        store_f16(address, value)
    else:
        store_bf16(address, value)


@njit(**OPTIONS)
def fetch(address, step, dtype, n, scratch):
    """Address of n elements, `step` bytes apart, as contiguous float32: where they are, or a copy in `scratch`."""
    if step == 4 and dtype == _F32:
        return address
    whole = n & ~7
    if step == 2 and dtype == _F16:
        for i in range(0, whole, 8):
            store_f32x8(scratch + 4 * i, load_f16x8(address + 2 * i))
        if n > whole:
            store_f32x8_part(scratch + 4 * whole, load_f16x8_part(address + 2 * whole, n - whole), n - whole)
    elif step == 2:
        for i in range(0, whole, 8):
            store_f32x8(scratch + 4 * i, load_bf16x8(address + 2 * i))
        if n > whole:
            store_f32x8_part(scratch + 4 * whole, load_bf16x8_part(address + 2 * whole, n - whole), n - whole)
    else:
        for i in range(n):
            store_f32(scratch + 4 * i, read_float(address + step * i, dtype))
    return scratch


@njit(**OPTIONS)
def place(address, step, dtype, scratch):
    """Where to compute a result of the layout given: in place, or in `scratch`, from where `put` takes it."""
    return address if step == 4 and dtype == _F32 else scratch


@njit(**OPTIONS)
def put(source, address, step, dtype, n):
    """Write n contiguous float32 as elements `step` bytes apart; nothing to do where they are there already."""
    if source == address:
        return
    whole = n & ~7
    if step == 2 and dtype == _F16:
        for i in range(0, whole, 8):
            store_f16x8(address + 2 * i, load_f32x8(source + 4 * i))
        if n > whole:
            store_f16x8_part(address + 2 * whole, load_f32x8_part(source + 4 * whole, n - whole), n - whole)
    elif step == 2:
        for i in range(0, whole, 8):
            store_bf16x8(address + 2 * i, load_f32x8(source + 4 * i))
        if n > whole:
            store_bf16x8_part(address + 2 * whole, load_f32x8_part(source + 4 * whole, n - whole), n - whole)
    else:
        for i in range(n):
            write_float(address + step * i, dtype, load_f32(source + 4 * i))
