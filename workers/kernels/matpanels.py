"""Products of quantised weights with a few columns of activations, from a packed panel, as LLVM code.

A panel holds eight rows. Per block: quants [chunk][8][8 rows][4 bytes], scale [8 rows] f32, floor [8 rows] f32 where
the format has one; K formats then have their sub-block scales [sub][8 rows][2] i16, each twice, and factors of the sums
of sixteen activations [8 pairs][8 rows][2] i16.
"""

from __future__ import annotations

from collections.abc import Callable

from workers.kernels.emit import (
    I16,
    I32,
    I64,
    add_products,
    const,
    f32x8,
    i8x32,
    i16x8,
    i16x16,
    i32x8,
    load,
    multiply_shorts,
    shuffle,
    splat,
    store,
    widen_half,
)  # fmt: skip
from workers.kernels.features import HAVE_VNNI
from workers.kernels.jit import cgutils, ir
from workers.kernels.matformats import Format, unpack_quants, unpack_scales
from workers.kernels.matlanes import (
    COLUMNS,
    PANELS,
    ROWS,
    Column,
    Values,
    accumulate,
    clamped_row,
    for_format,
    multiply,
    store_rows,
)

Quants = Callable[[int], ir.Value]
"""Vector j of eight: bytes 4 * j to 4 * j + 3 of 32 quants, for eight rows."""


def panel_block_nbytes(form: Format) -> int:
    """Bytes of one block of eight rows in a panel."""
    return 256 * form.chunks + 32 + 32 * (form.floor >= 0) + (32 * form.subs + 256 if form.subs else 0)


def panel_nbytes(form: Format, k: int) -> int:
    """Bytes of a panel of eight rows of `k` elements, a multiple of 64."""
    return -(-k // form.block * panel_block_nbytes(form) // 64) * 64


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


def gather_halves(b: ir.IRBuilder, rows: Values, offset: int) -> ir.Value:
    """An F16 at `offset` from each of eight addresses, as f32x8."""
    halves: ir.Value = ir.Constant(i16x8.ir, ir.Undefined)
    for r, row in enumerate(rows):
        halves = b.insert_element(halves, load(b, row, I16, offset), const(I32, r))
    return widen_half(b, halves)


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
        factors = [gather_halves(b, here, at) for at in (form.scale, form.floor) if at >= 0]
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


def _dot_panels(
    b: ir.IRBuilder, form: Format, panel: ir.Value, count: ir.Value, y: ir.Value, y_stride: ir.Value,
    columns: ir.Value, k: ir.Value, out: ir.Value, out_stride: ir.Value,
) -> None:  # fmt: skip
    blocks = b.udiv(k, const(I64, form.block))
    step = b.mul(blocks, const(I64, panel_block_nbytes(form)))
    panels = [b.add(panel, b.mul(_to_line(b, step), const(I64, p))) for p in range(PANELS)]
    starts = [clamped_row(b, y, const(I64, c), y_stride, columns) for c in range(COLUMNS)]
    tile = [(p, c) for p in range(PANELS) for c in range(COLUMNS)]
    totals = [cgutils.alloca_once_value(b, const(f32x8.ir, 0.0)) for _ in tile]
    with cgutils.for_range(b, blocks) as loop:
        offset = b.mul(loop.index, const(I64, panel_block_nbytes(form)))
        here = [b.add(start, offset) for start in panels]
        cols = [Column(b, form, start, k, loop.index, blocks) for start in starts]
        exact = (_super_tile if form.subs else _plain_tile)(b, form, here, cols)
        at = range(256 * form.chunks, 256 * form.chunks + 32 * (1 + (form.floor >= 0)), 32)
        scales = [[load(b, start, f32x8.ir, offset) for offset in at] for start in here]
        for i, (p, c) in enumerate(tile):
            other = _factored_sums(b, form, here[p], cols[c]) if form.subs else None
            b.store(accumulate(b, form, b.load(totals[i]), exact[i], other, scales[p], cols[c]), totals[i])
    for i, (p, c) in enumerate(tile):
        to = b.add(clamped_row(b, out, const(I64, c), out_stride, columns), const(I64, 4 * ROWS * p))
        store_rows(b, b.load(totals[i]), to, b.sub(count, const(I64, ROWS * p)))


def _to_line(b: ir.IRBuilder, nbytes: ir.Value) -> ir.Value:
    """Up to a multiple of 64, as `panel_nbytes` does it."""
    return b.and_(b.add(nbytes, const(I64, 63)), const(I64, -64))


def chunk_tile(b: ir.IRBuilder, form: Format, panels: list[Quants], cols: Values, scales: list[Values]) -> Values:
    """Integer sums of 32 elements for eight rows of each panel and the columns at `cols`, panel after panel.

    `quants(j)` of a panel is i8x32 [8 rows][4 bytes]; its `scales` are i16x16 [8 rows][2], one or two for the chunk,
    none for 1.
    """
    if HAVE_VNNI:
        return _chunk_of_fours(b, panels, cols, scales)
    n = len(cols)
    sums: list[ir.Value | None] = [None] * (n * len(panels))
    shorts: list[ir.Value | None] = [None] * (n * len(panels))
    for j in range(8):
        values = [_four_bytes(b, column, j) for column in cols]
        for p, quants in enumerate(panels):
            x, own = quants(j), scales[p] or [const(i16x16.ir, 1)]
            for i, y in enumerate(values, start=n * p):
                product, before = multiply(b, form, x, y), shorts[i]
                shorts[i] = product if before is None else b.add(before, product)
                if (j + 1) % form.span == 0:
                    more, sofar = multiply_shorts(b, shorts[i], own[j * len(own) // 8]), sums[i]
                    sums[i] = more if sofar is None else b.add(sofar, more)
                    shorts[i] = None
    return sums


def _chunk_of_fours(b: ir.IRBuilder, panels: list[Quants], cols: Values, scales: list[Values]) -> Values:
    """`chunk_tile`, four bytes at a time. Both of a row's i16 are its scale: the upper one is the scale as i32."""
    n = len(cols)
    factors = [[b.ashr(b.bitcast(v, i32x8.ir), const(i32x8.ir, 16)) for v in own] for own in scales]
    sums: list[ir.Value | None] = [None] * (n * len(panels))
    totals: Values = [const(i32x8.ir, 0) for _ in sums]
    for j in range(8):
        values = [_four_bytes(b, column, j) for column in cols]
        for p, quants in enumerate(panels):
            x, own = quants(j), factors[p]
            for i, y in enumerate(values, start=n * p):
                totals[i] = add_products(b, totals[i], x, y)
                if own and (j + 1) % (8 // len(own)) == 0:
                    more, sofar = b.mul(totals[i], own[j * len(own) // 8]), sums[i]
                    sums[i] = more if sofar is None else b.add(sofar, more)
                    totals[i] = const(i32x8.ir, 0)
    return sums if scales[0] else totals


def _four_bytes(b: ir.IRBuilder, column: ir.Value, j: int) -> ir.Value:
    """Activations 4 * j to 4 * j + 3 for each of the rows."""
    return b.bitcast(splat(b, load(b, column, I32, 4 * j), i32x8.ir), i8x32.ir)


def _at(b: ir.IRBuilder, quants: ir.Value) -> Quants:
    return lambda j: load(b, quants, i8x32.ir, 32 * j)


def _plain_tile(b: ir.IRBuilder, form: Format, here: Values, cols: list[Column]) -> Values:
    return chunk_tile(
        b, form, [_at(b, start) for start in here], [column.quants for column in cols], [[] for _ in here]
    )


def _super_tile(b: ir.IRBuilder, form: Format, here: Values, cols: list[Column]) -> Values:
    """Integer sums of a block of 256 for eight rows of each panel and a few columns."""
    sums = [cgutils.alloca_once(b, i32x8.ir) for _ in here for _ in cols]
    for total in sums:
        b.store(const(i32x8.ir, 0), total)
    per_chunk = form.subs // form.chunks
    with cgutils.for_range(b, const(I64, form.chunks)) as loop:
        panels, scales = [], []
        for start in here:
            panels.append(_at(b, b.add(start, b.mul(loop.index, const(I64, 256)))))
            small = b.add(start, b.mul(loop.index, const(I64, 32 * per_chunk)))
            scales.append([load(b, small, i16x16.ir, _scales_offset(form) + 32 * i) for i in range(per_chunk)])
        starts = [b.add(column.quants, b.mul(loop.index, const(I64, 32))) for column in cols]
        for total, more in zip(sums, chunk_tile(b, form, panels, starts, scales), strict=True):
            b.store(b.add(b.load(total), more), total)
    return [b.load(total) for total in sums]


def _scales_offset(form: Format) -> int:
    """Where the sub-block scales lie within a panel's block."""
    return 256 * form.chunks + 32 + 32 * (form.floor >= 0)


def _factored_sums(b: ir.IRBuilder, form: Format, here: ir.Value, column: Column) -> ir.Value:
    """Factors times sums of sixteen activations: minima of Q4_K and Q5_K, scales of Q6_K."""
    total: ir.Value = const(i32x8.ir, 0)
    for pair in range(8):
        factors = load(b, here, i16x16.ir, _scales_offset(form) + 32 * (form.subs + pair))
        sums = b.bitcast(splat(b, load(b, column.sums, I32, 4 * pair), i32x8.ir), i16x16.ir)
        total = b.add(total, multiply_shorts(b, factors, sums))
    return total


pack_rows = for_format(_pack_rows, 5)
"""(format, weights, stride, rows <= 8, k, panel)"""
dot_panels = for_format(_dot_panels, 8)
"""(format, PANELS panels, rows that exist, columns at y, their stride, columns that exist, k, out, out's stride)"""
