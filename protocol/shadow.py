"""Strict ownership on the wire: what each instruction of a program may read, and what it leaves as its own.

Beside each arena that programs write to lies its shadow: a 64-bit epoch, then one 64-bit tag per granule of 32 bytes,
which says who wrote the granule last. A program comes with a table of expectations, computed from the plan by the
identity of tensors; the worker compares them with the tags by the place of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from protocol.errors import ProtocolError
from protocol.program import Table

GRANULE = 32
"""Bytes that share a tag: the smallest alignment of a buffer, so that no two tensors meet in one."""

HEADER = 1
"""Words of a shadow before its tags: the epoch."""

WORDS = 8
"""kind, group, arena, first granule, behind the last, value, peer (of READ_PEER: its index), the row's own number."""

STEP_SHIFT = 24
"""A tag is step << STEP_SHIFT | number of the write in its program, from 1; -r for resident tensor r; 0: nobody."""

NONE = -1


class Kind(IntEnum):
    """What a row of the table demands or does; `value` is the number of a write, of a resident tensor or of a slot."""

    MARK = 0  # the granules are this program's write `value` of this step
    OWN = 1  # the granules belong to resident tensor `value`
    READ = 2  # they are this program's write `value` of this step
    READ_OWN = 3  # they belong to resident tensor `value`
    READ_OWN_OR_EMPTY = 4  # or nobody wrote them yet
    READ_HANDLE = 5  # they are what slot `value` says, and nobody has opened a new epoch since
    READ_NOBODY = 6  # nobody ever writes what is read here
    READ_PEER = 7  # as READ, in the arena of `peer` after copying from it
    EPOCH = 8  # this step opens a new epoch of the arena
    TAKE = 9  # slot `value` says: the granule's tag as it is now


def n_words(nbytes: int) -> int:
    """Words of the shadow of an arena."""
    return HEADER + -(-nbytes // GRANULE)


def shadow_table(rows: Sequence[tuple[int, ...]]) -> Table:
    """[n, WORDS] int64."""
    return np.array(rows, np.int64).reshape(-1, WORDS)


def check_table(table: Table, sizes: dict[int, int], n_groups: int, peers: dict[tuple[int, int], int]) -> None:
    """Kinds, groups in order, granules inside shadows of arenas of `sizes` bytes (peers' by peer and arena).

    Raises ProtocolError naming the row.
    """
    before = 0
    for i, (kind, group, arena, first, last, value, peer, _) in enumerate(table.tolist()):
        if not (0 <= kind <= Kind.TAKE and before <= group < n_groups and 0 <= value < 1 << STEP_SHIFT):
            raise ProtocolError(f"expectation {i}: kind {kind}, group {group} or value {value} out of range")
        size = peers.get((peer, arena)) if kind == Kind.READ_PEER else sizes.get(arena)
        least = first + (kind == Kind.TAKE)  # which looks at a tag
        if size is None or not 0 <= first <= least <= last <= -(-size // GRANULE):
            raise ProtocolError(f"expectation {i}: granules [{first}, {last}) of arena {arena}, which has {size} bytes")
        before = group
