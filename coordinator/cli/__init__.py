"""The command line: parse, run a command, tell errors in one line."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point of `crossdock`; exits with a status of protocol.errors.Exit."""
    try:
        signal.signal(signal.SIGTERM, _terminate)
        status = _run(sys.argv[1:])
    except KeyboardInterrupt:
        _say("interrupted", 130)
        status = 130
    _leave(status)


def _run(arguments: list[str]) -> int:
    from coordinator.cli.parser import parse  # imports take long enough to be interrupted in
    from protocol.errors import CrossdockError, Exit

    try:
        command = parse(arguments)
        return int(command())
    except CrossdockError as error:
        _say(" ".join(str(error).split()), error.exit)
        return int(error.exit)
    except BrokenPipeError:
        return int(Exit.OK)
    except MemoryError:
        _say("this machine has not enough memory for that", Exit.CAPACITY)
        return int(Exit.CAPACITY)
    except Exception as error:
        if os.environ.get("CROSSDOCK_TRACEBACK"):
            raise
        _say(f"internal error: {type(error).__name__}: {error} (CROSSDOCK_TRACEBACK=1 shows where)", Exit.INTERNAL)
        return int(Exit.INTERNAL)


def _say(line: str, status: int) -> None:
    print(f"crossdock: {line}   [exit {int(status)}]", file=sys.stderr, flush=True)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _leave(status: int) -> None:
    """Exit now: everything is closed, and tearing down a large interpreter takes longer than the answer."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(status)
