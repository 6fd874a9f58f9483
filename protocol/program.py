"""A worker's share of a graph evaluation: operations and instructions as tables of 64-bit integers.

The coordinator lowers a plan into one program per worker, ships it once and runs it with one message per step. The
tables are built, checked and read here, and nowhere else.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.dtypes import DType
from protocol.errors import ProtocolError
from protocol.limits import MAX_INSTRUCTIONS, MAX_OPS, MAX_TRANSFERS
from protocol.ops import PARAM_KINDS, Op

Table = npt.NDArray[np.int64]

N_SRC = 6
_OPERAND = 11  # arena, offset, dtype, ne[4], nb[4]
_NODE, _OP, _PARAMS, _DST = 0, 1, 2, 10
OP_WORDS = _DST + (1 + N_SRC) * _OPERAND
INSTRUCTION_WORDS = 8
NOWHERE = -1
"""Arena of an absent operand."""


@dataclass(frozen=True, slots=True)
class OperandRef:
    """A strided tensor in an arena: offset and strides in bytes."""

    arena: int
    offset: int
    dtype: DType
    ne: tuple[int, int, int, int]
    nb: tuple[int, int, int, int]

    @property
    def span(self) -> int:
        """Bytes from the first to behind the last element."""
        if 0 in self.ne:
            return 0
        blocks = (-(-self.ne[0] // self.dtype.block), *self.ne[1:])
        return self.dtype.block_nbytes + sum((n - 1) * b for n, b in zip(blocks, self.nb, strict=True))


@dataclass(frozen=True, slots=True)
class OpRecord:
    """One operation; `node` is its index in the graph, for messages to people."""

    node: int
    op: Op
    params: tuple[int | float, ...]
    dst: OperandRef
    src: tuple[OperandRef | None, ...]


class Kind(IntEnum):
    """What an instruction does."""

    RUN = 0  # ops [a, b), part of split c
    COPY = 1  # within the worker: `nbytes` from (src_arena, src_offset) to (arena, offset)
    SEND = 2  # publish (arena, offset, nbytes) to `peer` as `transfer`
    RECV = 3  # take `transfer` from `peer`'s (src_arena, src_offset) into (arena, offset), acknowledge
    WAIT = 4  # until `peer` has acknowledged `transfer`
    TAP = 5  # the reply gets (arena, offset, nbytes) as they are now; nothing is moved, marked or checked


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; which fields mean something depends on `kind`."""

    kind: Kind
    first: int = 0  # RUN: first op. COPY, TAP: the tensor's number in the graph, for people. Others: the transfer
    last: int = 0  # RUN: behind the last op. Others: the peer's index
    split: int = 0
    arena: int = NOWHERE
    offset: int = 0
    nbytes: int = 0
    src: tuple[int, int] = (NOWHERE, 0)

    @property
    def transfer(self) -> int:
        """Number of the transfer, its doorbell on the board."""
        return self.first

    @property
    def peer(self) -> int:
        """Index of the other worker."""
        return self.last


def pack_ops(ops: Sequence[OpRecord]) -> Table:
    """[n, OP_WORDS] int64."""
    table = np.full((len(ops), OP_WORDS), NOWHERE, np.int64)
    for row, op in zip(table, ops, strict=True):
        row[_NODE], row[_OP] = op.node, op.op
        row[_PARAMS:_DST] = np.frombuffer(_pack_params(op.op, op.params), np.int64)
        for k, operand in enumerate((op.dst, *op.src)):
            if operand is not None:
                start = _DST + k * _OPERAND
                row[start : start + _OPERAND] = (
                    operand.arena, operand.offset, operand.dtype, *operand.ne, *operand.nb,
                )  # fmt: skip
    return table


def unpack_ops(table: Table) -> list[OpRecord]:
    """The operations of a table, ids and types checked; ranges are checked by `check_operands`.

    Raises ProtocolError naming the row.
    """
    records = []
    for i, row in enumerate(table.tolist()):
        try:
            op = Op(row[_OP])
            operands = [_operand(row, k) for k in range(1 + N_SRC)]
        except ValueError as error:
            raise ProtocolError(f"operation {i}: {error}") from None
        if operands[0] is None:
            raise ProtocolError(f"operation {i} ({op.name}) has no destination")
        while len(operands) > 1 and operands[-1] is None:
            operands.pop()
        params = _unpack_params(op, table[i, _PARAMS:_DST].tobytes())
        records.append(OpRecord(row[_NODE], op, params, operands[0], tuple(operands[1:])))
    return records


def _operand(row: list[int], k: int) -> OperandRef | None:
    words = row[_DST + k * _OPERAND : _DST + (k + 1) * _OPERAND]
    if words[0] == NOWHERE:
        return None
    ne, nb = words[3:7], words[7:11]
    return OperandRef(words[0], words[1], DType(words[2]), (ne[0], ne[1], ne[2], ne[3]), (nb[0], nb[1], nb[2], nb[3]))


def check_operands(ops: Sequence[OpRecord], arenas: Mapping[int, int]) -> None:
    """Every operand lies inside an arena of the given sizes (bytes).

    Raises ProtocolError naming operation, operand, expected and actual.
    """
    for i, op in enumerate(ops):
        for k, operand in enumerate((op.dst, *op.src)):
            if operand is None:
                continue
            what = f"operation {i} ({op.op.name}) {'destination' if k == 0 else f'source {k - 1}'}"
            if any(not 0 <= n < 1 << 40 for n in operand.ne) or any(not 0 <= b < 1 << 46 for b in operand.nb):
                raise ProtocolError(f"{what}: shape {operand.ne} or strides {operand.nb} out of range")
            if operand.dtype.quantised and operand.ne[0] % operand.dtype.block:
                raise ProtocolError(f"{what}: rows of {operand.ne[0]} are no multiple of {operand.dtype.block}")
            check_range(arenas, operand.arena, operand.offset, operand.span, what)


def check_range(arenas: Mapping[int, int], arena: int, offset: int, nbytes: int, what: str) -> None:
    """[offset, offset + nbytes) lies inside the arena.

    Raises ProtocolError.
    """
    size = arenas.get(arena)
    if size is None:
        raise ProtocolError(f"{what}: unknown arena {arena}")
    if offset < 0 or nbytes < 0 or offset + nbytes > size:
        raise ProtocolError(f"{what}: bytes [{offset}, {offset + nbytes}) of an arena of {size}")


def pack_instructions(instructions: Sequence[Instruction]) -> Table:
    """[n, INSTRUCTION_WORDS] int64: kind | split << 8, first, last, arena, offset, nbytes, source arena, offset."""
    rows = [(i.kind | i.split << 8, i.first, i.last, i.arena, i.offset, i.nbytes, *i.src) for i in instructions]
    return np.array(rows, np.int64).reshape(-1, INSTRUCTION_WORDS)


def unpack_instructions(table: Table, n_ops: int, n_workers: int, n_transfers: int) -> list[Instruction]:
    """The instructions of a table; op ranges, peers and transfers checked.

    Raises ProtocolError naming the instruction.
    """
    result = []
    for i, (head, first, last, arena, offset, nbytes, src_arena, src_offset) in enumerate(table.tolist()):
        try:
            kind = Kind(head & 0xFF)
        except ValueError:
            raise ProtocolError(f"instruction {i}: unknown kind {head & 0xFF}") from None
        if kind is Kind.RUN:
            valid = 0 <= first <= last <= n_ops
        else:
            valid = kind in (Kind.COPY, Kind.TAP) or (0 <= first < n_transfers and 0 <= last < n_workers)
        if not valid:
            raise ProtocolError(f"instruction {i} ({kind.name}): {first}, {last} out of range")
        result.append(Instruction(kind, first, last, head >> 8, arena, offset, nbytes, (src_arena, src_offset)))
    return result


def table_from(buffer: Any, words: int, what: str) -> Table:
    """A received buffer as a table of `words` columns.

    Raises ProtocolError when the size does not fit.
    """
    limit = max(MAX_OPS, MAX_INSTRUCTIONS)
    if len(buffer) % (8 * words) or len(buffer) > limit * 8 * words:
        raise ProtocolError(f"{what}: {len(buffer)} bytes are no table of {words} words a row")
    return np.frombuffer(bytes(buffer), np.int64).reshape(-1, words)


def check_transfers(n_transfers: int) -> None:
    """Raises ProtocolError when a program wants more doorbells than the board has."""
    if not 0 <= n_transfers <= MAX_TRANSFERS:
        raise ProtocolError(f"program with {n_transfers} transfers: at most {MAX_TRANSFERS}")


def _pack_params(op: Op, params: tuple[int | float, ...]) -> bytes:
    kinds = PARAM_KINDS.get(op, "")
    assert len(params) <= len(kinds), (op, params)
    return struct.pack("<" + kinds[: len(params)], *params).ljust(64, b"\0")


def _unpack_params(op: Op, raw: bytes) -> tuple[int | float, ...]:
    kinds = "<" + PARAM_KINDS.get(op, "")
    return struct.unpack(kinds, raw[: struct.calcsize(kinds)])
