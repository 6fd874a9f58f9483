"""Requests and answers of a worker through shared memory: a box each way, and a doorbell to sleep on."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from protocol import board, sharedmem
from protocol.doorbell import Doorbells, Patience
from protocol.errors import ProtocolError, WorkerError
from protocol.limits import MAX_FRAMES
from protocol.messages import Done, Step
from protocol.wire import Buffer, Envelope, decode, encode

_MODULUS = 1 << 32
POSTED, TAKEN, _OPEN = 0, 16, 18  # words of a box: the writer's doorbell, the reader's count, is it in use
SLOTS, N_SLOTS, SLOT = 32, 32, 4  # slots of four words: number of the message, offset, bytes
DATA = 1024  # bytes before the records
BOX_NBYTES = 1 << 20
CAPACITY = BOX_NBYTES - DATA
"""Bytes of records that a box holds; what does not fit takes the socket."""

_IN_USE = 0x584D4258
_FRAMES, STEP, DONE = 0, 1, 2  # what a record's first frame is: a prelude, or the numbers of a message
_HEAD = struct.Struct("<II")  # that, number of frames
HEAD_NBYTES = _HEAD.size
_STEP_BODY = struct.Struct("<2q")
_DONE_BODY = struct.Struct("<7q")
_BODIES = {STEP: _STEP_BODY, DONE: _DONE_BODY}


def nbytes(n_workers: int) -> int:
    """Size of the run's shared memory: the board, then two boxes per worker."""
    return board.NBYTES + 2 * n_workers * BOX_NBYTES


class StepRecord:
    """A step's message as it lies in a box, laid out once for a program: `inputs` are written in place, all of them."""

    def __init__(self, program: int, sizes: Sequence[int]) -> None:
        """`sizes` are the inputs' bytes."""
        lengths = (_STEP_BODY.size, *sizes)
        self.program = program
        self.data = bytearray(_HEAD.pack(STEP, len(lengths)) + struct.pack(f"<{len(lengths)}I", *lengths))
        self._body = at = len(self.data)
        self.data.extend(bytes(sum(lengths)))
        at += _STEP_BODY.size
        self.inputs: list[memoryview] = []
        for nbytes in sizes:
            self.inputs.append(memoryview(self.data)[at : at + nbytes])
            at += nbytes

    def set_step(self, step: int) -> None:
        """The message's step."""
        _STEP_BODY.pack_into(self.data, self._body, self.program, step)

    def message(self) -> Step:
        """For the socket, with `inputs` as its buffers."""
        return Step(*_STEP_BODY.unpack_from(self.data, self._body))


class _Box:
    """An end of a box; `address` is the box's."""

    def __init__(self, segment: sharedmem.Segment, offset: int) -> None:
        words = segment.view[offset : offset + DATA].view(np.uint32)
        self.address = int(words.ctypes.data)
        self._bells = Doorbells(words)
        self._cells = self._bells.cells
        self._data = segment.view[offset + DATA : offset + BOX_NBYTES].data


class Writer(_Box):
    """The end of a box that posts. Messages are numbered from 1, whichever way they take.

    `posted` and `end`, the number of the last message and where its record ends, may be gone on with by compiled code.
    """

    def __init__(self, segment: sharedmem.Segment, offset: int) -> None:
        super().__init__(segment, offset)
        self.posted = self.end = 0

    def post(self, message: Any, buffers: Sequence[Buffer] = ()) -> bool:
        """Leave a message for the reader. False when there is no room: then it goes through the socket, `pass_by`.

        Raises ProtocolError when the message breaks its own limits.
        """
        if not self._has_slot():
            return False
        kind, frames = _frames(message, buffers)
        lengths = [len(frame) for frame in frames]
        size = _HEAD.size + 4 * len(frames) + sum(lengths)
        if size > CAPACITY - self.end or len(frames) > MAX_FRAMES:
            return False
        at = self.end
        for piece in (_HEAD.pack(kind, len(frames)), struct.pack(f"<{len(frames)}I", *lengths), *frames):
            self._data[at : at + len(piece)] = piece
            at += len(piece)
        self._announce(size)
        return True

    def post_step(self, record: StepRecord) -> bool:
        """As `post`."""
        size = len(record.data)
        if not self._has_slot() or size > CAPACITY - self.end:
            return False
        self._data[self.end : self.end + size] = record.data
        self._announce(size)
        return True

    def _has_slot(self) -> bool:
        taken = self._cells[TAKEN]
        if taken == self.posted:
            self.end = 0  # everything was taken: the first bytes again, they are still in the cache
            return True
        return (self.posted - taken) % _MODULUS < N_SLOTS

    def _announce(self, size: int) -> None:
        number = (self.posted + 1) % _MODULUS
        cells, slot = self._cells, SLOTS + SLOT * (number % N_SLOTS)
        cells[slot + 1], cells[slot + 2] = self.end, size
        cells[slot] = number
        self.end += size + -size % 8
        self.pass_by()

    def pass_by(self) -> None:
        """Count and announce a message; one that is not in the box was sent through the socket."""
        self.posted = (self.posted + 1) % _MODULUS
        self._bells.ring(POSTED, self.posted)


class Reader(_Box):
    """The end of a box that takes, in the order of the numbers; `taken` is that of the last one (see Writer)."""

    def __init__(self, segment: sharedmem.Segment, offset: int) -> None:
        super().__init__(segment, offset)
        self.taken = 0
        self._patience = Patience()

    @property
    def waiting(self) -> bool:
        """There is a message, here or in the socket."""
        return self._cells[POSTED] != self.taken

    @property
    def inside(self) -> bool:
        """The next message, there must be one, is here and not in the socket."""
        number = (self.taken + 1) % _MODULUS
        return self._cells[SLOTS + SLOT * (number % N_SLOTS)] == number

    def wait(self, timeout_s: float, patience: Patience | None = None) -> bool:
        """Until there is a message, at most that long; False when there is none.

        `patience` is what was learnt from messages like the one that is awaited.
        """
        return self._bells.wait(POSTED, self.taken, patience or self._patience, timeout_s)

    def take(self) -> Envelope:
        """The next message, which must be `inside`; its buffers are a copy.

        Raises ProtocolError on anything that is not a message: place, sizes and content are checked.
        """
        cells, slot = self._cells, SLOTS + SLOT * ((self.taken + 1) % _MODULUS % N_SLOTS)
        start, size = cells[slot + 1], cells[slot + 2]
        if size < _HEAD.size or start + size > CAPACITY:
            self.passed()
            raise ProtocolError(f"record of {size} bytes at {start} of a mailbox of {CAPACITY}")
        record = memoryview(bytes(self._data[start : start + size]))  # it cannot change any more
        self.passed()
        return _message(record)

    def passed(self) -> None:
        """Count a message that came through the socket."""
        self.taken = (self.taken + 1) % _MODULUS
        self._cells[TAKEN] = self.taken


def _frames(message: Any, buffers: Sequence[Buffer]) -> tuple[int, list[Buffer]]:
    """What a record's first frame is, and its frames; the two messages of every step are plain numbers."""
    if type(message) is Step:
        return STEP, [_STEP_BODY.pack(message.program, message.step), *buffers]
    if type(message) is Done and not message.digests:
        return DONE, [
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
    body = _BODIES.get(kind)
    if body is None:
        raise ProtocolError(f"record of unknown kind {kind}")
    if lengths[0] != body.size:
        raise ProtocolError(f"numbers of a record in {lengths[0]} bytes: expected {body.size}")
    if kind == STEP:
        return Envelope(Step(*body.unpack(frames[0])), tuple(frames[1:]))
    program, step, total_ns, compute_ns, wait_ns, copy_ns, received_nbytes = body.unpack(frames[0])
    done = Done(program, step, total_ns, compute_ns, wait_ns, copy_ns, received_nbytes, ())
    return Envelope(done, tuple(frames[1:]))


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
    return segment.view[start : start + DATA].view(np.uint32)[_OPEN:]
