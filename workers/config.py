"""What a worker is told when it is started: one line of JSON on stdin."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from protocol.errors import ProtocolError
from protocol.schema import from_plain


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """`memory` in bytes limits the sum of the arenas, None: no limit. `token` proves who started us.

    `arithmetic`: which kernels, one of kernels/table.py's.
    """

    name: str
    kind: str
    memory: int | None
    threads: int
    unsupported_ops: tuple[str, ...]
    arithmetic: str
    endpoint: str
    transport: str
    plane: str
    run_directory: str
    board: str
    token: str


@dataclass(frozen=True, slots=True)
class Birth:
    """A worker to be born: descriptors of its stdin, with its configuration, and of its log."""

    name: str
    stdin: int
    log: int


@dataclass(frozen=True, slots=True)
class Births:
    """What the nursery is told: `parent` is the coordinator's process, `report` a descriptor to write lines to.

    `arithmetic`: which kernels to load, "" for none.
    """

    parent: int
    report: int
    arithmetic: str
    workers: tuple[Birth, ...]


_MAX_LINE_NBYTES = 1 << 20
_WHO = "a worker is started by the coordinator, with its configuration on stdin"


def read_line() -> str:
    """The configuration's line, "" when stdin ends before it does. Raises ProtocolError when nobody would send one."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ProtocolError(_WHO)
    line = sys.stdin.buffer.readline(_MAX_LINE_NBYTES)
    return line.decode("utf-8", "replace") if line.endswith(b"\n") or len(line) == _MAX_LINE_NBYTES else ""


def parse(line: str) -> WorkerConfig:
    """Raises ProtocolError when the line is not a worker's configuration."""
    try:
        plain = json.loads(line)
    except (ValueError, RecursionError):
        raise ProtocolError(_WHO) from None
    return from_plain(WorkerConfig, plain, "configuration")
