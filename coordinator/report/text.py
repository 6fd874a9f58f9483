"""Numbers as people read them, and output that knows whether a person is watching."""

from __future__ import annotations

import os
import sys
import unicodedata

from rich.console import Console
from rich.markup import escape


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
    width = None if sys.stderr.isatty() else 1000  # a file has no edge to wrap at
    return Console(stderr=True, highlight=False, no_color="NO_COLOR" in os.environ or None, soft_wrap=True, width=width)


def plain(text: str) -> str:
    """Names from files may hold anything: brackets, which rich would take for markup, and what does not print."""
    return escape("".join(c if c.isprintable() else "?" for c in text))


def printable(text: str) -> str:
    """Text for a terminal: control characters, which could drive it, become U+FFFD; lines and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def watched() -> bool:
    """True when stderr is a terminal: progress may move."""
    return sys.stderr.isatty()
