"""MUL_MAT of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 weights: activations in blocks of 8 bits, eight F32 sums along the row.

Lane l of eight takes the integer products of elements 4 l to 4 l + 3 of each block, exact as i32, and adds them up
block after block, times the product of both scales, in one fused step. The lanes are added last: 4 and 4, 2 and 2, 1
and 1. The minima of Q4_1 and Q5_1 times the activations' sums make a ninth, scalar sum that joins at the very end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels import row as words
from workers.kernels.access import INNER, extent, row_address, share, stride, word
from workers.kernels.emit import (
    F32,
    I16,
    I64,
    apply_sign,
    call,
    const,
    f32x8,
    fma,
    i8x32,
    i16x16,
    load,
    multiply_bytes,
    multiply_shorts,
    prefetch_line,
    splat,
    store,
    sum_lanes,
    widen_half,
)
from workers.kernels.ggml import floats
from workers.kernels.jit import cgutils, intrinsic, ir, njit, types
from workers.kernels.matformats import FORMATS, Format, unpack_quants
from workers.kernels.matlanes import clamped_row
from workers.kernels.quantize_rows import QUANTIZE, column_nbytes, columns_nbytes
from workers.kernels.stage import Kernel, Operand, Stage, kernel

_W, _Y = words.SRC[0], words.SRC[1]
_GROUP = 8
"""Rows that a thread takes at a time."""
_Q4_0, _Q4_1, _Q5_0, _Q5_1, _Q8_0 = (int(DType[name]) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))


def _weights(b: ir.IRBuilder, form: Format, where: ir.Value) -> ir.Value:
    quants = unpack_quants(b, form, where)[0]
    return b.sub(quants, const(i8x32.ir, form.zero)) if form.zero else quants


def _products(b: ir.IRBuilder, form: Format, x: ir.Value, y: ir.Value) -> ir.Value:
    """Four products in each of eight lanes, as F32."""
    if form.zero or form.signed:
        size = call(b, "llvm.abs.v32i8", i8x32.ir, [x, const(ir.IntType(1), 0)])
        x, y = size, apply_sign(b, y, x)
    return b.sitofp(multiply_shorts(b, multiply_bytes(b, x, y), const(i16x16.ir, 1)), f32x8.ir)


def _tile(
    b: ir.IRBuilder,
    form: Format,
    shape: tuple[int, int],
    w: ir.Value,
    w_stride: ir.Value,
    rows: ir.Value,
    y: ir.Value,
    y_stride: ir.Value,
    columns: ir.Value,
    k: ir.Value,
    out: ir.Value,
    out_stride: ir.Value,
) -> None:
    """A tile of rows and columns; those beyond what exists repeat the last one."""
    starts_w = [clamped_row(b, w, const(I64, r), w_stride, rows) for r in range(shape[0])]
    starts_y = [clamped_row(b, y, const(I64, c), y_stride, columns) for c in range(shape[1])]
    lanes = [[cgutils.alloca_once_value(b, const(f32x8.ir, 0.0)) for _ in starts_w] for _ in starts_y]
    minima = [[cgutils.alloca_once_value(b, const(F32, 0.0)) for _ in starts_w] for _ in starts_y]
    blocks, ahead = b.udiv(k, const(I64, form.block)), b.mul(w_stride, const(I64, shape[0]))
    with cgutils.for_range(b, blocks) as loop:
        at, four = b.mul(loop.index, const(I64, form.nbytes)), b.mul(loop.index, const(I64, 4))
        columns_here = []
        for start in starts_y:
            scale = b.add(b.add(start, k), four)
            quants = load(b, b.add(start, b.mul(loop.index, const(I64, 32))), i8x32.ir)
            columns_here.append((quants, load(b, scale, F32), b.add(scale, b.mul(blocks, const(I64, 4)))))
        for r, start in enumerate(starts_w):
            here = b.add(start, at)
            if shape[1] == 1:
                prefetch_line(b, b.add(here, ahead))
            x, d = _weights(b, form, here), widen_half(b, load(b, here, I16, form.scale))
            for c, (quants, scale, sums) in enumerate(columns_here):
                factor = splat(b, b.fmul(d, scale), f32x8.ir)
                b.store(fma(b, factor, _products(b, form, x, quants), b.load(lanes[c][r])), lanes[c][r])
                if form.floor >= 0:
                    floor = widen_half(b, load(b, here, I16, form.floor))
                    b.store(fma(b, floor, load(b, sums, F32), b.load(minima[c][r])), minima[c][r])
    for c in range(shape[1]):
        column = clamped_row(b, out, const(I64, c), out_stride, columns)
        for r in range(shape[0]):
            value = sum_lanes(b, b.load(lanes[c][r]))
            value = b.fadd(value, b.load(minima[c][r])) if form.floor >= 0 else value
            store(b, value, clamped_row(b, column, const(I64, r), const(I64, 4), rows))


def _for_shape(shape: tuple[int, int]) -> Any:
    """The intrinsic of a tile; its first argument is a constant, a key of FORMATS."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        _tile(b, FORMATS[signature.args[0].literal_value], shape, *values[1:])
        return context.get_dummy_value()

    def function(context, form, w, w_stride, rows, y, y_stride, columns, k, out, out_stride):  # type: ignore[no-untyped-def]
        if not isinstance(form, types.IntegerLiteral):
            return None
        return types.void(form, *[types.int64] * 9), generate

    return intrinsic(function)


_ROWS, _COLUMNS = 2, 4
_four_by_one, _two_by_four = _for_shape((4, 1)), _for_shape((_ROWS, _COLUMNS))


@njit(**INNER)
def _group(row: int, unit: int, groups: int) -> tuple[int, int, int, int]:
    """Number of rows in a group, addresses of its weights, activations and results."""
    group, batch = unit % groups, unit // groups
    i2, i3 = batch % extent(row, _Y, 2), batch // extent(row, _Y, 2)
    w2, w3 = i2 * extent(row, _W, 2) // extent(row, _Y, 2), i3 * extent(row, _W, 3) // extent(row, _Y, 3)
    y = word(row, words.WORK) + batch * extent(row, _Y, 1) * word(row, words.AUX)
    out = row_address(row, words.DST, 0, i2, i3) + 4 * _GROUP * group
    return min(_GROUP, extent(row, _W, 1) - _GROUP * group), row_address(row, _W, _GROUP * group, w2, w3), y, out


@njit(**INNER)
def _multiply(row: int, ith: int, nth: int, form: int) -> None:
    k, m, out_step = extent(row, _W, 0), extent(row, _Y, 1), stride(row, words.DST, 1)
    w_step, y_step = stride(row, _W, 1), word(row, words.AUX)
    groups = (extent(row, _W, 1) + _GROUP - 1) // _GROUP
    first, last = share(groups * extent(row, _Y, 2) * extent(row, _Y, 3), ith, nth)
    for unit in range(first, last):
        rows, w, y, out = _group(row, unit, groups)
        if m == 1:
            for r in range(0, rows, 4):
                _four_by_one(form, w + r * w_step, w_step, rows - r, y, y_step, 1, k, out + 4 * r, out_step)
        else:
            for c in range(0, m, _COLUMNS):
                for r in range(0, rows, _ROWS):
                    _two_by_four(
                        form, w + r * w_step, w_step, rows - r, y + c * y_step, y_step, m - c, k,
                        out + c * out_step + 4 * r, out_step,
                    )  # fmt: skip


@kernel
def ggml_multiply_q4_0(row: int, ith: int, nth: int) -> None:
    """Q4_0 weights; AUX[0] is the distance of columns in scratch memory."""
    _multiply(row, ith, nth, _Q4_0)


@kernel
def ggml_multiply_q4_1(row: int, ith: int, nth: int) -> None:
    """Q4_1 weights."""
    _multiply(row, ith, nth, _Q4_1)


@kernel
def ggml_multiply_q5_0(row: int, ith: int, nth: int) -> None:
    """Q5_0 weights."""
    _multiply(row, ith, nth, _Q5_0)


@kernel
def ggml_multiply_q5_1(row: int, ith: int, nth: int) -> None:
    """Q5_1 weights."""
    _multiply(row, ith, nth, _Q5_1)


@kernel
def ggml_multiply_q8_0(row: int, ith: int, nth: int) -> None:
    """Q8_0 weights."""
    _multiply(row, ith, nth, _Q8_0)


PRODUCTS: dict[DType, Kernel] = {
    DType.Q4_0: ggml_multiply_q4_0,
    DType.Q4_1: ggml_multiply_q4_1,
    DType.Q5_0: ggml_multiply_q5_0,
    DType.Q5_1: ggml_multiply_q5_1,
    DType.Q8_0: ggml_multiply_q8_0,
}


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """MUL_MAT of what the default kernels take, for the types that are known here; None for others."""
    weights, columns = src[0], src[1]
    assert weights is not None
    assert columns is not None
    if weights.dtype not in PRODUCTS:
        return floats.stages(weights, columns)
    form = FORMATS[int(weights.dtype)]
    work = columns_nbytes(form.activation, columns.ne)
    aux = (column_nbytes(form.activation, weights.ne[0]),)
    return Stage(QUANTIZE[form.activation], work, aux=aux), Stage(PRODUCTS[weights.dtype], work, aux=aux)
