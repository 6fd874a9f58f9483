"""Gets the kernels ready before a worker needs them: from this machine's image, which is made if there is none."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from protocol.features import has
from workers.kernels import image

_LOOK_S = 0.05
LIMIT_S = 900.0


def load_kernels(arithmetic: str, waiting: Callable[[], None] = lambda: None) -> None:
    """Import the engine with its kernels; `waiting` is called now and then while they are compiled.

    Other arithmetics than `exact` have no image: numba compiles their kernels when they are first used.
    """
    if arithmetic == "exact" and not image.load() and has("image"):
        _make_image(waiting)
        image.load()
    import workers.engine  # noqa: F401  (from the image, or by numba)


def _make_image(waiting: Callable[[], None]) -> None:
    """Compile in a process of its own: the compiler would stay in our memory. If it fails, numba shows why later."""
    command = [sys.executable, "-P", "-m", "workers.kernels.warm"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        waiting()
        time.sleep(_LOOK_S)
    process.kill()
    process.wait()
