"""Strict ownership in a worker: a program's expectations bound to the shadows of its arenas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ProtocolError
from protocol.program import Table
from protocol.shadow import Kind, check_table
from workers.arena import Arenas
from workers.peers import Plane

N_SLOTS = 64
"""Handles that programs may pass on to later ones."""


class Violation(Exception):  # noqa: N818  (no fault of the program, nor of the worker: what strict ownership looks for)
    """A read that found other bytes than those that were meant; `report` is (row, granule, found, expected, epoch)."""

    def __init__(self, step: int, report: tuple[int, int, int, int, int]) -> None:
        super().__init__(step, report)
        self.step, self.report = step, report


@dataclass(frozen=True, slots=True, eq=False)
class Expectations:
    """A bound table, and at `address` what compiled code reads of it (kernels/shadow.py has the layout).

    Groups: ports, begin, instructions, end.
    """

    rows: Table
    block: NDArray[np.int64]
    address: int
    report: NDArray[np.int64]

    def violation(self, step: int) -> Violation:
        """What compiled code has just found in this step."""
        row, granule, found, expected, epoch = self.report.tolist()
        return Violation(step, (row, granule, found, expected, epoch))


class Shadows:
    """Walks expectations. Lives as long as the worker; keeps the handles that one program leaves for another."""

    def __init__(self, arenas: Arenas, plane: Plane) -> None:
        from workers.kernels.shadow import REPORT_WORDS, meet  # compiled code: only strict ownership needs it

        self._arenas, self._plane, self._meet = arenas, plane, meet
        self._slots = np.zeros(N_SLOTS, np.int64)
        self._report = np.zeros(REPORT_WORDS, np.int64)

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
        block = np.array(
            [self._meet.address(), kept.ctypes.data, self._slots.ctypes.data, self._report.ctypes.data, *starts],
            np.int64,
        )
        return Expectations(kept, block, int(block.ctypes.data), self._report)

    def check(self, expectations: Expectations, group: int, step: int) -> None:
        """Meet the expectations of a group. Raises Violation."""
        if self._meet(expectations.address, group, group + 1, step):
            raise expectations.violation(step)
