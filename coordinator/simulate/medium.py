"""One shared medium: max-min fair shares among any number of transfers, each change in the time of a heap's."""

from __future__ import annotations

import heapq
from typing import Any, Protocol


class Carried(Protocol):
    """What a medium asks of a transfer: its size, its own limit in bytes/s, and a number that orders equals."""

    serial: int
    nbytes: int
    cap: float


class _Group:
    """Transfers with the same limit get the same rate: `done` bytes each since the group began, ends in a heap."""

    __slots__ = ("done", "ends", "rate")

    def __init__(self) -> None:
        self.done = self.rate = 0.0
        self.ends: list[tuple[float, int, Any]] = []


class Medium:
    """The transfers on a medium of `capacity` bytes/s whose routes use no other medium.

    Nothing is stored per transfer but where its group's progress ends it, so that a change costs no more than the
    groups there are.
    """

    __slots__ = ("capacity", "groups", "last", "marks", "n")

    def __init__(self, capacity: float) -> None:
        self.capacity, self.last, self.n = capacity, 0.0, 0
        self.groups: dict[float, _Group] = {}
        self.marks: dict[int, float] = {}

    def add(self, flow: Carried, now: float) -> None:
        """A transfer starts."""
        self._advance(now)
        group = self.groups.setdefault(flow.cap, _Group())
        heapq.heappush(group.ends, (group.done + flow.nbytes, flow.serial, flow))
        self.marks[flow.serial] = group.done
        self.n += 1
        self._share()

    def remove(self, flow: Carried, now: float) -> float:
        """The transfer that ends first has ended; returns the bytes that it has moved."""
        self._advance(now)
        group = self.groups[flow.cap]
        _, serial, _ = heapq.heappop(group.ends)
        assert serial == flow.serial, "not the one that ends first"
        moved = group.done - self.marks.pop(serial)
        if not group.ends:
            del self.groups[flow.cap]
        self.n -= 1
        self._share()
        return moved

    def first(self) -> tuple[float, Any] | None:
        """When the next transfer ends if nothing changes, and which; None when there is none."""
        best: tuple[float, int, Any] | None = None
        for group in self.groups.values():
            end, serial, flow = group.ends[0]
            time = self.last + max(0.0, end - group.done) / group.rate
            if best is None or (time, serial) < best[:2]:
                best = time, serial, flow
        return None if best is None else (best[0], best[2])

    def used(self) -> float:
        """Bytes/s of all transfers."""
        return sum(group.rate * len(group.ends) for group in self.groups.values())

    def _advance(self, now: float) -> None:
        for group in self.groups.values():
            group.done += group.rate * (now - self.last)
        self.last = now

    def _share(self) -> None:
        """Those with the lowest limits first: what they cannot use is left to the others."""
        left, users = self.capacity, self.n
        for cap in sorted(self.groups):
            group = self.groups[cap]
            group.rate = min(cap, left / users)
            left -= group.rate * len(group.ends)
            users -= len(group.ends)
