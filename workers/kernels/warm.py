"""Compiles every kernel ahead of time, once per machine and version: `python -m workers.kernels.warm`.

Prints a line `k/n name` per kernel, and leaves an image of all of them (see image.py) that workers load in
milliseconds. Several cold processes may start at once: one compiles, the others wait for it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from protocol.features import has
from workers.kernels.features import configure_cache

CACHE = configure_cache()

import llvmlite.binding as llvm  # noqa: E402  (where numba caches is settled above)
import numba  # noqa: E402
from numba.core.registry import cpu_target  # noqa: E402

from workers.kernels import elf, image, serving, shadow, steps, table, team  # noqa: E402, F401  (importing them defines all kernels)
from workers.kernels.stage import KERNELS, Kernel  # noqa: E402

Progress = Callable[[int, int, str], None]
"""Called with (done, total, name) after each kernel."""


def is_warm() -> bool:
    """True when this machine's cache holds all kernels of this checkout, and their image where there can be one."""
    return _marker().exists() and (not has("image") or image.is_whole())


def warm(progress: Progress | None = None) -> int:
    """Load every kernel, compiling what the cache lacks; returns how many there are.

    Takes seconds at the first time on a machine, tenths of a second later. A cache that cannot be written only costs
    time: kernels are then compiled by every process.
    """
    if is_warm():
        return _load(progress)
    with _alone(CACHE):
        if not _marker().exists():
            _compile(os.cpu_count() or 1)
        count = _load(progress)
        with suppress(OSError):
            _marker().touch()
            make_image()
    return count


def make_image() -> None:
    """Write the image of all kernels. Raises OSError where it cannot be written, or numba keeps no object files."""
    image.write(elf.link({kernel.key: _object_file(kernel.compiled()) for kernel in _kernels()}), image.where())


def _kernels() -> list[Kernel]:
    """Those of the default arithmetic; others are compiled when they are first used, and may be defined here too."""
    return [kernel for kernel in KERNELS if not kernel.key.startswith("workers.kernels.ggml.")]


def _object_file(compiled: Any) -> tuple[bytes, str]:
    """What LLVM made of a kernel, and the symbol of its C function, from numba's cache.

    numba has no public way to it: with another numba than those that this was written for there is no image. What is
    in the cache may be another process's doing, with other names than ours.
    """
    try:
        cache, target = compiled._cache, cpu_target.target_context
        library, described, *_ = cache._cache_file.load(cache._index_key(compiled._sig, target.codegen()))
        _, kind, (data, _) = library
        if kind != "object":
            raise ValueError(f"a library of kind {kind}")
        return bytes(data), str(described.llvm_cfunc_wrapper_name)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise OSError(f"no object file in numba's cache: {error}") from None


def _compile(processes: int) -> None:
    """Fill the cache by several processes, each with its share of the kernels; what they miss is compiled later."""
    command = [sys.executable, "-P", "-m", "workers.kernels.warm", "--share"]
    started = [subprocess.Popen([*command, str(k), str(processes)]) for k in range(1, processes)]
    try:
        _load(None, 0, processes)
    finally:
        for process in started:
            process.wait()


def _load(progress: Progress | None, first: int = 0, step: int = 1) -> int:
    tasks = [(kernel.name, kernel.address) for kernel in _kernels()][first::step]
    for k, (name, task) in enumerate(tasks):
        task()
        if progress is not None:
            progress(k + 1, len(tasks), name)
    return len(tasks)


def _marker() -> Path:
    """A file that exists when the cache is complete for these sources, this numba and this CPU.

    numba compiles again for another folder with the same sources, and for sources with another time of change.
    """
    folder = Path(__file__).parent
    digest = hashlib.sha256(f"{numba.__version__} {llvm.get_host_cpu_name()} {folder}".encode())
    for source in sorted(folder.glob("*.py")):
        digest.update(f"{source.stat().st_mtime_ns} {source.stat().st_size}".encode())
    return CACHE / f"complete-{digest.hexdigest()[:16]}"


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, so that one process at a time compiles; it ends with the process that holds it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / "warm.lock", "w")  # noqa: SIM115  (closed below)
    except OSError:
        yield
        return
    with lock:
        _lock(lock.fileno())
        yield


def _lock(descriptor: int) -> None:
    """Wait for an exclusive lock; where files cannot be locked, go on without."""
    with suppress(OSError, ImportError):
        if os.name == "posix":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)


def main() -> None:
    """Warm the cache and print the progress, a line per kernel; `--share K N` does every Nth kernel from the Kth on."""
    if sys.argv[1:2] == ["--share"]:
        _load(None, int(sys.argv[2]), int(sys.argv[3]))
        return
    warm(lambda done, total, name: print(f"{done}/{total} {name}", flush=True))


if __name__ == "__main__":
    main()
