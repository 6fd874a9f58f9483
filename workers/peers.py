"""The data plane: how bytes get from one worker to another."""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import zmq

from protocol import sharedmem
from protocol.board import Board
from protocol.errors import ProtocolError
from protocol.messages import PeerArena
from protocol.program import Instruction, check_range
from protocol.shadow import n_words
from protocol.sockets import Context, connect, data_socket

Check = Callable[[], None]
"""Raises when received bytes were not those that were meant."""

COPIED_NBYTES = 512 << 10
"""Smaller bodies are copied when they are sent: that is quicker than to hear that ZeroMQ is through with the source."""

_HEAD = struct.Struct("<16sQIIQ")  # the run's tag, step, transfer, program, bytes


class Plane(Protocol):
    """Hand over, take, and wait until the other side has taken; `base` are addresses of the worker's own arenas."""

    def open(self, arenas: Sequence[PeerArena]) -> None:
        """Get ready to receive from these arenas of peers."""

    def retain(self, live: Collection[tuple[int, int]]) -> None:
        """Let go of all but these arenas (peer, arena): no program reads the others any more."""

    def check(self, item: Instruction) -> None:
        """Raise ProtocolError when a RECV would read outside of them."""

    def send(self, program: int, step: int, item: Instruction, base: int) -> None:
        """Make the source's bytes available to the peer."""

    def receive(self, program: int, step: int, item: Instruction, base: int, check: Check | None = None) -> None:
        """Block until the peer's bytes are in place; `check` is called before the peer may write over them."""

    def shadow(self, peer: int, arena: int) -> sharedmem.Segment | None:
        """The shadow of a peer's arena, None where its bytes cannot change under the receiver."""

    def wait(self, step: int, item: Instruction) -> None:
        """Block until nobody needs the source's bytes any more: the program may write over them."""

    def close(self) -> None:
        """Let go of everything."""


class SharedPlane:
    """One host: the receiver copies straight out of the sender's arena; the board says when, both ways."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.mapped: dict[tuple[int, int], sharedmem.Segment] = {}
        self.shadows: dict[tuple[int, int], sharedmem.Segment] = {}

    def open(self, arenas: Sequence[PeerArena]) -> None:
        """Map peers' arenas read-only. Raises WorkerError or ProtocolError when one is gone or too small."""
        for peer in arenas:
            known = self.mapped.get((peer.peer, peer.arena))
            if known is None or known.path != peer.path:
                self.mapped[peer.peer, peer.arena] = sharedmem.attach(peer.path, peer.nbytes)
                if peer.shadow_path:
                    shadow = sharedmem.attach(peer.shadow_path, 8 * n_words(peer.nbytes))
                    self.shadows[peer.peer, peer.arena] = shadow

    def retain(self, live: Collection[tuple[int, int]]) -> None:
        """Unmap the others: their memory is only given back when nobody maps it."""
        for key in self.mapped.keys() - set(live):
            self.mapped.pop(key).close()
            if key in self.shadows:
                self.shadows.pop(key).close()

    def check(self, item: Instruction) -> None:
        """The range that a RECV reads lies inside the peer's arena. Raises ProtocolError."""
        segment = self.mapped.get((item.peer, item.src[0]))
        sizes = {} if segment is None else {item.src[0]: segment.nbytes}
        check_range(sizes, item.src[0], item.src[1], item.nbytes, f"transfer {item.transfer}")

    def send(self, program: int, step: int, item: Instruction, base: int) -> None:
        """Publish: nothing is copied on this side."""
        self.board.publish(item.transfer, step)

    def receive(self, program: int, step: int, item: Instruction, base: int, check: Check | None = None) -> None:
        """Wait for the publication, copy once, check, acknowledge."""
        self.board.wait_published(item.transfer, step)
        source = self.mapped[item.peer, item.src[0]].address + item.src[1]
        sharedmem.copy(base + item.offset, source, item.nbytes)
        if check is not None:
            check()
        self.board.acknowledge(item.transfer, step)

    def shadow(self, peer: int, arena: int) -> sharedmem.Segment | None:
        """Mapped with the arena."""
        return self.shadows.get((peer, arena))

    def wait(self, step: int, item: Instruction) -> None:
        """Wait for the receiver's acknowledgement."""
        self.board.wait_acknowledged(item.transfer, step)

    def close(self) -> None:
        """Unmap."""
        for segment in (*self.mapped.values(), *self.shadows.values()):
            segment.close()
        self.mapped.clear()
        self.shadows.clear()


class SignalPlane(SharedPlane):
    """As SharedPlane without the bytes: for backends that have no memory."""

    def open(self, arenas: Sequence[PeerArena]) -> None:
        """Nothing to map."""

    def check(self, item: Instruction) -> None:
        """Nothing to read."""

    def receive(self, program: int, step: int, item: Instruction, base: int, check: Check | None = None) -> None:
        """Wait for the publication, acknowledge."""
        self.board.wait_published(item.transfer, step)
        self.board.acknowledge(item.transfer, step)


class MessagePlane:
    """Any transport: bytes travel as ZeroMQ frames, large ones straight out of the sender's arena.

    A large body is on loan until ZeroMQ has handed all of it to the system, which takes the peer's process to live but
    not its program to get anywhere. Its frame holds on to the memory: should an arena be released or a socket be closed
    meanwhile, nobody waits, and the pages go when the frame does. Frames carry a tag that only this run's processes
    know. A frame that arrives before its turn waits here. `segments` are the worker's own arenas.
    """

    def __init__(
        self,
        inbox: zmq.Socket[bytes],
        outboxes: Sequence[zmq.Socket[bytes] | None],
        token: str,
        segments: Mapping[int, sharedmem.Segment],
        *,
        virtual: bool,
    ) -> None:
        self.inbox, self.outboxes, self.segments, self.virtual = inbox, outboxes, segments, virtual
        self.tag = hashlib.sha256(token.encode()).digest()[:16]
        self.early: dict[tuple[int, int], tuple[int, zmq.Frame]] = {}  # by step and transfer: program and body
        self.lent: dict[int, zmq.MessageTracker] = {}  # by transfer: what ZeroMQ may still read

    def open(self, arenas: Sequence[PeerArena]) -> None:
        """Nothing to map."""

    def retain(self, live: Collection[tuple[int, int]]) -> None:
        """Nothing is mapped."""

    def check(self, item: Instruction) -> None:
        """Sizes are checked on arrival."""

    def send(self, program: int, step: int, item: Instruction, base: int) -> None:
        """Send the bytes: a copy of them, or themselves until `wait`."""
        outbox = self.outboxes[item.peer]
        assert outbox is not None, item
        head = _HEAD.pack(self.tag, step, item.transfer, program, 0 if self.virtual else item.nbytes)
        body = b"" if self.virtual else self.segments[item.arena].view[item.offset : item.offset + item.nbytes].data
        if len(body) < COPIED_NBYTES:
            outbox.send_multipart((head, body))
            return
        frame = zmq.Frame(body, track=True, copy=False)
        outbox.send_multipart((head, frame))
        assert frame.tracker is not None
        self.lent[item.transfer] = frame.tracker

    def receive(self, program: int, step: int, item: Instruction, base: int, check: Check | None = None) -> None:
        """Wait for the frame and copy it into place. Raises ProtocolError when it is not the planned one: another
        program's, or of another size."""
        while (found := self.early.pop((step, item.transfer), None)) is None:
            self._take(step)
        of_program, body = found
        if of_program != program:
            raise ProtocolError(f"transfer {item.transfer}: expected one of program {program}, got {of_program}'s")
        if self.virtual:
            return
        if len(body) != item.nbytes:
            raise ProtocolError(f"transfer {item.transfer}: expected {item.nbytes} bytes, got {len(body)}")
        _view(base + item.offset, item.nbytes)[:] = body.buffer
        if check is not None:
            check()

    def wait(self, step: int, item: Instruction) -> None:
        """Wait until ZeroMQ reads the source no more; of a peer that died, until somebody ends this process."""
        tracker = self.lent.pop(item.transfer, None)
        if tracker is not None:
            tracker.wait()

    def shadow(self, peer: int, arena: int) -> sharedmem.Segment | None:
        """The sender has checked its bytes, and does not write over them before `wait`."""
        return None

    def close(self) -> None:
        """Close the sockets; what is not sent within their linger period is dropped, and its memory let go of."""
        for socket in (self.inbox, *self.outboxes):
            if socket is not None:
                socket.close()

    def _take(self, step: int) -> None:
        """Put one message aside under its step and transfer; strangers' and past steps' are dropped.

        Raises ProtocolError when it is not as long as it says.
        """
        frames = self.inbox.recv_multipart(copy=False)
        if len(frames) != 2 or len(frames[0]) != _HEAD.size:
            return
        tag, of_step, transfer, program, nbytes = _HEAD.unpack(frames[0].buffer)
        if tag != self.tag or of_step < step:
            return
        if len(frames[1]) != nbytes:
            raise ProtocolError(f"transfer {transfer}: {nbytes} bytes are announced, {len(frames[1])} have come")
        self.early[of_step, transfer] = program, frames[1]


def open_outboxes(context: Context, endpoints: Sequence[str], own: int, secret: str) -> list[zmq.Socket[bytes] | None]:
    """A PUSH socket to each peer, None at our own index."""
    sockets: list[zmq.Socket[bytes] | None] = []
    for index, endpoint in enumerate(endpoints):
        socket = data_socket(context, zmq.PUSH) if index != own else None
        if socket is not None:
            connect(socket, endpoint, secret)
        sockets.append(socket)
    return sockets


def _view(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
