"""The machine code of all kernels in one file, ready to run in milliseconds and without numba or LLVM.

`warm` writes it from the object files in numba's cache, laid out for one base address; whoever loads it adds the
address that it got to every absolute one. For x86-64 Linux: elsewhere, or with `CROSSDOCK_DISABLE=image`, every
process loads its kernels by numba, with the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import mmap
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from protocol.features import CPU_SWITCHES, disabled, has
from workers.kernels.elf import Linked

LAYOUTS = ("board.py", "dtypes.py", "mailbox.py", "program.py", "shadow.py", "timing.py")
"""Modules of the package protocol whose numbers are compiled into kernels."""

_MAGIC = b"crossdock kernels 1\n"
_PAGE = mmap.PAGESIZE
_CPU_LINES = ("vendor_id", "cpu family", "model", "stepping", "flags")
_OURS = re.compile(r"crossdock-[0-9a-f]{12}-[a-z0-9-]+")
_addresses: dict[str, int] = {}
_memory: list[object] = []


def loaded() -> bool:
    """True when this process runs an image's kernels: modules of kernels then need no numba (see jit.py)."""
    return bool(_addresses)


def address(key: str) -> int:
    """Address of a kernel of the loaded image, 0 when there is none."""
    return _addresses.get(key, 0)


def load(path: Path | None = None) -> bool:
    """Load this machine's image, if it has one; before any other module of kernels is imported.

    False, and nothing has happened, where there is no image for these sources, this CPU and these switches.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        linked = read(path or where())
        _addresses.update(_map(linked))
    return loaded()


def write(linked: Linked, path: Path) -> None:
    """Write an image so that nobody ever sees half of it. Raises OSError."""
    head = json.dumps({"entries": linked.entries, "foreign": linked.foreign, "absolute": len(linked.absolute)}).encode()
    body = np.array(linked.absolute, np.int64).tobytes() + linked.code
    digest = hashlib.sha256(head + body).digest()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(_MAGIC + digest + len(head).to_bytes(8, "little") + head + body)
    os.replace(file.name, path)


def read(path: Path) -> Linked:
    """An image's code. Raises OSError or ValueError for what is no complete image."""
    data = path.read_bytes()
    start = len(_MAGIC) + 32
    size = int.from_bytes(data[start : start + 8], "little")
    head, body = data[start + 8 : start + 8 + size], data[start + 8 + size :]
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(head + body).digest() != data[len(_MAGIC) : start]:
        raise ValueError(f"{path}: damaged")
    plain = json.loads(head)
    nbytes = 8 * plain["absolute"]
    absolute = np.frombuffer(body[:nbytes], np.int64)
    return Linked(body[nbytes:], plain["entries"], absolute.tolist(), plain["foreign"])


def is_whole() -> bool:
    """True when this machine has its image, undamaged."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        read(where())
        return True
    return False


@functools.cache
def where() -> Path:
    """This machine's image: a file named after all that its code depends on. Raises OSError where there can be none."""
    if not has("image"):
        raise OSError("no images of machine code on this system")
    digest = hashlib.sha256("\n".join(_identity()).encode()).hexdigest()
    return cache_directory() / f"kernels-{digest[:16]}.image"


def _identity() -> Iterator[str]:
    """The sources, the compiler, the CPU, and what was switched off."""
    folder = Path(__file__).parent
    for source in sorted(folder.rglob("*.py")):
        data = source.read_bytes()
        yield f"{source.relative_to(folder)} {len(data)} {hashlib.sha256(data).hexdigest()}"
    for name in LAYOUTS:
        yield f"{name} {hashlib.sha256((folder.parent.parent / 'protocol' / name).read_bytes()).hexdigest()}"
    for name in ("numba", "llvmlite"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise OSError(f"no {name}")
        yield from sorted(path.name for path in Path(spec.origin).parent.parent.glob(f"{name}-*"))  # its version
    with open("/proc/cpuinfo", "rb") as file:
        first = file.read(1 << 14).decode("utf-8", "replace").partition("\n\n")[0].splitlines()
    yield from (line for line in first if line.partition("\t")[0].strip() in _CPU_LINES)
    yield f"{sys.version} {sorted(disabled() & set(CPU_SWITCHES))}"
    yield from (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_CPU_"))


def cache_directory() -> Path:
    """`NUMBA_CACHE_DIR` if that is set, also to what `features` chose in it, else the user's cache directory."""
    base = Path(os.environ.get("NUMBA_CACHE_DIR") or _user_cache())
    return base.parent if _OURS.fullmatch(base.name) else base


def _user_cache() -> Path:
    """A directory that only this user writes to, since code is run that is found there."""
    for home in (os.environ.get("XDG_CACHE_HOME"), Path.home() / ".cache"):
        if home:
            chosen = Path(home) / "crossdock"
            with contextlib.suppress(OSError):
                chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
                return chosen
    return _temporary_cache()


def _temporary_cache() -> Path:
    """For a user without a home: a directory that later processes and runs find again, if nobody else made it."""
    chosen = Path(tempfile.gettempdir()) / f"crossdock-cache-{os.getuid()}"
    with contextlib.suppress(OSError):
        chosen.mkdir(mode=0o700, exist_ok=True)
        found = chosen.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return chosen
    return Path(tempfile.mkdtemp(prefix="crossdock-cache-"))


def _map(linked: Linked) -> dict[str, int]:
    """Code in memory that may be run but no longer written; addresses of its entries. Raises OSError."""
    nbytes = -(-len(linked.code) // _PAGE) * _PAGE
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    area[: len(linked.code)] = linked.code
    view = np.frombuffer(area, np.uint8)
    base = int(view.ctypes.data)
    libc = ctypes.CDLL(None, use_errno=True)
    _add_to(view, linked.absolute, base)
    for name, offsets in linked.foreign.items():
        function = getattr(libc, name, None)  # what LLVM would find, too
        if function is None:
            raise OSError(f"no function {name} in this process")
        _add_to(view, offsets, ctypes.cast(function, ctypes.c_void_p).value or 0)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(base, nbytes, mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "memory must not become code")
    _memory.extend((area, view))
    return {name: base + offset for name, offset in linked.entries.items()}


def _add_to(view: npt.NDArray[np.uint8], offsets: Sequence[int], amount: int) -> None:
    """Add to the 64-bit words at these offsets, aligned or not; no two of them overlap."""
    at = np.asarray(offsets, np.int64)[:, None] + np.arange(8)
    view[at] = (view[at].view(np.int64) + amount).view(np.uint8)
