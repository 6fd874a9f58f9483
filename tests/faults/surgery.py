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


def tensor_info(reader: gguf.GGUFReader, name: str) -> tuple[Any, Any, Any]:
    """The tensor's dimensions, type and offset as they stand in the file, to be assigned to."""
    parts = next(t for t in reader.tensors if t.name == name).field.parts
    return parts[3], parts[4], parts[5]
