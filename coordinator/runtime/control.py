"""The coordinator's end of the control path: messages to workers, and theirs, in mailboxes or through the socket."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import zmq

from protocol.doorbell import Patience
from protocol.mailbox import Mailbox, StepRecord
from protocol.sharedmem import Segment
from protocol.wire import Buffer, Envelope, decode, encode

_POLL_MS = 20

Letter = Callable[[], Envelope]
"""A received message before it is read. Raises ProtocolError when it is none."""


class Control:
    """Lives as long as the fleet's socket, which all messages take until mailboxes are offered.

    From then on the socket has only what does not fit into a mailbox; the mailboxes know which message that is.
    """

    def __init__(self, socket: zmq.Socket[bytes], identities: Sequence[bytes]) -> None:
        self.socket, self._identities = socket, identities
        socket.setsockopt(zmq.RCVTIMEO, _POLL_MS)
        self._index = {identity: i for i, identity in enumerate(identities)}
        self._mailboxes: list[Mailbox] = []
        self._arrived: list[deque[list[bytes]]] = [deque() for _ in identities]

    def offer(self, segment: Segment) -> None:
        """Use mailboxes in `segment` with all workers, after the next message to each."""
        self._mailboxes = [Mailbox.offer(segment, worker) for worker in range(len(self._identities))]

    def send(self, worker: int, message: Any, buffers: Sequence[Buffer] = ()) -> None:
        """Raises zmq.ZMQError when the worker's connection is gone; a mailbox takes letters to the dead."""
        if not self._mailboxes:
            self.send_directly(worker, message, buffers)
        elif not self._mailboxes[worker].writer.post(message, buffers):
            self.send_directly(worker, message, buffers)
            self._mailboxes[worker].writer.pass_by()

    def send_step(self, worker: int, record: StepRecord) -> None:
        """As `send`, of a step."""
        if not self._mailboxes or not self._mailboxes[worker].writer.post_step(record):
            self.send(worker, record.message(), record.inputs)

    def send_directly(self, worker: int, message: Any, buffers: Sequence[Buffer] = ()) -> None:
        """Through the socket: the handshake."""
        self.socket.send_multipart([self._identities[worker], *encode(message, buffers)])

    def receive(self, awaited: Sequence[int], patience: Patience | None = None) -> tuple[int, Letter] | None:
        """A message of a worker, None when there is none within 20 ms; with mailboxes only from `awaited`.

        It polls, as long as `patience` says, and sleeps for the last of them: the others' answers wake nobody.
        """
        if not self._mailboxes:
            found = self._from_socket()
            return None if found is None else (found[0], partial(decode, found[1]))
        letter = self._letter(awaited)
        if letter is None:
            self._mailboxes[awaited[-1]].reader.wait(_POLL_MS / 1e3, patience)
            letter = self._letter(awaited)
        return letter

    def _letter(self, awaited: Sequence[int]) -> tuple[int, Letter] | None:
        for worker in awaited:
            reader = self._mailboxes[worker].reader
            if not reader.waiting:
                continue
            if reader.inside:
                return worker, reader.take
            while not self._arrived[worker]:
                found = self._from_socket()
                if found is None:
                    return None
                self._arrived[found[0]].append(found[1])
            reader.passed()
            return worker, partial(decode, self._arrived[worker].popleft())
        return None

    def _from_socket(self) -> tuple[int, list[bytes]] | None:
        while True:
            try:
                identity, *frames = self.socket.recv_multipart()
            except zmq.Again:
                return None
            worker = self._index.get(identity)
            if worker is not None:  # strangers are not worth an answer, let alone the run
                return worker, frames
