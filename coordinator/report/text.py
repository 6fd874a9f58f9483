"""Numbers as people read them, and output that knows whether a person is watching."""

from __future__ import annotations

import os
import sys

from rich.console import Console


def show_bytes(nbytes: float) -> str:
    """`1.5 KiB`, `61.4 MiB`; bytes below 1 KiB as they are."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def show_time(ns: float) -> str:
    """`340 us`, `12 ms`, `3.4 s`."""
    if ns < 1e6:
        return f"{ns / 1e3:.0f} us"
    if ns < 1e9:
        return f"{ns / 1e6:.0f} ms"
    return f"{ns / 1e9:.1f} s"


def plural(number: int, noun: str) -> str:
    """`1 split`, `3 splits`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def notes() -> Console:
    """Where everything goes that is not the answer: stderr, coloured only on a terminal."""
    return Console(stderr=True, highlight=False, no_color="NO_COLOR" in os.environ or None, soft_wrap=True)


def watched() -> bool:
    """True when stderr is a terminal: progress may move."""
    return sys.stderr.isatty()
