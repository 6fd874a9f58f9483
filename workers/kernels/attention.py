"""FLASH_ATTN_EXT: attention in blocks of keys with a running softmax, so that scores never exist all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import INNER, dense_rows, extent, fetch, float_param, row_address, share, stride, word
from workers.kernels.attentiontiles import (
    KEYS,
    TILE_COLUMNS,
    TILE_ROWS,
    add_tile,
    multiply_tile,
    pack_keys,
    pack_values,
)
from workers.kernels.jit import njit
from workers.kernels.simd import (
    add_f32x8,
    less_f32x8,
    load_f32,
    load_f32x8,
    load_f32x8_part,
    max_f32,
    max_f32x8,
    max_of_f32x8,
    mul_f32x8,
    prefetch,
    select_f32x8,
    splat_f32x8,
    store_f32,
    store_f32x8,
    store_f32x8_part,
    sub_f32x8,
    sum_f32x8,
    zero_f32x8,
)
from workers.kernels.stage import Operand, Stage, kernel
from workers.kernels.vecmath import exp8

DST, Q, K, V, MASK = row.DST, row.SRC[0], row.SRC[1], row.SRC[2], row.SRC[3]

ROWS = 4 * TILE_ROWS
"""Rows (query positions times heads of one key head) that share a pass over the keys."""

FAR_NBYTES = 1 << 15
"""With more keys than this a token's attention is taken to find them, and the values, in memory: every layer has as
many. With several tiles of rows the second finds what the first has read."""

_MINUS_INFINITY = np.float32(-np.inf)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

# One thread's scratch, in floats: state of the rows, mask, scores, then queries, results, keys and values.
_TOPS, _SUMS, _OPEN, _MASK = 0, ROWS, 2 * ROWS, 2 * ROWS + KEYS
_SCORES = _MASK + KEYS
_QUERIES = _SCORES + ROWS * KEYS


def _layout(width: int, padded: int) -> tuple[int, int, int, int]:
    """Offsets in bytes of results, keys, values and the end."""
    results = _QUERIES + ROWS * width
    keys = results + ROWS * padded
    values = keys + KEYS * width
    end = values + KEYS * padded
    return 4 * results, 4 * keys, 4 * values, -(-4 * end // 64) * 64


@njit(**INNER)
def _clear(address: int, n: int) -> None:
    """n floats, a multiple of 8, to zero."""
    for i in range(0, 4 * n, 32):
        store_f32x8(address + i, zero_f32x8())


@njit(**INNER)
def _load_queries(r: int, work: int, m0: int, m: int, group: int, head: int, batch: int, padded: int) -> None:
    """Scaled queries of rows [m0, m0 + m), zeros behind; empties results and the rows' state."""
    width, step = extent(r, Q, 0), stride(r, Q, 0)
    scale = float_param(r, 0)
    queries = work + 4 * _QUERIES
    for i in range(ROWS):
        store_f32(work + 4 * (_TOPS + i), _MINUS_INFINITY)
        store_f32(work + 4 * (_SUMS + i), _ZERO)
        q = row_address(r, Q, (m0 + i) // group, head * group + (m0 + i) % group, batch)
        for d in range(width):
            store_f32(queries + 4 * (i * width + d), load_f32(q + d * step) * scale if i < m else _ZERO)
    _clear(queries + 4 * ROWS * width, ROWS * padded)


@njit(**INNER)
def _mask_row(r: int, m: int, group: int, head: int, batch: int, at: int) -> int:
    """Address of the mask of row m from key `at` on."""
    i2, i3 = (head * group + m % group) % extent(r, MASK, 2), batch % extent(r, MASK, 3)
    return row_address(r, MASK, m // group, i2, i3) + at * stride(r, MASK, 0)


@njit(**INNER)
def _open_keys(r: int, work: int, m0: int, m: int, group: int, head: int, batch: int, at: int) -> tuple[int, int]:
    """First and last + 1 of the keys of the block at `at` that any of the rows may see; no more than first if none."""
    n = min(KEYS, extent(r, K, 1) - at)
    if word(r, MASK) == 0:
        return 0, n
    best = work + 4 * _OPEN
    for j in range(0, 4 * KEYS, 32):
        store_f32x8(best + j, splat_f32x8(_MINUS_INFINITY))
    step = group if extent(r, MASK, 2) == 1 else 1  # without masks of their own, a position's heads agree
    i = 0
    while i < m:
        mask = _mask_row(r, m0 + i, group, head, batch, at)
        mask = fetch(mask, stride(r, MASK, 0), word(r, MASK + row.DTYPE), n, work + 4 * _MASK)
        whole = n & ~7
        for j in range(0, 4 * whole, 32):
            store_f32x8(best + j, max_f32x8(load_f32x8(mask + j), load_f32x8(best + j)))
        for j in range(4 * whole, 4 * n, 4):
            store_f32(best + j, max_f32(load_f32(mask + j), load_f32(best + j)))
        i += step - (m0 + i) % step
    first, last = 0, n
    while last > 0 and load_f32(best + 4 * (last - 1)) == _MINUS_INFINITY:
        last -= 1
    while first < last and load_f32(best + 4 * first) == _MINUS_INFINITY:
        first += 1
    return first, last


@njit(**INNER)
def _apply_mask(scores: int, mask: int, n: int) -> None:
    """scores += mask; -inf in the mask wins over anything, NaN from memory never written included."""
    low = splat_f32x8(_MINUS_INFINITY)
    whole = n & ~7
    for j in range(0, 4 * whole, 32):
        x = load_f32x8(mask + j)
        store_f32x8(scores + j, select_f32x8(less_f32x8(low, x), add_f32x8(load_f32x8(scores + j), x), low))
    for j in range(4 * whole, 4 * n, 4):
        y = load_f32(mask + j)
        store_f32(scores + j, load_f32(scores + j) + y if y > _MINUS_INFINITY else _MINUS_INFINITY)


@njit(**INNER)
def _to_probabilities(scores: int, state: int, results: int, padded: int) -> None:
    """One row's KEYS scores to exp(score - largest so far); brings the row's sum and results up to that scale."""
    top = load_f32x8(scores)
    for j in range(32, 4 * KEYS, 32):
        top = max_f32x8(load_f32x8(scores + j), top)
    old = load_f32(state)
    new = max_f32(max_of_f32x8(top), old)
    if new == _MINUS_INFINITY:
        _clear(scores, KEYS)
        return
    shift, total = splat_f32x8(new), zero_f32x8()
    for j in range(0, 4 * KEYS, 32):
        p = exp8(sub_f32x8(load_f32x8(scores + j), shift))
        store_f32x8(scores + j, p)
        total = add_f32x8(total, p)
    before = load_f32(state + 4 * (_SUMS - _TOPS))
    if new > old:
        factor = exp8(splat_f32x8(old - new))
        for d in range(0, 4 * padded, 32):
            store_f32x8(results + d, mul_f32x8(load_f32x8(results + d), factor))
        before *= max_of_f32x8(factor)
        store_f32(state, new)
    store_f32(state + 4 * (_SUMS - _TOPS), before + sum_f32x8(total))


@njit(**INNER)
def _block(
    r: int,
    work: int,
    m0: int,
    m: int,
    group: int,
    head: int,
    batch: int,
    at: int,
    n: int,
    first: int,
    last: int,
    padded: int,
    results: int,
    keys: int,
    values: int,
) -> None:
    """One block of n keys from key `at` on, of which [first, last) count, for rows [m0, m0 + m)."""
    width = extent(r, Q, 0)
    scores = work + 4 * _SCORES
    kind = word(r, K + row.DTYPE)
    pack_keys(row_address(r, K, at, head, batch), stride(r, K, 1), kind, n, width, keys)
    source = row_address(r, V, at + first, head, batch)
    pack_values(source, stride(r, V, 1), word(r, V + row.DTYPE), last - first, extent(r, V, 0), padded, values)
    for i in range(0, m, TILE_ROWS):
        for j in range(0, n, TILE_COLUMNS):
            q = work + 4 * (_QUERIES + i * width)
            multiply_tile(q, 4 * width, keys + 4 * j, 4 * KEYS, width, scores + 4 * (i * KEYS + j), 4 * KEYS)
    for i in range(m):
        line = scores + 4 * i * KEYS
        for j in range(n, KEYS):
            store_f32(line + 4 * j, _MINUS_INFINITY)
        if word(r, MASK) != 0:
            mask = _mask_row(r, m0 + i, group, head, batch, at)
            mask = fetch(mask, stride(r, MASK, 0), word(r, MASK + row.DTYPE), n, work + 4 * _MASK)
            _apply_mask(line, mask, n)
        _to_probabilities(line, work + 4 * (_TOPS + i), results + 4 * i * padded, padded)
    for i in range(0, m, TILE_ROWS):
        for d in range(0, padded, TILE_COLUMNS):
            p, o = scores + 4 * (i * KEYS + first), results + 4 * (i * padded + d)
            add_tile(p, 4 * KEYS, values + 4 * d, 4 * padded, last - first, o, 4 * padded)


@njit(**INNER)
def _fetch_ahead(r: int, operand: int, head: int, batch: int, at: int) -> None:
    """Ask for a block of keys or values. A head's rows are too short and too far apart for the processor to guess:
    without this, attention from memory took half as long again.
    """
    step, nbytes = stride(r, operand, 1), extent(r, operand, 0) * stride(r, operand, 0)
    line = row_address(r, operand, at, head, batch)
    for _ in range(min(KEYS, extent(r, operand, 1) - at)):
        for within in range(0, nbytes, 64):
            prefetch(line + within)
        line += step


@njit(**INNER)
def _store_results(
    r: int, work: int, m0: int, m: int, group: int, head: int, batch: int, padded: int, results: int
) -> None:
    """Results divided by the rows' sums; zeros for a row that saw no key."""
    width = extent(r, DST, 0)
    whole = width & ~7
    for i in range(m):
        total = load_f32(work + 4 * (_SUMS + i))
        factor = splat_f32x8(_ONE / total if total > _ZERO else _ZERO)
        o = row_address(r, DST, head * group + (m0 + i) % group, (m0 + i) // group, batch)
        line = results + 4 * i * padded
        for d in range(0, 4 * whole, 32):
            store_f32x8(o + d, mul_f32x8(load_f32x8(line + d), factor))
        if width > whole:
            rest = width - whole
            store_f32x8_part(o + 4 * whole, mul_f32x8(load_f32x8_part(line + 4 * whole, rest), factor), rest)


@kernel
def flash_attention(r: int, ith: int, nth: int) -> None:
    """AUX: padded width of the values, offsets of results and keys, bytes of scratch per thread."""
    padded, room = word(r, row.AUX), word(r, row.AUX + 3)
    work = word(r, row.WORK) + ith * room
    results, keys = work + word(r, row.AUX + 1), work + word(r, row.AUX + 2)
    values = keys + 4 * KEYS * extent(r, Q, 0)
    n_keys, heads = extent(r, K, 1), extent(r, K, 2)
    group = extent(r, Q, 2) // heads
    rows = group * extent(r, Q, 1)
    tiles = (rows + ROWS - 1) // ROWS
    is_far = tiles == 1 and n_keys * stride(r, K, 1) > FAR_NBYTES
    unit, end = share(tiles * heads * extent(r, Q, 3), ith, nth)
    while unit < end:
        m0 = unit % tiles * ROWS
        m = min(ROWS, rows - m0)
        head, batch = unit // tiles % heads, unit // (tiles * heads)
        _load_queries(r, work, m0, m, group, head, batch, padded)
        if is_far and unit + 1 < end:
            _fetch_ahead(r, K, (unit + 1) % heads, (unit + 1) // heads, 0)
        first, last = _open_keys(r, work, m0, m, group, head, batch, 0)
        for at in range(0, n_keys, KEYS):
            next_first, next_last = 0, 0
            if at + KEYS < n_keys:
                next_first, next_last = _open_keys(r, work, m0, m, group, head, batch, at + KEYS)
            if is_far and next_last > next_first:
                _fetch_ahead(r, K, head, batch, at + KEYS)
            if last > first:
                if is_far:
                    _fetch_ahead(r, V, head, batch, at)
                n = min(KEYS, n_keys - at)
                _block(r, work, m0, m, group, head, batch, at, n, first, last, padded, results, keys, values)
            first, last = next_first, next_last
        _store_results(r, work, m0, m, group, head, batch, padded, results)
        unit += 1


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """FLASH_ATTN_EXT of F32 queries with F16 or F32 keys and values; None with ALiBi, soft cap or sinks."""
    if op is not Op.FLASH_ATTN_EXT or len(src) < 3 or any(s is not None for s in src[4:]):
        return None
    q, k, v, mask = src[0], src[1], src[2], src[3] if len(src) > 3 else None
    if q is None or k is None or v is None or not params or any(params[1:3]):
        return None
    types = (DType.F16, DType.F32)
    if (dst.dtype, q.dtype) != (DType.F32, DType.F32) or k.dtype not in types or v.dtype not in types:
        return None
    if not all(dense_rows(x) for x in (dst, k, v)) or not _shapes_agree(dst, q, k, v, mask):
        return None
    padded = -(-v.ne[0] // TILE_COLUMNS) * TILE_COLUMNS
    results, keys, _, room = _layout(q.ne[0], padded)
    return (Stage(flash_attention, work_nbytes=threads * room, aux=(padded, results, keys, room)),)


def _shapes_agree(dst: Operand, q: Operand, k: Operand, v: Operand, mask: Operand | None) -> bool:
    if k.ne[0] != q.ne[0] or k.ne[1:] != v.ne[1:] or q.ne[2] % k.ne[2] or q.ne[3] != k.ne[3]:
        return False
    if dst.ne != (v.ne[0], q.ne[2], q.ne[1], q.ne[3]):
        return False
    if mask is None:
        return True
    fits = mask.ne[0] == k.ne[1] and mask.ne[1] >= q.ne[1]
    return fits and mask.dtype in (DType.F16, DType.F32) and q.ne[2] % mask.ne[2] == 0 and q.ne[3] % mask.ne[3] == 0
