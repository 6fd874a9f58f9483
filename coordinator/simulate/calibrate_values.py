"""Cases of whatever works value by value or row by row, and of what only puts values elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from coordinator.simulate.calibrate_room import AUX, SCRATCH, WEIGHTS, Case, Room, chain, count_of, ids
from protocol.dtypes import DType
from protocol.ops import GluOp, Op, UnaryOp
from protocol.program import OperandRef, OpRecord

Extents = tuple[int, ...]


def of_values(room: Room) -> Iterator[Case]:
    """All of them."""
    for width, rows in ((128, 1), (576, 1), (2048, 1), (576, 16), (512, 64), (128, 40), (32, 256)):
        yield from value_by_value(room, width, rows)
    for d, heads, rows in (
        (32, 2, 1), (32, 4, 1), (64, 3, 1), (64, 9, 1), (128, 32, 1), (32, 3, 64), (64, 8, 16), (128, 4, 32),
    ):  # fmt: skip
        yield _rope(room, d, heads, rows)
    for dtype, width, rows in (
        (DType.Q8_0, 576, 1),
        (DType.Q8_0, 128, 1),
        (DType.Q8_0, 576, 16),
        (DType.F32, 576, 1),
        (DType.F32, 128, 1),
        (DType.F32, 512, 16),
        (DType.F16, 576, 1),
        (DType.F16, 512, 16),
        (DType.F16, 4096, 1),
    ):
        yield _rows_of(room, dtype, width, rows)  # fmt: skip
    for width, rows in ((64, 1), (192, 1), (1024, 1), (192, 16), (64, 64), (256, 64)):
        yield _rows_into(room, width, rows)
    yield from layouts(room)


def value_by_value(room: Room, width: int, rows: int) -> Iterator[Case]:
    """What works value by value or row by row on F32 [width, rows]."""

    def x(at: int) -> OperandRef:
        return room.operand(at, DType.F32, width, rows)

    row, one = room.operand(WEIGHTS, DType.F32, width), room.operand(WEIGHTS, DType.F32, 1)
    half, same = room.operand(SCRATCH, DType.F16, width, rows), room.operand(AUX, DType.F32, width, rows)
    plain: dict[Op, tuple[tuple[int | float, ...], tuple[OperandRef, ...]]] = {
        Op.RMS_NORM: ((1e-5,), ()), Op.NORM: ((1e-5,), ()), Op.ADD: ((), (same,)), Op.MUL: ((), (row,)),
        Op.GLU: ((int(GluOp.SWIGLU), 0), (same,)), Op.UNARY: ((int(UnaryOp.GELU_ERF),), ()), Op.CONT: ((), ()),
    }  # fmt: skip
    values = width * rows
    for op, (params, more) in plain.items():
        yield chain(
            f"{op.name} [{width}, {rows}]", count_of(2e-7 + values / 1e9),
            lambda i, a, b, o=op, p=params, m=more: OpRecord(i, o, p, x(b), (x(a), *m)),  # type: ignore[misc]
        )  # fmt: skip
    yield chain(
        f"MUL [{width}, {rows}] by a number", count_of(2e-7 + values / 1e9),
        lambda i, a, b: OpRecord(i, Op.MUL, (), x(b), (x(a), one)),
    )  # fmt: skip
    if rows > 1:
        yield chain(
            f"ADD [{width}, {rows}] of a row", count_of(2e-7 + values / 1e9),
            lambda i, a, b: OpRecord(i, Op.ADD, (), x(b), (x(a), row)),
        )  # fmt: skip
    yield chain(
        f"CPY [{width}, {rows}] to f16", count_of(2e-7 + values / 1e9),
        lambda i, a, b: OpRecord(i, Op.CPY, (), half, (x(a), half)),
    )  # fmt: skip


def _rope(room: Room, d: int, heads: int, rows: int) -> Case:
    params = (0, d, 0, 0, 8192, 100000.0, 1.0, 0.0, 1.0, 32.0, 1.0)
    positions = ids(room, DType.I32, rows)

    def make(i: int, a: int, b: int) -> OpRecord:
        x, y = (room.operand(at, DType.F32, d, heads, rows) for at in (a, b))
        return OpRecord(i, Op.ROPE, params, y, (x, positions))

    return chain(f"ROPE [{d}, {heads}, {rows}]", count_of(1e-6 + d * heads * rows / 1e9), make)


def _rows_of(room: Room, dtype: DType, width: int, rows: int) -> Case:
    table, numbers = room.operand(WEIGHTS, dtype, width, 256), ids(room, DType.I32, rows)

    def make(i: int, a: int, b: int) -> OpRecord:
        return OpRecord(i, Op.GET_ROWS, (), room.operand(b, DType.F32, width, rows), (table, numbers))

    return chain(f"GET_ROWS {dtype.label} [{width}, {rows}]", count_of(3e-7 + width * rows / 2e9), make)


def _rows_into(room: Room, width: int, rows: int) -> Case:
    cache, numbers = room.operand(WEIGHTS, DType.F16, width, 512), ids(room, DType.I64, rows)

    def make(i: int, a: int, b: int) -> OpRecord:
        return OpRecord(i, Op.SET_ROWS, (), cache, (room.operand(a, DType.F32, width, rows), numbers))

    return chain(f"SET_ROWS [{width}, {rows}]", count_of(3e-7 + width * rows / 2e9), make)


def layouts(room: Room) -> Iterator[Case]:
    """What only puts values elsewhere: around an encoder of images."""

    def case(name: str, op: Op, params: tuple[int, ...], out: Extents, *src: Extents, ns: float = 20.0) -> Case:
        def make(i: int, a: int, b: int) -> OpRecord:
            places = (a, AUX)
            read = tuple(room.operand(at, DType.F32, *ne) for at, ne in zip(places, src, strict=False))
            return OpRecord(i, op, params, room.operand(b, DType.F32, *out), read)

        return chain(f"{op.name} {name}", count_of(3e-7 + prod(out[1:]) * ns * 1e-9 + prod(out) / 1e9), make)

    for n, rows in ((1, 32), (64, 1), (256, 1)):
        half = (n, rows, 32)
        yield case(f"[2 x {n}, {rows}, 32]", Op.CONCAT, (0,), (2 * n, rows, 32), half, half)
    for n, rows in ((128, 1), (128, 8), (512, 8)):
        yield case(f"[{n}, 2 x {rows}]", Op.CONCAT, (1,), (n, 2 * rows), (n, rows), (n, rows))
        yield case(f"[{n}, {rows}] times 4", Op.REPEAT, (), (n, rows, 4), (n, rows))
        yield case(f"[{n}, {rows} + 3, 4]", Op.PAD, (0, 0, 0, 3, 0, 0, 0, 0), (n, rows + 3, 4), (n, rows, 4))
        yield case(f"[{n}, {rows}]", Op.CPY, (), (n, rows), (n, rows), (n, rows))
    for size, n in ((8, 4), (14, 3), (14, 6)):
        patches = (3 * size * size, n, n)
        yield case(
            f"{n} x {n} of {size} x {size}", Op.IM2COL, (size, size, 0, 0, 1, 1, 1), patches,
            (size, size, 3, 16), (size * n, size * n, 3), ns=3 * size * size,
        )  # fmt: skip
    for n, rows in ((128, 8), (512, 8)):
        yield _parted(room, n, rows)


def _parted(room: Room, width: int, rows: int) -> Case:
    """Made contiguous: the first half of the rows of each of four matrices."""

    def make(i: int, a: int, b: int) -> OpRecord:
        whole = room.operand(a, DType.F32, width, 2 * rows, 4)
        half = replace(whole, ne=(width, rows, 4, 1))
        return OpRecord(i, Op.CONT, (), room.operand(b, DType.F32, width, rows, 4), (half,))

    return chain(f"CONT half of [{width}, {2 * rows}, 4]", count_of(3e-7 + rows * 8e-8), make)
