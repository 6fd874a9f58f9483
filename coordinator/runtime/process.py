"""A worker process: started as a command, told its configuration on stdin, watched and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from coordinator.config import WorkerSpec
from protocol.errors import WorkerError
from protocol.schema import to_plain

_LAST_WORDS_NBYTES = 8192
_HINTS = {
    "SIGKILL": " (not by crossdock: out of memory?)",
    "SIGBUS": " (did the model file change, or is shared memory full?)",
}


@dataclass(frozen=True, slots=True)
class Vitals:
    """A look at a process: the system's letter for its state ("" unknown) and processor time in seconds."""

    state: str
    cpu_s: float

    @property
    def stopped(self) -> bool:
        """Somebody halted it: SIGSTOP, or a debugger."""
        return self.state[:1] in ("T", "t")

    @property
    def in_system(self) -> bool:
        """It waits for a disk."""
        return self.state[:1] == "D"


class WorkerProcess:
    """Lives from `start` to `end`. Its stdin stays open: when it closes, the worker ends by itself.

    A process group of its own keeps Ctrl-C away from it: the coordinator ends it, in order.
    """

    def __init__(self, spec: WorkerSpec, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.spec, self.log, self.process = spec, log, process

    @classmethod
    def start(cls, spec: WorkerSpec, configuration: dict[str, object], directory: str) -> WorkerProcess:
        """Start `python -P -m workers DIRECTORY NAME`. Raises WorkerError when the system cannot.

        The arguments are for people who look at the list of processes, and for a worker whose coordinator dies
        before it could say more.
        """
        log = Path(directory) / f"{spec.name}.log"
        command = [sys.executable, "-P", "-m", "workers", directory, spec.name]
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=output, process_group=0
                )
        except OSError as error:
            raise WorkerError(f"{spec.name}: cannot start {sys.executable}: {error.strerror}") from None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended at once: `died` will say how
            process.stdin.write(json.dumps(to_plain(configuration)).encode() + b"\n")
            process.stdin.flush()
        return cls(spec, log, process)

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def died(self) -> str | None:
        """None while it runs; else how it ended."""
        status = self.process.poll()
        if status is None:
            return None
        if status < 0:
            name = _signal_name(-status)
            return f"was killed by {name}{_HINTS.get(name, '')}"
        return f"ended with status {status}"

    def wait(self, timeout_s: float) -> None:
        """Give it that long to end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)

    def last_words(self) -> str:
        """The last line that it wrote, "" for none."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _LAST_WORDS_NBYTES))
                lines = log.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        if not lines:
            return ""
        # other people's control characters stay off the terminal
        return "".join(c if c.isprintable() else " " for c in lines[-1]).strip()[:500]

    def vitals(self) -> Vitals:
        """What the system says about it; where there is no /proc, `ps` is asked."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return Vitals(fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
        except (OSError, IndexError, ValueError):
            return _ask_ps(self.pid)

    def hang_up(self) -> None:
        """Close its stdin: it will end by itself."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):  # it is gone already, with the line that it never read
                self.process.stdin.close()

    def kill(self) -> None:
        """End it now. `reap` must follow."""
        self.process.kill()

    def reap(self) -> None:
        """Wait until the system has forgotten it."""
        self.process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names of their own
        return f"signal {number}"


def _ask_ps(pid: int) -> Vitals:
    try:
        command = ["ps", "-o", "state=,time=", "-p", str(pid)]
        state, time = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.split()
        seconds = 0.0
        for part in time.replace("-", ":").split(":"):
            seconds = seconds * 60 + float(part)
        return Vitals(state, seconds)
    except (OSError, ValueError, subprocess.SubprocessError):
        return Vitals("", 0.0)
