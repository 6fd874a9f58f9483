"""Graph documents that people name on the command line, and JSON that they get back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from coordinator.schedule.document import Document, load_document
from protocol.errors import InputError, PlanError

T = TypeVar("T")

_MAX_NBYTES = 1 << 30


def from_document(file: str, make: Callable[[Document], T]) -> tuple[Document, T]:
    """The graphs of a file, - for stdin, and what is made of them.

    Raises InputError for a file that cannot be read, PlanError with its name for what is wrong with it.
    """
    content = _read(file)
    try:
        document = load_document(content)
        return document, make(document)
    except PlanError as error:
        raise PlanError(f"{file}: {str(error).removeprefix('document: ')}") from None


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    path = Path(file)
    try:
        if path.stat().st_size > _MAX_NBYTES:
            raise InputError(f"{file}: more than {_MAX_NBYTES:,} bytes are no graph document")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None


def print_json(document: object) -> None:
    """The answer, piece by piece: large ones are never one text."""
    json.dump(document, sys.stdout, ensure_ascii=False)
    print()
