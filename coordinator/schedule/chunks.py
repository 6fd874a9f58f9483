"""ggml's dynamic allocator: chunks cut into blocks by best fit, with sorted free lists that merge."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coordinator.schedule.arrays import I64, helper
from coordinator.schedule.devices import UNLIMITED

MAX_CHUNKS = 16
"""ggml's GGML_VBUFFER_MAX_CHUNKS; the last one is unlimited."""

MAX_FREE = 256
"""ggml's MAX_FREE_BLOCKS per chunk."""


class Heap(NamedTuple):
    """One dynamic allocator per buffer type (first axis) with chunks (second) and free blocks (third).

    `offset` and `size` are those of the free blocks, sorted by offset; `used` is what each chunk has reached.
    """

    offset: I64
    size: I64
    n_free: I64
    used: I64
    n_chunks: I64


def new_heap(n_bufts: int) -> Heap:
    """Allocators without any chunk."""
    return Heap(
        np.empty((n_bufts, MAX_CHUNKS, MAX_FREE), np.int64),
        np.empty((n_bufts, MAX_CHUNKS, MAX_FREE), np.int64),
        np.zeros((n_bufts, MAX_CHUNKS), np.int64),
        np.zeros((n_bufts, MAX_CHUNKS), np.int64),
        np.zeros(n_bufts, np.int64),
    )


@helper
def padded(nbytes: int, alignment: int) -> int:
    """`nbytes` rounded up to a multiple of `alignment`, a power of two."""
    return int((nbytes + alignment - 1) & -alignment)


@helper
def take_block(heap: Heap, limit: int, b: int, size: int) -> tuple[int, int]:
    """Chunk and offset of `size` bytes: the best hole, else the end of a chunk, else a new chunk."""
    c, k = _best_hole(heap, b, size)
    if k < 0:
        c, k = _best_end(heap, b, size)
    if k < 0:
        c, k = _new_chunk(heap, b, max(size, limit)), 0
    offset = heap.offset[b, c, k]
    heap.offset[b, c, k] += size
    heap.size[b, c, k] -= size
    if heap.size[b, c, k] == 0:
        _remove(heap, b, c, k)
    heap.used[b, c] = max(heap.used[b, c], offset + size)
    return c, offset


@helper
def _best_hole(heap: Heap, b: int, size: int) -> tuple[int, int]:
    """The smallest hole (any free block but the last of its chunk) of the last chunk that has one."""
    chunk = block = -1
    for c in range(heap.n_chunks[b]):
        best = UNLIMITED
        for k in range(heap.n_free[b, c] - 1):
            if size <= heap.size[b, c, k] <= best:
                chunk, block, best = c, k, heap.size[b, c, k]
    return chunk, block


@helper
def _best_end(heap: Heap, b: int, size: int) -> tuple[int, int]:
    """The last free block whose use wastes least of what its chunk has reached, or else grows it least."""
    chunk = block = -1
    best = -UNLIMITED - 1
    for c in range(heap.n_chunks[b]):
        k = heap.n_free[b, c] - 1
        if k < 0:
            continue
        spare = heap.used[b, c] - heap.offset[b, c, k] - size
        better = (best < 0 and spare > best) or (0 <= spare < best)
        if heap.size[b, c, k] >= size and better:
            chunk, block, best = c, k, spare
    return chunk, block


@helper
def _new_chunk(heap: Heap, b: int, size: int) -> int:
    """Open a chunk of `size` bytes; the last possible one has no limit."""
    c = int(heap.n_chunks[b])
    heap.offset[b, c, 0] = 0
    heap.size[b, c, 0] = UNLIMITED if c == MAX_CHUNKS - 1 else size
    heap.n_free[b, c] = 1
    heap.used[b, c] = 0
    heap.n_chunks[b] += 1
    return c


@helper
def free_block(heap: Heap, b: int, c: int, offset: int, size: int) -> bool:
    """Give bytes back, joining them with free neighbours; False when there is no room in the list."""
    for k in range(heap.n_free[b, c]):
        if heap.offset[b, c, k] + heap.size[b, c, k] == offset:
            heap.size[b, c, k] += size
            if k + 1 < heap.n_free[b, c] and offset + size == heap.offset[b, c, k + 1]:
                heap.size[b, c, k] += heap.size[b, c, k + 1]
                _remove(heap, b, c, k + 1)
            return True
        if offset + size == heap.offset[b, c, k]:
            heap.offset[b, c, k] = offset
            heap.size[b, c, k] += size
            if k > 0 and heap.offset[b, c, k - 1] + heap.size[b, c, k - 1] == offset:
                heap.size[b, c, k - 1] += heap.size[b, c, k]
                _remove(heap, b, c, k)
            return True
    return _insert(heap, b, c, offset, size)


@helper
def _insert(heap: Heap, b: int, c: int, offset: int, size: int) -> bool:
    n = heap.n_free[b, c]
    if n == MAX_FREE:
        return False
    k = n
    while k > 0 and heap.offset[b, c, k - 1] >= offset:
        heap.offset[b, c, k] = heap.offset[b, c, k - 1]
        heap.size[b, c, k] = heap.size[b, c, k - 1]
        k -= 1
    heap.offset[b, c, k] = offset
    heap.size[b, c, k] = size
    heap.n_free[b, c] = n + 1
    return True


@helper
def _remove(heap: Heap, b: int, c: int, k: int) -> None:
    for i in range(k, heap.n_free[b, c] - 1):
        heap.offset[b, c, i] = heap.offset[b, c, i + 1]
        heap.size[b, c, i] = heap.size[b, c, i + 1]
    heap.n_free[b, c] -= 1
