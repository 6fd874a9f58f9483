"""The inner loops of attention: a register tile of a matrix product, and panels of keys and values as floats."""

from __future__ import annotations

from typing import Any

import numpy as np

from protocol.dtypes import DType
from workers.kernels.access import INNER, read_float
from workers.kernels.emit import F32, I64, const, f32x8, fma, i16x8, load, shuffle, splat, store, widen_half
from workers.kernels.jit import cgutils, ir, njit, types
from workers.kernels.simd import load_f16x8, load_f32x8, make, store_f32, store_f32x8, zero_f32x8

KEYS = 64
"""Keys in a block: the scores of a row that are in flight at a time."""

TILE_ROWS, TILE_COLUMNS = 6, 16
"""A register tile: 12 accumulators, 2 vectors of the panel and 1 of the rows, in 16 registers."""

_F32, _F16 = int(DType.F32), int(DType.F16)
_ADDRESS = types.int64
_ZERO = np.float32(0.0)


def _emit_tile(b: ir.IRBuilder, add: bool, values: tuple[ir.Value, ...]) -> None:
    """out[r, c] (+)= sum over k of rows[r, k] * panel[k, c]; k ascends, each sum starts at 0."""
    rows, row_step, panel, panel_step, depth, out, out_step = values
    vectors = TILE_COLUMNS // 8
    sums = [[cgutils.alloca_once(b, f32x8.ir) for _ in range(vectors)] for _ in range(TILE_ROWS)]
    for line in sums:
        for cell in line:
            b.store(const(f32x8.ir, 0.0), cell)
    starts = [b.add(rows, b.mul(row_step, const(I64, r))) for r in range(TILE_ROWS)]
    with cgutils.for_range(b, depth) as loop:
        at = b.add(panel, b.mul(panel_step, loop.index))
        right = [load(b, at, f32x8.ir, 32 * v) for v in range(vectors)]
        skip = b.mul(loop.index, const(I64, 4))
        for r in range(TILE_ROWS):
            left = splat(b, load(b, b.add(starts[r], skip), F32), f32x8.ir)
            for v in range(vectors):
                b.store(fma(b, left, right[v], b.load(sums[r][v])), sums[r][v])
    for r in range(TILE_ROWS):
        at = b.add(out, b.mul(out_step, const(I64, r)))
        for v in range(vectors):
            value = b.load(sums[r][v])
            store(b, b.fadd(load(b, at, f32x8.ir, 32 * v), value) if add else value, at, 32 * v)


def _tile(add: bool) -> Any:
    return make(types.void, *[_ADDRESS] * 7)(lambda b, *values: _emit_tile(b, add, values))


multiply_tile, add_tile = _tile(False), _tile(True)


def _emit_turn(b: ir.IRBuilder, half: bool, source: ir.Value, step: ir.Value, target: ir.Value) -> None:
    """An 8 x 8 block: element j of source row i becomes element i of panel row j."""
    lines = []
    for i in range(8):
        at = b.add(source, b.mul(step, const(I64, i)))
        lines.append(widen_half(b, load(b, at, i16x8.ir)) if half else load(b, at, f32x8.ir))
    pairs = [shuffle(b, lines[i], lines[i + 1], m) for i in (0, 2, 4, 6) for m in _PAIRS]
    fours = [shuffle(b, pairs[i], pairs[i + 2], m) for i in (0, 1, 4, 5) for m in _FOURS]
    for column, (i, m) in enumerate(_EIGHTS):
        store(b, shuffle(b, fours[i], fours[i + 4], m), target, 4 * KEYS * column)


# Lanes of a pair of vectors, in the three steps of a transposition that x86 does well: within 128 bits, then across.
_PAIRS = ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15])
_FOURS = ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
_EIGHTS = [(i, m) for m in ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]) for i in range(4)]

_turn_f16 = make(types.void, *[_ADDRESS] * 3)(lambda b, *values: _emit_turn(b, True, *values))
_turn_f32 = make(types.void, *[_ADDRESS] * 3)(lambda b, *values: _emit_turn(b, False, *values))


@njit(**INNER)
def pack_keys(keys: int, step: int, dtype: int, n: int, width: int, panel: int) -> None:
    """n <= KEYS rows of `width` elements, `step` bytes apart, to panel[width][KEYS]; absent keys are zeros."""
    whole = n & ~7 if width % 8 == 0 else 0
    size = 2 if dtype == _F16 else 4
    for j in range(0, whole, 8):
        for d in range(0, width, 8):
            if dtype == _F16:
                _turn_f16(keys + j * step + d * size, step, panel + 4 * (d * KEYS + j))
            else:
                _turn_f32(keys + j * step + d * size, step, panel + 4 * (d * KEYS + j))
    for d in range(width):
        for j in range(whole, KEYS, 8):
            store_f32x8(panel + 4 * (d * KEYS + j), zero_f32x8())
    for j in range(whole, n):
        for d in range(width):
            store_f32(panel + 4 * (d * KEYS + j), read_float(keys + j * step + d * size, dtype))


@njit(**INNER)
def pack_values(values: int, step: int, dtype: int, n: int, width: int, padded: int, panel: int) -> None:
    """n rows of `width` elements to panel[n][padded], zeros behind each row."""
    size = 2 if dtype == _F16 else 4
    whole = width & ~7
    for j in range(n):
        source, target = values + j * step, panel + 4 * j * padded
        if dtype == _F16:
            for d in range(0, whole, 8):
                store_f32x8(target + 4 * d, load_f16x8(source + 2 * d))
        else:
            for d in range(0, whole, 8):
                store_f32x8(target + 4 * d, load_f32x8(source + 4 * d))
        for d in range(whole, padded):
            store_f32(target + 4 * d, read_float(source + size * d, dtype) if d < width else _ZERO)
