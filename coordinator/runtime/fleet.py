"""The workers of a run: started, shaken hands with, talked to, watched and ended together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import zmq

from coordinator.config import Topology, WorkerSpec
from coordinator.runtime.awaited import Awaited
from coordinator.runtime.control import Control, Letter
from coordinator.runtime.descriptors import make_room
from coordinator.runtime.handshake import check_hello
from coordinator.runtime.nursery import Nursery
from coordinator.runtime.process import Start, WorkerProcess, start_workers
from coordinator.runtime.signals import Held
from coordinator.runtime.watch import Watch
from protocol import mailbox, rundir, sharedmem, sockets
from protocol import messages as m
from protocol.board import NBYTES, Board, State
from protocol.doorbell import Patience
from protocol.errors import CrossdockError, ProtocolError, WorkerError
from protocol.features import has
from protocol.mailbox import StepRecord
from protocol.wire import Buffer, Envelope

_GRACE_S = 0.5
_DEATH_S = 20.0  # at most, between the end of a connection and the end of its process, on a busy machine
START_TIMEOUT_S = 120.0
STALL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How the processes talk and compute. `plane`: shared memory, or bytes in messages; None: shared where that can be.

    `arithmetic`: "exact", or "ggml" for kernels with ggml's bits, which need a CPU with AVX2, FMA and F16C.
    """

    transport: str = "ipc"
    port: int = 0
    plane: str | None = None
    stall_timeout_s: float = STALL_TIMEOUT_S
    arithmetic: str = "exact"


class _Whole:
    """`Fleet.whole`: every step goes through it, and a generator would take its microseconds."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None and not issubclass(kind, CrossdockError):
            self.fleet.interrupted()


class Fleet:
    """All workers of one run, in device order. Use as a context manager: nothing outlives the block.

    `doing` is what the run is at, for messages to people: "starting", "loading the model", "the vision graph".
    """

    context: sockets.Context
    control: Control
    endpoint: str
    board: Board

    def __init__(self, topology: Topology, options: FleetOptions) -> None:
        self.topology, self.options = topology, options
        shared = options.transport == "ipc" and has("sharedmem")
        self.plane = options.plane or ("shared" if shared else "message")
        self.directory = ""
        self.processes: list[WorkerProcess] = []
        self.doing = "starting"
        self._nursery: Nursery | None = None
        # Numbers are never used twice in a run: peers map arenas by number, and the board compares steps.
        self.arena_numbers = [itertools.count(1) for _ in topology.workers]
        self.program_numbers = itertools.count()
        self.step_numbers = itertools.count(1)
        self._token = sockets.new_token()
        self._identities = [sockets.identity(name, self._token) for name in topology.names]
        self._awaited = Awaited(topology.names)
        self._stack = ExitStack()
        self._broken = ""
        self._whole = _Whole(self)

    def __enter__(self) -> Fleet:
        """The fleet, listening; workers are started by `start`.

        Raises UsageError for a port that is taken, CapacityError where too few files may be open.
        """
        try:
            with Held():
                self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(gently=kind is None)

    def _open(self) -> None:
        tcp = self.options.transport == "tcp"
        make_room(len(self.topology.workers))
        self.directory = rundir.run_directory()
        self._stack.callback(rundir.remove_run_directory, self.directory)
        size = mailbox.nbytes(len(self.topology.workers)) if self._has_mailboxes() else NBYTES
        self.board = Board(sharedmem.create(size, self.directory, "board"))
        self._stack.callback(self.board.segment.close)
        self.context = sockets.new_context(self._token if tcp else "")
        self._stack.callback(self.context.term)
        socket = sockets.control_server(self.context)
        self._stack.callback(socket.close)
        self.control = Control(socket, self._identities)
        self.endpoint = sockets.bind(socket, self.options.transport, self.directory, "control", self.options.port)

    def _has_mailboxes(self) -> bool:
        return self.options.transport == "ipc" and self.plane == "shared" and has("mailbox")

    def start(self) -> None:
        """Start all workers. Raises WorkerError."""
        starts = [Start(spec, self._configuration(spec)) for spec in self.topology.workers]
        with Held():  # no process without an entry in the list
            self._nursery = start_workers(starts, self.directory, self.options.arithmetic, self.processes)

    def _configuration(self, spec: WorkerSpec) -> dict[str, object]:
        return {
            "name": spec.name, "kind": spec.kind, "memory": spec.memory, "threads": spec.threads,
            "unsupported_ops": spec.unsupported_ops, "arithmetic": self.options.arithmetic, "endpoint": self.endpoint,
            "transport": self.options.transport, "plane": self.plane, "run_directory": self.directory,
            "board": self.board.segment.path, "token": self._token,
        }  # fmt: skip

    @property
    def compiling(self) -> bool:
        """True while kernels are compiled for the workers, once for this machine."""
        return self._nursery is not None and self._nursery.compiling

    def handshake(self) -> None:
        """Wait until every worker has said hello, and welcome them all.

        Raises ProtocolError when one speaks another version (it is told), WorkerError when one dies or is too late.
        """
        names = self.topology.names
        hellos: dict[int, m.Hello] = {}
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(hellos) < len(names):
            missing = [i for i in range(len(names)) if i not in hellos]
            worker, letter = self._receive(missing, deadline)
            try:
                hello = check_hello(letter().message, names[worker])
            except ProtocolError as error:
                self._refuse(worker, str(error))
                raise ProtocolError(f"{names[worker]}: {error}") from None
            if hello.token == self._token:
                hellos[worker] = hello
            else:  # somebody who took a worker's name: the worker itself is still to come
                self._refuse(worker, "you were not started by this run")
        endpoints = tuple(hellos[i].data_endpoint for i in range(len(names)))
        if self._has_mailboxes() and all("mailbox" in hello.features for hello in hellos.values()):
            self.control.offer(self.board.segment)
        for index in range(len(names)):
            self._send(index, m.Welcome(index, names, endpoints, self.plane), handshake=True)

    def _refuse(self, worker: int, reason: str) -> None:
        with suppress(zmq.ZMQError):
            self.control.send_directly(worker, m.Refused(reason[:1000]))

    def send(self, worker: int, message: Any, buffers: Sequence[Buffer] = ()) -> None:
        """Send to a worker by index. Raises WorkerError when an earlier request failed, or it is seen to be gone."""
        if self._broken:
            raise WorkerError(f"this run has ended: {self._broken}")
        self._send(worker, message, buffers)
        self._awaited.expect(worker, m.ANSWERS.get(type(message)))

    def send_step(self, worker: int, record: StepRecord) -> None:
        """As `send`, of a step that was written in place."""
        if self._broken:
            raise WorkerError(f"this run has ended: {self._broken}")
        try:
            self.control.send_step(worker, record)
        except zmq.ZMQError as error:
            self._unreachable(worker, error)
        self._awaited.expect(worker, m.Done)

    def _send(self, worker: int, message: Any, buffers: Sequence[Buffer] = (), *, handshake: bool = False) -> None:
        try:
            (self.control.send_directly if handshake else self.control.send)(worker, message, buffers)
        except zmq.ZMQError as error:
            self._unreachable(worker, error)

    def _unreachable(self, worker: int, error: zmq.ZMQError) -> NoReturn:
        deadline = time.monotonic() + _DEATH_S
        while worker < len(self.processes) and time.monotonic() < deadline:
            self._check_alive()
            self.processes[worker].wait(0.1)
        self._check_alive()
        raise WorkerError(f"{self.topology.names[worker]}: cannot be reached: {error.strerror}") from None

    def request(self, worker: int, message: Any, buffers: Sequence[Buffer] = ()) -> Envelope:
        """Send, and wait for the answer. Raises what the worker failed with, or WorkerError when it dies."""
        self.send(worker, message, buffers)
        return self.gather([worker])[worker]

    def whole(self) -> _Whole:
        """What is asked and answered within is done wholly, or the run has ended.

        After an interrupt some workers may have begun what others were not told, and answers are still to come that
        the next request would take for its own.
        """
        return self._whole

    def interrupted(self) -> None:
        """Something was left half done: the run has ended."""
        self._broken = self._broken or f"it was interrupted {_during(self.doing)}"

    def gather(self, workers: Sequence[int], patience: Patience | None = None) -> Mapping[int, Envelope]:
        """One answer from each of `workers`, the latest expected last, of the kind its request asks for. As `request`.

        `patience` is what was learnt from the same request before.
        The first failure ends it, and the fleet: the others may wait for ever for the worker that failed.
        """
        with self.whole():
            try:
                return self._gather(workers, patience)
            except CrossdockError as error:
                self._broken = str(error)
                raise

    def _gather(self, workers: Sequence[int], patience: Patience | None) -> Mapping[int, Envelope]:
        missing = list(workers)
        answers: dict[int, Envelope] = {}
        while missing:
            worker, letter = self._receive(missing, None, patience)
            envelope = self._awaited.take(worker, letter)
            if worker not in missing:
                raise ProtocolError(f"{self.topology.names[worker]}: answered twice, or to nothing")
            missing.remove(worker)
            answers[worker] = envelope
        return answers

    def _receive(
        self, awaited: Sequence[int], deadline: float | None, patience: Patience | None = None
    ) -> tuple[int, Letter]:
        """The next message, while all workers live, somebody gets on, and the deadline has not passed."""
        watch = None
        reports = 0
        while (found := self.control.receive(awaited, patience)) is None:
            self._check_alive()
            watch = watch or Watch(self.board, self.processes, awaited)
            if self._nursery is not None and self._nursery.n_reports != reports:
                reports = self._nursery.n_reports  # workers are born, or kernels compiled for them
                watch = Watch(self.board, self.processes, awaited)
                deadline = None if deadline is None else time.monotonic() + START_TIMEOUT_S
            if deadline is not None and time.monotonic() > deadline:
                late = ", ".join(self.topology.names[i] for i in sorted(awaited))
                raise WorkerError(f"{late}: no hello within {START_TIMEOUT_S:.0f} s")
            if watch.idle_s() > self.options.stall_timeout_s:
                raise WorkerError(
                    f"no worker made progress for {self.options.stall_timeout_s:g} s {_during(self.doing)}: "
                    f"{watch.whereabouts()} (--stall-timeout waits longer)"
                )
        return found

    def _check_alive(self) -> None:
        """Raises WorkerError for a worker that died: which, how, in which split, and its last words."""
        for index, process in enumerate(self.processes):
            how = process.died()
            if how is None:
                continue
            progress = self.board.progress(index)
            where = _during(self.doing)
            if progress.state is not State.IDLE:
                where = f"in split {progress.split} of {self.doing}"
            words = process.last_words()
            raise WorkerError(f"{process.spec.name} {how} {where}" + (f"; its last words: {words}" if words else ""))

    def close(self, *, gently: bool = False) -> None:
        """End every worker and remove everything the run left in the file system; gently: they may end themselves.

        Files go while workers live, who finish that should we be killed meanwhile; and once more at the end, for a
        socket that a worker may have made since.
        """
        with Held():
            rundir.remove_run_directory(self.directory)
            if gently:
                self._dismiss()
            if self._nursery is not None:
                self._nursery.end()
            for process in self.processes:
                process.kill()
                process.hang_up()
            for process in self.processes:
                process.reap()
            self.processes.clear()
            self._stack.close()

    def _dismiss(self) -> None:
        for index in range(len(self.processes)):
            with suppress(CrossdockError, zmq.ZMQError):
                self.control.send(index, m.Shutdown())
        deadline = time.monotonic() + _GRACE_S
        for process in self.processes:
            process.wait(max(0.0, deadline - time.monotonic()))


def _during(doing: str) -> str:
    """`during the vision graph`, `while loading the model`."""
    return f"during {doing}" if doing.startswith(("the ", "a ")) else f"while {doing}"
