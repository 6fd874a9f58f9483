"""Worker processes: started or born, told their configuration on stdin, watched and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coordinator.config import WorkerSpec
from coordinator.runtime.nursery import Born, Cradle, Nursery, environment, log_path
from protocol.errors import WorkerError
from protocol.features import has
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


class Handle(Protocol):
    """What a worker's process can be asked, whether it was started (`subprocess.Popen`) or born (`nursery.Born`)."""

    @property
    def pid(self) -> int:
        """Process id."""

    def poll(self) -> int | None:
        """Its status, None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Its status, once it has ended. Raises subprocess.TimeoutExpired."""

    def kill(self) -> None:
        """End it now."""


class WorkerProcess:
    """Lives from `start_workers` to `reap`. Its stdin stays open: when it closes, the worker ends by itself.

    A process group of its own keeps Ctrl-C away from it: the coordinator ends it, in order.
    """

    def __init__(self, spec: WorkerSpec, log: Path, process: Handle, stdin: int) -> None:
        self.spec, self.log, self.process, self._stdin = spec, log, process, stdin

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
        """The last line that it wrote, or else the nursery; "" for none."""
        return _last_line(self.log) or _last_line(log_path(str(self.log.parent)))

    def vitals(self) -> Vitals:
        """What the system says about it; where there is no /proc, `ps` is asked."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return Vitals(fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
        except (OSError, IndexError, ValueError):
            return _ask_ps(self.pid)

    def hang_up(self) -> None:
        """Close its stdin: it will end by itself."""
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    def kill(self) -> None:
        """End it now. `reap` must follow."""
        self.process.kill()

    def reap(self) -> None:
        """Wait until the system has forgotten it."""
        self.process.wait()


@dataclass(frozen=True, slots=True)
class Start:
    """A worker to start, and its configuration."""

    spec: WorkerSpec
    configuration: dict[str, object]


def start_workers(
    starts: Sequence[Start], directory: str, arithmetic: str, processes: list[WorkerProcess]
) -> Nursery | None:
    """Start workers and put them into `processes`, each as soon as there is one. Raises WorkerError.

    On Linux a nursery is started, which will bear them; elsewhere, or with `CROSSDOCK_DISABLE=fork`, each is started as
    `python -P -m workers DIRECTORY NAME`. The arguments are for people who look at the list of processes, and for a
    worker whose coordinator dies before it could say more.
    """
    prepared = [_prepare(start, directory) for start in starts]
    theirs = [fd for cradle, _ in prepared for fd in (cradle.stdin, cradle.log)]
    nursery = None
    try:
        if has("fork"):
            kernels = any(start.spec.kind != "null" for start in starts)
            nursery = Nursery.start(directory, [cradle for cradle, _ in prepared], arithmetic if kernels else "")
        for start, (cradle, stdin) in zip(starts, prepared, strict=True):
            process = _start(cradle, directory) if nursery is None else Born(nursery, cradle.name)
            processes.append(WorkerProcess(start.spec, _log(directory, cradle.name), process, stdin))
    finally:
        for fd in theirs:
            os.close(fd)
        for _, stdin in prepared[len(processes) :]:
            os.close(stdin)
    return nursery


def _log(directory: str, name: str) -> Path:
    return Path(directory) / f"{name}.log"


def _prepare(start: Start, directory: str) -> tuple[Cradle, int]:
    """The worker's ends of its stdin, the configuration waiting in it, and log; our end of its stdin."""
    try:
        log = os.open(_log(directory, start.spec.name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise WorkerError(f"{start.spec.name}: cannot write its log: {error.strerror}") from None
    theirs, ours = os.pipe()
    os.write(ours, json.dumps(to_plain(start.configuration)).encode() + b"\n")  # far less than a pipe holds
    return Cradle(start.spec.name, theirs, log), ours


def _start(cradle: Cradle, directory: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "workers", directory, cradle.name]
    try:
        return subprocess.Popen(
            command, stdin=cradle.stdin, stdout=cradle.log, stderr=cradle.log, process_group=0, env=environment()
        )
    except OSError as error:
        raise WorkerError(f"{cradle.name}: cannot start {sys.executable}: {error.strerror}") from None


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _LAST_WORDS_NBYTES))
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    if not lines:
        return ""
    # other people's control characters stay off the terminal
    return "".join(c if c.isprintable() else " " for c in lines[-1]).strip()[:500]


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
