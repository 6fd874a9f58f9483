"""Strict ownership in a worker: a program's expectations bound to the shadows of its arenas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protocol.errors import ProtocolError
from protocol.program import Table
from protocol.shadow import Kind, check_table
from workers.arena import Arenas
from workers.peers import Plane

N_SLOTS = 64
"""Handles that programs may pass on to later ones."""


class Violation(Exception):  # noqa: N818  (no fault of the program, nor of the worker: what strict ownership looks for)
    """A read that found other bytes than those that were meant; `report` is (row, granule, found, expected, epoch)."""

    def __init__(self, report: tuple[int, int, int, int, int]) -> None:
        super().__init__(report)
        self.report = report


@dataclass(frozen=True, slots=True, eq=False)
class Expectations:
    """A bound table; the rows of group g are starts[g]:starts[g + 1]. Groups: ports, begin, instructions, end."""

    rows: Table
    starts: tuple[int, ...]
    address: int


class Shadows:
    """Walks expectations. Lives as long as the worker; keeps the handles that one program leaves for another."""

    def __init__(self, arenas: Arenas, plane: Plane) -> None:
        from workers.kernels.shadow import REPORT_WORDS, walk  # compiled code: only strict ownership needs it

        self._arenas, self._plane, self._walk = arenas, plane, walk
        self._slots = np.zeros(N_SLOTS, np.int64)
        self._report = np.zeros(REPORT_WORDS, np.int64)
        self._addresses = int(self._slots.ctypes.data), int(self._report.ctypes.data)

    def bind(self, table: Table, n_groups: int, peers: Sequence[tuple[int, int]]) -> Expectations:
        """Check a table and put addresses in it. Raises ProtocolError."""
        sizes = {arena: self._arenas.segments[arena].nbytes for arena in self._arenas.shadows}
        theirs = {pair: self._plane.shadow(*pair) for pair in peers}
        known = {pair: (s.nbytes // 8 - 1) * 32 for pair, s in theirs.items() if s is not None}
        skipped = [i for i, row in enumerate(table.tolist()) if row[0] == Kind.READ_PEER and not known]
        kept = np.delete(table, skipped, axis=0) if skipped else table.copy()
        check_table(kept, sizes, n_groups, known)
        for row in kept:
            arena, peer = int(row[2]), int(row[6])
            if row[0] in (Kind.READ_HANDLE, Kind.TAKE) and not row[5] < N_SLOTS:
                raise ProtocolError(f"slot {row[5]}: expected less than {N_SLOTS}")
            segment = theirs[peer, arena] if row[0] == Kind.READ_PEER else self._arenas.shadows[arena]
            assert segment is not None, row
            row[2] = segment.address
        starts = np.searchsorted(kept[:, 1], np.arange(n_groups + 1))
        return Expectations(kept, tuple(starts.tolist()), int(kept.ctypes.data))

    def check(self, expectations: Expectations, group: int, step: int) -> None:
        """Meet the expectations of a group. Raises Violation."""
        first, last = expectations.starts[group], expectations.starts[group + 1]
        if first < last and self._walk(expectations.address, first, last, step, *self._addresses):
            row, granule, found, expected, epoch = self._report.tolist()
            raise Violation((row, granule, found, expected, epoch))
