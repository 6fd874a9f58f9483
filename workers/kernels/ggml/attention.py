"""FLASH_ATTN_EXT with an F16 cache: up to 63 queries one key after the other, from 64 queries on in blocks of 64 keys.

Up to 63: the query is rounded to F16, a score is summed in 32 lanes, the weighted values are summed in F16, and
exponentials are the C library's. From 64 on: everything in F32, a product one fused step per element in order, and
ggml's own exponentials; see `tiles`. With a key and value cache of 512 cells or more ggml also splits the cells of a
single query among its threads and so depends on their number: this is what it does with one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import INNER, extent, float_param, row_address, share, stride, word
from workers.kernels.ggml import tiles
from workers.kernels.ggml.functions import expf, sum_neighbours
from workers.kernels.jit import njit
from workers.kernels.simd import (
    add_f32x8,
    fma_f32,
    fma_f32x8,
    load_f16,
    load_f16x8,
    load_f32x8,
    mul_f32x8,
    splat_f32x8,
    store_f16x8,
    store_f32x8,
    zero_f32x8,
)
from workers.kernels.stage import Operand, Stage, kernel

DST, Q, K, V, MASK = row.DST, row.SRC[0], row.SRC[1], row.SRC[2], row.SRC[3]
_MANY = 64
_ZERO, _ONE, _LOW = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)


@njit(**INNER)
def _dot(a: int, b: int, n: int) -> float:
    """Product of two rows of n F16, a multiple of 32."""
    s0, s1, s2, s3 = zero_f32x8(), zero_f32x8(), zero_f32x8(), zero_f32x8()
    for i in range(0, 2 * n, 64):
        s0 = fma_f32x8(load_f16x8(a + i), load_f16x8(b + i), s0)
        s1 = fma_f32x8(load_f16x8(a + i + 16), load_f16x8(b + i + 16), s1)
        s2 = fma_f32x8(load_f16x8(a + i + 32), load_f16x8(b + i + 32), s2)
        s3 = fma_f32x8(load_f16x8(a + i + 48), load_f16x8(b + i + 48), s3)
    return sum_neighbours(add_f32x8(add_f32x8(s0, s2), add_f32x8(s1, s3)))


@njit(**INNER)
def _one_query(r: int, i1: int, head: int, batch: int, mask: int, query: int, sums: int) -> None:
    """One row of the result; `query` and `sums` are scratch memory for F16 rows."""
    n, width, scale = extent(r, Q, 0), extent(r, V, 0), float_param(r, 0)
    key_head = head // (extent(r, Q, 2) // extent(r, K, 2))
    q, k, v = (
        row_address(r, Q, i1, head, batch),
        row_address(r, K, 0, key_head, batch),
        row_address(r, V, 0, key_head, batch),
    )
    for i in range(0, n, 8):
        store_f16x8(query + 2 * i, load_f32x8(q + 4 * i))
    for i in range(0, 2 * width, 16):
        store_f16x8(sums + i, zero_f32x8())
    total, top = _ZERO, _LOW
    for j in range(extent(r, K, 1)):
        bias = load_f16(mask + 2 * j) if mask != 0 else _ZERO
        if bias == _LOW:
            continue
        score = _dot(k + j * stride(r, K, 1), query, n) * scale + bias
        before, weight = _ONE, _ONE
        if score > top:
            before = expf(top - score)
            top = score
            for i in range(0, 2 * width, 16):
                store_f16x8(sums + i, mul_f32x8(load_f16x8(sums + i), splat_f32x8(before)))
        else:
            weight = expf(score - top)
        value = v + j * stride(r, V, 1)
        for i in range(0, 2 * width, 16):
            store_f16x8(sums + i, fma_f32x8(load_f16x8(value + i), splat_f32x8(weight), load_f16x8(sums + i)))
        total = fma_f32(total, before, weight)
    factor = splat_f32x8(_ZERO if total == _ZERO else _ONE / total)
    out = row_address(r, DST, head, i1, batch)
    for i in range(0, width, 8):
        store_f32x8(out + 4 * i, mul_f32x8(load_f16x8(sums + 2 * i), factor))


@kernel
def ggml_attention(r: int, ith: int, nth: int) -> None:
    """AUX: bytes of scratch per thread."""
    query = word(r, row.WORK) + ith * word(r, row.AUX)
    sums = query + 2 * extent(r, Q, 0)
    n1, heads = extent(r, Q, 1), extent(r, Q, 2)
    first, last = share(n1 * heads * extent(r, Q, 3), ith, nth)
    for unit in range(first, last):
        i1, head, batch = unit // heads % n1, unit % heads, unit // (heads * n1)
        mask = 0
        if word(r, MASK) != 0:
            mask = row_address(r, MASK, i1, head % extent(r, MASK, 2), batch % extent(r, MASK, 3))
        _one_query(r, i1, head, batch, mask, query, sums)


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """FLASH_ATTN_EXT of what the default kernel takes, if keys, values and mask are F16 and heads a multiple of 32."""
    q, k, v, mask = src[0], src[1], src[2], src[3] if len(src) > 3 else None
    assert q is not None
    assert k is not None
    assert v is not None
    halves = (k, v) if mask is None else (k, v, mask)
    if any(t.dtype != DType.F16 or t.nb[0] != 2 for t in halves) or q.nb[0] != 4 or q.ne[0] % 32 or v.ne[0] % 32:
        return None
    if q.ne[1] >= _MANY:
        room = tiles.room(q.ne[0], v.ne[0])
        return (Stage(tiles.ggml_attention_tiles, work_nbytes=threads * room, aux=(room,)),)
    room = -(-2 * (q.ne[0] + v.ne[0]) // 64) * 64
    return (Stage(ggml_attention, work_nbytes=threads * room, aux=(room,)),)
