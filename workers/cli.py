"""A worker's life: read the configuration, watch the coordinator, serve until told to end."""

from __future__ import annotations

import os
import signal
import sys
import threading

import protocol
from protocol.errors import CrossdockError, Exit
from protocol.sockets import remove_run_directory
from workers import config
from workers.loop import serve


def main() -> None:
    """Serve one run. Exit status: 0, or that of the error, whose line goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the coordinator ends us
    try:
        settings = config.parse(sys.stdin.buffer.readline().decode("utf-8", "replace"))
        _check_protocol()
        _watch_stdin(settings.run_directory)
        serve(settings)
    except CrossdockError as error:
        print(f"crossdock worker: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit)
    os._exit(Exit.OK)


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
