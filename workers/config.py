"""What a worker is told when it is started: one line of JSON on stdin."""

from __future__ import annotations

import json
from dataclasses import dataclass

from protocol.errors import ProtocolError
from protocol.schema import from_plain


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """`memory` in bytes limits the sum of the arenas, None: no limit. `token` proves who started us."""

    name: str
    incarnation: int
    kind: str
    memory: int | None
    threads: int
    unsupported_ops: tuple[str, ...]
    endpoint: str
    transport: str
    plane: str
    run_directory: str
    board: str
    token: str


def parse(line: str) -> WorkerConfig:
    """Raises ProtocolError when the line is not a worker's configuration."""
    try:
        plain = json.loads(line)
    except ValueError:
        raise ProtocolError("a worker is started by the coordinator, with its configuration on stdin") from None
    return from_plain(WorkerConfig, plain, "configuration")
