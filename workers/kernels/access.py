"""How kernels reach their operands: fields of the row, fair shares, and pieces of rows as contiguous floats."""

from __future__ import annotations

from protocol.dtypes import DType
from workers.kernels import row
from workers.kernels.emit import F32, I32, I64, const, load
from workers.kernels.jit import ir, njit, types
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
    make,
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
from workers.kernels.stage import Operand

INNER = {"nogil": True, "error_model": "numpy", "inline": "always"}
"""For `njit` of functions that only kernels call: they have to be inlined before LLVM sees them.

numba links a function as it is after code generation, where LLVM may have turned `address + i` into an offset from i as
if i were the pointer. Where i then becomes a constant 0, that pointer is null and LLVM deletes the path: with LLVM 22 a
loop over Q4_K blocks came out as the one for Q5_K.
"""

SEGMENT = 1024
"""Elements of a row that a kernel takes at a time; a multiple of every block."""

SEGMENT_NBYTES = 4 * SEGMENT

FLOATS = frozenset({DType.F32, DType.F16, DType.BF16})
"""Types that `fetch` reads and `put` writes."""

_F32, _F16 = int(DType.F32), int(DType.F16)


def contiguous(operand: Operand) -> bool:
    """True when elements follow each other without gaps, in order, and nb[0] is the step from one to the next."""
    expected = operand.dtype.block_nbytes
    for i, (n, nb) in enumerate(zip(operand.ne, operand.nb, strict=True)):
        if (n != 1 or i == 0) and nb != expected:
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


def _emit_word(b: ir.IRBuilder, r: ir.Value, index: ir.Value) -> ir.Value:
    return load(b, b.add(r, b.mul(index, const(I64, 8))), I64)


def _emit_float_param(b: ir.IRBuilder, r: ir.Value, index: ir.Value) -> ir.Value:
    return load(b, b.add(r, b.mul(index, const(I64, 4))), F32, 8 * row.PARAMS)


def _emit_int_param(b: ir.IRBuilder, r: ir.Value, index: ir.Value) -> ir.Value:
    return b.sext(load(b, b.add(r, b.mul(index, const(I64, 4))), I32, 8 * row.PARAMS), I64)


def _emit_extent(b: ir.IRBuilder, r: ir.Value, operand: ir.Value, axis: ir.Value) -> ir.Value:
    return _emit_word(b, r, b.add(b.add(operand, axis), const(I64, row.NE)))


def _emit_stride(b: ir.IRBuilder, r: ir.Value, operand: ir.Value, axis: ir.Value) -> ir.Value:
    return _emit_word(b, r, b.add(b.add(operand, axis), const(I64, row.NB)))


def _emit_row_address(b: ir.IRBuilder, r: ir.Value, operand: ir.Value, *indices: ir.Value) -> ir.Value:
    at = _emit_word(b, r, operand)
    for axis, index in enumerate(indices, start=1):
        at = b.add(at, b.mul(index, _emit_stride(b, r, operand, const(I64, axis))))
    return at


_LONG = types.int64

word = make(_LONG, _LONG, _LONG)(_emit_word)
"""word(r, index): a 64-bit word of the row."""
float_param = make(types.float32, _LONG, _LONG)(_emit_float_param)
"""float_param(r, index): a float of the op's parameters."""
int_param = make(_LONG, _LONG, _LONG)(_emit_int_param)
"""int_param(r, index): an integer of the op's parameters."""
extent = make(_LONG, _LONG, _LONG, _LONG)(_emit_extent)
"""extent(r, operand, axis): ne[axis] of an operand (row.DST or one of row.SRC)."""
stride = make(_LONG, _LONG, _LONG, _LONG)(_emit_stride)
"""stride(r, operand, axis): nb[axis] of an operand."""
row_address = make(_LONG, *[_LONG] * 5)(_emit_row_address)
"""row_address(r, operand, i1, i2, i3): address of a row of an operand."""


@njit(**INNER)
def share(n: int, ith: int, nth: int) -> tuple[int, int]:
    """The part [first, last) of n units of work that thread `ith` of `nth` does."""
    return n * ith // nth, n * (ith + 1) // nth


@njit(**INNER)
def read_float(address: int, dtype: int) -> float:
    """One element as float32."""
    if dtype == _F32:
        return load_f32(address)
    if dtype == _F16:
        return load_f16(address)
    return load_bf16(address)


@njit(**INNER)
def write_float(address: int, dtype: int, value: float) -> None:
    """One float32 as an element."""
    if dtype == _F32:
        store_f32(address, value)
    elif dtype == _F16:
        store_f16(address, value)
    else:
        store_bf16(address, value)


@njit(**INNER)
def fetch(address: int, step: int, dtype: int, n: int, scratch: int) -> int:
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


@njit(**INNER)
def place(address: int, step: int, dtype: int, scratch: int) -> int:
    """Where to compute a result of the layout given: in place, or in `scratch`, from where `put` takes it."""
    return address if step == 4 and dtype == _F32 else scratch


@njit(**INNER)
def put(source: int, address: int, step: int, dtype: int, n: int) -> None:
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
