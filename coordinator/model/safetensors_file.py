"""Read safetensors checkpoints, one file or sharded, checking every length and offset before it is used."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
import numpy.typing as npt

from protocol.errors import ModelError

MAX_HEADER: Final = 100_000_000
_ITEM_NBYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a checkpoint; `offset` is absolute in `file`, `shape` outermost first."""

    name: str
    file: Path
    dtype: str  # F32 | F16 | BF16
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def open_checkpoint(folder: Path) -> dict[str, SourceTensor]:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises ModelError when a file is missing, damaged, or a shard lacks a tensor that the index promises.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read_file(single)
    if not index.is_file():
        raise ModelError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map is missing or empty")
    tensors: dict[str, SourceTensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: {shard!r} is not the plain name of a .safetensors file")
        for name, tensor in _read_file(folder / shard).items():
            if weight_map.get(name) == shard:
                tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ModelError(f"{folder / shard}: tensor {name} is missing, though {index.name} promises it")
    return tensors


def read_tensor(tensor: SourceTensor) -> npt.NDArray[np.float32]:
    """The values as F32 [shape]. Raises ModelError when the file has become shorter or unreadable."""
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            raw = file.read(tensor.nbytes)
    except OSError as error:
        raise ModelError(f"{tensor.file}: cannot be read: {error.strerror}") from None
    if len(raw) != tensor.nbytes:
        raise ModelError(f"{tensor.file}: tensor {tensor.name} has {len(raw):,} of {tensor.nbytes:,} bytes")
    if tensor.dtype == "F32":
        return np.frombuffer(raw, "<f4").astype(np.float32).reshape(tensor.shape)
    if tensor.dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32).reshape(tensor.shape)
    wide = np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(tensor.shape)


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file; {} when it is missing and `optional`.

    Raises ModelError when it is missing, too long (100 MB), no JSON or no object.
    """
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ModelError(f"{path}: {path.stat().st_size:,} bytes: expected at most {MAX_HEADER:,}")
        text = path.read_bytes()
    except FileNotFoundError:
        if optional:
            return {}
        raise ModelError(f"{path}: is missing") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    return _parse_object(text, str(path))


def _parse_object(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_file(path: Path) -> dict[str, SourceTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) != 8 or length > min(size - 8, MAX_HEADER):
                raise ModelError(f"{path}: header of {length:,} bytes in a file of {size:,}: truncated or damaged")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    header = _parse_object(text, f"{path}: header")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor(path, name, entry, start, size) for name, entry in header.items()}
    _refuse_overlaps(path, tensors)
    return tensors


def _tensor(path: Path, name: str, entry: object, start: int, size: int) -> SourceTensor:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict):
        raise ModelError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _ITEM_NBYTES:
        raise ModelError(f"{where} has the type {dtype!r}: supported are {', '.join(_ITEM_NBYTES)}")
    if not (_naturals(shape) and _naturals(offsets)) or len(shape) > 8 or len(offsets) != 2:
        raise ModelError(f"{where}: shape {shape!r} or data_offsets {offsets!r} cannot be meant")
    begin, end = offsets
    nbytes = math.prod(shape) * _ITEM_NBYTES[dtype]
    if end - begin != nbytes:
        raise ModelError(f"{where}: {end - begin:,} bytes for shape {shape} of {dtype}: expected {nbytes:,}")
    if start + end > size:
        raise ModelError(f"{where} ends at byte {start + end:,} but the file has {size:,} (truncated?)")
    return SourceTensor(name, path, dtype, tuple(shape), start + begin, nbytes)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 60 for item in value)


def _refuse_overlaps(path: Path, tensors: dict[str, SourceTensor]) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise ModelError(f"{path}: tensor {tensor.name} begins at byte {tensor.offset:,}, inside {before}")
        end, before = tensor.offset + tensor.nbytes, tensor.name
