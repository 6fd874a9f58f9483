"""Pictures need matplotlib, which is no part of a plain installation."""

from __future__ import annotations

import importlib.util
import sys

from protocol.errors import UsageError


def check_matplotlib(option: str) -> None:
    """Raises UsageError, with what would install it, when matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        install = f"{sys.executable} -m pip install matplotlib"
        raise UsageError(f"{option}: matplotlib, the extra 'plots', is missing: {install}")
