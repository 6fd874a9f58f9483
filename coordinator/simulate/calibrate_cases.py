"""Synthetic operations of known shapes, chained as in a model, whose times say what each kind of work costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.simulate.work import work_of
from protocol.dtypes import DType
from protocol.ops import GluOp, Op, UnaryOp
from protocol.program import OperandRef, OpRecord

QUICK_TYPES: Final = (DType.F32, DType.F16, DType.Q8_0, DType.Q4_1)
TYPES: Final = (
    *QUICK_TYPES, DType.BF16, DType.Q4_0, DType.Q5_0, DType.Q5_1, DType.Q4_K, DType.Q5_K, DType.Q6_K,
)  # fmt: skip
"""Types of weights that are measured: all that workers have kernels for."""

VECTORS: Final = ((256, 64), (256, 256), (512, 512), (1536, 576), (512, 1536), (2048, 1024))
LARGEST: Final = (1024, 8192)
"""Weights only ever read from memory, as those of an output."""
MATRICES: Final = ((256, 256, 16), (512, 512, 64), (1536, 576, 32), (512, 1536, 128))
"""Weights [k, n], and how many columns they are multiplied with."""

ATTENTION: Final = ((32, 4, 2, 40), (32, 4, 2, 256), (64, 9, 3, 256), (64, 9, 3, 1024), (128, 16, 4, 512))
"""Head size, heads, heads of the cache, positions."""

_PING, _PONG, AUX, WEIGHTS = 0, 4 << 20, 8 << 20, 12 << 20
"""Offsets in the arena: each op reads what the one before it wrote, so that it is in the nearest cache, and threads
have to meet as in a model; ids and masks; weights and caches."""

HOT_NBYTES: Final = 1 << 20
"""So many bytes of weights take turns when they are to be found in a cache."""
LEAST_S: Final = 1.5e-3
"""A sample is to take about this long: long enough for the clock, short enough to slip between neighbours."""
_ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class Case:
    """Ops that are measured as one run. `missed`: they read more weights than the cache holds. `before`: how often they
    run before a sample is taken, so that their weights are in the cache."""

    name: str
    ops: tuple[OpRecord, ...]
    missed: bool = False
    before: int = 1

    @property
    def key(self) -> str:
        """What the cost is looked up by."""
        return work_of(self.ops[0]).key


@dataclass(frozen=True, slots=True)
class Room:
    """Memory for weights: bytes of them that surely are more than the cache, and the number of the arena."""

    arena: int
    cold_nbytes: int

    @property
    def nbytes(self) -> int:
        """What the arena must have."""
        return WEIGHTS + self.cold_nbytes + (4 << 20)

    def operand(self, offset: int, dtype: DType, *ne: int) -> OperandRef:
        """A contiguous tensor there."""
        a, b, c, d = (*ne, 1, 1, 1)[:4]
        row = dtype.row_nbytes(a)
        return OperandRef(self.arena, offset, dtype, (a, b, c, d), (dtype.block_nbytes, row, row * b, row * b * c))


def cases(room: Room, *, quick: bool = False) -> Iterator[Case]:
    """All of them, in an order that does not matter."""
    for dtype in QUICK_TYPES if quick else TYPES:
        yield from _products(room, dtype)
    for dtype in (DType.F16, DType.F32):
        yield from _attention(room, dtype)
    yield from _others(room)


def brief_op(room: Room) -> OpRecord:
    """An op that takes next to no time."""
    return next(iter(_rowwise(room, 128, 1))).ops[0]


def first_bytes(room: Room) -> Sequence[tuple[int, bytes]]:
    """What has to lie where (offset, bytes) besides arbitrary numbers: ids and masks are zero."""
    return ((AUX, bytes(WEIGHTS - AUX)),)


def _chain(name: str, count: int, make: Callable[[int, int, int], OpRecord], missed: bool = False) -> Case:
    """`count` ops; `make` gets a number and the offsets of input and output."""
    ops = tuple(make(i, *((_PING, _PONG) if i % 2 == 0 else (_PONG, _PING))) for i in range(count))
    return Case(name, ops, missed)


def _products(room: Room, dtype: DType) -> Iterator[Case]:
    shapes = [(k, n, 1) for k, n in VECTORS] + [(512, 512, 4), *MATRICES]
    if dtype.block <= 32:
        shapes += [(128, 64, 1), (128, 512, 1), (128, 256, 16)]
    for k, n, m in shapes:
        count = _count(3e-7 + k * n * m / (1.2e11 if m > 8 else 3e10))
        yield _product(room, dtype, (k, n, m), count)
    for k, n in (*VECTORS[2:], LARGEST):
        if dtype.row_nbytes(k) * n <= room.cold_nbytes:
            yield _product(room, dtype, (k, n, 1), missed=True)


def _product(room: Room, dtype: DType, shape: tuple[int, int, int], count: int = 0, *, missed: bool = False) -> Case:
    """`count` products [k, n] x m, or one with each of the matrices that fit where the cache has no room for them."""
    k, n, m = shape
    size = -(-dtype.row_nbytes(k) * n // _ALIGNMENT) * _ALIGNMENT
    slots = max(1, (room.cold_nbytes if missed else HOT_NBYTES) // size)

    def make(i: int, x: int, y: int) -> OpRecord:
        weights = room.operand(i % slots * size + WEIGHTS, dtype, k, n)
        out, columns = room.operand(y, DType.F32, n, m), room.operand(x, DType.F32, k, m)
        return OpRecord(i, Op.MUL_MAT, (), out, (weights, columns))

    where = " from memory" if missed else ""
    ops = _chain("", min(slots, 2000) if missed else count, make).ops
    return Case(f"{dtype.label} [{k}, {n}] x {m}{where}", ops, missed)


def _attention(room: Room, dtype: DType) -> Iterator[Case]:
    for d, heads, kv_heads, keys in ATTENTION:
        for rows in (1, 16, 64) if keys <= 512 else (1,):
            yield _attend(room, dtype, (d, heads, kv_heads, keys, rows), False)
    yield _attend(room, dtype, (64, 9, 3, 256, 1), True)
    yield _attend(room, dtype, (64, 9, 3, 1024, 1), True)


def _attend(room: Room, dtype: DType, shape: tuple[int, int, int, int, int], cold: bool) -> Case:
    """Caches [d, keys, heads] are views of [d, heads, keys], as a model's are."""
    d, heads, kv_heads, keys, rows = shape
    row = dtype.row_nbytes(d)
    size = row * kv_heads * keys
    slots = max(1, (room.cold_nbytes if cold else HOT_NBYTES) // (2 * size))

    def cache(at: int) -> OperandRef:
        nb = (dtype.block_nbytes, row * kv_heads, row, row * kv_heads * keys)
        return OperandRef(room.arena, at, dtype, (d, keys, kv_heads, 1), nb)

    def make(i: int, x: int, y: int) -> OpRecord:
        k = WEIGHTS + i % slots * 2 * size
        q = OperandRef(room.arena, x, DType.F32, (d, rows, heads, 1), (4, 4 * d * heads, 4 * d, 4 * d * heads * rows))
        mask = room.operand(AUX, DType.F16, keys, rows)
        out = room.operand(y, DType.F32, d, heads, rows)
        return OpRecord(i, Op.FLASH_ATTN_EXT, (d**-0.5, 0.0, 0.0, 0), out, (q, cache(k), cache(k + size), mask))

    count = min(slots, 400) if cold else _count(1e-6 + 4 * d * heads * keys * rows / 3e10)
    where = " from memory" if cold else ""
    return _chain(f"{dtype.label} {heads}/{kv_heads} heads of {d}, {rows} x {keys}{where}", count, make, cold)


def _others(room: Room) -> Iterator[Case]:
    for width, rows in ((128, 1), (576, 1), (2048, 1), (576, 16), (512, 64)):
        yield from _rowwise(room, width, rows)
    for d, heads, rows in ((32, 2, 1), (32, 4, 1), (64, 3, 1), (64, 9, 1), (128, 32, 1)):
        yield _rope(room, d, heads, rows)  # angles are computed once for each row: the law has no such term
    for dtype, width, rows in (
        (DType.Q8_0, 576, 1),
        (DType.Q8_0, 128, 1),
        (DType.Q8_0, 576, 16),
        (DType.F32, 576, 1),
        (DType.F32, 128, 1),
        (DType.F32, 512, 16),
        (DType.F16, 576, 1),
        (DType.F16, 512, 16),
    ):
        yield _rows_of(room, dtype, width, rows)  # fmt: skip
    for width, rows in ((64, 1), (192, 1), (1024, 1), (192, 16)):
        yield _rows_into(room, width, rows)


def _rowwise(room: Room, width: int, rows: int) -> Iterator[Case]:
    """What works value by value or row by row on F32 [width, rows]."""

    def x(at: int) -> OperandRef:
        return room.operand(at, DType.F32, width, rows)

    row, one = room.operand(WEIGHTS, DType.F32, width), room.operand(WEIGHTS, DType.F32, 1)
    half, same = room.operand(AUX, DType.F16, width, rows), room.operand(AUX, DType.F32, width, rows)
    plain: dict[Op, tuple[tuple[int | float, ...], tuple[OperandRef, ...]]] = {
        Op.RMS_NORM: ((1e-5,), ()), Op.NORM: ((1e-5,), ()), Op.ADD: ((), (same,)), Op.MUL: ((), (row,)),
        Op.GLU: ((int(GluOp.SWIGLU), 0), (same,)), Op.UNARY: ((int(UnaryOp.GELU_ERF),), ()), Op.CONT: ((), ()),
    }  # fmt: skip
    values = width * rows
    for op, (params, more) in plain.items():
        yield _chain(
            f"{op.name} [{width}, {rows}]", _count(2e-7 + values / 1e9),
            lambda i, a, b, o=op, p=params, m=more: OpRecord(i, o, p, x(b), (x(a), *m)),  # type: ignore[misc]
        )  # fmt: skip
    yield _chain(
        f"MUL [{width}, {rows}] by a number", _count(2e-7 + values / 1e9),
        lambda i, a, b: OpRecord(i, Op.MUL, (), x(b), (x(a), one)),
    )  # fmt: skip
    yield _chain(
        f"CPY [{width}, {rows}] to f16", _count(2e-7 + values / 1e9),
        lambda i, a, b: OpRecord(i, Op.CPY, (), half, (x(a), half)),
    )  # fmt: skip


def _rope(room: Room, d: int, heads: int, rows: int) -> Case:
    params = (0, d, 0, 0, 8192, 100000.0, 1.0, 0.0, 1.0, 32.0, 1.0)
    positions = room.operand(AUX, DType.I32, rows)

    def make(i: int, a: int, b: int) -> OpRecord:
        x, y = (room.operand(at, DType.F32, d, heads, rows) for at in (a, b))
        return OpRecord(i, Op.ROPE, params, y, (x, positions))

    return _chain(f"ROPE [{d}, {heads}, {rows}]", _count(1e-6 + d * heads * rows / 1e9), make)


def _rows_of(room: Room, dtype: DType, width: int, rows: int) -> Case:
    table, ids = room.operand(WEIGHTS, dtype, width, 256), room.operand(AUX, DType.I32, rows)

    def make(i: int, a: int, b: int) -> OpRecord:
        return OpRecord(i, Op.GET_ROWS, (), room.operand(b, DType.F32, width, rows), (table, ids))

    return _chain(f"GET_ROWS {dtype.label} [{width}, {rows}]", _count(3e-7 + width * rows / 2e9), make)


def _rows_into(room: Room, width: int, rows: int) -> Case:
    cache, ids = room.operand(WEIGHTS, DType.F16, width, 512), room.operand(AUX, DType.I64, rows)

    def make(i: int, a: int, b: int) -> OpRecord:
        return OpRecord(i, Op.SET_ROWS, (), cache, (room.operand(a, DType.F32, width, rows), ids))

    return _chain(f"SET_ROWS [{width}, {rows}]", _count(3e-7 + width * rows / 2e9), make)


def _count(guess_s: float) -> int:
    return max(2, min(2000, int(LEAST_S / guess_s)))
