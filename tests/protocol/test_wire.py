"""What is sent arrives, and everything else is a ProtocolError: never another exception, never much memory."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import tracemalloc
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages as m
from protocol.errors import BY_CODE, CrossdockError, ProtocolError
from protocol.limits import MAX_FRAMES, MAX_HEADER_NBYTES, MAX_ITEMS, MAX_TEXT
from protocol.version import MAGIC, MAJOR
from protocol.wire import PRELUDE, Envelope, decode, encode

TEXT = st.text(st.characters(codec="utf-8"), max_size=40) | st.just("m\udce4rz.gguf")  # a path that is no UTF-8


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotation in messages."""
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=4).map(tuple)
    if dataclasses.is_dataclass(hint):
        return st.builds(hint, **{name: values(h) for name, h in get_type_hints(hint).items()})
    return {int: st.integers(-(1 << 63), (1 << 63) - 1), str: TEXT, bool: st.booleans()}[hint]


MESSAGES = st.sampled_from(sorted(m.KINDS)).flatmap(lambda kind: values(m.KINDS[kind]))
BUFFERS = st.lists(st.binary(max_size=64), max_size=4)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


def framed(header: bytes, *buffers: bytes, magic: bytes = MAGIC, major: int = MAJOR) -> list[bytes]:
    return [PRELUDE.pack(magic, major, len(buffers), len(header)), header, *buffers]


@given(MESSAGES, BUFFERS)
def test_round_trip(message: Any, buffers: list[bytes]) -> None:
    frames = [bytes(frame) for frame in encode(message, buffers)]
    assert decode(frames) == Envelope(message, tuple(memoryview(b) for b in buffers))


def refused(frames: list[Any], *words: str) -> str:
    with pytest.raises(ProtocolError) as info:
        decode(frames)
    line = str(info.value)
    assert "\n" not in line
    assert len(line) < 400
    for word in words:
        assert word in line
    return line


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=40), max_size=6))
def test_random_frames(frames: list[bytes]) -> None:
    refused(frames)


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_random_header(header: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(framed(header))


@settings(max_examples=100)
@given(st.sampled_from(sorted(m.KINDS)), st.data())
def test_wrong_fields(kind: str, data: st.DataObject) -> None:
    """A sound message with one field replaced, removed or added."""
    message = data.draw(values(m.KINDS[kind]))
    plain = msgpack.unpackb(bytes(encode(message)[1]), unicode_errors="surrogateescape")
    name = data.draw(st.sampled_from(sorted(plain)) | st.text(max_size=5))
    if data.draw(st.booleans()):
        plain.pop(name, None)
    else:
        plain[name] = data.draw(JUNK)
    header = msgpack.packb(plain, unicode_errors="surrogateescape")
    with contextlib.suppress(ProtocolError):
        envelope = decode(framed(header))
        again = encode(envelope.message)  # what got through is of the declared types
        assert decode([bytes(frame) for frame in again]) == envelope


@settings(max_examples=100)
@given(MESSAGES, BUFFERS, st.data())
def test_flipped_bytes(message: Any, buffers: list[bytes], data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode(message, buffers)]
    frame = frames[data.draw(st.integers(0, 1))]
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ProtocolError):
        decode(frames)


GOOD = [bytes(frame) for frame in encode(m.Loaded(1, 2))]
FAULTS: dict[str, tuple[list[bytes], tuple[str, ...]]] = {
    "nothing": ([], ("0 frames", "2 to 4096")),
    "one frame": (GOOD[:1], ("1 frames",)),
    "too many frames": ([*GOOD, *[b""] * MAX_FRAMES], (str(MAX_FRAMES + 2), "4096")),
    "an unannounced buffer": ([*GOOD, b""], ("0 buffers", "got 1")),
    "a missing buffer": (framed(GOOD[1], b"x")[:2], ("1 buffers", "got 0")),
    "a short prelude": ([GOOD[0][:-1], GOOD[1]], ("prelude of",)),
    "another magic": (framed(GOOD[1], magic=b"HTTP"), ("HTTP", "XDOK")),
    "another version": (framed(GOOD[1], major=MAJOR + 1), (f"version {MAJOR + 1}", f"expected {MAJOR}")),
    "a truncated header": (framed(GOOD[1][:-1]), ("not msgpack",)),
    "a header with a tail": (framed(GOOD[1] + b"\0"), ("not msgpack",)),
    "a header over the limit": (framed(b"\xc0" * (MAX_HEADER_NBYTES + 1)), (str(MAX_HEADER_NBYTES),)),
    "a list": (framed(msgpack.packb([1])), ("no message kind",)),
    "no kind": (framed(msgpack.packb({"arena": 1})), ("no message kind",)),
    "an unknown kind": (framed(msgpack.packb({"t": "reboot"})), ("reboot",)),
    "an unhashable key": (framed(b"\x81\x91\x01\x01"), ("not msgpack",)),
    "a key twice over": (framed(b"\x82\xa1t\xa6loaded\xa1t\x01"), ("no message kind",)),
    "deep nesting": (framed(b"\x91" * 100_000), ("not msgpack",)),
    "an extension type": (framed(msgpack.packb(msgpack.ExtType(4, b"code"))), ("not msgpack",)),
    "a list that claims to be huge": (framed(b"\xdd\xff\xff\xff\xff"), ("not msgpack",)),
    "a text that claims to be huge": (framed(b"\xdb\xff\xff\xff\xff"), ("not msgpack",)),
    "a number as text": (framed(msgpack.packb({"t": "mapped", "arena": "1"})), ("mapped.arena", "int", "str")),
    "NaN as a number": (framed(msgpack.packb({"t": "mapped", "arena": float("nan")})), ("mapped.arena", "float")),
    "a truth as a number": (framed(msgpack.packb({"t": "mapped", "arena": True})), ("mapped.arena", "bool")),
    "a number of 64 bits unsigned": (framed(msgpack.packb({"t": "mapped", "arena": 1 << 63})), ("64 bits",)),
    "a long text": (
        framed(msgpack.packb({"t": "refused", "reason": "x" * (MAX_TEXT + 1)})), ("refused.reason", str(MAX_TEXT)),
    ),
    "a long list": (
        framed(msgpack.packb({"t": "release", "arenas": [0] * (MAX_ITEMS + 1)})), ("not msgpack",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    frames, words = FAULTS[name]
    refused(frames, *words)


@pytest.mark.slow
def test_bomb_stays_small() -> None:
    """A header of the greatest size, made of what takes the most memory once it is unpacked: empty maps."""
    item = b"\x80"
    block = b"\xdc" + struct.pack(">H", 65535) + item * 65535
    count = (MAX_HEADER_NBYTES - 20) // len(block)
    frames = framed(b"\x82\xa1t\xa6loaded\xa1x\x91\x91\xdd" + struct.pack(">I", count) + block * count)
    tracemalloc.start()
    refused(frames)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20


def test_message_over_its_limits_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="too large"):
        encode(m.Step(0, 0), [b""] * MAX_FRAMES)
    with pytest.raises(ProtocolError, match="too large"):
        encode(m.Done(0, 0, 0, 0, 0, 0, 0, ("x" * MAX_TEXT,) * 1000))


@pytest.mark.parametrize("code", [*BY_CODE, "from another version"])
def test_failed_becomes_its_error(code: str) -> None:
    error = m.Failed(code, "accel0: no").error()
    assert type(error) is BY_CODE.get(code, CrossdockError)
    assert str(error) == "accel0: no"
