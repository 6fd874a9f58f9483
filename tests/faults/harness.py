"""Runs the real command in a session and a temporary directory of its own, and looks for what it left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.patience import LATE_S

COMMAND = str(Path(sys.executable).with_name("crossdock"))
GONE_S = 60.0  # what is still there then stays; on a free machine it goes within milliseconds


@dataclass(frozen=True)
class Result:
    """How a command ended. `leftovers`: processes and files that outlived it."""

    status: int
    stdout: bytes
    stderr: str
    leftovers: list[str]

    @property
    def lines(self) -> list[str]:
        return self.stderr.splitlines()

    def check(self, status: int, *words: str) -> str:
        """One line on stderr, with all the words and the documented status, and nothing left. Returns the line."""
        assert "Traceback" not in self.stderr, self.stderr
        assert len(self.lines) == 1, self.stderr
        line = self.lines[0]
        assert line.startswith("crossdock: "), line
        assert line.endswith(f"   [exit {status}]"), line
        assert self.status == status, (self.status, line)
        for word in words:
            assert word in line, (word, line)
        assert self.leftovers == []
        return line


class Job:
    """A running command. `finish` must be called; it kills what is left."""

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        env: Mapping[str, str] = {},
        command: Sequence[str] = (COMMAND,),
        stdout: int | None = None,
    ) -> None:
        # not pytest's directory: its name may be too long for a socket
        self.tmp = tempfile.mkdtemp(prefix="xd-", dir="/tmp")
        variables = {k: v for k, v in os.environ.items() if k not in ("XDG_RUNTIME_DIR", "CROSSDOCK_DISABLE")}
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=self.out if stdout is None else stdout,
            stderr=self.err,
            env={**variables, "TMPDIR": self.tmp, **env},
            start_new_session=True,
        )

        UNFINISHED.add(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> dict[str, int]:
        """Process ids of the workers that have been started, by name."""
        found = {}
        for pid in members(self.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"workers" in words and len(words) >= 6:
                found[words[5].decode()] = pid
        return found

    def stdout(self) -> bytes:
        """What it has printed so far."""
        return os.pread(self.out.fileno(), 1 << 20, 0)

    def stderr(self) -> str:
        """What it has told so far."""
        return os.pread(self.err.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def wait_until(self, condition: Callable[[], object]) -> bool:
        """Poll tightly; False when the command ended first."""
        deadline = time.monotonic() + LATE_S
        while not condition():
            if self.process.poll() is not None:
                return bool(condition())
            assert time.monotonic() < deadline, (self.stderr(), self.stdout())
            time.sleep(0.001)
        return True

    def finish(self, patience_s: float = LATE_S, *, may_stay: str = "") -> Result:
        """Wait for its end, then for its processes and files to be gone, but those with `may_stay` in their names."""
        UNFINISHED.discard(self)
        try:
            self.process.wait(patience_s)
            left = self._outliving(may_stay)
            return Result(self.process.returncode, self.stdout(), self.stderr(), left)
        finally:
            for pid in members(self.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait(LATE_S)
            self.out.close()
            self.err.close()
            shutil.rmtree(self.tmp, ignore_errors=True)

    def _outliving(self, may_stay: str) -> list[str]:
        """What is left when its processes have had their time. Our own may be taken away in the middle of a look: only
        one that began when time was up says that something has stayed."""
        deadline = time.monotonic() + GONE_S
        while True:
            late = time.monotonic() > deadline
            left = self.leftovers(may_stay)
            if late or not left:
                return left
            time.sleep(0.005)

    def leftovers(self, may_stay: str = "") -> list[str]:
        """Processes of the session (its leader aside) and files under the temporary directory.

        Processes first: a file that is there when the last of them is gone will never be removed, but one that was
        there before may have been what the last process was removing.
        """
        processes = [f"process {pid}" for pid in members(self.pid) if pid != self.pid]
        tree = os.walk(self.tmp)  # it does not mind what vanishes meanwhile
        paths = [f"{folder}/{name}" for folder, folders, files in tree for name in (*folders, *files)]
        return processes + [path for path in paths if not (may_stay and may_stay in path)]


UNFINISHED: set[Job] = set()


def end_unfinished() -> None:
    """After a test that failed half-way."""
    for job in list(UNFINISHED):
        job.process.kill()
        job.finish()


def members(session: int) -> list[int]:
    """Processes of a session that still live."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = stat(int(entry))
            if fields and int(fields[3]) == session and fields[0] not in ("Z", "X"):
                found.append(int(entry))
    return found


def stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on, empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def run(arguments: Sequence[object], patience_s: float = LATE_S, **options: object) -> Result:
    """The whole life of a command."""
    return Job(arguments, **options).finish(patience_s)  # type: ignore[arg-type]


def catches_signals(job: Job) -> bool:
    """Its own signal handlers are in place: from here on an interrupt is its own affair."""
    try:
        status = Path(f"/proc/{job.pid}/status").read_text()
    except OSError:
        return False
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)
