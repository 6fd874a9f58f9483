"""Words of shared memory that one process changes and another sleeps on."""

from __future__ import annotations

import os
from _thread import allocate_lock
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from protocol.futex import Futex

_LEAST, _MOST, _YIELD = 20, 5000, 20
_SHORT_NS, _VAIN, _BUSY = 300_000, 100, 1000


class Patience:
    """How often a waiter polls before it sleeps, learnt as in workers' compiled code (workers/kernels/team.py says why
    each number is what it is; a poll takes twice as long here)."""

    __slots__ = ("_sleeps", "polls")

    def __init__(self) -> None:
        self.polls = _LEAST
        self._sleeps = 0

    def helped(self, n: int) -> None:
        """The value changed before poll number `n`."""
        self.polls = max(min(2 * n, _MOST), self.polls - self.polls // 16, _LEAST)

    def slept(self, ns: int) -> None:
        """Polling was not enough, and so long a sleep followed."""
        if ns >= _SHORT_NS or self._sleeps:
            self.polls, self._sleeps = max(self.polls // 2, _LEAST), max(self._sleeps - 1, 0)
        elif self.polls < _MOST:
            self.polls = min(4 * self.polls, _MOST)
        else:
            self.give_up(_VAIN)

    def give_up(self, sleeps: int) -> None:
        """Whoever is to ring has likely no processor because of us, or somebody else has ours: sleep that often."""
        self.polls, self._sleeps = _LEAST, sleeps


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
        cells = self.cells
        for n in range(patience.polls):
            if cells[word] != seen:
                patience.helped(n)
                return True
            if n >= _LEAST and n % _YIELD == 0:
                since = perf_counter_ns()
                os.sched_yield()  # Linux has it, and only there is a futex
                if perf_counter_ns() - since >= _SHORT_NS:
                    patience.give_up(_BUSY)
                    break
        since = perf_counter_ns()
        cells[word + 1] = 1
        self._futex.wait(self._address + 4 * word, seen, timeout_s)
        cells[word + 1] = 0
        patience.slept(perf_counter_ns() - since)
        return cells[word] != seen
