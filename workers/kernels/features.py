"""Which CPU features kernels may use, how to switch them off, and a cache of compiled code for each choice."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import llvmlite.binding as llvm

from protocol.features import disabled

KNOWN = ("avx2", "fma", "f16c")
"""Features that kernels have special code for. `CROSSDOCK_DISABLE=avx2,f16c` does without; results stay the same."""

_COMPILED = re.compile(r"@kernel|njit|IRBuilder")
_IMPORT = re.compile(r"^from workers\.kernels(?:\.([\w.]+) import|\s+import ([\w ,]+))", re.MULTILINE)
_OURS = re.compile(r"crossdock-[0-9a-f]{12}-[a-z0-9-]+")


def detect(environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Features of KNOWN that the CPU has, numba may generate code for, and nobody switched off."""
    if environ.get("NUMBA_CPU_FEATURES"):
        present = {f[1:] for f in environ["NUMBA_CPU_FEATURES"].split(",") if f.startswith("+")}
        present -= {f[1:] for f in environ["NUMBA_CPU_FEATURES"].split(",") if f.startswith("-")}
    elif environ.get("NUMBA_CPU_NAME", "host") != "host":
        present = set()
    else:
        present = {name for name, on in _host().items() if on}
    return frozenset(KNOWN) & present - disabled(environ)


@functools.cache
def _host() -> dict[str, bool]:
    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # a CPU that LLVM cannot ask
        return {}


def configure_cache() -> Path:
    """Point numba's cache at a directory for this code and these features; call it before anything is compiled.

    The directory lies under `NUMBA_CACHE_DIR` if that is set, else under the user's cache directory. Calling it again,
    also in a child process that inherited the environment, changes nothing. Features that are switched off are
    withheld from LLVM as well.
    """
    base = Path(os.environ.get("NUMBA_CACHE_DIR") or _user_cache())
    if _OURS.fullmatch(base.name):
        base = base.parent
    chosen = base / f"crossdock-{_digest()}-{'-'.join(sorted(detect())) or 'portable'}"
    settings = {"CACHE_DIR": str(chosen)}
    withheld = disabled() & set(KNOWN)
    if withheld and not os.environ.get("NUMBA_CPU_NAME") and _host():
        own = [f"{'+' if on else '-'}{name}" for name, on in sorted(_host().items()) if name not in withheld]
        settings["CPU_FEATURES"] = ",".join(own + [f"-{name}" for name in sorted(withheld)])
        settings["CPU_NAME"] = llvm.get_host_cpu_name()
    for name, value in settings.items():
        os.environ[f"NUMBA_{name}"] = value
        if "numba" in sys.modules:
            setattr(sys.modules["numba"].config, name, value)
    return chosen


def shared_sources() -> dict[str, str]:
    """Sources of the modules whose code is compiled into kernels of other modules, by name.

    numba notices a change only in a kernel's own file, so these have to be part of the cache's name.
    """
    folder = Path(__file__).parent
    sources = {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text("utf-8")
        for path in sorted(folder.rglob("*.py"))
    }
    shared: set[str] = set()
    for source in sources.values():
        if _COMPILED.search(source):
            for module, names in _IMPORT.findall(source):
                shared.update([module] if module else (name.split()[0] for name in names.split(",")))
    return {name: source for name, source in sources.items() if name in shared}


@functools.cache
def _digest() -> str:
    digest = hashlib.sha256()
    for name, source in shared_sources().items():
        digest.update(f"{name} {len(source)} {source}".encode())
    return digest.hexdigest()[:12]


def _user_cache() -> Path:
    """A directory that only this user writes to, since numba runs what it finds there."""
    for home in (os.environ.get("XDG_CACHE_HOME"), Path.home() / ".cache"):
        if home:
            chosen = Path(home) / "crossdock"
            with contextlib.suppress(OSError):
                chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
                return chosen
    return Path(tempfile.mkdtemp(prefix="crossdock-cache-"))


HAVE = detect()
"""The features this process uses, settled at import."""
HAVE_AVX2, HAVE_F16C = "avx2" in HAVE, "f16c" in HAVE
