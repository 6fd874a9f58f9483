"""Types of command line values, and the parser that checks them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from protocol.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing the usage and exiting; what has no type must not be empty."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", None, filled)  # groups of arguments share it

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def filled(text: str) -> str:
    """An argparse type: a text with something in it. `--workers "$UNSET"` is no way to ask for the default."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty: leave the option out, or say what it is to be")
    return text


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: integers from `low` on that fit in 31 bits."""
    high = (1 << 31) - 1

    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            bound = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"{text:.40} is out of range: expected {bound}")
        return value

    return integer


def layers(text: str) -> int | None:
    """An argparse type: a number of layers, or None for `all`."""
    if text in ("all", "-1"):
        return None
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of layers, or all")
    return at_least(0)(text)
