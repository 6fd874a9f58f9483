"""Types of command line values."""

from __future__ import annotations

import argparse
from collections.abc import Callable


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
    return None if text in ("all", "-1") else at_least(0)(text)
