"""Requests and answers of a worker through shared memory: a box each way, and a doorbell to sleep on."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from protocol import board, sharedmem
from protocol.doorbell import Doorbells
from protocol.errors import ProtocolError, WorkerError
from protocol.limits import MAX_FRAMES
from protocol.messages import Done, Step
from protocol.wire import Buffer, Envelope, decode, encode

_MODULUS = 1 << 32
_POSTED, _TAKEN, _OPEN = 0, 16, 18  # words of a box: the writer's doorbell, the reader's count, is it in use
_SLOTS, N_SLOTS, _SLOT = 32, 32, 4  # slots of four words: number of the message, offset, bytes
_DATA = 1024  # bytes before the records
BOX_NBYTES = 1 << 20
CAPACITY = BOX_NBYTES - _DATA
"""Bytes of records that a box holds; what does not fit takes the socket."""

_IN_USE = 0x584D4258
_SPINS = 20
_FRAMES, _STEP, _DONE = 0, 1, 2  # what a record's first frame is: a prelude, or the numbers of a message
_HEAD = struct.Struct("<II")  # that, number of frames
_STEP_BODY = struct.Struct("<2q")
_DONE_BODY = struct.Struct("<7q")


def nbytes(n_workers: int) -> int:
    """Size of the run's shared memory: the board, then two boxes per worker."""
    return board.NBYTES + 2 * n_workers * BOX_NBYTES


class Writer:
    """The end of a box that posts. Messages are numbered from 1, whichever way they take."""

    def __init__(self, segment: sharedmem.Segment, offset: int) -> None:
        words = segment.view[offset : offset + _DATA].view(np.uint32)
        self._bells = Doorbells(words)
        self._cells = self._bells.cells
        self._data = segment.view[offset + _DATA : offset + BOX_NBYTES].data
        self._posted = self._end = 0

    def post(self, message: Any, buffers: Sequence[Buffer] = ()) -> bool:
        """Leave a message for the reader. False when there is no room: then it goes through the socket, `pass_by`.

        Raises ProtocolError when the message breaks its own limits.
        """
        taken = self._cells[_TAKEN]
        if taken == self._posted:
            self._end = 0  # everything was taken: the first bytes again, they are still in the cache
        elif (self._posted - taken) % _MODULUS >= N_SLOTS:
            return False
        kind, frames = _frames(message, buffers)
        lengths = [len(frame) for frame in frames]
        size = _HEAD.size + 4 * len(frames) + sum(lengths)
        if size > CAPACITY - self._end or len(frames) > MAX_FRAMES:
            return False
        start, number = self._end, (self._posted + 1) % _MODULUS
        at = start
        for piece in (_HEAD.pack(kind, len(frames)), struct.pack(f"<{len(frames)}I", *lengths), *frames):
            self._data[at : at + len(piece)] = piece
            at += len(piece)
        self._end = at + -at % 8
        cells, slot = self._cells, _SLOTS + _SLOT * (number % N_SLOTS)
        cells[slot + 1], cells[slot + 2] = start, size
        cells[slot] = number
        self.pass_by()
        return True

    def pass_by(self) -> None:
        """Count and announce a message; one that is not in the box was sent through the socket."""
        self._posted = (self._posted + 1) % _MODULUS
        self._bells.ring(_POSTED, self._posted)


class Reader:
    """The end of a box that takes, in the order of the numbers."""

    def __init__(self, segment: sharedmem.Segment, offset: int) -> None:
        words = segment.view[offset : offset + _DATA].view(np.uint32)
        self._bells = Doorbells(words)
        self._cells = self._bells.cells
        self._data = segment.view[offset + _DATA : offset + BOX_NBYTES].data
        self._taken = 0

    @property
    def waiting(self) -> bool:
        """There is a message, here or in the socket."""
        return self._cells[_POSTED] != self._taken

    @property
    def inside(self) -> bool:
        """The next message, there must be one, is here and not in the socket."""
        number = (self._taken + 1) % _MODULUS
        return self._cells[_SLOTS + _SLOT * (number % N_SLOTS)] == number

    def wait(self, timeout_s: float) -> bool:
        """Until there is a message, at most that long; False when there is none."""
        return self._bells.wait(_POSTED, self._taken, _SPINS, timeout_s)

    def take(self) -> Envelope:
        """The next message, which must be `inside`; its buffers are a copy.

        Raises ProtocolError on anything that is not a message: place, sizes and content are checked.
        """
        cells, slot = self._cells, _SLOTS + _SLOT * ((self._taken + 1) % _MODULUS % N_SLOTS)
        start, size = cells[slot + 1], cells[slot + 2]
        if size < _HEAD.size or start + size > CAPACITY:
            self.passed()
            raise ProtocolError(f"record of {size} bytes at {start} of a mailbox of {CAPACITY}")
        record = memoryview(bytes(self._data[start : start + size]))  # it cannot change any more
        self.passed()
        return _message(record)

    def passed(self) -> None:
        """Count a message that came through the socket."""
        self._taken = (self._taken + 1) % _MODULUS
        self._cells[_TAKEN] = self._taken


def _frames(message: Any, buffers: Sequence[Buffer]) -> tuple[int, list[Buffer]]:
    """What a record's first frame is, and its frames; the two messages of every step are plain numbers."""
    if type(message) is Step:
        return _STEP, [_STEP_BODY.pack(message.program, message.step), *buffers]
    if type(message) is Done and not message.digests:
        return _DONE, [
            _DONE_BODY.pack(
                message.program, message.step, message.total_ns, message.compute_ns, message.wait_ns, message.copy_ns,
                message.received_nbytes,
            ),
            *buffers,
        ]  # fmt: skip
    return _FRAMES, encode(message, buffers)


def _message(record: memoryview) -> Envelope:
    kind, n_frames = _HEAD.unpack_from(record)
    start = _HEAD.size + 4 * n_frames
    if not 1 <= n_frames <= MAX_FRAMES or start > len(record):
        raise ProtocolError(f"record of {n_frames} frames: expected 1 to {MAX_FRAMES} in {len(record)} bytes")
    lengths = struct.unpack_from(f"<{n_frames}I", record, _HEAD.size)
    if start + sum(lengths) != len(record):
        raise ProtocolError(f"frames of {sum(lengths)} bytes: the record has {len(record) - start}")
    frames = []
    for length in lengths:
        frames.append(record[start : start + length])
        start += length
    if kind == _FRAMES:
        return decode(frames)
    body = {_STEP: _STEP_BODY, _DONE: _DONE_BODY}.get(kind)
    if body is None:
        raise ProtocolError(f"record of unknown kind {kind}")
    if lengths[0] != body.size:
        raise ProtocolError(f"numbers of a record in {lengths[0]} bytes: expected {body.size}")
    message: Step | Done
    if kind == _STEP:
        message = Step(*body.unpack(frames[0]))
    else:
        program, step, total_ns, compute_ns, wait_ns, copy_ns, received_nbytes = body.unpack(frames[0])
        message = Done(program, step, total_ns, compute_ns, wait_ns, copy_ns, received_nbytes, ())
    return Envelope(message, tuple(frames[1:]))


class Mailbox:
    """One side's view of a worker's two boxes. Lives as long as the run."""

    def __init__(self, segment: sharedmem.Segment, worker: int, *, coordinator: bool) -> None:
        requests = board.NBYTES + 2 * worker * BOX_NBYTES
        answers = requests + BOX_NBYTES
        self.writer = Writer(segment, requests if coordinator else answers)
        self.reader = Reader(segment, answers if coordinator else requests)

    @classmethod
    def offer(cls, segment: sharedmem.Segment, worker: int) -> Mailbox:
        """The coordinator's side; from here on the worker may use it."""
        _in_use(segment, worker)[0] = _IN_USE
        return cls(segment, worker, coordinator=True)

    @classmethod
    def attach(cls, path: str, worker: int) -> Mailbox | None:
        """The worker's side, by the board's path; None where the coordinator offers none.

        Raises WorkerError when it cannot be mapped.
        """
        size = nbytes(worker + 1)
        try:
            if os.stat(path).st_size < size:
                return None
        except OSError as error:
            raise WorkerError(f"cannot open {path}: {error.strerror}") from None
        segment = sharedmem.attach(path, size, writable=True)
        if _in_use(segment, worker)[0] != _IN_USE:
            return None
        return cls(segment, worker, coordinator=False)


def _in_use(segment: sharedmem.Segment, worker: int) -> Any:
    start = board.NBYTES + 2 * worker * BOX_NBYTES
    return segment.view[start : start + _DATA].view(np.uint32)[_OPEN:]
