"""Bytes of a region and a number for each: who wrote them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

Run = tuple[int, int, int]
"""Bytes [start, end) and a number; NOBODY where nothing was written."""

NOBODY = -1


class Runs:
    """Disjoint runs sorted by start. Writing replaces what was there."""

    __slots__ = ("_ends", "_starts", "_who")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._who: list[int] = []

    def write(self, start: int, end: int, who: int) -> None:
        """Bytes [start, end) belong to `who` now."""
        if start >= end:
            return
        i, j = bisect_right(self._ends, start), bisect_left(self._starts, end)
        new = [(start, end, who)]
        if i < j:
            if self._starts[i] < start:
                new.insert(0, (self._starts[i], start, self._who[i]))
            if self._ends[j - 1] > end:
                new.append((end, self._ends[j - 1], self._who[j - 1]))
        self._starts[i:j] = [a for a, _, _ in new]
        self._ends[i:j] = [b for _, b, _ in new]
        self._who[i:j] = [w for _, _, w in new]

    def read(self, start: int, end: int) -> list[Run]:
        """The runs that cover [start, end), neighbours of one writer joined, gaps as NOBODY's."""
        out: list[Run] = []
        at = start
        for k in range(bisect_right(self._ends, start), bisect_left(self._starts, end)):
            a, b = max(self._starts[k], start), min(self._ends[k], end)
            if a > at:
                out.append((at, a, NOBODY))
            if out and out[-1][1] == a and out[-1][2] == self._who[k]:
                out[-1] = (out[-1][0], b, out[-1][2])
            else:
                out.append((a, b, self._who[k]))
            at = b
        if at < end:
            out.append((at, end, NOBODY))
        return out

    def copy(self) -> Runs:
        """The same runs, to be changed on their own."""
        other = Runs()
        other._starts, other._ends, other._who = self._starts[:], self._ends[:], self._who[:]
        return other
