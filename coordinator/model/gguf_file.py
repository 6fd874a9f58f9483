"""Open a GGUF file: every offset, count, type and length is checked against the file before it is used."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.gguf_header import MetaValue, read_header
from coordinator.model.hparams import WeightInfo
from protocol import content
from protocol.errors import ModelError

__all__ = ["MetaValue", "ModelFile", "open_model", "weight_bytes"]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A checked GGUF file.

    `weights` holds absolute offsets in file order. `fingerprint` is protocol.content's digest of the header and of
    both ends of each tensor: two processes that see the same one have opened the same file.
    """

    path: Path
    nbytes: int
    metadata: dict[str, MetaValue]
    weights: dict[str, WeightInfo]
    alignment: int
    fingerprint: str
    header_nbytes: int = 0


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read and check the header of a GGUF file (version 2 or 3, little endian, one part).

    Raises ModelError with one line when the file is missing, truncated, damaged or of a kind that is not supported.
    """
    path = Path(path)
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise ModelError(f"{path.name}: not a regular file")
            if info.st_size < 24:
                raise ModelError(f"{path.name}: {info.st_size} bytes are too few for a GGUF header (24)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = read_header(data, path.name)
                fingerprint = content.digest(data, _ranges(header.nbytes, header.weights))
                return ModelFile(
                    path, len(data), header.metadata, header.weights, header.alignment, fingerprint, header.nbytes
                )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelError(f"{path}: cannot be opened: {reason}") from None


def _open_at_once(path: str, flags: int) -> int:
    """A named pipe without a writer would keep us waiting before anything can be said about it."""
    return os.open(path, flags | os.O_NONBLOCK)


def weight_bytes(model: ModelFile, name: str) -> bytes:
    """The raw bytes of one tensor, in the file's own type. Raises ModelError when it is missing or unreadable."""
    info = model.weights.get(name)
    if info is None:
        raise ModelError(f"{model.path.name}: tensor {name} is missing")
    try:
        with model.path.open("rb") as file:
            file.seek(info.offset)
            data = file.read(info.nbytes)
    except OSError as error:
        raise ModelError(f"{model.path}: cannot be read: {error.strerror}") from None
    if len(data) != info.nbytes:
        raise ModelError(
            f"{model.path.name}: tensor {name} has {len(data):,} of {info.nbytes:,} bytes (changed while open?)"
        )
    return data


def content_ranges(model: ModelFile) -> content.Ranges:
    """The byte ranges that the fingerprint covers, for another process to check its file by."""
    return _ranges(model.header_nbytes, model.weights)


def _ranges(header_nbytes: int, weights: dict[str, WeightInfo]) -> content.Ranges:
    return content.ranges_of(header_nbytes, [(info.offset, info.nbytes) for info in weights.values()])
