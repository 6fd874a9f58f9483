"""Assemble GGUF files byte by byte, damaged ones included."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def kv(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def kv_u32(key: str, value: int) -> bytes:
    return kv(key, U32, struct.pack("<I", value))


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def info(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    rank = len(dims) if n_dims is None else n_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", rank, *dims, kind, offset)


def gguf(
    kvs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: int = 4096,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_kvs: int | None = None,
    n_infos: int | None = None,
    alignment: int = 32,
) -> bytes:
    n_infos = len(infos) if n_infos is None else n_infos
    n_kvs = len(kvs) if n_kvs is None else n_kvs
    head = magic + struct.pack("<IQQ", version, n_infos, n_kvs) + b"".join(kvs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + bytes(range(256)) * (data // 256) + bytes(data % 256)


def valid() -> bytes:
    """A small sound file that ends with its last tensor's last byte."""
    kvs = [
        kv("general.architecture", STRING, string("llama")),
        kv("general.name", STRING, string("Zwerg ☃")),
        kv_u32("llama.block_count", 1),
        kv("a.float", F32, struct.pack("<f", 0.5)),
        kv("a.double", F64, struct.pack("<d", 0.1)),
        kv("a.signed", I64, struct.pack("<q", -7)),
        kv("a.flag", BOOL, b"\x01"),
        kv("an.array", ARRAY, array(I16, 3, struct.pack("<3h", -1, 0, 1))),
        kv("some.strings", ARRAY, array(STRING, 2, string("a") + string(""))),
        kv("no.strings", ARRAY, array(STRING, 0, b"")),
    ]
    infos = [info("second.weight", [32, 2], 8, 128), info("first.weight", [8, 4], 0, 0)]
    return gguf(kvs, infos, 128 + 68)
