"""The process that workers are born of, from the coordinator's side: Linux only, `process.py` starts them elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import WorkerError

_SET_SUBREAPER, _GET_SUBREAPER = 36, 37  # prctl's PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER
_NAP_S = 0.001
_LAST_S = 1.0  # for those who were just being born when it ended


class _Adoption:
    """Whether orphans among our descendants become our children: while any nursery of this process bears workers."""

    def __init__(self) -> None:
        self._lock, self._n, self._was = threading.Lock(), 0, 0

    def begin(self) -> bool:
        """From now on; False where the system cannot do it."""
        was, libc = ctypes.c_int(0), ctypes.CDLL(None)
        with self._lock:
            if self._n == 0:
                if libc.prctl(_GET_SUBREAPER, ctypes.byref(was), 0, 0, 0) or libc.prctl(_SET_SUBREAPER, 1, 0, 0, 0):
                    return False
                self._was = was.value
            self._n += 1
        return True

    def end(self) -> None:
        """One nursery less; after the last one everything is as it was."""
        with self._lock:
            self._n -= 1
            if self._n == 0:
                ctypes.CDLL(None).prctl(_SET_SUBREAPER, self._was, 0, 0, 0)


_ADOPTION = _Adoption()


@dataclass(frozen=True, slots=True)
class Cradle:
    """A worker to be born: descriptors of its stdin and of its log, ours until it is born."""

    name: str
    stdin: int
    log: int


class Nursery:
    """Lives from its start until it has borne all workers; they are our children from then on.

    It loads libraries and kernels once. Workers share that memory and are ready in milliseconds.
    """

    def __init__(self, process: subprocess.Popen[bytes], report: int, names: Sequence[str]) -> None:
        self.process, self._report, self._names, self._adopts = process, report, tuple(names), True
        self.pids: dict[str, int] = {}
        self.n_reports = 0
        self.compiling = False
        self._heard = b""

    @classmethod
    def start(cls, directory: str, cradles: Sequence[Cradle], arithmetic: str) -> Nursery | None:
        """Start it; None where the system would not make its orphans our children. Raises WorkerError."""
        if not _ADOPTION.begin():
            return None
        names = [cradle.name for cradle in cradles]
        command = [sys.executable, "-P", "-m", "workers.nursery", directory, ",".join(names)]
        report, theirs = os.pipe()
        told = [{"name": c.name, "stdin": c.stdin, "log": c.log} for c in cradles]
        line = json.dumps({"parent": os.getpid(), "report": theirs, "arithmetic": arithmetic, "workers": told})
        try:
            with log_path(directory).open("wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment(),
                    pass_fds=[theirs, *(fd for c in cradles for fd in (c.stdin, c.log))],
                    process_group=0,
                )
        except OSError as error:
            os.close(report)
            _ADOPTION.end()
            raise WorkerError(f"cannot start {sys.executable}: {error.strerror}") from None
        finally:
            os.close(theirs)
        os.set_blocking(report, False)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended at once: `poll` will say how
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            process.stdin.close()
        return cls(process, report, names)

    @property
    def silent(self) -> bool:
        """True when nobody will report any more: neither the nursery nor a worker that is just being born."""
        return self._report < 0

    def listen(self) -> None:
        """Take in what it has reported; each report counts as progress. When all are born, it is let go of."""
        while self._report >= 0:
            try:
                data = os.read(self._report, 4096)
            except BlockingIOError:
                break
            if not data:
                os.close(self._report)
                self._report = -1
                break
            *lines, self._heard = (self._heard + data).split(b"\n")
            self.n_reports += len(lines)
            for line in lines:
                self._note(line.decode("utf-8", "replace").split())
        if self.process.poll() is not None and self._adopts and len(self.pids) == len(self._names):
            self._let_go()

    def _note(self, words: list[str]) -> None:
        self.compiling = words == ["compiling"]
        if len(words) == 3 and words[0] == "born" and words[1] in self._names and words[2].isdigit():
            self.pids[words[1]] = int(words[2])

    def _let_go(self) -> None:
        self._adopts = False
        _ADOPTION.end()

    def end(self) -> None:
        """End it now, with what it has started; afterwards `pids` are those of all workers that were born."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        deadline = time.monotonic() + _LAST_S
        while self._report >= 0 and time.monotonic() < deadline:
            self.listen()
            if self._report >= 0:
                select.select([self._report], [], [], 0.01)
        if self._report >= 0:
            os.close(self._report)
            self._report = -1
        if self._adopts:
            self._let_go()


class Born:
    """A worker of the nursery, with the methods of a `subprocess.Popen` that `WorkerProcess` needs."""

    def __init__(self, nursery: Nursery, name: str) -> None:
        self.nursery, self.name = nursery, name
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        """Process id; before it is born, that of the nursery."""
        self.nursery.listen()
        return self.nursery.pids.get(self.name, self.nursery.process.pid)

    def poll(self) -> int | None:
        """None while it lives, or may still be born; else its status, negative for a signal."""
        if self.returncode is None:
            ended = self.nursery.process.poll()
            self.nursery.listen()
            pid = self.nursery.pids.get(self.name)
            if pid is not None:
                self.returncode = _status(pid, adopted=ended is not None)
            elif ended is not None and self.nursery.silent:
                self.returncode = ended or 1
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its status, once it has ended. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self.name, timeout or 0.0)
            time.sleep(_NAP_S)
        return status

    def kill(self) -> None:
        """End it now."""
        if self.poll() is None and self.name in self.nursery.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.nursery.pids[self.name], signal.SIGKILL)


def log_path(directory: str) -> Path:
    """What the nursery itself writes."""
    return Path(directory) / "nursery.log"


def environment() -> dict[str, str]:
    """For workers: no threads for numpy's linear algebra, which they never call."""
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1"}


def _status(pid: int, *, adopted: bool) -> int | None:
    """How a process ended, None while it runs; until the nursery has ended its children are not ours to ask for."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 1 if adopted and not _exists(pid) else None
    return os.waitstatus_to_exitcode(status) if found else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
