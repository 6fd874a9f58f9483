"""Does anybody still get on? Tells a long computation from a run that hangs."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from coordinator.runtime.process import WorkerProcess
from protocol.board import Board, State

_LOOK_S = 0.25
_BUSY_SHARE = 0.005  # of a processor: a process that only sleeps stays below
_ABSENT_S = 1.0  # who asks every few milliseconds and finds that more has passed was halted itself


class Watch:
    """Looks at the workers while their answers are awaited.

    They get on while anything on the board changes, or while one that waits for no peer computes or reads a disk. Time
    in which this process was halted does not count: whoever halted it may have halted them as well.
    """

    def __init__(self, board: Board, processes: Sequence[WorkerProcess], awaited: Collection[int]) -> None:
        self.board, self.processes = board, processes
        self.awaited = [i for i in awaited if i < len(processes)]
        self._since = self._looked = self._asked = time.monotonic()
        self._progress = [board.progress(i) for i in range(len(processes))]
        self._cpu_s: float | None = None

    def idle_s(self) -> float:
        """Seconds since the last sign of progress; to be asked again and again."""
        now = time.monotonic()
        self._since += max(0.0, now - self._asked - _ABSENT_S)
        self._asked = now
        if now - self._looked >= _LOOK_S:
            self._looked = now
            if self._got_on(now - self._since):
                self._since = now
        return now - self._since

    def _got_on(self, elapsed_s: float) -> bool:
        progress = [self.board.progress(i) for i in range(len(self.processes))]
        acting = [self.processes[i].vitals() for i in self.awaited if self.board.progress(i).state is not State.WAITING]
        cpu_s = sum(vitals.cpu_s for vitals in acting)
        before = self._cpu_s
        changed = progress != self._progress or before is None
        busy = before is not None and cpu_s - before > _BUSY_SHARE * elapsed_s
        if changed or busy or any(vitals.in_system for vitals in acting):
            self._progress, self._cpu_s = progress, cpu_s
            return True
        return False

    def whereabouts(self) -> str:
        """Which worker is where: `accel0 (stopped) in split 1, cpu0 waits for a peer in split 2`."""
        return ", ".join(self._where(i) for i in self.awaited)

    def _where(self, index: int) -> str:
        process, progress = self.processes[index], self.board.progress(index)
        name = process.spec.name + (" (stopped)" if process.vitals().stopped else "")
        if progress.state is State.WAITING:
            return f"{name} waits for a peer in split {progress.split}"
        return f"{name} in split {progress.split}" if progress.state is State.BUSY else f"{name} in no split"
