"""What synthetic operations are made of: memory of a worker with known places, and chains of one kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from coordinator.simulate.work import work_of
from protocol.dtypes import DType
from protocol.program import OperandRef, OpRecord

PING, PONG, AUX, WEIGHTS = 0, (4 << 20) + 1088, (8 << 20) + 2240, 12 << 20
"""Offsets in the arena: each op reads what the one before it wrote, so that it is in the nearest cache, and threads
have to meet as in a model; ids and masks; weights and caches. Were the first three apart by whole pages, processors
would take loads for reads of what has just been stored: a model's tensors seldom lie like that."""
SCRATCH: Final = AUX + (2 << 20)
"""For results that nobody reads: a mask that was written over would leave keys out."""
_IDS: Final = AUX + (3 << 20)
"""0, 1, 2, ... as I64, of which I32 would see every other as zero: those are behind them."""
_N_IDS: Final = 512

LEAST_S: Final = 1.5e-3
"""A sample is to take about this long: long enough for the clock, short enough to slip between neighbours."""


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


def first_bytes(room: Room) -> Sequence[tuple[int, bytes]]:
    """What has to lie where (offset, bytes) besides arbitrary numbers: masks are zero, ids count rows."""
    numbers = np.arange(_N_IDS)
    texts = ((_IDS, numbers.astype(np.int64).tobytes()), (_IDS + 8 * _N_IDS, numbers.astype(np.int32).tobytes()))
    return ((AUX, bytes(WEIGHTS - AUX)), *texts)


def ids(room: Room, dtype: DType, rows: int) -> OperandRef:
    """The first `rows` of them, as I32 or I64."""
    return room.operand(_IDS if dtype is DType.I64 else _IDS + 8 * _N_IDS, dtype, rows)


def chain(name: str, count: int, make: Callable[[int, int, int], OpRecord], missed: bool = False) -> Case:
    """`count` ops; `make` gets a number and the offsets of input and output."""
    ops = tuple(make(i, *((PING, PONG) if i % 2 == 0 else (PONG, PING))) for i in range(count))
    return Case(name, ops, missed)


def scattered(n: int) -> list[int]:
    """0 to n - 1, in an order that no prefetcher expects.

    A model's products read matrices that do not follow each other in memory: files have a layer's tensors by name.
    Read one behind the other, weights came a tenth faster here than a model's ever do.
    """
    order = list(range(n))
    Random(n).shuffle(order)
    return order


def count_of(guess_s: float) -> int:
    """How many ops that are guessed to take so long make a sample."""
    return max(2, min(500, int(LEAST_S / guess_s)))
