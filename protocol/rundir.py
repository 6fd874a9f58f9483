"""A run's directory: sockets, logs and file-backed memory of one run, gone with it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

from protocol.errors import WorkerError

PREFIX = "crossdock-run-"
_YOUNG_S = 60.0
_STUBBORN_S, _STUBBORN = 0.5, 20  # what cannot be removed for so long, as often as that, never will be
_locks: dict[str, int] = {}


def run_directory() -> str:
    """A new directory that only this user can enter. Directories that dead runs left behind are removed on the way.

    Whoever makes it holds a lock on it until `remove_run_directory` or its end: that is how a dead run is recognised.

    Raises WorkerError when the system gives none.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = bool(base) and os.path.isdir(base) and os.access(base, os.W_OK)
    try:
        path = tempfile.mkdtemp(prefix=PREFIX, dir=base if usable else None)
    except OSError as error:
        raise WorkerError(f"cannot make a directory for the run's sockets: {error.strerror} (see TMPDIR)") from None
    fd = _lock(path)
    if fd is not None:
        _locks[path] = fd
    _sweep(os.path.dirname(path))
    return path


def remove_run_directory(path: str) -> None:
    """Remove what `run_directory` made, and nothing else; more than one process may try.

    Again and again while something appears in it: a socket that is just being bound would keep it for ever.
    """
    last, tries = time.monotonic() + _STUBBORN_S, 0
    while _is_ours(path) and (tries < _STUBBORN or time.monotonic() < last):
        shutil.rmtree(path, ignore_errors=True)
        tries += 1
    fd = _locks.pop(path, None)
    if fd is not None:
        os.close(fd)


def _is_ours(path: str) -> bool:
    try:
        info = os.lstat(path)
    except OSError:
        return False
    mine = info.st_uid == os.getuid() and stat.S_ISDIR(info.st_mode) and stat.S_IMODE(info.st_mode) == 0o700
    return mine and os.path.isabs(path) and Path(path).name.startswith(PREFIX)


def _lock(path: str) -> int | None:
    """A descriptor that holds the directory's lock, None where somebody else does or there are no locks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _sweep(base: str) -> None:
    """Remove directories of runs that were killed before any of their workers could."""
    with contextlib.suppress(OSError):
        for path in [entry.path for entry in os.scandir(base) if entry.name.startswith(PREFIX)]:
            if path in _locks or not _is_ours(path) or time.time() - os.lstat(path).st_mtime < _YOUNG_S:
                continue
            fd = _lock(path)
            if fd is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(fd)
