"""Words of shared memory that one process changes and another sleeps on."""

from __future__ import annotations

from _thread import allocate_lock

import numpy as np
import numpy.typing as npt

from protocol.futex import Futex


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

    def wait(self, word: int, seen: int, spins: int, timeout_s: float) -> bool:
        """Until the value is not `seen` any more, at most about that long; False when it still is.

        A signal may end it early. It spins a little before it sleeps.
        """
        cells = self.cells
        for _ in range(spins):
            if cells[word] != seen:
                return True
        cells[word + 1] = 1
        self._futex.wait(self._address + 4 * word, seen, timeout_s)
        cells[word + 1] = 0
        return cells[word] != seen
