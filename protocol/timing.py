"""How long a program's instructions take: on modelled hardware, shipped with it, and as they came out, sent back.

Both are tables of 64-bit integers: picoseconds of virtual time, so that sums depend on no order, and nanoseconds of the
host's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from protocol.errors import ProtocolError
from protocol.program import Table, table_from

TIMINGS: Final = ("", "trace", "clock", "pace")
"""What a program's steps are timed by: nothing; the wall clock; a virtual clock as well; and slowed down to that."""

PS: Final = 1_000_000_000_000
"""Picoseconds of a second."""

COST_WORDS: Final = 4
TIME_WORDS: Final = 5
_MAX_PS: Final = 1 << 60

BLOCKS: Final = 1
"""Flag of a SEND: the sender goes on when the bytes have left."""
AHEAD: Final = 2
"""Flag of a RECV: its transfer may begin when the receiver comes to the first of several RECVs in a row."""
RESULT: Final = 4
"""Flag of a row behind the instructions: an output on its way to the coordinator."""


class Cost(NamedTuple):
    """What the model says of one instruction: picoseconds that the device, or the link, is busy, further picoseconds on
    the way, the link's number, flags."""

    busy: int
    lag: int = 0
    route: int = -1
    flags: int = 0


class Times(NamedTuple):
    """When an instruction began and ended: wall clock in ns, virtual clock in ps since the step's beginning. Of RECV,
    also when the last byte had left the sender."""

    start_ns: int
    end_ns: int
    start_ps: int
    end_ps: int
    left_ps: int


def pack_costs(costs: Sequence[Cost]) -> Table:
    """[n, COST_WORDS]: a row for what comes before the instructions, one for each, and those for what comes after."""
    return np.array(costs, np.int64).reshape(-1, COST_WORDS)


def unpack_costs(buffer: object, n_instructions: int) -> list[Cost]:
    """The costs in a received buffer. Raises ProtocolError for too few rows, or a time below 0 or above 12 days."""
    table = table_from(buffer, COST_WORDS, "modelled times")
    if len(table) <= n_instructions:
        raise ProtocolError(f"modelled times: {len(table)} rows for {n_instructions} instructions")
    if len(table) and (table[:, :2].min() < 0 or table[:, :2].max() > _MAX_PS):
        raise ProtocolError("modelled times: expected 0 to 2^60 ps each")
    return [Cost(*row) for row in table.tolist()]


def unpack_times(buffer: object) -> list[Times]:
    """What a step's reply says: a row per instruction, and one for the whole step. Raises ProtocolError."""
    return [Times(*row) for row in table_from(buffer, TIME_WORDS, "times").tolist()]
