"""A worker process: started as a command, told its configuration on stdin, watched and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from coordinator.config import WorkerSpec
from protocol.errors import WorkerError
from protocol.schema import to_plain

_GRACE_S = 0.5


class WorkerProcess:
    """Lives from `start` to `end`. Its stdin stays open: when it closes, the worker ends by itself."""

    def __init__(self, spec: WorkerSpec, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.spec, self.log, self.process = spec, log, process

    @classmethod
    def start(cls, spec: WorkerSpec, configuration: dict[str, object], directory: str) -> WorkerProcess:
        """Start `python -P -m workers`. Raises WorkerError when the system cannot."""
        log = Path(directory) / f"{spec.name}.log"
        try:
            with log.open("wb") as stderr:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "workers"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env=dict(os.environ),
                )
            assert process.stdin is not None
            process.stdin.write(json.dumps(to_plain(configuration)).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"{spec.name}: cannot start: {error.strerror}") from None
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
            return f"killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def last_words(self) -> str:
        """The last line that it wrote to stderr, "" for none."""
        try:
            lines = self.log.read_bytes()[-8192:].decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip()[:500] if lines else ""

    def cpu_seconds(self) -> float:
        """Processor time used so far; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return 0.0

    def end(self, *, gently: bool) -> None:
        """Make sure that it is gone; gently: after a moment to end by itself."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):  # it is gone already, with the line that it never read
                self.process.stdin.close()
        deadline = time.monotonic() + (_GRACE_S if gently else 0.0)
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
