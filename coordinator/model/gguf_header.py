"""Walk a GGUF header over untrusted bytes: metadata and tensor infos, each read only after it is known to be there."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from coordinator.model.hparams import WeightInfo
from protocol.dtypes import DType
from protocol.errors import ModelError

MetaValue = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]
"""A metadata value as plain Python."""

SUPPORTED: Final = frozenset({
    DType.F32, DType.F16, DType.BF16, DType.Q8_0, DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1,
    DType.Q4_K, DType.Q5_K, DType.Q6_K,
})  # fmt: skip
"""Types a weight may have."""

# A vocabulary of 262,144 tokens with merges, scores and types has about 1.1 million elements: the limits leave room
# and bound the memory that a hostile header can ask for.
MAX_ELEMENTS: Final = 8_000_000
MAX_STRING: Final = 16 << 20
MAX_KEY: Final = 1024
MAX_NAME: Final = 63
MAX_ALIGNMENT: Final = 1 << 20
DEFAULT_ALIGNMENT: Final = 32

_SCALARS: Final = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip
_MIN_KV: Final = 8 + 4 + 1  # an empty key, a type, one byte
_MIN_INFO: Final = 8 + 4 + 4 + 8  # an empty name, no extents, a type, an offset


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF header says; `nbytes` are the bytes before the tensor data."""

    metadata: dict[str, MetaValue]
    weights: dict[str, WeightInfo]
    alignment: int
    nbytes: int


class _Cursor:
    """A position in the file that never passes its end."""

    __slots__ = ("_data", "_elements", "file", "pos", "size")

    def __init__(self, data: mmap.mmap | bytes, file: str) -> None:
        self._data = data
        self._elements = MAX_ELEMENTS
        self.file = file
        self.pos = 0
        self.size = len(data)

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.file}: {what}")

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.pos:
            end = self.pos + nbytes
            raise self.fail(f"{what} ends at byte {end:,} but the file has {self.size:,} (truncated?)")

    def take(self, nbytes: int, what: str) -> bytes:
        self.need(nbytes, what)
        self.pos += nbytes
        return self._data[self.pos - nbytes : self.pos]

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def text(self, what: str, limit: int = MAX_STRING) -> str:
        length = self.u64(f"length of {what}")
        self.need(length, what)
        if length > limit:
            raise self.fail(f"{what} has {length:,} bytes: the limit is {limit:,}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 (byte {error.start} of {length})") from None

    def spend(self, count: int, what: str) -> None:
        """Count array elements against the limit of the whole header."""
        if count > self._elements:
            raise self.fail(f"{what} has {count:,} elements: more than {MAX_ELEMENTS:,} in all are not read")
        self._elements -= count


def read_header(data: mmap.mmap | bytes, file: str) -> Header:
    """Read a whole header. `file` names the file in errors, all of which are ModelErrors."""
    cursor = _Cursor(data, file)
    n_tensors, n_keys = _read_counts(cursor)
    metadata: dict[str, MetaValue] = {}
    for index in range(n_keys):
        key = cursor.text(f"metadata key {index} of {n_keys}", MAX_KEY)
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} occurs twice")
        metadata[key] = _read_value(cursor, f"metadata {key!r}")
    alignment = _alignment(cursor, metadata)
    _refuse_parts(cursor, metadata)
    raw = [_read_info(cursor, index, n_tensors) for index in range(n_tensors)]
    start = -(-cursor.pos // alignment) * alignment
    weights = _place(cursor, raw, start, alignment)
    return Header(metadata, weights, alignment, cursor.pos)


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.take(4, "magic")
    if magic != b"GGUF":
        raise cursor.fail(f"not a GGUF file: it begins with {magic!r}, expected b'GGUF'")
    version = cursor.u32("version")
    if version and version & 0xFFFF == 0:
        raise cursor.fail("a big-endian GGUF file: only little-endian ones are supported")
    if version not in (2, 3):
        raise cursor.fail(f"GGUF version {version}: expected 2 or 3")
    n_tensors, n_keys = cursor.u64("tensor count"), cursor.u64("metadata count")
    left = cursor.size - cursor.pos
    for count, least, what in ((n_tensors, _MIN_INFO, "tensors"), (n_keys, _MIN_KV, "metadata keys")):
        if count > left // least:
            raise cursor.fail(f"header announces {count:,} {what} but only {left:,} bytes follow (damaged?)")
    return n_tensors, n_keys


def _read_value(cursor: _Cursor, what: str) -> MetaValue:
    kind = _value_type(cursor, what)
    if kind == GGUFValueType.STRING:
        return cursor.text(what)
    if kind == GGUFValueType.ARRAY:
        return _read_array(cursor, what)
    value = _read_scalars(cursor, kind, 1, what)[0]
    assert isinstance(value, (int, float))
    return value


def _read_array(cursor: _Cursor, what: str) -> MetaValue:
    kind = _value_type(cursor, what)
    if kind == GGUFValueType.ARRAY:
        raise cursor.fail(f"{what} is an array of arrays: not supported")
    count = cursor.u64(f"length of {what}")
    least = 8 if kind == GGUFValueType.STRING else int(np.dtype(_SCALARS[kind]).itemsize)
    cursor.need(count * least, what)
    cursor.spend(count, what)
    if kind == GGUFValueType.STRING:
        return [cursor.text(f"{what}[{index}]") for index in range(count)]
    return _read_scalars(cursor, kind, count, what)


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    raw = cursor.u32(f"type of {what}")
    try:
        return GGUFValueType(raw)
    except ValueError:
        raise cursor.fail(f"{what} has the unknown value type {raw}: expected 0 to 12") from None


def _read_scalars(cursor: _Cursor, kind: GGUFValueType, count: int, what: str) -> list[int] | list[float] | list[bool]:
    dtype = np.dtype(_SCALARS[kind])
    values = np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype)
    if kind == GGUFValueType.BOOL:
        if (values > 1).any():
            raise cursor.fail(f"{what} is a bool of value {int(values.max())}: expected 0 or 1")
        return [bool(value) for value in values]
    result: list[int] | list[float] = values.tolist()
    return result


def _alignment(cursor: _Cursor, metadata: dict[str, MetaValue]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.fail(f"general.alignment is {value!r}: expected a power of two from 8 to {MAX_ALIGNMENT:,}")
    return value


def _refuse_parts(cursor: _Cursor, metadata: dict[str, MetaValue]) -> None:
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise cursor.fail(f"one of {parts} parts of a split model: merge them into one file first")


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    dtype: DType
    ne: tuple[int, int, int, int]
    offset: int
    nbytes: int


def _read_info(cursor: _Cursor, index: int, count: int) -> _Info:
    name = cursor.text(f"name of tensor {index} of {count}", MAX_NAME)
    if not name or not name.isprintable() or " " in name:
        raise cursor.fail(f"tensor {index} has the name {name!r}: expected printable characters without spaces")
    what = f"tensor {name}"
    n_dims = cursor.u32(f"rank of {what}")
    if n_dims > 4:
        raise cursor.fail(f"{what} has {n_dims:,} dimensions: expected at most 4")
    dims = [cursor.u64(f"extents of {what}") for _ in range(n_dims)]
    dtype = _weight_type(cursor, what)
    offset = cursor.u64(f"offset of {what}")
    elements = 1
    for extent in dims:
        elements *= extent
    if elements == 0 or elements >= 1 << 60:
        raise cursor.fail(f"{what} has the extents {dims}: expected at least 1 each and fewer than 2^60 elements")
    ne = (*dims, 1, 1, 1, 1)[:4]
    if ne[0] % dtype.block:
        raise cursor.fail(f"{what} has rows of {ne[0]:,} elements: {dtype.label} needs a multiple of {dtype.block}")
    assert len(ne) == 4
    return _Info(name, dtype, ne, offset, dtype.row_nbytes(elements))


def _weight_type(cursor: _Cursor, what: str) -> DType:
    raw = cursor.u32(f"type of {what}")
    if raw in DType.__members__.values() and DType(raw) in SUPPORTED:
        return DType(raw)
    name = GGMLQuantizationType(raw).name if raw in GGMLQuantizationType.__members__.values() else "unknown"
    supported = ", ".join(dtype.name for dtype in sorted(SUPPORTED))
    raise cursor.fail(f"{what} has the type {raw} ({name}): supported are {supported}")


def _place(cursor: _Cursor, infos: list[_Info], start: int, alignment: int) -> dict[str, WeightInfo]:
    """Absolute offsets, in file order; refuses tensors that leave the file, overlap or repeat a name."""
    weights: dict[str, WeightInfo] = {}
    before: _Info | None = None
    for info in sorted(infos, key=lambda info: info.offset):
        if info.name in weights:
            raise cursor.fail(f"tensor {info.name} occurs twice")
        if info.offset % alignment:
            raise cursor.fail(f"tensor {info.name} is at offset {info.offset:,}: not a multiple of {alignment}")
        end = start + info.offset + info.nbytes
        if end > cursor.size:
            raise cursor.fail(f"tensor {info.name} ends at byte {end:,} but the file has {cursor.size:,} (truncated?)")
        if before is not None and info.offset < before.offset + before.nbytes:
            raise cursor.fail(
                f"tensor {info.name} begins at byte {start + info.offset:,}, "
                f"inside tensor {before.name} that ends at {start + before.offset + before.nbytes:,}"
            )
        weights[info.name] = WeightInfo(info.name, info.dtype, info.ne, start + info.offset, info.nbytes)
        before = info
    return weights
