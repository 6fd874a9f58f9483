"""MUL_MAT of F32 and F16 weights, in one of two orders of summation.

One column: four vectors of eight sums along the row, added crosswise, then neighbours. Several columns, with rows in
fours: one vector of eight sums, halved until one is left (this is what a build with llamafile's kernels does, as
llama.cpp's is by default). F16 weights meet activations rounded to F16; all sums are F32.
"""

from __future__ import annotations

from typing import Any

from protocol.dtypes import DType
from workers.kernels import row as words
from workers.kernels.access import INNER, contiguous, extent, row_address, share, stride, word
from workers.kernels.emit import I64, const, f32x8, fma, i16x8, load, store, sum_lanes, widen_half
from workers.kernels.ggml.functions import emit_sum_neighbours
from workers.kernels.jit import cgutils, intrinsic, ir, njit, types
from workers.kernels.matlanes import clamped_row
from workers.kernels.simd import load_f32x8, store_f16x8
from workers.kernels.stage import Operand, Stage, kernel

_W, _Y = words.SRC[0], words.SRC[1]
_GROUP = 8
"""Rows that a thread takes at a time."""
_F32, _F16 = int(DType.F32), int(DType.F16)


def _load(b: ir.IRBuilder, dtype: DType, start: ir.Value, index: ir.Value, vector: int) -> ir.Value:
    """Vector number `index` + `vector` of a row."""
    where = b.add(start, b.mul(b.add(index, const(I64, vector)), const(I64, 8 * dtype.block_nbytes)))
    return load(b, where, f32x8.ir) if dtype == DType.F32 else widen_half(b, load(b, where, i16x8.ir))


def _tile(b: ir.IRBuilder, dtype: DType, shape: tuple[int, int, int], *values: ir.Value) -> None:
    """A tile of rows and columns with so many vectors of sums; what is beyond what exists repeats the last one."""
    w, w_stride, rows, y, y_stride, columns, k, out, out_stride = values
    starts_w = [clamped_row(b, w, const(I64, r), w_stride, rows) for r in range(shape[0])]
    starts_y = [clamped_row(b, y, const(I64, c), y_stride, columns) for c in range(shape[1])]
    vectors = range(shape[2])
    zero = const(f32x8.ir, 0.0)
    sums = [[[cgutils.alloca_once_value(b, zero) for _ in vectors] for _ in starts_w] for _ in starts_y]
    with cgutils.for_range_slice(b, const(I64, 0), b.lshr(k, const(I64, 3)), const(I64, shape[2]), I64) as (index, _):
        for v in vectors:
            right = [_load(b, dtype, start, index, v) for start in starts_y]
            for r, start in enumerate(starts_w):
                left = _load(b, dtype, start, index, v)
                for c, value in enumerate(right):
                    b.store(fma(b, left, value, b.load(sums[c][r][v])), sums[c][r][v])
    for c, line in enumerate(sums):
        column = clamped_row(b, out, const(I64, c), out_stride, columns)
        for r, cells in enumerate(line):
            s = [b.load(cell) for cell in cells]
            if len(s) == 4:
                total = emit_sum_neighbours(b, b.fadd(b.fadd(s[0], s[2]), b.fadd(s[1], s[3])))
            else:
                total = sum_lanes(b, s[0])
            store(b, total, clamped_row(b, column, const(I64, r), const(I64, 4), rows))


def _for_shape(shape: tuple[int, int, int]) -> Any:
    """The intrinsic of a tile; its first argument is a constant, the type of weights and activations."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        _tile(b, DType(signature.args[0].literal_value), shape, *values[1:])
        return context.get_dummy_value()

    def function(context, dtype, w, w_stride, rows, y, y_stride, columns, k, out, out_stride):  # type: ignore[no-untyped-def]
        if not isinstance(dtype, types.IntegerLiteral):
            return None
        return types.void(dtype, *[types.int64] * 9), generate

    return intrinsic(function)


_four_sums, _four_by_three = _for_shape((2, 1, 4)), _for_shape((4, 3, 1))


@njit(**INNER)
def _multiply(row: int, ith: int, nth: int, dtype: int) -> None:
    """AUX: distance of columns in scratch memory (0: they are where they were), 1 for the order of several columns."""
    k, m, out_step = extent(row, _W, 0), extent(row, _Y, 1), stride(row, words.DST, 1)
    w_step, packed = stride(row, _W, 1), word(row, words.AUX)
    y_step = packed if packed else stride(row, _Y, 1)
    groups = (extent(row, _W, 1) + _GROUP - 1) // _GROUP
    first, last = share(groups * extent(row, _Y, 2) * extent(row, _Y, 3), ith, nth)
    for unit in range(first, last):
        at, batch = unit % groups * _GROUP, unit // groups
        i2, i3 = batch % extent(row, _Y, 2), batch // extent(row, _Y, 2)
        w2, w3 = i2 * extent(row, _W, 2) // extent(row, _Y, 2), i3 * extent(row, _W, 3) // extent(row, _Y, 3)
        w, out = row_address(row, _W, at, w2, w3), row_address(row, words.DST, 0, i2, i3) + 4 * at
        y = word(row, words.WORK) + batch * m * packed if packed else row_address(row, _Y, 0, i2, i3)
        rows = min(_GROUP, extent(row, _W, 1) - at)
        if word(row, words.AUX + 1):
            for c in range(0, m, 3):
                to, column = out + c * out_step, y + c * y_step
                for r in range(0, rows, 4):
                    _four_by_three(
                        dtype, w + r * w_step, w_step, rows - r, column, y_step, m - c, k, to + 4 * r, out_step
                    )
        else:
            for c in range(m):
                to, column = out + c * out_step, y + c * y_step
                for r in range(0, rows, 2):
                    _four_sums(dtype, w + r * w_step, w_step, rows - r, column, y_step, 1, k, to + 4 * r, out_step)


@kernel
def ggml_multiply_f32(row: int, ith: int, nth: int) -> None:
    """F32 weights."""
    _multiply(row, ith, nth, _F32)


@kernel
def ggml_multiply_f16(row: int, ith: int, nth: int) -> None:
    """F16 weights."""
    _multiply(row, ith, nth, _F16)


@kernel
def ggml_halve(row: int, ith: int, nth: int) -> None:
    """Source 1 to scratch memory as F16; AUX[0] is the distance of columns."""
    n1, n2 = extent(row, _Y, 1), extent(row, _Y, 2)
    first, last = share(n1 * n2 * extent(row, _Y, 3), ith, nth)
    for i in range(first, last):
        y = row_address(row, _Y, i % n1, i // n1 % n2, i // (n1 * n2))
        to = word(row, words.WORK) + i * word(row, words.AUX)
        for j in range(0, extent(row, _Y, 0), 8):
            store_f16x8(to + 2 * j, load_f32x8(y + 4 * j))


def stages(weights: Operand, columns: Operand) -> tuple[Stage, ...] | None:
    """Products with F32 activations of a multiple of 32 elements; None for anything else."""
    k, n, m = weights.ne[0], weights.ne[1], columns.ne[1]
    if weights.dtype not in (DType.F32, DType.F16) or columns.dtype != DType.F32 or k % 32:
        return None
    halved = weights.dtype == DType.F16
    several = int(m > 1 and n % 4 == 0 and (halved or contiguous(columns)))
    if not halved:
        return (Stage(ggml_multiply_f32, aux=(0, several)),)
    distance = -(-2 * k // 64) * 64
    work, aux = distance * m * columns.ne[2] * columns.ne[3], (distance, several)
    return Stage(ggml_halve, work, aux=aux), Stage(ggml_multiply_f16, work, aux=aux)
