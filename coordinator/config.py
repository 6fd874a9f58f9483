"""Which workers a run has: the `--workers` list and topology files, checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import UsageError
from protocol.limits import MAX_ARENA_NBYTES, MAX_WORKERS
from protocol.ops import VIEW_OPS, Op

KINDS = ("cpu", "accel", "null")
MAX_THREADS = 256
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(B|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,4}")
_MAX_FILE_NBYTES = 1 << 20
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
"""Names of workers and devices."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process. `memory` in bytes limits the sum of its arenas, None: only the machine does."""

    name: str
    kind: str
    memory: int | None = None
    threads: int = 1
    unsupported_ops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """The workers in device priority order; the last one is the host's `cpu` (or stands for it: `null`)."""

    workers: tuple[WorkerSpec, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in device order."""
        return tuple(worker.name for worker in self.workers)


def parse_size(text: str | int, where: str) -> int:
    """Bytes of `64MiB`, `1.5 GiB` or a plain number. Raises UsageError."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise UsageError(f"{where}: {str(text)[:40]!r} is no size: expected for example 64MiB or 24GiB")
    nbytes = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if nbytes > MAX_ARENA_NBYTES:
        raise UsageError(f"{where}: {str(text)[:40]!r} is more than the {MAX_ARENA_NBYTES >> 40} TiB that are possible")
    return int(nbytes)


def parse_workers(text: str, threads: int) -> Topology:
    """`cpu:1,accel:2` or `cpu:1,accel:2:64MiB`: kind, how many, memory of each.

    Raises UsageError.
    """
    if threads > MAX_THREADS:
        raise UsageError(f"--threads {threads}: expected 1 to {MAX_THREADS}")
    specs: list[WorkerSpec] = []
    for part in text.split(","):
        kind, _, rest = part.strip().partition(":")
        number, _, memory = rest.partition(":")
        if kind not in KINDS or _NUMBER.fullmatch(number or "1") is None:
            raise UsageError(
                f"--workers {text!r}: {part.strip()!r} is not KIND:NUMBER[:MEMORY] with KIND one of {', '.join(KINDS)}"
            )
        limit = parse_size(memory, f"--workers {text!r}") if memory else None
        base = sum(spec.kind == kind for spec in specs)
        specs += [WorkerSpec(f"{kind}{base + i}", kind, limit, threads) for i in range(int(number or "1"))]
        if len(specs) > MAX_WORKERS:
            raise UsageError(f"--workers {text!r}: {len(specs)} workers, at most {MAX_WORKERS} are possible")
    return _ordered(specs, f"--workers {text!r}")


def read_topology(path: Path) -> Topology:
    """A TOML file with one `[[worker]]` table per worker: name, kind, memory, threads, unsupported_ops.

    Raises UsageError naming file, table and field.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_NBYTES + 1)
        if len(content) > _MAX_FILE_NBYTES:
            raise UsageError(f"{path}: more than {_MAX_FILE_NBYTES:,} bytes are no topology")
        document = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML: {error}") from None
    unknown = set(document) - {"worker"}
    if unknown:
        raise UsageError(f"{path}: unknown key {sorted(unknown)[0]!r}: expected [[worker]] tables")
    tables = document.get("worker")
    if not isinstance(tables, list) or not tables:
        raise UsageError(f"{path}: no [[worker]] table")
    if len(tables) > MAX_WORKERS:
        raise UsageError(f"{path}: {len(tables)} workers, at most {MAX_WORKERS} are possible")
    specs = [_spec(table, i, f"{path}: worker {i + 1}") for i, table in enumerate(tables)]
    return _ordered(specs, str(path))


def _spec(table: Any, number: int, where: str) -> WorkerSpec:
    known = {"name": str, "kind": str, "memory": (str, int), "threads": int, "unsupported_ops": list}
    if not isinstance(table, dict):
        raise UsageError(f"{where}: expected a table")
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}: expected one of {', '.join(known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise UsageError(f"{where}: {key} is {value!r}: wrong type")
    kind = table.get("kind")
    if kind not in KINDS:
        raise UsageError(f"{where}: kind is {kind!r}: expected one of {', '.join(KINDS)}")
    name = table.get("name", f"{kind}{number}")
    if NAME.fullmatch(name) is None:
        raise UsageError(f"{where}: name {name!r}: expected a letter, then letters, digits, - and _, at most 32")
    threads = table.get("threads", 1)
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"{where}: threads is {threads}: expected 1 to {MAX_THREADS}")
    ops = tuple(table.get("unsupported_ops", ()))
    for op in ops:
        if not isinstance(op, str) or op not in Op.__members__ or Op[op] in (*VIEW_OPS, Op.NONE):
            raise UsageError(
                f"{where}: unsupported_ops: {op!r} is no op that is computed; ggml's names are meant, such as MUL_MAT"
            )
    memory = parse_size(table["memory"], where) if "memory" in table else None
    return WorkerSpec(name, kind, memory, threads, ops)


def _ordered(specs: Sequence[WorkerSpec], where: str) -> Topology:
    """Devices in ggml's priority order: accelerators first, further CPUs next, the host's CPU last."""
    names = [spec.name.lower() for spec in specs]  # they name files, which some systems do not tell apart by case
    twice = next((spec.name for spec in specs if names.count(spec.name.lower()) > 1), None)
    if twice is not None:
        raise UsageError(f"{where}: two workers are called {twice!r}")
    nulls = [spec for spec in specs if spec.kind == "null"]
    if nulls and len(nulls) < len(specs):
        raise UsageError(f"{where}: null workers compute nothing and have nothing to hand over: all workers or none")
    host = next((spec for spec in specs if spec.kind == "cpu"), nulls[-1] if nulls else None)
    if host is None:
        raise UsageError(f"{where}: no cpu worker: ggml's scheduler needs a CPU as its last device")
    if host.unsupported_ops:
        raise UsageError(f"{where}: {host.name} is the host's CPU and must support every op")
    others = sorted((spec for spec in specs if spec is not host), key=lambda spec: spec.kind == "cpu")
    return Topology((*others, host))
