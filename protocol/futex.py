"""Linux's futex, for words of memory that processes share."""

from __future__ import annotations

import ctypes

_SYS_FUTEX, _WAIT, _WAKE = 202, 0, 1  # on x86-64
_EVERYBODY = 0x7FFFFFFF


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Futex:
    """The system call on 32-bit words by address; needs the feature `futex` (x86-64 Linux)."""

    def __init__(self) -> None:
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._call.argtypes = (
            ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_long,
        )  # fmt: skip

    def wait(self, address: int, seen: int, timeout_s: float) -> None:
        """Sleep while the word is `seen`, at most that long; a signal may end it early."""
        timeout = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
        self._call(_SYS_FUTEX, address, _WAIT, seen, ctypes.byref(timeout), None, 0)

    def wake(self, address: int) -> None:
        """Wake all that sleep on the word."""
        self._call(_SYS_FUTEX, address, _WAKE, _EVERYBODY, None, None, 0)
