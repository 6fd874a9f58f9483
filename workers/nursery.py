"""`python -P -m workers.nursery`: loads everything that workers need once, then becomes them by forking, and ends.

A worker is born in milliseconds and shares the memory of what was loaded. There is no ZeroMQ context and no thread
before the fork. The orphans become children of the coordinator, which asked the system for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from protocol.errors import Exit
from protocol.rundir import remove_run_directory
from protocol.schema import from_plain
from workers import cli
from workers.config import Birth, Births
from workers.prepare import load_kernels

_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_ARGUMENTS = 45, 46  # fields of /proc/self/stat from the state on: where the command line starts and ends


def main() -> None:
    """Bear the workers that stdin tells of; arguments: the run's directory, and their names."""
    directory = sys.argv[1]
    line = sys.stdin.buffer.readline()
    if not line:  # the coordinator died before it could say anything
        remove_run_directory(directory)
        os._exit(Exit.WORKER)
    births = from_plain(Births, json.loads(line), "births")
    _end_with(births.parent, directory)
    if births.arithmetic:
        load_kernels(births.arithmetic, lambda: _report(births.report, "compiling", directory))
    import workers.loop  # noqa: F401  (what all kinds of workers need)

    gc.collect()
    gc.freeze()  # the collector would write to pages that are shared
    for birth in births.workers:
        if os.fork() == 0:
            _live(birth, births, directory)
    os._exit(Exit.OK)


def _end_with(parent: int, directory: str) -> None:
    """End at once when the coordinator does, whatever killed it."""

    def end(*_: object) -> None:
        if os.getppid() != parent:
            _end(directory)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(signal.SIGTERM), 0, 0, 0)
    end()  # it may be too late for the signal


def _end(directory: str) -> NoReturn:
    """The coordinator is gone: remove what it left, and end with everything that was started here."""
    remove_run_directory(directory)
    os.killpg(0, signal.SIGKILL)
    os._exit(Exit.INTERNAL)


def _report(fd: int, line: str, directory: str) -> None:
    try:
        os.write(fd, f"{line}\n".encode())
    except OSError:  # nobody reads any more
        _end(directory)


def _live(birth: Birth, births: Births, directory: str) -> NoReturn:
    """Become a worker like one that was started as a command."""
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the coordinator is gone: as a worker we shall see that, and clean up
            os.write(births.report, f"born {birth.name} {os.getpid()}\n".encode())
        for source, target in ((birth.stdin, 0), (birth.log, 1), (birth.log, 2)):
            os.dup2(source, target)
        for fd in {births.report, *(fd for b in births.workers for fd in (b.stdin, b.log))}:
            os.close(fd)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  (lives as long as the process)
        _rename([sys.executable, "-P", "-m", "workers", directory, birth.name])
        cli.main()
    finally:
        os._exit(Exit.INTERNAL)


def _rename(command: list[str]) -> None:
    """Put another command line in the place of ours, for people who look at the list of processes."""
    text = b"\0".join(os.fsencode(word) for word in command) + b"\0"
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = (int(fields[i]) for i in _ARGUMENTS)
        if 0 < len(text) <= end - start:
            ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main()
