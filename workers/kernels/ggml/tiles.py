"""Attention of 64 queries or more: blocks of 64 keys, scores and sums in F32.

A score is one fused step per element, in order, from 0; then times the scale, plus the mask. The running sum of the
exponentials is F32, a block's part of it a float64 sum of vectors of eight. The values' sums go on from block to block,
one fused step per key. Rows do not touch each other, so that a tile may have any number of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from protocol.dtypes import DType
from workers.kernels import row
from workers.kernels.access import INNER, extent, float_param, row_address, share, stride, word
from workers.kernels.attentiontiles import KEYS, TILE_COLUMNS, TILE_ROWS, multiply_tile, pack_keys, pack_values
from workers.kernels.emit import F32, I64, f32x8, fma, load, splat, store
from workers.kernels.ggml.functions import exp8, expf
from workers.kernels.jit import cgutils, float32, float64, ir, njit, types
from workers.kernels.simd import (
    load_f16,
    load_f32,
    load_f32x8,
    make,
    max_f32x8,
    max_of_f32x8,
    mul_f32x8,
    splat_f32x8,
    store_f32,
    store_f32x8,
    sub_f32x8,
    sum_f32x8,
    zero_f32x8,
)
from workers.kernels.stage import kernel

DST, Q, K, V, MASK = row.DST, row.SRC[0], row.SRC[1], row.SRC[2], row.SRC[3]
_ROWS = 4 * TILE_ROWS
_F16 = int(DType.F16)
_ZERO, _ONE, _LOW = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)
assert KEYS == 64, "ggml's block, on which the order of summation depends"

# One thread's scratch, in floats: state of the rows, then scores, queries, results, keys and values.
_TOPS, _SUMS, _SCORES = 0, _ROWS, 2 * _ROWS
_QUERIES = _SCORES + _ROWS * KEYS


def room(width: int, values: int) -> int:
    """Bytes of scratch per thread for heads of these extents."""
    return -(-4 * (_QUERIES + (_ROWS + KEYS) * (width + values)) // 64) * 64


def _emit_values(b: ir.IRBuilder, *values: ir.Value) -> None:
    """out[r, c] goes on by p[r, k] * panel[k, c], k ascending; TILE_ROWS rows of 16 columns."""
    p, p_step, panel, panel_step, depth, out, out_step = values
    starts = [b.add(p, b.mul(p_step, ir.Constant(I64, r))) for r in range(TILE_ROWS)]
    targets = [b.add(out, b.mul(out_step, ir.Constant(I64, r))) for r in range(TILE_ROWS)]
    sums = [[cgutils.alloca_once(b, f32x8.ir) for _ in (0, 32)] for _ in targets]
    for line, target in zip(sums, targets, strict=True):
        for cell, at in zip(line, (0, 32), strict=True):
            b.store(load(b, target, f32x8.ir, at), cell)
    with cgutils.for_range(b, depth) as loop:
        here = b.add(panel, b.mul(panel_step, loop.index))
        right = [load(b, here, f32x8.ir, at) for at in (0, 32)]
        for line, start in zip(sums, starts, strict=True):
            left = splat(b, load(b, b.add(start, b.mul(loop.index, ir.Constant(I64, 4))), F32), f32x8.ir)
            for cell, value in zip(line, right, strict=True):
                b.store(fma(b, left, value, b.load(cell)), cell)
    for line, target in zip(sums, targets, strict=True):
        for cell, at in zip(line, (0, 32), strict=True):
            store(b, b.load(cell), target, at)


_add_values: Any = make(types.void, *[types.int64] * 7)(_emit_values)


@njit(**INNER)
def _start(r: int, work: int, i1: int, m: int, head: int, batch: int) -> None:
    """m queries, zeros behind them; empties results and state."""
    width = extent(r, Q, 0)
    for i in range(_ROWS):
        store_f32(work + 4 * (_TOPS + i), _LOW)
        store_f32(work + 4 * (_SUMS + i), _ZERO)
        q, to = row_address(r, Q, i1 + min(i, m - 1), head, batch), work + 4 * (_QUERIES + i * width)
        for d in range(0, 4 * width, 32):
            store_f32x8(to + d, load_f32x8(q + d) if i < m else zero_f32x8())
    results = work + 4 * (_QUERIES + _ROWS * width)
    for d in range(0, 4 * _ROWS * extent(r, V, 0), 32):
        store_f32x8(results + d, zero_f32x8())


@njit(**INNER)
def _mask_scores(r: int, line: int, i1: int, head: int, batch: int, at: int, n: int) -> float:
    """Scale, mask and the largest of a row's n scores; -inf behind them."""
    scale, mask = float_param(r, 0), 0
    if word(r, MASK) != 0:
        mask = row_address(r, MASK, i1, head % extent(r, MASK, 2), batch % extent(r, MASK, 3)) + 2 * at
    for j in range(n):
        x = load_f32(line + 4 * j) * scale
        store_f32(line + 4 * j, x + load_f16(mask + 2 * j) if mask != 0 else x)
    for j in range(n, KEYS):
        store_f32(line + 4 * j, _LOW)
    top = load_f32x8(line)
    for j in range(32, 4 * KEYS, 32):
        top = max_f32x8(load_f32x8(line + j), top)
    return max_of_f32x8(top)


@njit(**INNER)
def _weigh(line: int, state: int, result: int, width: int, best: float) -> None:
    """A row's scores to exp(score - largest so far); brings its sum and results up to that scale."""
    if best == _LOW:
        for j in range(0, 4 * KEYS, 32):
            store_f32x8(line + j, zero_f32x8())
        return
    top, total = load_f32(state), load_f32(state + 4 * (_SUMS - _TOPS))
    if best > top:
        factor = expf(top - best)
        top = best
        for d in range(0, 4 * width, 32):
            store_f32x8(result + d, mul_f32x8(load_f32x8(result + d), splat_f32x8(factor)))
        total *= factor
    more = float64(0.0)
    for j in range(0, 4 * KEYS, 32):
        p = exp8(sub_f32x8(load_f32x8(line + j), splat_f32x8(top)))
        store_f32x8(line + j, p)
        more += float64(sum_f32x8(p))
    store_f32(state, top)
    store_f32(state + 4 * (_SUMS - _TOPS), float32(float64(total) + more))


@njit(**INNER)
def _block(r: int, work: int, i1: int, m: int, head: int, batch: int, at: int) -> None:
    """One block of keys from key `at` on for m queries."""
    width, deep, n = extent(r, Q, 0), extent(r, V, 0), min(KEYS, extent(r, K, 1) - at)
    scores, queries = work + 4 * _SCORES, work + 4 * _QUERIES
    results = queries + 4 * _ROWS * width
    keys = results + 4 * _ROWS * deep
    values = keys + 4 * KEYS * width
    key_head = head // (extent(r, Q, 2) // extent(r, K, 2))
    pack_keys(row_address(r, K, at, key_head, batch), stride(r, K, 1), _F16, n, width, keys)
    pack_values(row_address(r, V, at, key_head, batch), stride(r, V, 1), _F16, n, deep, deep, values)
    for i in range(0, m, TILE_ROWS):
        for j in range(0, n, TILE_COLUMNS):
            out = scores + 4 * (i * KEYS + j)
            multiply_tile(queries + 4 * i * width, 4 * width, keys + 4 * j, 4 * KEYS, width, out, 4 * KEYS)
    for i in range(m):
        line = scores + 4 * i * KEYS
        best = _mask_scores(r, line, i1 + i, head, batch, at, n)
        _weigh(line, work + 4 * (_TOPS + i), results + 4 * i * deep, deep, best)
    for i in range(0, m, TILE_ROWS):
        for d in range(0, deep, 16):
            p, o = scores + 4 * i * KEYS, results + 4 * (i * deep + d)
            _add_values(p, 4 * KEYS, values + 4 * d, 4 * deep, n, o, 4 * deep)


@njit(**INNER)
def _open(r: int, i1: int, m: int, head: int, batch: int, at: int) -> bool:
    """False when none of m queries may see any of the block's keys."""
    if word(r, MASK) == 0:
        return True
    for i in range(i1, i1 + m):
        mask = row_address(r, MASK, i, head % extent(r, MASK, 2), batch % extent(r, MASK, 3))
        for j in range(at, min(at + KEYS, extent(r, K, 1))):
            if load_f16(mask + 2 * j) != _LOW:
                return True
    return False


@kernel
def ggml_attention_tiles(r: int, ith: int, nth: int) -> None:
    """AUX: bytes of scratch per thread."""
    work = word(r, row.WORK) + ith * word(r, row.AUX)
    n1, heads, deep = extent(r, Q, 1), extent(r, Q, 2), extent(r, V, 0)
    groups = (n1 + _ROWS - 1) // _ROWS
    first, last = share(groups * heads * extent(r, Q, 3), ith, nth)
    for unit in range(first, last):
        i1, head, batch = unit % groups * _ROWS, unit // groups % heads, unit // (groups * heads)
        m = min(_ROWS, n1 - i1)
        _start(r, work, i1, m, head, batch)
        for at in range(0, extent(r, K, 1), KEYS):
            if _open(r, i1, m, head, batch, at):
                _block(r, work, i1, m, head, batch, at)
        for i in range(m):
            total = load_f32(work + 4 * (_SUMS + i))
            factor = splat_f32x8(_ZERO if total == _ZERO else _ONE / total)
            line = work + 4 * (_QUERIES + _ROWS * extent(r, Q, 0) + i * deep)
            out = row_address(r, DST, head, i1 + i, batch)
            for d in range(0, 4 * deep, 32):
                store_f32x8(out + d, mul_f32x8(load_f32x8(line + d), factor))
