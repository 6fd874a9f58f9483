"""Tiles of products of F32, F16 and BF16 weights, as LLVM code.

Eight lanes run along k: lane l sums the fused products of elements l, l + 8, ...; then the lanes are added in a fixed
order. So an output has the same bits in tiles of any shape.
"""

from __future__ import annotations

from typing import Any

from protocol.dtypes import DType
from workers.kernels.emit import (
    F32,
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
from workers.kernels.jit import cgutils, intrinsic, ir, types
from workers.kernels.matlanes import clamped_row, reduce_rows, spread_rows, store_rows

PAIRS = (
    (DType.F32, DType.F32),
    (DType.F16, DType.F32),
    (DType.BF16, DType.F32),
    (DType.F16, DType.F16),
)
"""Types of weights and activations that there are kernels for."""

WIDE = 6
"""Columns of a tile of eight rows, for which there are registers with HAVE_AVX512."""

_f32x16 = ir.VectorType(F32, 16)


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


def _wide_tile(
    b: ir.IRBuilder,
    pair: tuple[DType, DType],
    w: ir.Value,
    w_stride: ir.Value,
    y: ir.Value,
    y_stride: ir.Value,
    k: ir.Value,
    out: ir.Value,
    out_stride: ir.Value,
) -> None:
    """Eight rows and six columns, all there; the lanes of two rows share a vector."""
    sums = [[cgutils.alloca_once_value(b, const(_f32x16, 0.0)) for _ in range(4)] for _ in range(WIDE)]
    w_rows, y_rows = (spread_rows(b, stride, n) for stride, n in ((w_stride, 4), (y_stride, WIDE // 2)))

    def step(index: ir.Value, count: ir.Value | None) -> None:
        at_w, at_y = (b.mul(index, const(I64, 8 * dtype.block_nbytes)) for dtype in pair)
        rows = w_rows(b.add(w, at_w))
        weights = [_load_two(b, pair[0], rows[r : r + 2], count) for r in range(0, 8, 2)]
        for column, where in zip(sums, y_rows(b.add(y, at_y)), strict=True):
            value = _load(b, pair[1], where, count)
            twice = shuffle(b, value, None, [*range(8), *range(8)])
            for total, both in zip(column, weights, strict=True):
                b.store(fma(b, both, twice, b.load(total)), total)

    whole, rest = b.ashr(k, const(I64, 3)), b.and_(k, const(I64, 7))
    with cgutils.for_range(b, whole) as loop:
        step(loop.index, None)
    with b.if_then(b.icmp_signed(">", rest, const(I64, 0)), likely=False):
        step(whole, rest)
    for c, column in enumerate(sums):
        halves = [shuffle(b, b.load(v), None, list(range(h, h + 8))) for v in column for h in (0, 8)]
        store(b, reduce_rows(b, halves), b.add(out, b.mul(out_stride, const(I64, c))))


def _load_two(b: ir.IRBuilder, dtype: DType, rows: list[ir.Value], count: ir.Value | None) -> ir.Value:
    """Eight elements of each of two rows, or the first `count` and zeros, as f32x16."""
    to = f32x8.ir if dtype == DType.F32 else i16x8.ir
    bits = [load(b, row, to) if count is None else load_part(b, row, count, to) for row in rows]
    both = shuffle(b, bits[0], bits[1], list(range(16)))
    if dtype == DType.F32:
        return both
    return widen_half(b, both) if dtype == DType.F16 else widen_bfloat(b, both)


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


@intrinsic
def eight_by_six(context, pair, w, w_stride, y, y_stride, k, out, out_stride):  # type: ignore[no-untyped-def]
    """(pair, weights, stride, activations, stride, k, out, stride); with HAVE_AVX512."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        _wide_tile(b, PAIRS[signature.args[0].literal_value], *values[1:])
        return context.get_dummy_value()

    if not isinstance(pair, types.IntegerLiteral):
        return None
    return types.void(pair, *[types.int64] * 7), generate


eight_by_one, four_by_three = _for_pair((8, 1)), _for_pair((4, 3))
"""(pair, weights, stride, rows that exist, activations, stride, columns that exist, k, out, stride)"""
