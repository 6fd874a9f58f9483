"""What other steps left never counts: doorbells of an earlier one, messages that are early, late or from strangers."""

from __future__ import annotations

import tempfile
import threading
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
from workers.peers import MessagePlane, SharedPlane

LATE_S = 30.0
SOON_S = 0.05
NBYTES = 64


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


class Mail:
    """A receiver, and two senders: a peer of the run and one of another run."""

    def __init__(self, directory: str) -> None:
        self.context = sockets.new_context()
        self.inbox = sockets.data_socket(self.context, zmq.PULL)
        endpoint = sockets.bind(self.inbox, "ipc", directory, "inbox")
        self.data = np.zeros(2 * NBYTES, np.uint8)
        self.receiver = MessagePlane(self.inbox, [None], "ours", virtual=False)
        self.peer, self.stranger = self._sender(endpoint, "ours"), self._sender(endpoint, "theirs")

    def _sender(self, endpoint: str, token: str) -> MessagePlane:
        outbox = sockets.data_socket(self.context, zmq.PUSH)
        sockets.connect(outbox, endpoint, "")
        idle = sockets.data_socket(self.context, zmq.PULL)
        return MessagePlane(idle, [outbox], token, virtual=False)

    def send(self, plane: MessagePlane, step: int, transfer: int, value: int, nbytes: int = NBYTES) -> None:
        self.data[:NBYTES] = value
        plane.send(0, step, Instruction(Kind.SEND, transfer, 0, 0, 1, 0, nbytes), int(self.data.ctypes.data))
        self.data[:NBYTES] = 0  # a sent slot is free at once

    def receive(self, step: int, transfer: int) -> int:
        item = Instruction(Kind.RECV, transfer, 0, 0, 1, NBYTES, NBYTES, (2, 0))
        self.inbox.setsockopt(zmq.RCVTIMEO, int(SOON_S * 1000))
        self.receiver.receive(0, step, item, int(self.data.ctypes.data))
        (value,) = set(self.data[NBYTES:].tolist())
        return int(value)


@pytest.fixture
def mail(directory: str) -> Iterator[Mail]:
    made = Mail(directory)
    yield made
    for plane in (made.receiver, made.peer, made.stranger):
        plane.close()
    made.context.term()


def test_messages_wait_for_their_step_and_transfer(mail: Mail) -> None:
    for step, transfer in ((3, 1), (4, 0), (3, 0), (4, 1)):
        mail.send(mail.peer, step, transfer, 10 * step + transfer)
    assert [mail.receive(3, 0), mail.receive(3, 1), mail.receive(4, 1), mail.receive(4, 0)] == [30, 31, 41, 40]


def test_messages_of_an_earlier_step_are_dropped(mail: Mail) -> None:
    mail.send(mail.peer, 2, 0, 99)
    with pytest.raises(zmq.Again):
        mail.receive(3, 0)
    mail.send(mail.peer, 3, 0, 30)
    assert mail.receive(3, 0) == 30


def test_messages_of_another_run_are_dropped(mail: Mail) -> None:
    mail.send(mail.stranger, 3, 0, 99)
    with pytest.raises(zmq.Again):
        mail.receive(3, 0)
    mail.send(mail.peer, 3, 0, 30)
    assert mail.receive(3, 0) == 30


def test_message_of_another_size_is_refused(mail: Mail) -> None:
    mail.send(mail.peer, 3, 0, 1, nbytes=NBYTES - 1)
    with pytest.raises(ProtocolError, match="transfer 0: expected 64 bytes, got 63"):
        mail.receive(3, 0)
