"""The command line: parse, run a command, tell errors in one line."""

import os
import sys

try:  # until our own handlers are there, an interrupt is Python's: a traceback, out of any import that is not there yet
    import contextlib
    import re
    from collections.abc import Callable

    from coordinator.runtime import signals
except KeyboardInterrupt:
    os.write(2, b"crossdock: interrupted   [exit 130]\n")
    os._exit(130)

_MAX_WORD, _MAX_LINE = 300, 1500
"""Characters of a word and of a line of an error; a path may have a long name, a line should fit on a screen."""


def main() -> None:
    """Entry point of `crossdock`; exits with a status of protocol.errors.Exit."""
    try:
        signals.install()
        _reopen()
        status = _run(sys.argv[1:])
        signals.settle()
    except KeyboardInterrupt:
        signals.leave()
    _leave(status)


def _reopen() -> None:
    """What the shell closed (`>&-`) goes nowhere: else the next file or socket opened would be output."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _run(arguments: list[str]) -> int:
    from protocol.errors import CrossdockError, Exit

    try:
        with signals.Held():  # C extensions print an interrupt that meets them while they are imported
            command = _parse(arguments)
        return int(command())
    except CrossdockError as error:
        _say(" ".join(str(error).split()), error.exit)
        return int(error.exit)
    except BrokenPipeError:
        return int(Exit.OK)
    except MemoryError:
        _say("this machine has not enough memory for that", Exit.CAPACITY)
        return int(Exit.CAPACITY)
    except OSError as error:
        if os.environ.get("CROSSDOCK_TRACEBACK"):
            raise
        _say(f"{error.filename or 'input or output'}: {error.strerror or error}", Exit.INPUT)
        return int(Exit.INPUT)
    except Exception as error:
        if signals.arrived():  # in a C extension's import it comes out as an ImportError
            signals.leave()
        if os.environ.get("CROSSDOCK_TRACEBACK"):
            raise
        _say(f"internal error: {type(error).__name__}: {error} (CROSSDOCK_TRACEBACK=1 shows where)", Exit.INTERNAL)
        return int(Exit.INTERNAL)


def _parse(arguments: list[str]) -> Callable[[], int]:
    """The command, with everything that it needs imported."""
    from coordinator.cli.parser import parse
    from protocol.features import check_switches

    check_switches()
    return parse(arguments)


def _say(line: str, status: int) -> None:
    """One line on stderr, whatever is in it, even when nobody reads there."""
    shown = shorten("".join(c if c.isprintable() else " " for c in line))
    with contextlib.suppress(OSError):
        print(f"crossdock: {shown}   [exit {int(status)}]", file=sys.stderr, flush=True)


def shorten(line: str) -> str:
    """Long words and a long line without their middles: an error says what it is about, not all of it."""
    line = re.sub(rf"\S{{{_MAX_WORD + 1},}}", lambda word: _without_middle(word[0], _MAX_WORD), line)
    return _without_middle(line, _MAX_LINE)


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2 - 20
    return f"{text[:half]}[... {len(text) - 2 * half:,} more ...]{text[-half:]}"


def _leave(status: int) -> None:
    """Exit now: everything is closed, and tearing down a large interpreter takes longer than the answer."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(status)
