"""The run's notice board: shared words on which workers publish and acknowledge transfers, and show progress."""

from __future__ import annotations

import time
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from protocol import sharedmem
from protocol.doorbell import Doorbells, Patience
from protocol.features import has
from protocol.limits import MAX_TRANSFERS, MAX_WORKERS

_LINE = 16  # words of 32 bits: one cache line
_PROGRESS = 0  # per worker one line: step, instruction, split, state
_TRANSFERS = MAX_WORKERS * _LINE  # per transfer two lines: published, acknowledged
_CLOCK, _CLOCK_SET = 4, 8  # in each of them: virtual time in two words, and the step that it is of
_WORDS = _TRANSFERS + 2 * MAX_TRANSFERS * _LINE
NBYTES = _WORDS * 4

_SPINS = 200
_NAP_S = 0.05


class State(IntEnum):
    """What a worker is at."""

    IDLE = 0  # no step: it waits for the coordinator, or answers another request
    BUSY = 1  # in an instruction that needs nobody else
    WAITING = 2  # for a peer


class Progress(NamedTuple):
    """Where a worker was when it last said so."""

    step: int
    instruction: int
    split: int
    state: State


class Board:
    """Lives as long as the run. A word holds the number of the last step for which its event happened.

    Waiting polls for a while, then sleeps on a futex; without one it polls briefly, then takes short naps. It has no
    time limit: a worker whose peer dies is ended by the coordinator, and one whose coordinator dies by its own watch on
    stdin.
    """

    def __init__(self, segment: sharedmem.Segment) -> None:
        self.segment = segment
        self._words = segment.view[:NBYTES].view(np.uint32)
        self._cells = self._words.data
        self._address = int(self._words.ctypes.data)
        self._bells = Doorbells(self._words) if has("futex") else None
        self._patience = Patience()

    @classmethod
    def create(cls, directory: str) -> Board:
        """A new board, all zero."""
        return cls(sharedmem.create(NBYTES, directory, "board"))

    @classmethod
    def attach(cls, path: str) -> Board:
        """The board of a run that another process started."""
        return cls(sharedmem.attach(path, NBYTES, writable=True))

    def show(self, worker: int, step: int, instruction: int, split: int, state: State = State.BUSY) -> None:
        """Worker `worker` says where it is."""
        cells, base = self._cells, _PROGRESS + worker * _LINE
        cells[base], cells[base + 1], cells[base + 2] = step & 0xFFFFFFFF, instruction, split
        cells[base + 3] = state

    def rest(self, worker: int) -> None:
        """Worker `worker` says that it is through with its step."""
        self._cells[_PROGRESS + worker * _LINE + 3] = State.IDLE

    def progress(self, worker: int) -> Progress:
        """What the worker showed last; a worker may write anything here, so it is only shown to people."""
        cells, base = self._cells, _PROGRESS + worker * _LINE
        state = State(cells[base + 3]) if cells[base + 3] in (1, 2) else State.IDLE
        return Progress(cells[base], cells[base + 1], cells[base + 2], state)

    def line(self, worker: int) -> int:
        """Address, in this process, of a worker's progress: step, instruction, split and state, 32 bits each."""
        return self._at(_PROGRESS + worker * _LINE)

    def published(self, transfer: int) -> int:
        """Address of the doorbell (see Doorbells) that `publish` rings."""
        return self._at(_TRANSFERS + 2 * transfer * _LINE)

    def acknowledged(self, transfer: int) -> int:
        """Address of the doorbell that `acknowledge` rings."""
        return self._at(_TRANSFERS + (2 * transfer + 1) * _LINE)

    def _at(self, word: int) -> int:
        return self._address + 4 * word

    def publish(self, transfer: int, step: int) -> None:
        """The source's bytes are ready for `step`."""
        self._post(_TRANSFERS + 2 * transfer * _LINE, step)

    def acknowledge(self, transfer: int, step: int) -> None:
        """The receiver has its copy: the source may be overwritten."""
        self._post(_TRANSFERS + (2 * transfer + 1) * _LINE, step)

    def wait_published(self, transfer: int, step: int) -> None:
        """Block until `publish(transfer, step)`."""
        self._wait(_TRANSFERS + 2 * transfer * _LINE, step)

    def wait_acknowledged(self, transfer: int, step: int) -> None:
        """Block until `acknowledge(transfer, step)`."""
        self._wait(_TRANSFERS + (2 * transfer + 1) * _LINE, step)

    def stamp_sent(self, transfer: int, clock_ps: int) -> None:
        """The sender's virtual time, before it publishes."""
        self._write_clock(_TRANSFERS + 2 * transfer * _LINE, clock_ps)

    def sent_clock(self, transfer: int) -> int:
        """The sender's virtual time (ps) when it published what the receiver has."""
        return self._read_clock(_TRANSFERS + 2 * transfer * _LINE)

    def stamp_left(self, transfer: int, step: int, clock_ps: int) -> None:
        """The receiver knows at which virtual time the last byte left the sender."""
        line = _TRANSFERS + (2 * transfer + 1) * _LINE
        self._write_clock(line, clock_ps)
        self._post(line + _CLOCK_SET, step)

    def left_clock(self, transfer: int, step: int) -> int:
        """Block until `stamp_left(transfer, step, ...)`; the virtual time in ps."""
        line = _TRANSFERS + (2 * transfer + 1) * _LINE
        self._wait(line + _CLOCK_SET, step)
        return self._read_clock(line)

    def _write_clock(self, line: int, clock_ps: int) -> None:
        cells = self._cells
        cells[line + _CLOCK], cells[line + _CLOCK + 1] = clock_ps & 0xFFFFFFFF, clock_ps >> 32 & 0xFFFFFFFF

    def _read_clock(self, line: int) -> int:
        cells = self._cells
        return int(cells[line + _CLOCK]) | int(cells[line + _CLOCK + 1]) << 32

    def _post(self, word: int, step: int) -> None:
        if self._bells is not None:
            self._bells.ring(word, step & 0xFFFFFFFF)
        else:
            self._cells[word] = step & 0xFFFFFFFF

    def _wait(self, word: int, step: int) -> None:
        cells, want = self._cells, step & 0xFFFFFFFF
        for _ in range(_SPINS if self._bells is None else 0):
            if cells[word] == want:
                return
        nap = 20e-6
        while (seen := cells[word]) != want:
            if self._bells is not None:
                self._bells.wait(word, seen, self._patience, _NAP_S)
            else:
                time.sleep(nap)
                nap = min(nap * 1.5, 1e-3)
