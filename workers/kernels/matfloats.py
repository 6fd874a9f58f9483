"""Products of F32, F16 and BF16 weights, rows as they lie with any stride between them, and their kernels.

Eight lanes run along k: lane l sums the fused products of elements l, l + 8, ...; then the lanes are added in a fixed
order. So an output has the same bits in tiles of any shape, for any number of columns, rows and threads. Half
precision weights meet activations in full precision: nothing is rounded before the result.
"""

from __future__ import annotations

from typing import Any

from protocol.dtypes import DType
from workers.kernels import row as words
from workers.kernels.access import extent, row_address, share, stride
from workers.kernels.emit import (
    I64,
    const,
    f32x8,
    fma,
    i16x8,
    load,
    load_part,
    prefetch_line,
    shuffle,
    store,
    store_part,
    widen_bfloat,
    widen_half,
)
from workers.kernels.jit import cgutils, intrinsic, ir, njit, types
from workers.kernels.matlanes import clamped_row, reduce_rows, store_rows
from workers.kernels.stage import OPTIONS, Kernel, kernel

PAIRS = (
    (DType.F32, DType.F32),
    (DType.F16, DType.F32),
    (DType.BF16, DType.F32),
    (DType.F16, DType.F16),
)
"""Types of weights and activations that there are kernels for."""

FEW = 2
"""Up to so many columns a tile is eight rows of one column, else four rows of three."""

BLOCK_NBYTES = 1 << 18
"""Of activations that all weights pass by before the next ones: what a second-level cache keeps."""

_W, _Y = words.SRC[0], words.SRC[1]
_F32_F32, _F16_F32, _BF16_F32, _F16_F16 = range(4)


def _load(b: ir.IRBuilder, dtype: DType, where: ir.Value, count: ir.Value | None = None) -> ir.Value:
    """Eight elements, or the first `count` and zeros, as f32x8."""
    to = f32x8.ir if dtype == DType.F32 else i16x8.ir
    bits = load(b, where, to) if count is None else load_part(b, where, count, to)
    if dtype == DType.F32:
        return bits
    return widen_half(b, bits) if dtype == DType.F16 else widen_bfloat(b, bits)


def _tile(
    b: ir.IRBuilder,
    pair: tuple[DType, DType],
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
    starts_w = [clamped_row(b, w, const(I64, r), w_stride, rows) for r in range(shape[0])]
    starts_y = [clamped_row(b, y, const(I64, c), y_stride, columns) for c in range(shape[1])]
    sums = [[cgutils.alloca_once_value(b, const(f32x8.ir, 0.0)) for _ in starts_w] for _ in starts_y]

    def step(index: ir.Value, count: ir.Value | None) -> None:
        at_w, at_y = (b.mul(index, const(I64, 8 * dtype.block_nbytes)) for dtype in pair)
        values = [_load(b, pair[1], b.add(start, at_y), count) for start in starts_y]
        for r, start in enumerate(starts_w):
            weights = _load(b, pair[0], b.add(start, at_w), count)
            for c, value in enumerate(values):
                b.store(fma(b, weights, value, b.load(sums[c][r])), sums[c][r])

    whole, rest = b.ashr(k, const(I64, 3)), b.and_(k, const(I64, 7))
    fours = const(I64, 0)
    if shape[1] == 1:  # weights are used once: ask for the next rows, line by line
        fours, ahead = b.and_(whole, const(I64, -4)), b.mul(w_stride, const(I64, shape[0]))
        with cgutils.for_range_slice(b, const(I64, 0), fours, const(I64, 4), I64) as (index, _):
            nbytes = 8 * pair[0].block_nbytes
            for start in starts_w:
                for line in range(0, 4 * nbytes, 64):
                    prefetch_line(b, b.add(b.add(start, ahead), b.mul(index, const(I64, nbytes))), line)
            for i in range(4):
                step(b.add(index, const(I64, i)), None)
    with cgutils.for_range_slice(b, fours, whole, const(I64, 1), I64) as (index, _):
        step(index, None)
    with b.if_then(b.icmp_signed(">", rest, const(I64, 0)), likely=False):
        step(whole, rest)
    for c, column in enumerate(sums):
        to = clamped_row(b, out, const(I64, c), out_stride, columns)
        _finish(b, [b.load(total) for total in column], to, rows)


def _finish(b: ir.IRBuilder, sums: list[ir.Value], out: ir.Value, rows: ir.Value) -> None:
    """Add up the lanes of four or eight rows and write those that exist."""
    if len(sums) == 8:
        store_rows(b, reduce_rows(b, sums), out, rows)
        return
    both = reduce_rows(b, sums + sums)  # its lower half is what eight rows would give
    with b.if_else(b.icmp_signed(">=", rows, const(I64, 4))) as (full, part):
        with full:
            store(b, shuffle(b, both, None, [0, 1, 2, 3]), out)
        with part:
            store_part(b, both, out, rows)


def _for_pair(shape: tuple[int, int]) -> Any:
    """The intrinsic of a tile; its first argument is a constant, an index into PAIRS."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        _tile(b, PAIRS[signature.args[0].literal_value], shape, *values[1:])
        return context.get_dummy_value()

    def function(context, pair, w, w_stride, rows, y, y_stride, columns, k, out, out_stride):  # type: ignore[no-untyped-def]
        if not isinstance(pair, types.IntegerLiteral):
            return None
        return types.void(pair, *[types.int64] * 9), generate

    return intrinsic(function)


eight_by_one, four_by_three = _for_pair((8, 1)), _for_pair((4, 3))
"""(pair, weights, stride, rows that exist, activations, stride, columns that exist, k, out, stride)"""


@njit(**OPTIONS)
def _unit(row: int, unit: int, groups: int) -> tuple[int, int, int, int]:
    """Number of rows in the group of eight, addresses of its weights, activations and results."""
    group, batch = unit % groups, unit // groups
    i2, i3 = batch % extent(row, _Y, 2), batch // extent(row, _Y, 2)
    w2, w3 = i2 * extent(row, _W, 2) // extent(row, _Y, 2), i3 * extent(row, _W, 3) // extent(row, _Y, 3)
    out = row_address(row, words.DST, 0, i2, i3) + 32 * group
    rows = min(8, extent(row, _W, 1) - 8 * group)
    return rows, row_address(row, _W, 8 * group, w2, w3), row_address(row, _Y, 0, i2, i3), out


@njit(**OPTIONS)
def _units(row: int, ith: int, nth: int) -> tuple[int, tuple[int, int]]:
    """Groups of eight rows per batch, and the thread's share of all of them."""
    groups = (extent(row, _W, 1) + 7) // 8
    return groups, share(groups * extent(row, _Y, 2) * extent(row, _Y, 3), ith, nth)


@njit(inline="always")
def _few_columns(row: int, ith: int, nth: int, pair: int) -> None:
    groups, (first, last) = _units(row, ith, nth)
    k, out_step = extent(row, _W, 0), stride(row, words.DST, 1)
    w_step, y_step = stride(row, _W, 1), stride(row, _Y, 1)
    for unit in range(first, last):
        rows, w, y, out = _unit(row, unit, groups)
        for c in range(extent(row, _Y, 1)):
            eight_by_one(pair, w, w_step, rows, y + c * y_step, y_step, 1, k, out + c * out_step, out_step)


@njit(inline="always")
def _many_columns(row: int, ith: int, nth: int, pair: int) -> None:
    groups, (first, last) = _units(row, ith, nth)
    k, m, out_step = extent(row, _W, 0), extent(row, _Y, 1), stride(row, words.DST, 1)
    w_step, y_step = stride(row, _W, 1), stride(row, _Y, 1)
    block = max(1, BLOCK_NBYTES // (12 * max(k, 1))) * 3
    for start in range(0, m, block):
        for unit in range(first, last):
            rows, w, y, out = _unit(row, unit, groups)
            for r in range(0, rows, 4):
                for c in range(start, min(start + block, m), 3):
                    four_by_three(
                        pair, w + r * w_step, w_step, rows - r, y + c * y_step, y_step, min(3, m - c), k,
                        out + c * out_step + 4 * r, out_step,
                    )  # fmt: skip


@kernel
def few_f32(row: int, ith: int, nth: int) -> None:
    """F32 weights, one or two columns."""
    _few_columns(row, ith, nth, _F32_F32)


@kernel
def many_f32(row: int, ith: int, nth: int) -> None:
    """F32 weights, any number of columns."""
    _many_columns(row, ith, nth, _F32_F32)


@kernel
def few_f16(row: int, ith: int, nth: int) -> None:
    """F16 weights, one or two columns."""
    _few_columns(row, ith, nth, _F16_F32)


@kernel
def many_f16(row: int, ith: int, nth: int) -> None:
    """F16 weights, any number of columns."""
    _many_columns(row, ith, nth, _F16_F32)


@kernel
def few_bf16(row: int, ith: int, nth: int) -> None:
    """BF16 weights, one or two columns."""
    _few_columns(row, ith, nth, _BF16_F32)


@kernel
def many_bf16(row: int, ith: int, nth: int) -> None:
    """BF16 weights, any number of columns."""
    _many_columns(row, ith, nth, _BF16_F32)


@kernel
def few_f16_f16(row: int, ith: int, nth: int) -> None:
    """F16 weights and activations, one or two columns."""
    _few_columns(row, ith, nth, _F16_F16)


@kernel
def many_f16_f16(row: int, ith: int, nth: int) -> None:
    """F16 weights and activations, any number of columns."""
    _many_columns(row, ith, nth, _F16_F16)


PRODUCTS: dict[tuple[DType, DType], tuple[Kernel, Kernel]] = {
    (DType.F32, DType.F32): (few_f32, many_f32),
    (DType.F16, DType.F32): (few_f16, many_f16),
    (DType.BF16, DType.F32): (few_bf16, many_bf16),
    (DType.F16, DType.F16): (few_f16_f16, many_f16_f16),
}
"""Kernels for few and for many columns, by the types of weights and activations."""
