"""Memory that several processes of one host can map: memfd where there is one, else files in the run's directory."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from protocol.errors import CapacityError, ProtocolError, WorkerError
from protocol.features import has

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Segment:
    """Mapped memory: `view` is uint8 [nbytes], page aligned; `path` is what another process opens, "" for none."""

    view: Bytes
    nbytes: int
    path: str
    fd: int = -1
    unlink: bool = False

    @property
    def address(self) -> int:
        """Address of the first byte in this process."""
        return int(self.view.ctypes.data)

    def close(self) -> None:
        """Give the memory back; it stays mapped elsewhere and until the last array on it is gone."""
        self.view = np.empty(0, np.uint8)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.unlink:
            Path(self.path).unlink(missing_ok=True)
            self.unlink = False


def create(nbytes: int, directory: str, label: str) -> Segment:
    """New zeroed memory that peers can attach to by its path.

    Raises CapacityError when the system does not give that much.
    """
    size = max(nbytes, mmap.PAGESIZE)
    segment = Segment(np.empty(0, np.uint8), nbytes, "")
    try:
        if has("memfd"):
            segment.fd = os.memfd_create(f"crossdock-{label}"[:200], os.MFD_CLOEXEC)
            segment.path = f"/proc/{os.getpid()}/fd/{segment.fd}"
            os.ftruncate(segment.fd, size)
        else:
            segment.path = f"{directory}/{label}.mem"
            segment.fd = os.open(segment.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            segment.unlink = True
            _fill(segment.fd, size)
        segment.view = _map(segment.fd, size, writable=True)
    except (OSError, ValueError, OverflowError) as error:
        segment.close()
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CapacityError(f"{label}: cannot get {nbytes:,} bytes of shared memory: {why}") from None
    return segment


def _fill(fd: int, nbytes: int) -> None:
    """Take the room on the disk now: a write to a full one through a mapping would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
    else:
        os.ftruncate(fd, nbytes)


def private(nbytes: int, label: str) -> Segment:
    """New zeroed memory of this process alone. Raises CapacityError."""
    try:
        area = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
    except (OSError, ValueError, OverflowError) as error:
        raise CapacityError(f"{label}: cannot get {nbytes:,} bytes of memory: {error}") from None
    return Segment(np.frombuffer(area, np.uint8), nbytes, "")


def attach(path: str, nbytes: int, *, writable: bool = False) -> Segment:
    """Map memory that another process created, or a file.

    Raises WorkerError when it cannot be opened, ProtocolError when it is smaller than promised.
    """
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise WorkerError(f"cannot open {path}: {error.strerror}") from None
    try:
        actual = os.fstat(fd).st_size
        if actual < nbytes:
            raise ProtocolError(f"{path}: expected {nbytes:,} bytes, it has {actual:,}")
        return Segment(_map(fd, max(nbytes, 1), writable=writable), nbytes, path)
    except (OSError, ValueError) as error:
        raise WorkerError(f"cannot map {path}: {error}") from None
    finally:
        os.close(fd)


def _map(fd: int, nbytes: int, *, writable: bool) -> Bytes:
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    return np.frombuffer(mmap.mmap(fd, nbytes, access=access), np.uint8)


def copy(destination: int, source: int, nbytes: int) -> None:
    """memmove between addresses that the caller has checked."""
    ctypes.memmove(destination, source, nbytes)
