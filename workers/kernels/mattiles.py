"""Products of quantised weights with quantised activations, as LLVM code: eight rows times one or four columns.

Row r of the eight is lane r. One block of 32 or 256 elements gives an exact integer per lane, which one fused step
adds to the lane's sum: `sum += scale * integer`, blocks in order. A value is therefore the same whether it comes from
`dot_rows` (straight from the weights) or `dot_panel` (from a packed panel), and whatever its neighbours are.

A panel holds eight rows. Per block: quants [chunk][8][8 rows][4 bytes], scale [8 rows] f32, floor [8 rows] f32 where
the format has one; K formats then have their sub-block scales [sub][8 rows][2] i16, each twice, and factors of the sums
of sixteen activations [8 pairs][8 rows][2] i16.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from workers.kernels.emit import (
    F32,
    I16,
    I32,
    I64,
    apply_sign,
    call,
    const,
    f32x8,
    fma,
    i8x32,
    i16x8,
    i16x16,
    i32x8,
    load,
    multiply_bytes,
    multiply_shorts,
    prefetch_line,
    shuffle,
    splat,
    store,
    store_part,
    widen_half,
)  # fmt: skip
from workers.kernels.matformats import FORMATS, Format, unpack_quants, unpack_scales

ROWS, COLUMNS = 8, 4
"""Of a tile."""

STRIP = 32
"""Blocks of eight rows whose exact sums are kept before they are added up: 16 KB at most."""

Values = list[ir.Value]


def panel_block_nbytes(form: Format) -> int:
    """Bytes of one block of eight rows in a panel."""
    return 256 * form.chunks + 32 + 32 * (form.floor >= 0) + (32 * form.subs + 256 if form.subs else 0)


def panel_nbytes(form: Format, k: int) -> int:
    """Bytes of a panel of eight rows of `k` elements, a multiple of 64."""
    return -(-k // form.block * panel_block_nbytes(form) // 64) * 64


def reduce_rows(b: ir.IRBuilder, rows: Values) -> ir.Value:
    """Eight vectors of eight i32 (or f32, or pairs of i16) to one: lane r is the sum over row r, in a fixed order."""
    kind = rows[0].type
    lanes = f32x8.ir if kind == f32x8.ir else i32x8.ir
    steps = (
        ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    )
    add = b.fadd if kind == f32x8.ir else b.add
    for low, high in steps:
        wide = [b.bitcast(v, lanes) for v in rows]
        rows = [
            add(b.bitcast(shuffle(b, u, v, low), kind), b.bitcast(shuffle(b, u, v, high), kind))
            for u, v in zip(wide[::2], wide[1::2], strict=True)
        ]
    return rows[0]


def transpose(b: ir.IRBuilder, rows: Values) -> Values:
    """Eight vectors of eight i32: lane r of result j is lane j of row r."""
    pairs = []
    for u, v in zip(rows[::2], rows[1::2], strict=True):
        pairs.append((shuffle(b, u, v, [0, 8, 1, 9, 4, 12, 5, 13]), shuffle(b, u, v, [2, 10, 3, 11, 6, 14, 7, 15])))
    fours = []
    for (a, c), (d, e) in zip(pairs[::2], pairs[1::2], strict=True):
        for u, v in ((a, d), (c, e)):
            fours.append((u, v, [0, 1, 8, 9, 4, 5, 12, 13]))
            fours.append((u, v, [2, 3, 10, 11, 6, 7, 14, 15]))
    half = [shuffle(b, *four) for four in fours]
    low = [shuffle(b, half[k], half[4 + k], [0, 1, 2, 3, 8, 9, 10, 11]) for k in range(4)]
    return low + [shuffle(b, half[k], half[4 + k], [4, 5, 6, 7, 12, 13, 14, 15]) for k in range(4)]


def _multiply(b: ir.IRBuilder, form: Format, x: ir.Value, y: ir.Value) -> ir.Value:
    """Quants times activations, pairs of bytes added: i16x16."""
    if not form.signed:
        return multiply_bytes(b, x, y)
    size = call(b, "llvm.abs.v32i8", i8x32.ir, [x, const(ir.IntType(1), 0)])
    return multiply_bytes(b, size, apply_sign(b, y, x))


def clamped_row(b: ir.IRBuilder, start: ir.Value, row: ir.Value, stride: ir.Value, count: ir.Value) -> ir.Value:
    """Address of a row (or column) of a tile; those beyond `count` stand for the last one."""
    last = b.sub(count, const(I64, 1))
    inside = b.icmp_signed("<", row, last)
    return b.add(start, b.mul(b.select(inside, row, last), stride))


def _gather_halves(b: ir.IRBuilder, rows: Values, offset: int) -> ir.Value:
    """An F16 at `offset` from each of eight addresses, as f32x8."""
    halves: ir.Value = ir.Constant(i16x8.ir, ir.Undefined)
    for r, row in enumerate(rows):
        halves = b.insert_element(halves, load(b, row, I16, offset), const(I32, r))
    return widen_half(b, halves)


class _Column:
    """Addresses of a column's activations: quants, a scale per block, sums per block (quantize_rows.py)."""

    def __init__(self, b: ir.IRBuilder, form: Format, y: ir.Value, k: ir.Value, index: ir.Value, blocks: ir.Value):
        self.quants = b.add(y, b.mul(index, const(I64, form.block)))
        scales = b.add(y, k)
        self.scale = b.add(scales, b.mul(index, const(I64, 4)))
        sums = b.add(scales, b.mul(blocks, const(I64, 4)))
        self.sums = b.add(sums, b.mul(index, const(I64, 32 if form.subs else 4)))


def _accumulate(
    b: ir.IRBuilder, form: Format, total: ir.Value, exact: ir.Value, other: ir.Value | None, w: Values, column: _Column
) -> ir.Value:
    """Add one block to the sums: `exact` are the quants' products, `other` those of the sums; w: scale and floor."""
    factor = splat(b, load(b, column.scale, F32), f32x8.ir)
    if form.zero:
        if other is None:
            other = splat(b, load(b, column.sums, I32), i32x8.ir)
        exact = b.sub(exact, b.mul(other, const(i32x8.ir, form.zero)))
    total = fma(b, b.fmul(w[0], factor), b.sitofp(exact, f32x8.ir), total)
    if form.floor < 0:
        return total
    if other is None:
        return fma(b, w[1], splat(b, load(b, column.sums, F32), f32x8.ir), total)
    return fma(b, b.fneg(b.fmul(w[1], factor)), b.sitofp(other, f32x8.ir), total)


# --- eight rows where they lie, one column


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
                column = _Column(b, form, y, k, b.add(start, loop.index), blocks)
                here = b.add(line, b.mul(loop.index, const(I64, form.nbytes)))
                _row_sums(b, form, here, ahead, column, strip, loop.index, rows.index)
        with cgutils.for_range(b, length) as loop:
            column = _Column(b, form, y, k, b.add(start, loop.index), blocks)
            exact, other, scales = _strip_sums(b, form, strip, loop.index)
            b.store(_accumulate(b, form, b.load(total), exact, other, scales, column), total)
    store_rows(b, b.load(total), out, count)


def _row_sums(
    b: ir.IRBuilder,
    form: Format,
    row: ir.Value,
    ahead: ir.Value,
    column: _Column,
    strip: _Strip,
    index: ir.Value,
    which: ir.Value,
) -> None:
    """Exact sums of one block of one row, not yet across lanes, and its scales, into the strip."""
    for line in range(0, form.nbytes, 64):
        prefetch_line(b, b.add(row, ahead), line)
    products = [
        _multiply(b, form, quants, load(b, column.quants, i8x32.ir, 32 * chunk))
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


def store_rows(b: ir.IRBuilder, v: ir.Value, out: ir.Value, count: ir.Value) -> None:
    """Write the first `count` of eight values, all eight if there are more."""
    with b.if_else(b.icmp_signed(">=", count, const(I64, ROWS))) as (full, part):
        with full:
            store(b, v, out)
        with part:
            store_part(b, v, out, count)


# --- eight rows packed into a panel, four columns


def _pack_rows(
    b: ir.IRBuilder, form: Format, w: ir.Value, stride: ir.Value, count: ir.Value, k: ir.Value, panel: ir.Value
) -> None:
    quants = cgutils.alloca_once(b, ir.ArrayType(ir.ArrayType(i32x8.ir, ROWS), form.chunks))
    scales = cgutils.alloca_once(b, ir.ArrayType(i32x8.ir, ROWS))
    rows = [clamped_row(b, w, const(I64, r), stride, count) for r in range(ROWS)]
    with cgutils.for_range(b, b.udiv(k, const(I64, form.block))) as loop:
        offset = b.mul(loop.index, const(I64, form.nbytes))
        here = [b.add(row, offset) for row in rows]
        to = b.add(panel, b.mul(loop.index, const(I64, panel_block_nbytes(form))))
        for r, row in enumerate(here):
            for chunk, v in enumerate(unpack_quants(b, form, row)):
                b.store(b.bitcast(v, i32x8.ir), cgutils.gep_inbounds(b, quants, 0, chunk, r))
            if form.subs:
                b.store(b.bitcast(unpack_scales(b, form, row), i32x8.ir), cgutils.gep_inbounds(b, scales, 0, r))
        with cgutils.for_range(b, const(I64, form.chunks)) as inner:
            vectors = [b.load(cgutils.gep_inbounds(b, quants, 0, inner.index, r)) for r in range(ROWS)]
            chunk_to = b.add(to, b.mul(inner.index, const(I64, 256)))
            for j, v in enumerate(transpose(b, vectors)):
                store(b, v, chunk_to, 32 * j)
        factors = [_gather_halves(b, here, at) for at in (form.scale, form.floor) if at >= 0]
        if form.subs:
            pairs = [b.load(cgutils.gep_inbounds(b, scales, 0, r)) for r in range(ROWS)]
            factors += _spread_scales(b, form, transpose(b, pairs))
        for i, v in enumerate(factors):
            store(b, v, to, 256 * form.chunks + 32 * i)


def _spread_scales(b: ir.IRBuilder, form: Format, pairs: Values) -> Values:
    """Pairs of small scales by row, as i32, to what a panel holds: each scale twice, and factors of the sums."""
    half, upper = const(i32x8.ir, 16), const(i32x8.ir, -65536)

    def twice(pair: ir.Value) -> Values:
        low = b.and_(pair, const(i32x8.ir, 65535))
        return [b.or_(low, b.shl(pair, half)), b.or_(b.lshr(pair, half), b.and_(pair, upper))]

    if form.subs == 16:
        return [v for pair in pairs for v in twice(pair)] + pairs
    return [v for pair in pairs for v in twice(pair)]


def _dot_panel(
    b: ir.IRBuilder, form: Format, panel: ir.Value, count: ir.Value, y: ir.Value, y_stride: ir.Value,
    columns: ir.Value, k: ir.Value, out: ir.Value, out_stride: ir.Value,
) -> None:  # fmt: skip
    blocks = b.udiv(k, const(I64, form.block))
    starts = [clamped_row(b, y, const(I64, c), y_stride, columns) for c in range(COLUMNS)]
    totals = [cgutils.alloca_once_value(b, const(f32x8.ir, 0.0)) for _ in range(COLUMNS)]
    with cgutils.for_range(b, blocks) as loop:
        here = b.add(panel, b.mul(loop.index, const(I64, panel_block_nbytes(form))))
        cols = [_Column(b, form, start, k, loop.index, blocks) for start in starts]
        factors = 256 * form.chunks
        exact = (_super_tile if form.subs else _plain_tile)(b, form, here, cols)
        scales = [load(b, here, f32x8.ir, factors + 32 * i) for i in range(1 + (form.floor >= 0))]
        for c, column in enumerate(cols):
            other = _factored_sums(b, form, here, column) if form.subs else None
            b.store(_accumulate(b, form, b.load(totals[c]), exact[c], other, scales, column), totals[c])
    for c in range(COLUMNS):
        store_rows(b, b.load(totals[c]), clamped_row(b, out, const(I64, c), out_stride, columns), count)


def _chunk_tile(b: ir.IRBuilder, form: Format, quants: ir.Value, cols: Values, scales: Values) -> Values:
    """Integer sums of 32 elements for eight rows and four columns; `scales` are one or two vectors of i16."""
    sums: list[ir.Value | None] = [None] * COLUMNS
    shorts: list[ir.Value | None] = [None] * COLUMNS
    for j in range(8):
        x = load(b, quants, i8x32.ir, 32 * j)
        for c, column in enumerate(cols):
            y = b.bitcast(splat(b, load(b, column, I32, 4 * j), i32x8.ir), i8x32.ir)
            product, before = _multiply(b, form, x, y), shorts[c]
            shorts[c] = product if before is None else b.add(before, product)
            if (j + 1) % form.span == 0:
                more, sofar = multiply_shorts(b, shorts[c], scales[j * len(scales) // 8]), sums[c]
                sums[c] = more if sofar is None else b.add(sofar, more)
                shorts[c] = None
    return sums


def _plain_tile(b: ir.IRBuilder, form: Format, here: ir.Value, cols: list[_Column]) -> Values:
    return _chunk_tile(b, form, here, [column.quants for column in cols], [const(i16x16.ir, 1)])


def _super_tile(b: ir.IRBuilder, form: Format, here: ir.Value, cols: list[_Column]) -> Values:
    """Integer sums of a block of 256 for eight rows and four columns."""
    sums = [cgutils.alloca_once(b, i32x8.ir) for _ in cols]
    for total in sums:
        b.store(const(i32x8.ir, 0), total)
    per_chunk = form.subs // form.chunks
    with cgutils.for_range(b, const(I64, form.chunks)) as loop:
        quants = b.add(here, b.mul(loop.index, const(I64, 256)))
        small = b.add(here, b.mul(loop.index, const(I64, 32 * per_chunk)))
        scales = [load(b, small, i16x16.ir, _scales_offset(form) + 32 * i) for i in range(per_chunk)]
        starts = [b.add(column.quants, b.mul(loop.index, const(I64, 32))) for column in cols]
        for total, more in zip(sums, _chunk_tile(b, form, quants, starts, scales), strict=True):
            b.store(b.add(b.load(total), more), total)
    return [b.load(total) for total in sums]


def _scales_offset(form: Format) -> int:
    """Where the sub-block scales lie within a panel's block."""
    return 256 * form.chunks + 32 + 32 * (form.floor >= 0)


def _factored_sums(b: ir.IRBuilder, form: Format, here: ir.Value, column: _Column) -> ir.Value:
    """Factors times sums of sixteen activations: minima of Q4_K and Q5_K, scales of Q6_K."""
    total: ir.Value = const(i32x8.ir, 0)
    for pair in range(8):
        factors = load(b, here, i16x16.ir, _scales_offset(form) + 32 * (form.subs + pair))
        sums = b.bitcast(splat(b, load(b, column.sums, I32, 4 * pair), i32x8.ir), i16x16.ir)
        total = b.add(total, multiply_shorts(b, factors, sums))
    return total


# --- what kernels call


def for_format(emit: Any, arguments: int) -> Any:
    """An intrinsic `f(format, *addresses and counts)` whose first argument is a constant, a key of FORMATS."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        emit(b, FORMATS[signature.args[0].literal_value], *values[1:])
        return context.get_dummy_value()

    def typed(form: Any) -> Any:
        if not isinstance(form, types.IntegerLiteral):
            return None
        return types.void(form, *[types.int64] * arguments), generate

    names = ", ".join(f"a{i}" for i in range(arguments))
    scope: dict[str, Any] = {"typed": typed}
    exec(f"def function(context, form, {names}): return typed(form)", scope)
    return intrinsic(scope["function"])


dot_rows = for_format(_dot_rows, 6)
"""(format, weights, stride, rows <= 8, column, k, out): out[r] for consecutive rows."""
pack_rows = for_format(_pack_rows, 5)
"""(format, weights, stride, rows <= 8, k, panel)"""
dot_panel = for_format(_dot_panel, 8)
"""(format, panel, rows <= 8, columns at y, their stride, columns <= 4, k, out, out's stride)"""
