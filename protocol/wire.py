"""Messages as ZeroMQ frames: prelude, msgpack header, raw buffers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from protocol import messages
from protocol.errors import ProtocolError
from protocol.limits import MAX_BUFFER_NBYTES, MAX_FRAMES, MAX_HEADER_NBYTES, MAX_ITEMS, MAX_TEXT
from protocol.schema import from_plain, to_plain
from protocol.version import MAGIC, MAJOR

Buffer = bytes | bytearray | memoryview
PRELUDE = struct.Struct("<4sHHI")
"""Magic, major version, buffer count, header bytes."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A received message and its raw buffers (read-only views, of any alignment)."""

    message: Any
    buffers: tuple[memoryview, ...] = field(default=())


def encode(message: Any, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """Frames of a message; buffers are not copied.

    Raises ProtocolError when the message breaks its own limits.
    """
    plain = {"t": type(message).KIND, **to_plain(message)}
    # paths may hold bytes that are no UTF-8: they travel as they are
    header = msgpack.packb(plain, use_bin_type=True, strict_types=True, unicode_errors="surrogateescape")
    if len(header) > MAX_HEADER_NBYTES or len(buffers) > MAX_FRAMES - 2:
        raise ProtocolError(f"message {plain['t']!r} is too large: {len(header)} header bytes, {len(buffers)} buffers")
    return [PRELUDE.pack(MAGIC, MAJOR, len(buffers), len(header)), header, *buffers]


def decode(frames: Sequence[Buffer]) -> Envelope:
    """The message in frames.

    Raises ProtocolError on anything that is not exactly a message of this version: magic, version, frame count, sizes,
    header, kind and every field are checked before use.
    """
    if not 2 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"message of {len(frames)} frames: expected 2 to {MAX_FRAMES}")
    if len(frames[0]) != PRELUDE.size:
        raise ProtocolError(f"prelude of {len(frames[0])} bytes: expected {PRELUDE.size}")
    magic, major, n_buffers, n_header = PRELUDE.unpack(frames[0])
    if magic != MAGIC:
        raise ProtocolError(f"magic {bytes(magic)!r}: expected {MAGIC!r}")
    if major != MAJOR:
        raise ProtocolError(f"protocol version {major}: expected {MAJOR}")
    if n_buffers != len(frames) - 2 or n_header != len(frames[1]):
        raise ProtocolError(
            f"prelude promises {n_buffers} buffers and {n_header} header bytes, "
            f"got {len(frames) - 2} and {len(frames[1])}"
        )
    if n_header > MAX_HEADER_NBYTES:
        raise ProtocolError(f"header of {n_header} bytes: at most {MAX_HEADER_NBYTES}")
    for frame in frames[2:]:
        if len(frame) > MAX_BUFFER_NBYTES:
            raise ProtocolError(f"buffer of {len(frame)} bytes: at most {MAX_BUFFER_NBYTES}")
    return Envelope(_message(frames[1]), tuple(memoryview(frame).toreadonly() for frame in frames[2:]))


def _message(header: Buffer) -> Any:
    try:
        plain = msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            unicode_errors="surrogateescape",
            max_str_len=MAX_TEXT * 4,
            max_bin_len=MAX_TEXT,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises a dozen unrelated classes on bad bytes
        raise ProtocolError(f"header is not msgpack: {type(error).__name__}") from None
    if not isinstance(plain, dict) or not isinstance(plain.get("t"), str):
        raise ProtocolError("header names no message kind")
    kind = plain.pop("t")
    cls = messages.KINDS.get(kind)
    if cls is None:
        raise ProtocolError(f"unknown message {kind[:40]!r}")
    return from_plain(cls, plain, kind)
