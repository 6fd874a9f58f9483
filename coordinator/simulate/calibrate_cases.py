"""Synthetic operations of known shapes, chained as in a model, whose times say what each kind of work costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from coordinator.simulate.calibrate_room import AUX, WEIGHTS, Case, Room, chain, count_of, scattered
from coordinator.simulate.calibrate_values import of_values, value_by_value
from protocol.dtypes import DType
from protocol.ops import Op
from protocol.program import OperandRef, OpRecord

QUICK_TYPES: Final = (DType.F32, DType.F16, DType.Q8_0, DType.Q4_1)
TYPES: Final = (
    *QUICK_TYPES, DType.BF16, DType.Q4_0, DType.Q5_0, DType.Q5_1, DType.Q4_K, DType.Q5_K, DType.Q6_K,
)  # fmt: skip
"""Types of weights that are measured: all that workers have kernels for."""

VECTORS: Final = ((256, 64), (256, 256), (512, 512), (1536, 576), (512, 1536), (2048, 1024))
LARGEST: Final = (1024, 8192)
"""Weights only ever read from memory, as those of an output."""
MATRICES: Final = (
    (256, 64, 64), (256, 256, 16), (256, 512, 40), (512, 192, 64), (512, 512, 64), (1536, 576, 32), (512, 1536, 120),
)  # fmt: skip
"""Weights [k, n], and how many columns they are multiplied with."""
NARROW: Final = ((128, 64, 1), (128, 512, 1), (128, 256, 16), (128, 64, 64), (128, 320, 40))
"""The same, for types with short blocks."""
MATRICES_MISSED: Final = ((512, 512, 32), (1536, 576, 64))

ATTENTION: Final = ((32, 4, 2, 40), (32, 4, 2, 256), (64, 9, 3, 256), (64, 9, 3, 1024), (128, 16, 4, 512))
"""Head size, heads, heads of the cache, positions."""
TOWER: Final = ((32, 4, 4, 64, 64), (64, 6, 6, 128, 128))
"""The same and rows, as in an encoder of images."""
ATTENTION_MISSED: Final = ((64, 9, 3, 256), (64, 9, 3, 1024), (128, 16, 4, 256))

HOT_NBYTES: Final = 1 << 19
"""So many bytes of weights take turns when they are to be found in a cache."""
_ALIGNMENT: Final = 64


def cases(room: Room, *, quick: bool = False) -> Iterator[Case]:
    """All of them, in an order that does not matter."""
    for dtype in QUICK_TYPES if quick else TYPES:
        yield from _products(room, dtype)
    for dtype in (DType.F16, DType.F32):
        yield from _attention(room, dtype)
    yield from of_values(room)


def alone(room: Room, ops: Iterable[OpRecord], *, missed: bool) -> Iterator[Case]:
    """Cases of those among ops that read weights or caches, which their costs are to be known for."""
    for op in ops:
        a, b = (*op.src, None)[:2]
        if op.op is Op.MUL_MAT and a is not None and b is not None:
            (k, n, *_), m = a.ne, b.ne[1]
            yield _product(room, a.dtype, (k, n, m), count_of(3e-7 + k * n * m / 3e10), missed=missed)
        elif op.op is Op.FLASH_ATTN_EXT and a is not None and b is not None:
            (d, rows, heads, _), (_, keys, kv_heads, _) = a.ne, b.ne
            yield _attend(room, b.dtype, (d, heads, kv_heads, keys, rows), missed)


def brief_op(room: Room) -> OpRecord:
    """An op that takes next to no time."""
    return next(iter(value_by_value(room, 128, 1))).ops[0]


def reading(room: Room) -> Case:
    """Products that ask memory for more bytes a second than others: of a token's vectors with all weights there are."""
    return _product(room, DType.Q8_0, (1536, 576, 1), missed=True)


def _products(room: Room, dtype: DType) -> Iterator[Case]:
    shapes = [(k, n, 1) for k, n in VECTORS] + [(512, 512, 4), *MATRICES]
    if dtype.block <= 32:
        shapes += NARROW
    for k, n, m in shapes:
        count = count_of(3e-7 + k * n * m / (1.2e11 if m > 8 else 3e10))
        yield _product(room, dtype, (k, n, m), count)
    missed = [(k, n, 1) for k, n in (*VECTORS[1:], LARGEST)]
    for k, n, m in (*missed, *MATRICES_MISSED):
        if dtype.row_nbytes(k) * n <= room.cold_nbytes:
            yield _product(room, dtype, (k, n, m), missed=True)


def _product(room: Room, dtype: DType, shape: tuple[int, int, int], count: int = 0, *, missed: bool = False) -> Case:
    """`count` products [k, n] x m, or one with each of the matrices that fit where the cache has no room for them."""
    k, n, m = shape
    size = -(-dtype.row_nbytes(k) * n // _ALIGNMENT) * _ALIGNMENT
    slots = max(1, (room.cold_nbytes if missed else HOT_NBYTES) // size)
    places = scattered(slots)

    def make(i: int, x: int, y: int) -> OpRecord:
        weights = room.operand(places[i % slots] * size + WEIGHTS, dtype, k, n)
        out, columns = room.operand(y, DType.F32, n, m), room.operand(x, DType.F32, k, m)
        return OpRecord(i, Op.MUL_MAT, (), out, (weights, columns))

    where = " from memory" if missed else ""
    most = 2000 if m == 1 else count_of(k * n * m / 1.2e11)
    ops = chain("", min(slots, most) if missed else count, make).ops
    return Case(f"{dtype.label} [{k}, {n}] x {m}{where}", ops, missed)


def _attention(room: Room, dtype: DType) -> Iterator[Case]:
    for d, heads, kv_heads, keys in ATTENTION:
        for rows in (1, 16, 64) if keys <= 512 else (1,):
            yield _attend(room, dtype, (d, heads, kv_heads, keys, rows), False)
    for shape in TOWER:
        yield _attend(room, dtype, shape, False)
    for d, heads, kv_heads, keys in ATTENTION_MISSED:
        yield _attend(room, dtype, (d, heads, kv_heads, keys, 1), True)


def _attend(room: Room, dtype: DType, shape: tuple[int, int, int, int, int], cold: bool) -> Case:
    """Caches [d, keys, heads] are views of [d, heads, keys], as a model's are."""
    d, heads, kv_heads, keys, rows = shape
    row = dtype.row_nbytes(d)
    size = row * kv_heads * keys
    slots = max(1, (room.cold_nbytes if cold else HOT_NBYTES) // (2 * size))
    places = scattered(slots)

    def cache(at: int) -> OperandRef:
        nb = (dtype.block_nbytes, row * kv_heads, row, row * kv_heads * keys)
        return OperandRef(room.arena, at, dtype, (d, keys, kv_heads, 1), nb)

    def make(i: int, x: int, y: int) -> OpRecord:
        k = WEIGHTS + places[i % slots] * 2 * size
        q = OperandRef(room.arena, x, DType.F32, (d, rows, heads, 1), (4, 4 * d * heads, 4 * d, 4 * d * heads * rows))
        mask = room.operand(AUX, DType.F16, keys, rows)
        out = room.operand(y, DType.F32, d, heads, rows)
        return OpRecord(i, Op.FLASH_ATTN_EXT, (d**-0.5, 0.0, 0.0, 0), out, (q, cache(k), cache(k + size), mask))

    count = min(slots, 400) if cold else count_of(1e-6 + 4 * d * heads * keys * rows / 3e10)
    where = " from memory" if cold else ""
    return chain(f"{dtype.label} {heads}/{kv_heads} heads of {d}, {rows} x {keys}{where}", count, make, cold)
