"""Products of quantised weights with a few columns of activations, from a packed panel, as LLVM code.

A panel holds `LANES` rows. Per block: quants [chunk][8][rows][4 bytes], scale [rows] f32, floor [rows] f32 where the
format has one; K formats then have their sub-block scales [sub][rows][2] i16, each twice, and factors of the sums of
a sub-block's activations [pair of sub-blocks][rows][2] i16.
"""

from __future__ import annotations

from collections.abc import Callable

from workers.kernels.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    add_products,
    const,
    i16x8,
    i16x16,
    load,
    multiply_shorts,
    opaque,
    splat,
    store,
)  # fmt: skip
from workers.kernels.features import HAVE_VNNI
from workers.kernels.jit import cgutils, ir
from workers.kernels.matformats import Format
from workers.kernels.matlanes import (
    COLUMNS,
    LANES,
    PANELS,
    ROWS,
    Column,
    Values,
    accumulate,
    block_offsets,
    clamped_row,
    for_format,
    multiply,
    store_rows,
)

Quants = Callable[[int], ir.Value]
"""Vector j of eight: bytes 4 * j to 4 * j + 3 of 32 quants, for the rows of a panel."""

VECTOR = 4 * LANES
"""Bytes of one vector of a panel."""

_FLOATS, _INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_SHORTS, _BYTES = ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 4 * LANES)


def panel_block_vectors(form: Format) -> int:
    """Vectors of four bytes a row that one block has in a panel."""
    return _scales_at(form) + form.subs + form.subs // 2


def group_nbytes(form: Format, k: int) -> int:
    """Bytes that eight rows of `k` elements take in a panel, a multiple of 64."""
    return -(-k // form.block * 32 * panel_block_vectors(form) // 64) * 64


def _dot_panels(
    b: ir.IRBuilder, form: Format, panel: ir.Value, count: ir.Value, y: ir.Value, y_stride: ir.Value,
    columns: ir.Value, k: ir.Value, out: ir.Value, out_stride: ir.Value,
) -> None:  # fmt: skip
    blocks = b.udiv(k, const(I64, form.block))
    size = const(I64, VECTOR * panel_block_vectors(form))
    step = _to_line(b, b.mul(blocks, size))
    panels = [b.add(panel, b.mul(step, const(I64, p))) for p in range(PANELS)]
    starts = [clamped_row(b, y, const(I64, c), y_stride, columns) for c in range(COLUMNS)]
    tile = [(p, c) for p in range(PANELS) for c in range(COLUMNS)]
    totals = [cgutils.alloca_once_value(b, const(_FLOATS, 0.0)) for _ in tile]
    rooms = [cgutils.alloca_once(b, i16x8.ir) if form.subs == 8 else None for _ in range(COLUMNS)]
    with cgutils.for_range(b, blocks) as loop:
        offset = b.mul(loop.index, size)
        here = [b.add(start, offset) for start in panels]
        offsets = block_offsets(b, form, k, loop.index, blocks)
        cols = [Column(b, start, offsets) for start in starts]
        exact = _super_tile(b, form, here, starts, offsets[0]) if form.subs else _plain_tile(b, form, here, cols)
        at = range(8 * form.chunks, _scales_at(form))
        scales = [[load(b, start, _FLOATS, VECTOR * i) for i in at] for start in here]
        sums = [_sums_of_subs(b, column, room) for column, room in zip(cols, rooms, strict=True)]
        for i, (p, c) in enumerate(tile):
            other = _factored_sums(b, form, here[p], sums[c]) if form.subs else None
            b.store(accumulate(b, form, b.load(totals[i]), exact[i], other, scales[p], cols[c]), totals[i])
    for i, (p, c) in enumerate(tile):
        to = b.add(clamped_row(b, out, const(I64, c), out_stride, columns), const(I64, VECTOR * p))
        store_rows(b, b.load(totals[i]), to, b.sub(count, const(I64, LANES * p)))


def _to_line(b: ir.IRBuilder, nbytes: ir.Value) -> ir.Value:
    """Up to a multiple of 64, as `group_nbytes` does it."""
    return b.and_(b.add(nbytes, const(I64, 63)), const(I64, -64))


def chunk_tile(
    b: ir.IRBuilder, form: Format, panels: list[Quants], cols: Values, scales: list[Values], starts: Values
) -> Values:
    """Integer sums of 32 elements for the rows of each panel and the columns at `cols`, panel after panel.

    `quants(j)` of a panel is bytes [rows][4]; its `scales` are i16 [rows][2], one or two for the chunk, none for 1.
    `starts`: what the sums of each column are added to, where there are no scales.
    """
    if HAVE_VNNI:
        return _chunk_of_fours(b, panels, cols, scales, starts)
    n = len(cols)
    sums: list[ir.Value | None] = [None if scales[0] else start for _ in panels for start in starts]
    shorts: list[ir.Value | None] = [None] * (n * len(panels))
    for j in range(8):
        values = [_four_bytes(b, column, j, ROWS) for column in cols]
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


def _chunk_of_fours(
    b: ir.IRBuilder, panels: list[Quants], cols: Values, scales: list[Values], starts: Values
) -> Values:
    """`chunk_tile`, four bytes at a time. Both of a row's i16 are its scale: the upper one is the scale as i32."""
    n, kind = len(cols), starts[0].type
    if n * len(panels) == 1 and not scales[0]:
        return [_two_chains(b, panels[0], cols[0], starts[0])]
    factors = [[b.ashr(b.bitcast(v, kind), const(kind, 16)) for v in own] for own in scales]
    sums: list[ir.Value | None] = [None] * (n * len(panels))
    totals = [const(kind, 0) if scales[0] else start for _ in panels for start in starts]
    for j in range(8):
        values = [_four_bytes(b, column, j, kind.count) for column in cols]
        for p, quants in enumerate(panels):
            x, own = quants(j), factors[p]
            for i, y in enumerate(values, start=n * p):
                totals[i] = add_products(b, totals[i], x, y)
                if own and (j + 1) % (8 // len(own)) == 0:
                    more, sofar = b.mul(totals[i], own[j * len(own) // 8]), sums[i]
                    sums[i] = more if sofar is None else b.add(sofar, more)
                    totals[i] = const(kind, 0)
    return sums if scales[0] else totals


def _two_chains(b: ir.IRBuilder, quants: Quants, column: ir.Value, start: ir.Value) -> ir.Value:
    """A tile of one: a sum that waits for the one before it takes four cycles, so there are two of them."""
    totals = [start, const(start.type, 0)]
    for j in range(4):
        for half in (0, 1):
            y = _four_bytes(b, column, j + 4 * half, start.type.count)
            totals[half] = add_products(b, totals[half], quants(j + 4 * half), y)
    return b.add(*totals)


def _four_bytes(b: ir.IRBuilder, column: ir.Value, j: int, rows: int) -> ir.Value:
    """Activations 4 * j to 4 * j + 3 for each of the rows."""
    return b.bitcast(splat(b, load(b, column, I32, 4 * j), ir.VectorType(I32, rows)), ir.VectorType(I8, 4 * rows))


def _at(b: ir.IRBuilder, quants: ir.Value) -> Quants:
    return lambda j: load(b, quants, _BYTES, VECTOR * j)


def _plain_tile(b: ir.IRBuilder, form: Format, here: Values, cols: list[Column]) -> Values:
    panels, starts = [_at(b, start) for start in here], [column.start(b, form, LANES) for column in cols]
    return chunk_tile(b, form, panels, [column.quants for column in cols], [[] for _ in here], starts)


def _super_tile(b: ir.IRBuilder, form: Format, here: Values, ys: Values, quants: ir.Value) -> Values:
    """Integer sums of a block of 256 for the rows of each panel and a few columns."""
    zero = const(_INTEGERS, 0)
    sums = [cgutils.alloca_once(b, _INTEGERS) for _ in here for _ in ys]
    for total in sums:
        b.store(zero, total)
    per_chunk = form.subs // form.chunks
    with cgutils.for_range(b, const(I64, form.chunks)) as loop:
        panels, scales = [], []
        for start in here:
            panels.append(_at(b, b.add(start, b.mul(loop.index, const(I64, 8 * VECTOR)))))
            small = b.add(start, b.mul(loop.index, const(I64, VECTOR * per_chunk)))
            scales.append([load(b, small, _SHORTS, VECTOR * (_scales_at(form) + i)) for i in range(per_chunk)])
        offset = opaque(b, b.add(quants, b.mul(loop.index, const(I64, 32))))
        starts = [b.add(y, offset) for y in ys]
        more = chunk_tile(b, form, panels, starts, scales, [zero] * len(ys))
        for total, value in zip(sums, more, strict=True):
            b.store(b.add(b.load(total), value), total)
    return [b.load(total) for total in sums]


def _scales_at(form: Format) -> int:
    """Which of a block's vectors is the first one of sub-block scales: those before it are quants, scale and floor."""
    return 8 * form.chunks + 1 + (form.floor >= 0)


def _factored_sums(b: ir.IRBuilder, form: Format, here: ir.Value, sums: ir.Value) -> ir.Value:
    """Factors times sums of sub-blocks' activations: minima of Q4_K and Q5_K, scales of Q6_K."""
    total: ir.Value = const(_INTEGERS, 0)
    for pair in range(form.subs // 2):
        factors = load(b, here, _SHORTS, VECTOR * (_scales_at(form) + form.subs + pair))
        both = b.bitcast(splat(b, load(b, sums, I32, 4 * pair), _INTEGERS), _SHORTS)
        total = b.add(total, multiply_shorts(b, factors, both))
    return total


def _sums_of_subs(b: ir.IRBuilder, column: Column, room: ir.Value | None) -> ir.Value:
    """Address of a block's sums of activations; with `room` for them, of those by 32 elements instead of sixteen."""
    if room is None:
        return column.sums
    pairs = multiply_shorts(b, load(b, column.sums, i16x16.ir), const(i16x16.ir, 1))
    where = b.ptrtoint(room, I64)
    store(b, b.trunc(pairs, i16x8.ir), where)
    return where


dot_panels = for_format(_dot_panels, 8)
"""(format, PANELS panels, rows that exist, columns at y, their stride, columns that exist, k, out, out's stride)"""
