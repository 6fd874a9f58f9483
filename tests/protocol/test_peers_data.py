"""What other steps left never counts: doorbells of an earlier one, messages that are early, late or from strangers."""

from __future__ import annotations

import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import zmq

from protocol import sharedmem, sockets
from protocol.board import Board
from protocol.errors import ProtocolError
from protocol.messages import PeerArena
from protocol.program import Instruction, Kind
from tests.patience import LATE_S, comes_true
from workers.arena import Arenas
from workers.peers import _HEAD, COPIED_NBYTES, MessagePlane, SharedPlane

SOON_S = 0.05
NBYTES = 64
LARGE, N_LARGE = 4 << 20, 8


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="xd-", dir="/tmp") as path:  # short enough for a socket
        yield path


@contextmanager
def background(target: object, *args: object) -> Iterator[threading.Thread]:
    """A thread that must have ended when the block has."""
    thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
    thread.start()
    yield thread
    thread.join(LATE_S)
    assert not thread.is_alive()


# ---- the board


@pytest.mark.parametrize("step", [2, 1 << 31, (1 << 32) + 5])
def test_a_doorbell_of_another_step_does_not_count(directory: str, step: int) -> None:
    board = Board.create(directory)
    for wait, ring in ((board.wait_published, board.publish), (board.wait_acknowledged, board.acknowledge)):
        ring(3, step - 1)
        with background(wait, 3, step) as waiting:
            waiting.join(SOON_S)
            assert waiting.is_alive()
            ring(4, step)
            waiting.join(SOON_S)
            assert waiting.is_alive()
            ring(3, step)
    board.segment.close()


def test_publication_and_acknowledgement_are_two_doorbells(directory: str) -> None:
    board = Board.create(directory)
    board.publish(0, 7)
    with background(board.wait_acknowledged, 0, 7) as waiting:
        waiting.join(SOON_S)
        assert waiting.is_alive()
        board.acknowledge(0, 7)
    board.segment.close()


# ---- shared memory


def test_a_receiver_copies_between_publication_and_acknowledgement(directory: str) -> None:
    """Bytes written before the publication arrive, and those written after the acknowledgement do not."""
    board, source = Board.create(directory), sharedmem.create(NBYTES, directory, "source")
    target = np.zeros(NBYTES, np.uint8)
    plane = SharedPlane(board)
    plane.open([PeerArena(1, 9, source.path, NBYTES, "")])
    item = Instruction(Kind.RECV, 2, 1, 0, 5, 0, NBYTES, (9, 0))
    source.view[:NBYTES] = 1
    for step in (1, 2):
        with background(plane.receive, 0, step, item, int(target.ctypes.data)):
            source.view[:NBYTES] = 10 + step
            plane.send(0, step, item, 0)
            plane.wait(step, item)
            source.view[:NBYTES] = 0
        assert set(target.tolist()) == {10 + step}
    plane.close()
    source.close()
    board.segment.close()


# ---- messages

ARENA, SLOT = 1, 2  # where bytes are sent from, and where they are received


class Mail:
    """A receiver, and two senders, a peer of the run and one of another run; all have the same arenas.

    Until `open` nobody takes anything: what is sent waits within ZeroMQ.
    """

    def __init__(self, directory: str) -> None:
        self.context, self.directory = sockets.new_context(), directory
        self.arenas = Arenas(directory, "w", limit=None, shared=False, virtual=False)
        for arena in (ARENA, SLOT):
            self.arenas.allocate(arena, N_LARGE * LARGE, "arena")
        self.data, self.slot = (self.arenas.segments[arena].view for arena in (ARENA, SLOT))
        self.inbox = sockets.data_socket(self.context, zmq.PULL)
        self.inbox.setsockopt(zmq.RCVTIMEO, int(LATE_S * 1000))
        self.receiver = MessagePlane(self.inbox, [None], "ours", self.arenas.segments, virtual=False)
        self.peer, self.stranger = self._sender("ours"), self._sender("theirs")

    def open(self) -> None:
        """From now on messages arrive."""
        assert sockets.bind(self.inbox, "ipc", self.directory, "inbox") == self._endpoint

    @property
    def _endpoint(self) -> str:
        return f"ipc://{self.directory}/inbox.sock"

    def _sender(self, token: str) -> MessagePlane:
        outbox = sockets.data_socket(self.context, zmq.PUSH)
        sockets.connect(outbox, self._endpoint, "")
        idle = sockets.data_socket(self.context, zmq.PULL)
        return MessagePlane(idle, [outbox], token, self.arenas.segments, virtual=False)

    def send(self, plane: MessagePlane, step: int, transfer: int, value: int, nbytes: int = NBYTES) -> Instruction:
        """Large ones each from a place of their own, by transfer."""
        item = Instruction(Kind.SEND, transfer, 0, 0, ARENA, transfer * LARGE, nbytes)
        self.data[item.offset : item.offset + nbytes] = value
        plane.send(0, step, item, 0)
        return item

    def send_small(self, plane: MessagePlane, step: int, transfer: int, value: int, nbytes: int = NBYTES) -> None:
        item = self.send(plane, step, transfer, value, nbytes)
        self.data[item.offset : item.offset + nbytes] = 0  # a small slot is free at once
        plane.wait(step, item)

    def receive(self, step: int, transfer: int, nbytes: int = NBYTES) -> int:
        item = Instruction(Kind.RECV, transfer, 0, 0, SLOT, 0, nbytes, (ARENA, 0))
        self.receiver.receive(0, step, item, int(self.slot.ctypes.data))
        (value,) = np.unique(self.slot[:nbytes])
        return int(value)

    def close(self) -> None:
        for plane in (self.receiver, self.peer, self.stranger):
            plane.close()
        self.context.term()


@pytest.fixture
def held(directory: str) -> Iterator[Mail]:
    made = Mail(directory)
    yield made
    made.close()


@pytest.fixture
def mail(held: Mail) -> Mail:
    held.open()
    return held


def test_messages_wait_for_their_step_and_transfer(mail: Mail) -> None:
    for step, transfer in ((3, 1), (4, 0), (3, 0), (4, 1)):
        mail.send_small(mail.peer, step, transfer, 10 * step + transfer)
    assert [mail.receive(3, 0), mail.receive(3, 1), mail.receive(4, 1), mail.receive(4, 0)] == [30, 31, 41, 40]


def nothing_comes(mail: Mail) -> None:
    mail.inbox.setsockopt(zmq.RCVTIMEO, int(SOON_S * 1000))
    with pytest.raises(zmq.Again):
        mail.receive(3, 0)
    mail.inbox.setsockopt(zmq.RCVTIMEO, int(LATE_S * 1000))


def test_messages_of_an_earlier_step_are_dropped(mail: Mail) -> None:
    mail.send_small(mail.peer, 2, 0, 99)
    nothing_comes(mail)
    mail.send_small(mail.peer, 3, 0, 30)
    assert mail.receive(3, 0) == 30


def test_messages_of_another_run_are_dropped(mail: Mail) -> None:
    mail.send_small(mail.stranger, 3, 0, 99)
    nothing_comes(mail)
    mail.send_small(mail.peer, 3, 0, 30)
    assert mail.receive(3, 0) == 30


def test_message_of_another_size_is_refused(mail: Mail) -> None:
    mail.send_small(mail.peer, 3, 0, 1, nbytes=NBYTES - 1)
    with pytest.raises(ProtocolError, match="transfer 0: expected 64 bytes, got 63"):
        mail.receive(3, 0)


def test_message_of_another_program_is_refused(mail: Mail) -> None:
    """Programs number their transfers alike."""
    mail.peer.send(5, 3, Instruction(Kind.SEND, 0, 0, 0, ARENA, 0, NBYTES), 0)
    with pytest.raises(ProtocolError, match="transfer 0: expected one of program 0, got 5's"):
        mail.receive(3, 0)


@pytest.mark.parametrize("announced", [0, NBYTES - 1, NBYTES + 1, (1 << 64) - 1])
def test_message_that_is_not_as_long_as_it_says_is_refused(mail: Mail, announced: int) -> None:
    outbox = mail.peer.outboxes[0]
    assert outbox is not None
    outbox.send_multipart((_HEAD.pack(mail.peer.tag, 3, 0, 0, announced), bytes(NBYTES)))
    with pytest.raises(ProtocolError, match=f"transfer 0: {announced} bytes are announced, 64 have come"):
        mail.receive(3, 0)


# ---- messages that are read where they lie


def test_a_large_body_is_not_copied_by_its_sender(held: Mail) -> None:
    """What is written into it while ZeroMQ holds it back arrives, and `wait` returns no sooner than it was read."""
    item = held.send(held.peer, 3, 0, 1, LARGE)
    with background(held.peer.wait, 3, item) as waiting:
        waiting.join(SOON_S)
        assert waiting.is_alive()
        held.data[:LARGE] = 2
        held.open()
        assert held.receive(3, 0, LARGE) == 2


def test_a_small_body_is_copied(held: Mail) -> None:
    item = held.send(held.peer, 3, 0, 1, COPIED_NBYTES - 1)
    held.peer.wait(3, item)
    held.data[:COPIED_NBYTES] = 2
    held.open()
    assert held.receive(3, 0, COPIED_NBYTES - 1) == 1


@pytest.mark.parametrize("nbytes", [COPIED_NBYTES - 1, COPIED_NBYTES, LARGE])
def test_a_slot_may_be_overwritten_after_the_wait(mail: Mail, nbytes: int) -> None:
    """Again and again, while the peer's program has not looked at any message yet."""
    for step in range(1, N_LARGE + 1):
        item = mail.send(mail.peer, step, 0, step, nbytes)
        mail.peer.wait(step, item)
        mail.data[:nbytes] = 99
    assert [mail.receive(step, 0, nbytes) for step in range(1, N_LARGE + 1)] == [*range(1, N_LARGE + 1)]


def test_many_loans_at_once(held: Mail) -> None:
    """They come back in another order than they were given, and a wait for one is none for another."""
    items = [held.send(held.peer, 3, transfer, 10 + transfer, LARGE) for transfer in range(N_LARGE)]
    held.open()
    for item in reversed(items):
        held.peer.wait(3, item)
        held.data[item.offset : item.offset + LARGE] = 0
    order = [5, 0, 7, 1, 2, 6, 4, 3]
    assert [held.receive(3, transfer, LARGE) for transfer in order] == [10 + transfer for transfer in order]
    assert not held.peer.lent


def test_an_arena_is_given_back_while_it_is_read(held: Mail) -> None:
    """Nobody waits, and the bytes go when they were sent; what is left unsent goes with the sockets."""
    held.send(held.peer, 3, 0, 7, LARGE)
    memory = weakref.ref(held.data.base)
    held.data = np.empty(0, np.uint8)
    held.arenas.release(ARENA)
    assert memory() is not None
    held.open()
    assert held.receive(3, 0, LARGE) == 7
    assert comes_true(lambda: memory() is None)


def test_closing_with_loans_out(held: Mail) -> None:
    """To a peer that is not there; the fixture closes sockets and context, and must come to an end."""
    memory = weakref.ref(held.data.base)
    for transfer in range(N_LARGE):
        held.send(held.peer, 3, transfer, 7, LARGE)
    held.data = np.empty(0, np.uint8)
    began = time.monotonic()
    held.close()
    assert time.monotonic() - began < LATE_S / 2
    held.arenas.release(ARENA)
    assert comes_true(lambda: memory() is None)
