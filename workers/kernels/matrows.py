"""Products of quantised weights where they lie with one column of activations, as LLVM code."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

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
from workers.kernels.matformats import Format, unpack_quants, unpack_scales
from workers.kernels.matlanes import (
    ROWS,
    Column,
    Values,
    accumulate,
    clamped_row,
    for_format,
    multiply,
    reduce_rows,
    store_rows,
)

STRIP = 32
"""Blocks of eight rows whose exact sums are kept before they are added up: 16 KB at most."""


class _Strip:
    """Memory for the exact sums [row][block] and scales [block][row] of a strip of blocks of eight rows."""

    def __init__(self, b: ir.IRBuilder, form: Format) -> None:
        def table(kind: ir.Type, inner: int, outer: int) -> ir.Value:
            return cgutils.alloca_once(b, ir.ArrayType(ir.ArrayType(kind, inner), outer))

        self.exact = table(i16x16.ir if _in_shorts(form) else i32x8.ir, STRIP, ROWS)
        self.other = table(i32x8.ir, STRIP, ROWS) if form.subs else None
        self.scales = [(table(I16, ROWS, STRIP), at) for at in (form.scale, form.floor) if at >= 0]


def _in_shorts(form: Format) -> bool:
    """True where the 32 products of a block fit into the two shorts that a row keeps when rows are reduced."""
    return form.span == 8 and not form.subs


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
    """Row after row through a strip of blocks, for the sake of the memory's prefetcher; then block after block."""
    blocks = b.udiv(k, const(I64, form.block))
    total = cgutils.alloca_once_value(b, const(f32x8.ir, 0.0))
    strip = _Strip(b, form)
    ahead = b.mul(stride, const(I64, ROWS))  # the next eight rows are asked for while these are used
    with cgutils.for_range_slice(b, const(I64, 0), blocks, const(I64, STRIP), I64) as (start, _):
        left = b.sub(blocks, start)
        length = b.select(b.icmp_signed("<", left, const(I64, STRIP)), left, const(I64, STRIP))
        with cgutils.for_range(b, const(I64, ROWS)) as rows:
            line = b.add(clamped_row(b, w, rows.index, stride, count), b.mul(start, const(I64, form.nbytes)))
            with cgutils.for_range(b, length) as loop:
                column = Column(b, form, y, k, b.add(start, loop.index), blocks)
                here = b.add(line, b.mul(loop.index, const(I64, form.nbytes)))
                _row_sums(b, form, here, ahead, column, strip, loop.index, rows.index)
        with cgutils.for_range(b, length) as loop:
            column = Column(b, form, y, k, b.add(start, loop.index), blocks)
            exact, other, scales = _strip_sums(b, form, strip, loop.index)
            b.store(accumulate(b, form, b.load(total), exact, other, scales, column), total)
    store_rows(b, b.load(total), out, count)


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
    exact = products[0]
    if form.subs:
        small = unpack_scales(b, form, row)
        exact = const(i32x8.ir, 0)
        for chunk, product in enumerate(products):
            lanes = [chunk] * 16 if form.subs == 8 else [2 * chunk] * 8 + [2 * chunk + 1] * 8
            exact = b.add(exact, multiply_shorts(b, product, shuffle(b, small, None, lanes)))
        if form.subs == 8:
            small = shuffle(b, small, None, [8 + i // 2 for i in range(16)])
        other = multiply_shorts(b, small, load(b, column.sums, i16x16.ir))
        b.store(other, cgutils.gep_inbounds(b, strip.other, 0, which, index))
    elif not _in_shorts(form):
        exact = multiply_shorts(b, exact, const(i16x16.ir, 1))
    b.store(exact, cgutils.gep_inbounds(b, strip.exact, 0, which, index))
    for table, offset in strip.scales:
        b.store(load(b, row, I16, offset), cgutils.gep_inbounds(b, table, 0, index, which))


def _strip_sums(
    b: ir.IRBuilder, form: Format, strip: _Strip, index: ir.Value
) -> tuple[ir.Value, ir.Value | None, Values]:
    """One block of eight rows from the strip: lane r belongs to row r."""

    def lanes(table: ir.Value) -> ir.Value:
        return reduce_rows(b, [b.load(cgutils.gep_inbounds(b, table, 0, r, index)) for r in range(ROWS)])

    exact = lanes(strip.exact)
    if _in_shorts(form):
        exact = multiply_shorts(b, exact, const(i16x16.ir, 1))
    other = lanes(strip.other) if form.subs else None
    halves = []
    for table, _ in strip.scales:
        first = b.bitcast(cgutils.gep_inbounds(b, table, 0, index, 0), i16x8.ir.as_pointer())
        halves.append(widen_half(b, b.load(first, align=2)))
    return exact, other, halves


dot_rows = for_format(_dot_rows, 6)
"""(format, weights, stride, rows <= 8, column, k, out): out[r] for consecutive rows."""
