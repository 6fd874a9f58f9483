"""How long tests wait on a busy machine: for what must come about, as long as anybody would; on a free one it does at
once."""

from __future__ import annotations

import time
from collections.abc import Callable

LATE_S = 120.0


def comes_true(condition: Callable[[], bool]) -> bool:
    """Asked again and again until it holds, or for so long that it never will."""
    deadline = time.monotonic() + LATE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
