"""What this machine has, and the off switch for each of it: CROSSDOCK_DISABLE=memfd,futex,sharedmem,avx2,..."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Collection, Mapping
from functools import cache

from protocol.errors import UsageError

VARIABLE = "CROSSDOCK_DISABLE"

CPU_SWITCHES = ("avx2", "fma", "f16c", "vnni", "avx512")
"""Of the CPU: see workers.kernels.features."""

_WIDE = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"}

SWITCHES = ("memfd", "futex", "sharedmem", "mailbox", "fork", "image", *CPU_SWITCHES)
"""Everything that can be switched off; each has a portable twin."""


def disabled(environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Features switched off by the environment, lower case."""
    return frozenset(word.strip().lower() for word in environ.get(VARIABLE, "").split(",") if word.strip())


def of_cpu(present: Collection[str], off: Collection[str]) -> frozenset[str]:
    """Those of CPU_SWITCHES that kernels may use on a CPU with these features, by LLVM's names, and without those that
    are `off`. vnni and avx512 are used on top of the other three, and avx512 on top of vnni."""
    basic = {"avx2", "fma", "f16c"}
    found = basic & set(present) - set(off)
    if found == basic and "vnni" not in off and ({"avx512vnni", "avx512vl"} <= set(present) or "avxvnni" in present):
        found.add("vnni")
        if set(present) >= _WIDE and "avx512" not in off:
            found.add("avx512")
    return frozenset(found)


def check_switches() -> None:
    """Raises UsageError for a switch that does not exist: a typing error would otherwise switch nothing off."""
    unknown = sorted(disabled() - set(SWITCHES))
    if unknown:
        raise UsageError(f"{VARIABLE}: unknown feature {unknown[0][:40]!r}: expected some of {', '.join(SWITCHES)}")


@cache
def has(feature: str) -> bool:
    """True when the machine has an operating-system feature and it is not switched off (of the CPU's, see
    workers.kernels.features).

    memfd: anonymous shared files. futex: sleeping on a word of shared memory. sharedmem: processes of one host may
    exchange tensors through shared memory at all; it needs x86-64's store order, since a plain store publishes.
    mailbox: requests and answers through shared memory, with the three before it.
    fork: workers are born of one process that has loaded everything. image: kernels' machine code from one file.
    """
    if feature in disabled():
        return False
    if feature == "mailbox":
        return has("memfd") and has("futex") and has("sharedmem")
    linux = sys.platform == "linux"
    x86 = platform.machine() in ("x86_64", "AMD64")
    return {
        "memfd": linux and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"),
        "futex": linux and x86,
        "fork": linux,
        "image": linux and x86,
        "sharedmem": x86 and os.name == "posix",
    }.get(feature, False)
