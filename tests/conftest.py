"""For all tests: what was compiled once is not compiled again, and what was imported is not walked through again.

numba settles where code is kept when it sees a function, and importing kernels tells it another place than the
planner's, in the environment too. So the planner is imported first, and commands get the environment as it was: or
each change of a kernel would let the tests compile the planner twice more.

And no generated example fails because the machine was busy.
"""

from __future__ import annotations

import gc
import os
import sys

from hypothesis import HealthCheck, settings

_CACHE = os.environ.get("NUMBA_CACHE_DIR")

sys.dont_write_bytecode = False  # hundreds of processes are started here
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if not os.environ.get("CROSSDOCK_DISABLE"):  # or numba would settle for this CPU's features before kernels are asked
    import coordinator.schedule.scheduler  # noqa: F401

settings.register_profile("crossdock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("crossdock")


def pytest_collection_finish() -> None:
    """The environment as it was; and walks through modules and test items, which stay, were a tenth of the time."""
    if _CACHE is None:
        os.environ.pop("NUMBA_CACHE_DIR", None)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
