"""Words of shared memory that one process changes and another sleeps on."""

from __future__ import annotations

import os
from _thread import allocate_lock
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from protocol.futex import Futex

_POLLS = 20
_LEAST_NS, _FIRST_NS, _MOST_NS, _SLICE_NS = 1_000, 64_000, 300_000, 300_000
_LEAST_SLEEPS, _MOST_SLEEPS = 8, 4096


class Patience:
    """How long a waiter polls before it sleeps, learnt as in workers' compiled code (workers/kernels/team.py says why
    each number is what it is; a poll takes longer here)."""

    __slots__ = ("_penalty", "_sleeps", "ns")

    def __init__(self) -> None:
        self.ns = _FIRST_NS
        self._sleeps = self._penalty = 0

    @property
    def may_poll(self) -> bool:
        """False for one who had better sleep at once."""
        return not self._sleeps

    def early(self) -> None:
        """The value changed before the first yield."""
        self.ns = max(self.ns - self.ns // 16, _LEAST_NS)

    def helped(self, ns: int) -> None:
        """The value changed within so many nanoseconds of polling and yielding."""
        self.ns = max(min(2 * ns, _MOST_NS), self.ns - self.ns // 16, _LEAST_NS)
        self._penalty = max(self._penalty - 1, 0)

    def lost(self) -> None:
        """A yield took so long that somebody else must have had the processor, or the machine stood still."""
        self._sleeps = self._penalty = min(max(4 * self._penalty, _LEAST_SLEEPS), _MOST_SLEEPS)

    def slept(self, ns: int) -> None:
        """Polling was not enough, and so long a sleep followed."""
        if self._sleeps:
            self._sleeps -= 1
        elif self.ns + ns >= _MOST_NS:
            self.ns = max(self.ns // 2, _LEAST_NS)
        else:
            self.ns = min(4 * self.ns, _MOST_NS)


class Doorbells:
    """Doorbells among 32-bit words that processes share; needs the feature `futex` (x86-64 Linux).

    A doorbell is two words: a value that only its ringer changes, and behind it whether its one waiter sleeps. The
    ringer makes a system call only for a sleeper.
    """

    def __init__(self, words: npt.NDArray[np.uint32]) -> None:
        self.cells = words.data
        self._address = int(words.ctypes.data)
        self._futex = Futex()

    def ring(self, word: int, value: int) -> None:
        """Store, and wake who sleeps on it."""
        cells = self.cells
        cells[word] = value
        # The value must be stored before the flag is loaded, or both sides could miss each other. x86-64 orders that
        # only around a locked instruction, and taking a lock, that nobody else has, is one.
        allocate_lock().acquire()
        if cells[word + 1]:
            self._futex.wake(self._address + 4 * word)

    def wait(self, word: int, seen: int, patience: Patience, timeout_s: float) -> bool:
        """Until the value is not `seen` any more, at most about that long; False when it still is.

        A signal may end it early. It polls for a while before it sleeps.
        """
        if self._polled(word, seen, patience):
            return True
        cells = self.cells
        since = perf_counter_ns()
        cells[word + 1] = 1
        self._futex.wait(self._address + 4 * word, seen, timeout_s)
        cells[word + 1] = 0
        patience.slept(perf_counter_ns() - since)
        return cells[word] != seen

    def _polled(self, word: int, seen: int, patience: Patience) -> bool:
        """Poll for a while; whether the value changed."""
        cells = self.cells
        for _ in range(_POLLS):
            if cells[word] != seen:
                patience.early()
                return True
        since = now = perf_counter_ns()
        while patience.may_poll and now - since < patience.ns:
            os.sched_yield()  # Linux has it, and only there is a futex
            before, now = now, perf_counter_ns()
            if now - before >= _SLICE_NS:
                patience.lost()
                break
            for _ in range(_POLLS):
                if cells[word] != seen:
                    patience.helped(now - since)
                    return True
        return bool(cells[word] != seen)
