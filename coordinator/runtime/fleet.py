"""The workers of a run: started, shaken hands with, talked to, watched and ended together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import zmq

from coordinator.config import Topology
from coordinator.runtime.process import WorkerProcess
from protocol import messages as m
from protocol import sockets
from protocol.board import Board
from protocol.errors import ProtocolError, WorkerError
from protocol.features import has
from protocol.version import MAJOR, MINOR
from protocol.wire import Buffer, Envelope, decode, encode

_POLL_MS = 20
START_TIMEOUT_S = 120.0
STALL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How the processes talk. `plane`: shared memory, or bytes in messages; None: shared where that can be."""

    transport: str = "ipc"
    port: int = 0
    plane: str | None = None
    stall_timeout_s: float = STALL_TIMEOUT_S


class Fleet:
    """All workers of one run, in device order. Use as a context manager: nothing outlives the block."""

    def __init__(self, topology: Topology, options: FleetOptions) -> None:
        self.topology, self.options = topology, options
        shared = options.transport == "ipc" and has("sharedmem")
        self.plane = options.plane or ("shared" if shared else "message")
        self.directory = sockets.run_directory()
        self.context = sockets.new_context()
        self.socket = sockets.control_server(self.context)
        self.processes: list[WorkerProcess] = []
        self.doing = "starting"
        # Numbers are never used twice in a run: peers map arenas by number, and the board compares steps.
        self.arena_numbers = [itertools.count(1) for _ in topology.workers]
        self.program_numbers = itertools.count()
        self.step_numbers = itertools.count(1)
        self._token = sockets.new_token()
        self._clean = False
        try:
            self.endpoint = sockets.bind(self.socket, options.transport, self.directory, "control", options.port)
            self.board = Board.create(self.directory)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Fleet:
        """The fleet; workers are started by `start`."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._clean = kind is None
        self.close()

    def start(self) -> None:
        """Start all workers. Raises WorkerError."""
        for spec in self.topology.workers:
            configuration: dict[str, object] = {
                "name": spec.name, "incarnation": 0, "kind": spec.kind, "memory": spec.memory,
                "threads": spec.threads, "unsupported_ops": spec.unsupported_ops, "endpoint": self.endpoint,
                "transport": self.options.transport, "plane": self.plane, "run_directory": self.directory,
                "board": self.board.segment.path, "token": self._token,
            }  # fmt: skip
            self.processes.append(WorkerProcess.start(spec, configuration, self.directory))

    def handshake(self) -> None:
        """Wait until every worker has said hello, and welcome them all.

        Raises ProtocolError when one speaks another version (it is told), WorkerError when one dies or is too late.
        """
        names = self.topology.names
        hellos: dict[str, m.Hello] = {}
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(hellos) < len(names):
            identity, envelope = self._receive(deadline, "a worker's hello")
            hello = envelope.message
            if not isinstance(hello, m.Hello) or hello.name not in names or hello.name in hellos:
                raise ProtocolError(f"expected the hello of a worker, got {type(hello).__name__} from {identity!r}")
            self._check_hello(identity, hello)
            hellos[hello.name] = hello
        endpoints = tuple(hellos[name].data_endpoint for name in names)
        for index in range(len(names)):
            self.send(index, m.Welcome(index, names, endpoints, self.plane))

    def _check_hello(self, identity: bytes, hello: m.Hello) -> None:
        reason = ""
        if (hello.major, hello.minor) != (MAJOR, MINOR):
            reason = f"{hello.name} speaks protocol {hello.major}.{hello.minor}: expected {MAJOR}.{MINOR}"
        elif hello.token != self._token or identity.decode("utf-8", "replace") != f"{hello.name}.{hello.incarnation}":
            reason = f"{hello.name} was not started by this run"
        if reason:
            self.socket.send_multipart([identity, *encode(m.Refused(reason))])
            raise ProtocolError(reason)

    def send(self, worker: int, message: Any, buffers: Sequence[Buffer] = ()) -> None:
        """Send to a worker by index. Raises WorkerError when it is gone."""
        identity = f"{self.topology.names[worker]}.0".encode()
        try:
            self.socket.send_multipart([identity, *encode(message, buffers)])
        except zmq.ZMQError as error:
            self._check_alive()
            raise WorkerError(f"{self.topology.names[worker]}: cannot be reached: {error.strerror}") from None

    def request(self, worker: int, message: Any, buffers: Sequence[Buffer] = ()) -> Envelope:
        """Send, and wait for the answer. Raises what the worker failed with, or WorkerError when it dies."""
        self.send(worker, message, buffers)
        return self.gather([worker])[worker]

    def gather(self, workers: Sequence[int]) -> Mapping[int, Envelope]:
        """One answer from each of `workers`. Raises as `request`."""
        index_of = {f"{name}.0".encode(): i for i, name in enumerate(self.topology.names)}
        missing = set(workers)
        answers: dict[int, Envelope] = {}
        while missing:
            identity, envelope = self._receive(None, self.doing)
            worker = index_of.get(identity)
            if isinstance(envelope.message, m.Failed):
                raise envelope.message.error()
            if worker not in missing:
                raise ProtocolError(f"unexpected {type(envelope.message).__name__} from {identity!r}")
            missing.discard(worker)
            answers[worker] = envelope
        return answers

    def _receive(self, deadline: float | None, what: str) -> tuple[bytes, Envelope]:
        """The next message, while all workers live, go on, and the deadline has not passed."""
        seen, since = self._activity(), time.monotonic()
        while not self.socket.poll(_POLL_MS):
            self._check_alive()
            now = time.monotonic()
            if deadline is not None and now > deadline:
                raise WorkerError(f"no answer within {START_TIMEOUT_S:.0f} s while waiting for {what}")
            if now - since > min(1.0, self.options.stall_timeout_s):
                activity = self._activity()
                if activity != seen:
                    seen, since = activity, now
                elif now - since > self.options.stall_timeout_s:
                    raise WorkerError(f"no worker made progress for {now - since:.0f} s: {self._whereabouts()}")
        frames = self.socket.recv_multipart()
        return frames[0], decode(frames[1:])

    def _activity(self) -> tuple[object, ...]:
        return tuple((self.board.progress(i), p.cpu_seconds()) for i, p in enumerate(self.processes))

    def _whereabouts(self) -> str:
        return ", ".join(
            f"{p.spec.name} in split {self.board.progress(i)[2]}" for i, p in enumerate(self.processes)
        ) + f" of {self.doing}"  # fmt: skip

    def _check_alive(self) -> None:
        """Raises WorkerError for a worker that died: which, in which split, and its last words."""
        for index, process in enumerate(self.processes):
            how = process.died()
            if how is None:
                continue
            step, _, split = self.board.progress(index)
            where = f" in split {split} of {self.doing}" if step else f" while {self.doing}"
            words = process.last_words()
            raise WorkerError(f"{process.spec.name} {how}{where}" + (f"; its last words: {words}" if words else ""))

    def close(self) -> None:
        """End every worker and remove everything the run left in the file system."""
        if self._clean:
            for index in range(len(self.processes)):
                self.send(index, m.Shutdown())
        for process in self.processes:
            if not self._clean:
                process.process.kill()
        for process in self.processes:
            process.end(gently=self._clean)
        self.processes.clear()
        self.socket.close(linger=0)
        self.context.term()
        if hasattr(self, "board"):
            self.board.segment.close()
        sockets.remove_run_directory(self.directory)
