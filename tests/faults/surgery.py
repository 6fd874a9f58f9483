"""Damaged copies of a GGUF file: one fact changed, all else as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def copy(source: Path, target: Path) -> gguf.GGUFReader:
    """A copy, open for changes in place."""
    shutil.copyfile(source, target)
    return gguf.GGUFReader(target, "r+")


def set_value(reader: gguf.GGUFReader, key: str, value: Any) -> None:
    """Change a metadata value; a string must keep its length in bytes."""
    field = reader.fields[key]
    part = field.parts[field.data[0]]
    if isinstance(value, str):
        assert len(value) == len(part), (value, bytes(part))
        part[:] = np.frombuffer(value.encode(), np.uint8)
    else:
        part[0] = value


def element(reader: gguf.GGUFReader, key: str, text: bytes) -> int:
    """Where in a list of strings a text stands."""
    field = reader.fields[key]
    return next(i for i, at in enumerate(field.data) if bytes(field.parts[at]) == text)


def rename(reader: gguf.GGUFReader, key: str, old: bytes, new: bytes) -> None:
    """Change one string of a list into another of its length."""
    assert len(old) == len(new)
    field = reader.fields[key]
    field.parts[field.data[element(reader, key, old)]][:] = np.frombuffer(new, np.uint8)


def tensor_info(reader: gguf.GGUFReader, name: str) -> tuple[Any, Any, Any]:
    """The tensor's dimensions, type and offset as they stand in the file, to be assigned to."""
    parts = next(t for t in reader.tensors if t.name == name).field.parts
    return parts[3], parts[4], parts[5]
