"""Open files that a run needs, made sure of before it begins: ZeroMQ ends the process when it runs out of them."""

from __future__ import annotations

import os
import resource

from protocol.errors import CapacityError

_EACH = 3
"""For each worker: a pipe, a log and a connection of the coordinator; two connections and a socket of its peers."""

_ALWAYS = 32
"""The most seen in either, 21, and some for files that are read and written meanwhile."""


def needed(n_workers: int) -> int:
    """Descriptors that the coordinator, and each worker, may come to beside those that are open before."""
    return _ALWAYS + _EACH * n_workers


def make_room(n_workers: int) -> None:
    """Let this process and its workers have as many descriptors as they need, if the system allows.

    Raises CapacityError when it does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _n_open() + needed(n_workers)
    if _allows(soft, wanted):
        return
    if not _allows(hard, wanted):
        workers = "1 worker needs" if n_workers == 1 else f"{n_workers} workers need"
        raise CapacityError(f"{workers} up to {wanted} open files: {hard} are allowed here (ulimit -n {wanted})")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _allows(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def _n_open() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # nobody tells
        return _ALWAYS
