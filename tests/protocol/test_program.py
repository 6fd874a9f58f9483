"""Program tables survive their journey, and nothing in them can point outside of a worker's memory."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages as m
from protocol.dtypes import DType
from protocol.errors import CapacityError, CrossdockError, ProtocolError
from protocol.ops import PARAM_KINDS, Op
from protocol.program import (
    INSTRUCTION_WORDS,
    OP_WORDS,
    Instruction,
    Kind,
    OperandRef,
    OpRecord,
    check_operands,
    check_range,
    pack_instructions,
    pack_ops,
    table_from,
    unpack_instructions,
    unpack_ops,
)
from workers.arena import Arenas
from workers.peers import SharedPlane
from workers.run import NullEngine, compile_program

WORD = st.integers(-(1 << 63), (1 << 63) - 1)
SMALL = st.integers(0, 1 << 40)
DIMS = st.tuples(SMALL, SMALL, SMALL, SMALL)
OPERAND = st.builds(OperandRef, st.integers(0, 1 << 30), SMALL, st.sampled_from(DType), DIMS, DIMS)
FLOAT = st.floats(width=32, allow_nan=False)


@st.composite
def ops(draw: st.DrawFn) -> OpRecord:
    op = draw(st.sampled_from(Op))
    params = tuple(
        draw(FLOAT if kind == "f" else st.integers(-(1 << 31), (1 << 31) - 1)) for kind in PARAM_KINDS.get(op, "")
    )
    sources = draw(st.lists(st.none() | OPERAND, max_size=5))
    last = [draw(OPERAND)] if sources else []  # absent sources at the end are not kept
    return OpRecord(draw(st.integers(0, 1 << 30)), op, params, draw(OPERAND), (*sources, *last))


INSTRUCTION = st.builds(
    Instruction, st.sampled_from(Kind), st.integers(0, 9), st.integers(9, 9), st.integers(0, 1 << 20), SMALL, SMALL,
    SMALL, st.tuples(SMALL, SMALL),
)  # fmt: skip


@settings(max_examples=40)
@given(st.lists(ops(), max_size=5))
def test_ops_round_trip(records: list[OpRecord]) -> None:
    assert unpack_ops(table_from(pack_ops(records).tobytes(), OP_WORDS, "ops")) == records


@given(st.lists(INSTRUCTION, max_size=8))
def test_instructions_round_trip(instructions: list[Instruction]) -> None:
    table = table_from(pack_instructions(instructions).tobytes(), INSTRUCTION_WORDS, "instructions")
    assert unpack_instructions(table, n_ops=9, n_workers=10, n_transfers=10) == instructions


@settings(max_examples=40)
@given(st.lists(st.lists(WORD, min_size=OP_WORDS, max_size=OP_WORDS), max_size=3))
def test_random_ops(rows: list[list[int]]) -> None:
    table = np.array(rows, np.int64).reshape(-1, OP_WORDS)
    with contextlib.suppress(ProtocolError):
        records = unpack_ops(table)
        check_operands(records, {0: 4096})
        assert all(r.dst.arena == 0 and 0 <= r.dst.offset <= 4096 - r.dst.span for r in records)


@settings(max_examples=100)
@given(st.dictionaries(st.integers(0, 3), st.integers(0, 1 << 46)), WORD, WORD, WORD)
def test_range(sizes: dict[int, int], arena: int, offset: int, nbytes: int) -> None:
    inside = arena in sizes and 0 <= offset <= sizes[arena] and 0 <= nbytes <= sizes[arena] - offset
    if inside:
        check_range(sizes, arena, offset, nbytes, "it")
    else:
        with pytest.raises(ProtocolError, match=r"^it: "):
            check_range(sizes, arena, offset, nbytes, "it")


@settings(max_examples=100)
@given(
    st.sampled_from([DType.F32, DType.F16, DType.Q8_0]),
    st.tuples(*[st.integers(0, 5)] * 4),
    st.tuples(*[st.integers(0, 200)] * 4),
    st.integers(0, 500),
)
def test_span_is_what_a_kernel_may_touch(
    dtype: DType, ne: tuple[int, int, int, int], nb: tuple[int, int, int, int], offset: int
) -> None:
    """Against every element's own bytes."""
    ne = (ne[0] * dtype.block, *ne[1:])
    operand = OperandRef(0, offset, dtype, ne, nb)
    ends = [0] + [
        a * nb[0] + b * nb[1] + c * nb[2] + d * nb[3] + dtype.block_nbytes
        for a in range(ne[0] // dtype.block)
        for b in range(ne[1])
        for c in range(ne[2])
        for d in range(ne[3])
    ]
    assert operand.span >= max(ends)


def operand(arena: int = 1, offset: int = 0, dtype: int = DType.F32, **more: Any) -> OperandRef:
    ne, nb = more.get("ne", (8, 1, 1, 1)), more.get("nb", (4, 32, 32, 32))
    return OperandRef(arena, offset, dtype, ne, nb)  # type: ignore[arg-type]


def record(dst: OperandRef | None = None, *src: OperandRef | None, op: Op = Op.ADD) -> OpRecord:
    return OpRecord(0, op, (), dst or operand(), src or (operand(), operand()))


HUGE = (1 << 63) - 1
BAD_OPS: dict[str, tuple[OpRecord, str]] = {
    "unknown arena": (record(operand(7)), "unknown arena 7"),
    "negative arena": (record(operand(-2)), "unknown arena -2"),
    "offset behind the end": (record(operand(offset=4096)), "of an arena of 4096"),
    "last byte behind the end": (record(operand(offset=4096 - 31)), "of an arena of 4096"),
    "negative offset": (record(operand(offset=-4)), "bytes \\[-4"),
    "offset that overflows": (record(operand(offset=HUGE)), "of an arena of 4096"),
    "extent that overflows": (record(operand(ne=(HUGE, 1, 1, 1))), "out of range"),
    "stride that overflows": (record(operand(nb=(4, HUGE, 32, 32), ne=(1, 2, 1, 1))), "out of range"),
    "extents whose product overflows": (record(operand(ne=(1 << 39,) * 4)), "of an arena of 4096"),
    "negative extent": (record(operand(ne=(8, -1, 1, 1))), "out of range"),
    "negative stride": (record(operand(nb=(-4, 32, 32, 32))), "out of range"),
    "half a block": (record(operand(dtype=DType.Q8_0, ne=(8, 1, 1, 1))), "no multiple of 32"),
    "source behind the end": (record(operand(), operand(), operand(offset=5000)), "source 1"),
    "into a mapped file": (record(operand(arena=2)), "mapped file"),
}
BAD_INSTRUCTIONS: dict[str, tuple[Instruction, str]] = {
    "ops that are not there": (Instruction(Kind.RUN, 0, 2), "out of range"),
    "ops backwards": (Instruction(Kind.RUN, 1, 0), "out of range"),
    "negative op": (Instruction(Kind.RUN, -1, 1), "out of range"),
    "transfer that is not there": (Instruction(Kind.SEND, 1, 0, 0, 1, 0, 8), "out of range"),
    "negative transfer": (Instruction(Kind.WAIT, -1, 0), "out of range"),
    "peer that is not there": (Instruction(Kind.SEND, 0, 2, 0, 1, 0, 8), "out of range"),
    "send from outside": (Instruction(Kind.SEND, 0, 1, 0, 1, 4090, 8), "of an arena of 4096"),
    "copy to outside": (Instruction(Kind.COPY, 0, 0, 0, 1, 4090, 8, (1, 0)), "of an arena of 4096"),
    "copy from outside": (Instruction(Kind.COPY, 0, 0, 0, 1, 0, 8, (1, HUGE)), "of an arena of 4096"),
    "copy of negative size": (Instruction(Kind.COPY, 0, 0, 0, 1, 8, -8, (1, 0)), "bytes \\[8, 0\\)"),
    "copy into a mapped file": (Instruction(Kind.COPY, 0, 0, 0, 2, 0, 8, (1, 0)), "mapped file"),
    "receive into a mapped file": (Instruction(Kind.RECV, 0, 1, 0, 2, 0, 8, (1, 0)), "mapped file"),
    "tap from outside": (Instruction(Kind.TAP, 0, 0, 0, 1, 4090, 8), "of an arena of 4096"),
    "receive from an arena that nobody named": (Instruction(Kind.RECV, 0, 1, 0, 1, 0, 8, (5, 0)), "unknown arena 5"),
}


@pytest.fixture
def arenas(tmp_path: Any) -> Arenas:
    """Arena 1 of 4096 bytes, and a mapped file as arena 2."""
    arenas = Arenas(str(tmp_path), "accel0", limit=None, shared=False, virtual=False)
    arenas.allocate(1, 4096, "compute")
    arenas.allocate(2, 4096, "file")
    arenas.read_only.add(2)
    return arenas


def compiled(arenas: Arenas, ops: list[OpRecord], instructions: list[Instruction], **more: Any) -> Any:
    message = m.ProgramMessage(0, "the test", **{**EMPTY, **more})
    tables = [memoryview(pack_ops(ops).tobytes()), memoryview(pack_instructions(instructions).tobytes())]
    plane = SharedPlane(None)  # type: ignore[arg-type]
    return compile_program(message, tables, arenas, plane, NullEngine(), 2, frozenset({Op.SOFT_MAX}))


EMPTY: dict[str, Any] = {
    "n_transfers": 1,
    "inputs": (),
    "outputs": (),
    "digests": (),
    "peer_arenas": (),
    "overlaps": False,
}


def test_sound_program(arenas: Arenas) -> None:
    compiled(arenas, [record()], [Instruction(Kind.RUN, 0, 1), Instruction(Kind.SEND, 0, 1, 0, 1, 4088, 8)])


@pytest.mark.parametrize("name", BAD_OPS)
def test_bad_op(name: str, arenas: Arenas) -> None:
    bad, words = BAD_OPS[name]
    with pytest.raises(ProtocolError, match=words):
        compiled(arenas, [bad], [])


@pytest.mark.parametrize("name", BAD_INSTRUCTIONS)
def test_bad_instruction(name: str, arenas: Arenas) -> None:
    bad, words = BAD_INSTRUCTIONS[name]
    with pytest.raises(ProtocolError, match=words):
        compiled(arenas, [record()], [bad])


@pytest.mark.parametrize("which", ["inputs", "outputs", "digests"])
def test_bad_port(which: str, arenas: Arenas) -> None:
    with pytest.raises(ProtocolError, match="port 'logits'"):
        compiled(arenas, [], [], **{which: (m.Port("logits", 1, 4090, 8),)})


def test_unknown_ids_and_unsupported_ops(arenas: Arenas) -> None:
    for column, value, words in ((1, 9999, "9999"), (10, -1, "no destination"), (12, 99, "99")):
        table = pack_ops([record()])
        table[0, column] = value
        with pytest.raises(ProtocolError, match=words):
            unpack_ops(table)
    table = pack_instructions([Instruction(Kind.RUN)])
    table[0, 0] = 77
    with pytest.raises(ProtocolError, match="unknown kind 77"):
        unpack_instructions(table, 0, 1, 1)
    with pytest.raises(CapacityError, match="SOFT_MAX"):
        compiled(arenas, [record(op=Op.SOFT_MAX)], [])
    with pytest.raises(ProtocolError, match="16385 transfers"):
        compiled(arenas, [], [], n_transfers=16385)


@settings(max_examples=100)
@given(st.binary(max_size=3 * 8 * INSTRUCTION_WORDS), st.binary(max_size=2 * 8 * OP_WORDS))
def test_random_program(instructions: bytes, operations: bytes) -> None:
    arenas = Arenas("/nonexistent", "accel0", limit=None, shared=False, virtual=True)
    arenas.allocate(1, 4096, "compute")
    message = m.ProgramMessage(0, "the test", **EMPTY)
    buffers = (memoryview(operations), memoryview(instructions))
    with contextlib.suppress(CrossdockError):
        compile_program(message, buffers, arenas, SharedPlane(None), NullEngine(), 2, frozenset())  # type: ignore[arg-type]


def test_arenas_refuse(arenas: Arenas) -> None:
    pieces = np.array([[0, 1 << 62, 1 << 62]], np.int64)
    for act in (
        lambda: arenas.allocate(1, 8, "again"),
        lambda: arenas.allocate(-1, 8, "negative"),
        lambda: arenas.allocate(3, -8, "negative"),
        lambda: arenas.allocate(3, 1 << 62, "huge"),
        lambda: arenas.release(9),
        lambda: arenas.read(1, 4090, 8),
        lambda: arenas.write(1, 4090, memoryview(bytes(8))),
        lambda: arenas.write(2, 0, memoryview(bytes(8))),
        lambda: arenas.load(2, 1, pieces),
        lambda: arenas.load(2, 1, -pieces),
    ):
        with pytest.raises(ProtocolError):
            act()
    assert arenas.allocated_nbytes == 4096


def test_arenas_say_how_much_is_missing(tmp_path: Any) -> None:
    arenas = Arenas(str(tmp_path), "accel0", limit=1000, shared=False, virtual=True)
    arenas.allocate(1, 600, "weights")
    with pytest.raises(CapacityError, match=r"KV of 500 bytes makes 1,100, the limit is 1,000: 100 bytes short"):
        arenas.allocate(2, 500, "KV")
