"""A worker's life: read the configuration, watch the coordinator, serve until told to end."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from pathlib import Path

import protocol
from protocol.errors import CrossdockError, Exit, ProtocolError
from protocol.rundir import remove_run_directory
from workers import config
from workers.loop import serve
from workers.prepare import load_kernels

_HANG_UP_MS = 50
_ENDING_MS = 60_000  # on a busy machine the last thread of a process that was killed may wait long for its end
_FLAGS, _EXITING = 6, 4  # of /proc/PID/stat from the state on: Linux's PF_EXITING among them


def main() -> None:
    """Serve one run. Exit status: 0, or that of the error, whose line goes to stderr.

    The coordinator gives the run's directory and the worker's name as arguments, the rest on stdin.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator ends us
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # sent to stopped workers when it dies: they have to clean up, too
    directory = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        status = _serve(directory)
    except CrossdockError as error:
        print(f"crossdock worker: {error}", file=sys.stderr, flush=True)
        status = error.exit
    except BaseException:
        traceback.print_exc()  # its last line becomes our last words
        status = Exit.INTERNAL
    if sys.stdout is not None:
        sys.stdout.flush()
    if status is not Exit.OK and _abandoned():
        remove_run_directory(directory)
    os._exit(status)


def _abandoned() -> bool:
    """True when the coordinator is gone, perhaps what made us fail: then the watch may not have come to its end.

    A process that is killed loses its files one by one, so we may have failed before the pipe closes.
    """
    ending = _is_ending(os.getppid())
    hang_up = select.poll()
    hang_up.register(0, 0)
    return bool(hang_up.poll(_ENDING_MS if ending else _HANG_UP_MS))


def _is_ending(pid: int) -> bool:
    """The process was killed, or ends by itself, and may still have files; False where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return bool(int(fields[_FLAGS]) & _EXITING)
    except (OSError, IndexError, ValueError):
        return False


def _serve(directory: str) -> Exit:
    line = config.read_line()
    if not line:  # the coordinator died before it could say anything
        remove_run_directory(directory)
        raise ProtocolError("the coordinator ended before it sent a configuration")
    settings = config.parse(line)
    _check_protocol()
    _watch_stdin(settings.run_directory)
    if settings.kind != "null" and "numba" not in sys.modules:
        load_kernels(settings.arithmetic)
    serve(settings)
    return Exit.OK


def _check_protocol() -> None:
    """PyPI has other packages called `protocol`: make sure that ours was imported."""
    if not hasattr(protocol, "CROSSDOCK"):
        raise CrossdockError(f"the package 'protocol' at {protocol.__file__} is not crossdock's")


def _watch_stdin(run_directory: str) -> None:
    """End at once when the coordinator does, whatever killed it: its end of the pipe closes then."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        remove_run_directory(run_directory)
        os._exit(Exit.WORKER)

    threading.Thread(target=watch, name="coordinator-watch", daemon=True).start()
