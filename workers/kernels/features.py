"""Which CPU features kernels may use, how to switch them off, and a cache of compiled code for each choice."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from protocol.features import disabled, of_cpu
from workers.kernels import image

KNOWN = ("avx2", "fma", "f16c")
"""Features that kernels have special code for. `CROSSDOCK_DISABLE=avx2,f16c` does without; results stay the same."""

MORE = ("vnni", "avx512")
"""The same, on top of all of KNOWN: products of four bytes, and those in vectors of 512 bits."""

_OF_LLVM: dict[str, tuple[str, ...]] = {"vnni": ("avx512vnni", "avxvnni"), "avx512": ()}
_COMPILED = re.compile(r"@kernel|njit|IRBuilder")
_IMPORT = re.compile(r"^from workers\.kernels(?:\.([\w.]+) import|\s+import ([\w ,]+))", re.MULTILINE)


def detect(environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Features of KNOWN and MORE that the CPU has, numba may generate code for, and nobody switched off."""
    if environ.get("NUMBA_CPU_FEATURES"):
        present = {f[1:] for f in environ["NUMBA_CPU_FEATURES"].split(",") if f.startswith("+")}
        present -= {f[1:] for f in environ["NUMBA_CPU_FEATURES"].split(",") if f.startswith("-")}
    elif environ.get("NUMBA_CPU_NAME", "host") != "host":
        present = set()
    else:
        present = {name for name, on in _host().items() if on}
    return of_cpu(present, disabled(environ))


@functools.cache
def _host() -> dict[str, bool]:
    import llvmlite.binding as llvm  # no image needs it

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
    chosen = image.cache_directory() / f"crossdock-{_digest()}-{'-'.join(sorted(detect())) or 'portable'}"
    settings = {"CACHE_DIR": str(chosen)}
    withheld = disabled() & {*KNOWN, *MORE}
    if withheld and not os.environ.get("NUMBA_CPU_NAME") and _host():
        import llvmlite.binding as llvm

        names = {real for name in withheld for real in _OF_LLVM.get(name, (name,))}
        own = [f"{'+' if on else '-'}{name}" for name, on in sorted(_host().items()) if name not in names]
        settings["CPU_FEATURES"] = ",".join(own + [f"-{name}" for name in sorted(names)])
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
    for name in image.LAYOUTS:
        digest.update((Path(__file__).parents[2] / "protocol" / name).read_bytes())
    return digest.hexdigest()[:12]


HAVE = frozenset() if image.loaded() else detect()
"""The features for which this process compiles code, settled at import; an image was made for its own."""
HAVE_AVX2, HAVE_F16C, HAVE_VNNI = "avx2" in HAVE, "f16c" in HAVE, "vnni" in HAVE
HAVE_AVX512 = "avx512" in HAVE
"""Vectors of 512 bits are registers, and there are 32 of them; HAVE_VNNI holds as well."""
