"""Products of quantised weights where they lie with one column of activations, as LLVM code."""

from __future__ import annotations

from collections.abc import Callable

from protocol.dtypes import DType
from workers.kernels.emit import (
    I16,
    I64,
    const,
    f32x8,
    i8x32,
    i16x8,
    i16x16,
    i32x8,
    load,
    multiply_shorts,
    prefetch_line,
    shuffle,
    widen_half,
)  # fmt: skip
from workers.kernels.jit import cgutils, ir
from workers.kernels.matformats import Format, unpack_quants, unpack_scales
from workers.kernels.matlanes import (
    ROWS,
    Column,
    Values,
    accumulate,
    block_offsets,
    clamped_row,
    for_format,
    multiply,
    reduce_rows,
    spread_rows,
    store_rows,
)
from workers.kernels.matpack import gather_halves, transpose, turned_halves
from workers.kernels.matpanels import chunk_tile

STRIP = 32
"""Blocks of eight rows whose exact sums are kept before they are added up: 16 KB at most."""


class _Strip:
    """Memory for the exact sums [row][block] and scales [block][row] of a strip of blocks of eight rows."""

    def __init__(self, b: ir.IRBuilder, form: Format) -> None:
        def table(kind: ir.Type, inner: int, outer: int) -> ir.Value:
            return cgutils.alloca_once(b, ir.ArrayType(ir.ArrayType(kind, inner), outer))

        self.exact, self.other = table(i32x8.ir, STRIP, ROWS), table(i32x8.ir, STRIP, ROWS)
        self.scales = [(table(I16, ROWS, STRIP), at) for at in (form.scale, form.floor) if at >= 0]


def _dot_rows(
    b: ir.IRBuilder,
    form: Format,
    w: ir.Value,
    stride: ir.Value,
    count: ir.Value,
    y: ir.Value,
    k: ir.Value,
    out: ir.Value,
) -> None:
    total = cgutils.alloca_once_value(b, const(f32x8.ir, 0.0))
    (_add_supers if form.subs else _add_blocks)(b, form, total, w, stride, count, y, k)
    store_rows(b, b.load(total), out, count)


def _add_blocks(
    b: ir.IRBuilder,
    form: Format,
    total: ir.Value,
    w: ir.Value,
    stride: ir.Value,
    count: ir.Value,
    y: ir.Value,
    k: ir.Value,
) -> None:
    """Blocks of 32: eight rows at once, turned so that each has a lane, in registers."""
    with b.if_else(b.icmp_signed(">=", count, const(I64, ROWS))) as (full, part):
        with full:
            rows = spread_rows(b, stride, ROWS // 2)
            _add_each_block(b, form, total, lambda offset: rows(b.add(w, offset)), stride, y, k)
        with part:
            clamped = [clamped_row(b, w, const(I64, r), stride, count) for r in range(ROWS)]
            _add_each_block(b, form, total, lambda offset: [b.add(row, offset) for row in clamped], stride, y, k)


def _add_each_block(
    b: ir.IRBuilder,
    form: Format,
    total: ir.Value,
    rows: Callable[[ir.Value], Values],
    stride: ir.Value,
    y: ir.Value,
    k: ir.Value,
) -> None:
    """`rows(offset)`: addresses of the eight rows' bytes from `offset` on."""
    blocks = b.udiv(k, const(I64, form.block))
    ahead = b.mul(stride, const(I64, ROWS))  # the next eight rows are asked for while these are used
    for short in (4096, 8192):  # those behind them where rows are short: memory takes a while
        ahead = b.select(b.icmp_signed("<", ahead, const(I64, short)), b.shl(ahead, const(I64, 1)), ahead)
    with cgutils.for_range(b, blocks) as loop:
        offset = b.mul(loop.index, const(I64, form.nbytes))
        here = rows(offset)
        turn = b.and_(loop.index, const(I64, 1 if form.nbytes <= 32 else 0))
        with b.if_then(b.icmp_signed("==", turn, const(I64, 0))):  # about once per line
            for line in rows(b.add(offset, ahead)):
                prefetch_line(b, line)
        column = Column(b, y, block_offsets(b, form, k, loop.index, blocks))
        turned = _turned_quants(b, form, here)
        start = column.start(b, form, ROWS)
        exact = chunk_tile(b, form, [turned.__getitem__], [column.quants], [[]], [start])[0]
        scales = [gather_halves(b, here, at) for at in (form.scale, form.floor) if at >= 0]
        b.store(accumulate(b, form, b.load(total), exact, None, scales, column), total)


def _turned_quants(b: ir.IRBuilder, form: Format, rows: Values) -> Values:
    """Eight vectors i8x32 [8 rows][4 bytes] of a block at eight addresses, in the order of its elements."""
    if form.high >= 0:
        whole = [b.bitcast(unpack_quants(b, form, row)[0], i32x8.ir) for row in rows]
        return [b.bitcast(v, i8x32.ir) for v in transpose(b, whole)]
    if form.dtype == DType.Q8_0:
        quants = turned_halves(b, rows, form.quants) + turned_halves(b, rows, form.quants + 16)
        return quants if form.signed else [b.xor(v, const(i8x32.ir, -128)) for v in quants]
    nibbles, four, mask = turned_halves(b, rows, form.quants), const(i8x32.ir, 4), const(i8x32.ir, 15)
    return [b.and_(v, mask) for v in nibbles] + [b.lshr(v, four) for v in nibbles]


def _add_supers(
    b: ir.IRBuilder,
    form: Format,
    total: ir.Value,
    w: ir.Value,
    stride: ir.Value,
    count: ir.Value,
    y: ir.Value,
    k: ir.Value,
) -> None:
    """Blocks of 256: row after row through a strip of blocks, for the sake of the memory's prefetcher, then block
    after block."""
    blocks = b.udiv(k, const(I64, form.block))
    strip = _Strip(b, form)
    ahead = b.mul(stride, const(I64, ROWS))  # the next eight rows are asked for while these are used
    with cgutils.for_range_slice(b, const(I64, 0), blocks, const(I64, STRIP), I64) as (start, _):
        left = b.sub(blocks, start)
        length = b.select(b.icmp_signed("<", left, const(I64, STRIP)), left, const(I64, STRIP))
        with cgutils.for_range(b, const(I64, ROWS)) as rows:
            line = b.add(clamped_row(b, w, rows.index, stride, count), b.mul(start, const(I64, form.nbytes)))
            with cgutils.for_range(b, length) as loop:
                column = Column(b, y, block_offsets(b, form, k, b.add(start, loop.index), blocks))
                here = b.add(line, b.mul(loop.index, const(I64, form.nbytes)))
                _row_sums(b, form, here, ahead, column, strip, loop.index, rows.index)
        with cgutils.for_range(b, length) as loop:
            column = Column(b, y, block_offsets(b, form, k, b.add(start, loop.index), blocks))
            exact, other, scales = _strip_sums(b, form, strip, loop.index)
            b.store(accumulate(b, form, b.load(total), exact, other, scales, column), total)


def _row_sums(
    b: ir.IRBuilder,
    form: Format,
    row: ir.Value,
    ahead: ir.Value,
    column: Column,
    strip: _Strip,
    index: ir.Value,
    which: ir.Value,
) -> None:
    """Exact sums of one block of one row, not yet across lanes, and its scales, into the strip."""
    for line in range(0, form.nbytes, 64):
        prefetch_line(b, b.add(row, ahead), line)
    products = [
        multiply(b, form, quants, load(b, column.quants, i8x32.ir, 32 * chunk))
        for chunk, quants in enumerate(unpack_quants(b, form, row))
    ]
    small = unpack_scales(b, form, row)
    exact = const(i32x8.ir, 0)
    for chunk, product in enumerate(products):
        lanes = [chunk] * 16 if form.subs == 8 else [2 * chunk] * 8 + [2 * chunk + 1] * 8
        exact = b.add(exact, multiply_shorts(b, product, shuffle(b, small, None, lanes)))
    if form.subs == 8:
        small = shuffle(b, small, None, [8 + i // 2 for i in range(16)])
    other = multiply_shorts(b, small, load(b, column.sums, i16x16.ir))
    b.store(other, cgutils.gep_inbounds(b, strip.other, 0, which, index))
    b.store(exact, cgutils.gep_inbounds(b, strip.exact, 0, which, index))
    for table, offset in strip.scales:
        b.store(load(b, row, I16, offset), cgutils.gep_inbounds(b, table, 0, index, which))


def _strip_sums(b: ir.IRBuilder, form: Format, strip: _Strip, index: ir.Value) -> tuple[ir.Value, ir.Value, Values]:
    """One block of eight rows from the strip: lane r belongs to row r."""

    def lanes(table: ir.Value) -> ir.Value:
        return reduce_rows(b, [b.load(cgutils.gep_inbounds(b, table, 0, r, index)) for r in range(ROWS)])

    exact, other = lanes(strip.exact), lanes(strip.other)
    halves = []
    for table, _ in strip.scales:
        first = b.bitcast(cgutils.gep_inbounds(b, table, 0, index, 0), i16x8.ir.as_pointer())
        halves.append(widen_half(b, b.load(first, align=2)))
    return exact, other, halves


dot_rows = for_format(_dot_rows, 6)
"""(format, weights, stride, rows that exist, column, k, out): out[r] for consecutive rows."""
