"""Ctrl-C and `kill`: one KeyboardInterrupt, held back while something must not be left half done.

Every process of a pipeline may get Ctrl-C, and wrappers forward it, so that one key press can arrive twice. Only the
first becomes an exception; a third means that cleaning up takes too long for somebody, and ends the program at once
(workers notice, end and remove the run's files themselves).
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

from protocol.errors import Exit

LINE = f"crossdock: interrupted   [exit {int(Exit.INTERRUPTED)}]\n"
_ENOUGH = 3


class _State:
    """Signals of this process so far."""

    seen = 0
    depth = 0
    pending = False


def install() -> None:
    """From here on SIGINT, SIGTERM and SIGHUP interrupt; those that our parent had ignored stay ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _arrived)
    sys.unraisablehook = _unraisable


def settle() -> None:
    """The program's result is settled: signals that arrive now change nothing."""
    _State.depth += 1


def arrived() -> bool:
    """True when a signal has come. C extensions turn the interrupt into errors of their own while they are imported."""
    return _State.seen > 0


class Held:
    """`with Held():` a signal waits until the block is left, and interrupts then. Blocks may nest."""

    def __enter__(self) -> None:
        _State.depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _State.depth -= 1
        if _State.pending and not _State.depth:
            _State.pending = False
            raise KeyboardInterrupt


def _arrived(number: int, frame: FrameType | None) -> None:
    _State.seen += 1
    if _State.seen >= _ENOUGH:
        leave()
    if _State.seen > 1:
        return
    if _State.depth:
        _State.pending = True
        return
    raise KeyboardInterrupt


def _unraisable(info: sys.UnraisableHookArgs) -> None:
    """An interrupt in a destructor or callback, where nothing can be raised, would only be printed and forgotten."""
    if info.exc_type is KeyboardInterrupt:
        leave()
    sys.__unraisablehook__(info)


def leave() -> NoReturn:
    """Say so and end, without unwinding."""
    try:
        os.write(2, LINE.encode())
    finally:
        os._exit(Exit.INTERRUPTED)
