"""Weights where they lie, turned so that each of eight rows has a lane, and packed into panels, as LLVM code."""

from __future__ import annotations

from workers.kernels.emit import (
    I16,
    I32,
    I64,
    const,
    i8x32,
    i16x8,
    i16x16,
    i32x4,
    i32x8,
    load,
    shuffle,
    store,
    widen_half,
)  # fmt: skip
from workers.kernels.jit import cgutils, ir
from workers.kernels.matformats import Format, scale_words, super_offset, unpack_quants, unpack_super
from workers.kernels.matlanes import ROWS, Values, clamped_row, for_format
from workers.kernels.matpanels import VECTOR, panel_block_vectors


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


def turned_halves(b: ir.IRBuilder, rows: Values, offset: int) -> Values:
    """Four vectors i8x32 [8 rows][4 bytes] of the sixteen bytes at `offset` from eight addresses."""
    parts = [load(b, row, i32x4.ir, offset) for row in rows]
    pairs = [shuffle(b, parts[r], parts[r + 4], list(range(8))) for r in range(4)]
    low = [shuffle(b, pairs[r], pairs[r + 1], [0, 8, 1, 9, 4, 12, 5, 13]) for r in (0, 2)]
    high = [shuffle(b, pairs[r], pairs[r + 1], [2, 10, 3, 11, 6, 14, 7, 15]) for r in (0, 2)]
    turned = []
    for u, v in (low, high):
        turned += [shuffle(b, u, v, [0, 1, 8, 9, 4, 5, 12, 13]), shuffle(b, u, v, [2, 3, 10, 11, 6, 7, 14, 15])]
    return [b.bitcast(v, i8x32.ir) for v in turned]


def _pack_rows(
    b: ir.IRBuilder, form: Format, w: ir.Value, stride: ir.Value, count: ir.Value, k: ir.Value, panel: ir.Value
) -> None:
    rows = [clamped_row(b, w, const(I64, r), stride, count) for r in range(ROWS)]
    turned = ir.ArrayType(ir.ArrayType(i32x8.ir, ROWS), super_offset(form)[1] if form.subs else 0)
    raw = cgutils.alloca_once(b, turned)
    with cgutils.for_range(b, b.udiv(k, const(I64, form.block))) as loop:
        offset = b.mul(loop.index, const(I64, form.nbytes))
        here = [b.add(row, offset) for row in rows]
        to = b.add(panel, b.mul(loop.index, const(I64, VECTOR * panel_block_vectors(form))))
        if form.subs:
            _pack_super(b, form, here, to, raw)
            factors = _super_factors(b, form, here)
        else:
            quants = [b.bitcast(unpack_quants(b, form, row)[0], i32x8.ir) for row in here]
            for j, v in enumerate(transpose(b, quants)):
                store(b, v, to, VECTOR * j)
            factors = [gather_halves(b, here, at) for at in (form.scale, form.floor) if at >= 0]
        for i, v in enumerate(factors, start=8 * form.chunks):
            store(b, v, to, VECTOR * i)


def _pack_super(b: ir.IRBuilder, form: Format, rows: Values, to: ir.Value, raw: ir.Value) -> None:
    """Quants of a block of 256 of eight rows: bytes are turned as they lie, by way of `raw`, and then taken apart."""
    first, count = super_offset(form)
    with cgutils.for_range(b, const(I64, count)) as loop:
        offset = b.mul(loop.index, const(I64, 32))
        vectors = [load(b, b.add(row, offset), i32x8.ir, first) for row in rows]
        for j, v in enumerate(transpose(b, vectors)):
            b.store(v, cgutils.gep_inbounds(b, raw, 0, loop.index, j))
    with cgutils.for_range(b, const(I64, 8)) as loop:

        def fetch(offset: int) -> ir.Value:
            return b.bitcast(b.load(cgutils.gep_inbounds(b, raw, 0, (offset - first) // 32, loop.index)), i8x32.ir)

        vector = b.add(to, b.mul(loop.index, const(I64, VECTOR)))
        for chunk, quants in enumerate(unpack_super(b, form, fetch)):
            store(b, quants, vector, 8 * VECTOR * chunk)


def _super_factors(b: ir.IRBuilder, form: Format, rows: Values) -> Values:
    """What a panel holds behind the quants of a block of 256: scale, floor, each small scale twice, and factors."""
    if form.subs == 16:
        words = [b.bitcast(v, i32x8.ir) for v in turned_halves(b, rows, form.scales)]
        pairs = [pair for word in words for pair in _pairs(b, word, signed=True)]
        return [gather_halves(b, rows, form.scale), *_twice(b, pairs), *pairs]
    head, *rest = (b.bitcast(v, i32x8.ir) for v in turned_halves(b, rows, form.scale))
    halves = [widen_half(b, b.trunc(v, i16x8.ir)) for v in (head, b.lshr(head, const(i32x8.ir, 16)))]
    pairs = [pair for word in scale_words(b, rest) for pair in _pairs(b, word, signed=False)]
    return [*halves, *_twice(b, pairs[:4]), *pairs[4:]]


def _pairs(b: ir.IRBuilder, word: ir.Value, signed: bool) -> Values:
    """Four bytes per row, as two vectors of a pair of i16 per row."""
    shorts, eight, half = b.bitcast(word, i16x16.ir), const(i16x16.ir, 8), const(i32x8.ir, 16)
    low = b.ashr(b.shl(shorts, eight), eight) if signed else b.and_(shorts, const(i16x16.ir, 255))
    low, high = (b.bitcast(v, i32x8.ir) for v in (low, (b.ashr if signed else b.lshr)(shorts, eight)))
    lower, upper = const(i32x8.ir, 65535), const(i32x8.ir, -65536)
    return [b.or_(b.and_(low, lower), b.shl(high, half)), b.or_(b.lshr(low, half), b.and_(high, upper))]


def _twice(b: ir.IRBuilder, pairs: Values) -> Values:
    """Each i16 of pairs per row as a pair of itself."""
    half, lower, upper = const(i32x8.ir, 16), const(i32x8.ir, 65535), const(i32x8.ir, -65536)
    both = []
    for pair in pairs:
        low = b.and_(pair, lower)
        both += [b.or_(low, b.shl(pair, half)), b.or_(b.lshr(pair, half), b.and_(pair, upper))]
    return both


pack_rows = for_format(_pack_rows, 5)
"""(format, weights, stride, rows that exist of eight, k, where the first of them lies in a panel)"""
