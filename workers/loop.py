"""The worker's message loop: handshake, then one answer per request until told to end."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from protocol import messages as m
from protocol.board import Board
from protocol.errors import CapacityError, CrossdockError, ProtocolError
from protocol.features import SWITCHES, has
from protocol.limits import MAX_PROGRAMS
from protocol.mailbox import Mailbox
from protocol.ops import Op
from protocol.program import table_from
from protocol.sockets import Context, bind, connect, control_client, data_socket, identity, new_context
from protocol.version import MAJOR, MINOR
from protocol.wire import Buffer, Envelope, decode, encode
from workers.actions import Engine
from workers.arena import Arenas
from workers.config import WorkerConfig
from workers.peers import MessagePlane, Plane, SharedPlane, SignalPlane, open_outboxes
from workers.run import Compiled, NullEngine, Runner, compile_program
from workers.shadow import Shadows, Violation

Reply = tuple[Any, Sequence[Buffer]] | None
Buffers = tuple[memoryview, ...]

_NAP_S = 10.0  # an idle worker sleeps until it is woken; this is only its second chance


def serve(config: WorkerConfig) -> None:
    """Connect, shake hands and answer until `Shutdown`.

    Raises ProtocolError when the coordinator refuses us or speaks something else.
    """
    context = new_context(config.token if config.transport == "tcp" else "")
    control = control_client(context, identity(config.name, config.token))
    connect(control, config.endpoint, config.token)
    inbox = data_socket(context, zmq.PULL)
    endpoint = bind(inbox, config.transport, config.run_directory, f"{config.name}.in")
    features = tuple(name for name in SWITCHES if has(name))
    hello = m.Hello(config.name, MAJOR, MINOR, config.token, os.getpid(), config.kind, features, endpoint)
    control.send_multipart(encode(hello))
    engine = _engine(config)  # loads the kernels while the coordinator plans
    welcome = decode(control.recv_multipart()).message
    if isinstance(welcome, m.Refused):
        raise ProtocolError(f"{config.name}: refused: {welcome.reason}")
    if not isinstance(welcome, m.Welcome):
        raise ProtocolError(f"{config.name}: expected welcome, got {type(welcome).__name__}")
    board = Board.attach(config.board)
    arenas = _arenas(config, shared=welcome.plane == "shared")
    plane = _plane(config, welcome, context, inbox, board, arenas)
    mailbox = Mailbox.attach(config.board, welcome.index) if has("mailbox") else None
    _Worker(config, welcome, arenas, plane, board, engine).loop(_Control(control, mailbox))
    engine.close()
    plane.close()
    control.close()
    context.term()


def _engine(config: WorkerConfig) -> Engine:
    if config.kind == "null":
        return NullEngine()
    from workers.engine import KernelEngine  # numba: a second to import, and nothing for null workers

    return KernelEngine(config.threads, config.arithmetic)


def _arenas(config: WorkerConfig, *, shared: bool) -> Arenas:
    virtual = config.kind == "null"
    return Arenas(config.run_directory, config.name, limit=config.memory, shared=shared, virtual=virtual)


def _plane(
    config: WorkerConfig,
    welcome: m.Welcome,
    context: Context,
    inbox: zmq.Socket[bytes],
    board: Board,
    arenas: Arenas,
) -> Plane:
    virtual = config.kind == "null"
    if welcome.plane == "shared":
        inbox.close()
        return SignalPlane(board) if virtual else SharedPlane(board)
    outboxes = open_outboxes(context, welcome.data_endpoints, welcome.index, config.token)
    return MessagePlane(inbox, outboxes, config.token, arenas.segments, virtual=virtual)


class _Control:
    """The way to the coordinator and back: through the mailbox where there is one, else through the socket.

    What does not fit into the mailbox takes the socket, and the mailbox counts it: the order is kept.
    """

    def __init__(self, socket: zmq.Socket[bytes], mailbox: Mailbox | None) -> None:
        self.socket, self.mailbox = socket, mailbox

    def receive(self) -> Envelope:
        """The next request. Raises ProtocolError when it is none."""
        if self.mailbox is not None:
            reader = self.mailbox.reader
            while not reader.waiting:
                reader.wait(_NAP_S)
            if reader.inside:
                return reader.take()
            reader.passed()
        return decode([frame.buffer for frame in self.socket.recv_multipart(copy=False)])

    def send(self, message: Any, buffers: Sequence[Buffer] = ()) -> None:
        """An answer."""
        if self.mailbox is None:
            self.socket.send_multipart(encode(message, buffers))
        elif not self.mailbox.writer.post(message, buffers):
            self.socket.send_multipart(encode(message, buffers))
            self.mailbox.writer.pass_by()


class _Worker:
    """State of a serving worker, and its answers to each kind of request."""

    def __init__(
        self, config: WorkerConfig, welcome: m.Welcome, arenas: Arenas, plane: Plane, board: Board, engine: Engine
    ) -> None:
        self.config, self.arenas, self.plane, self.engine = config, arenas, plane, engine
        self.n_workers = len(welcome.names)
        self.unsupported = frozenset(Op[name] for name in config.unsupported_ops)
        self.programs: dict[int, Compiled] = {}
        self.runner = Runner(welcome.index, arenas, plane, board, engine)
        self.repeated: Compiled | None = None  # the program of the last request, when that was its step
        self.answers: dict[type, Callable[[Any, Buffers], Reply]] = {
            m.Allocate: self._allocate,
            m.Release: self._release,
            m.MapFile: self._map_file,
            m.Load: self._load,
            m.ProgramMessage: self._program,
            m.Forget: self._forget,
            m.Step: self._step,
            m.Read: self._read,
            m.Write: self._write,
            m.StatsRequest: self._stats,
        }

    def loop(self, control: _Control) -> None:
        """Answer requests in order; what the world does wrong becomes `Failed`."""
        while True:
            try:
                envelope = self._next(control)
                if isinstance(envelope.message, m.Shutdown):
                    return
                answer = self.answers.get(type(envelope.message))
                if answer is None:
                    raise ProtocolError(f"{type(envelope.message).__name__} is no request to a worker")
                reply = answer(envelope.message, envelope.buffers)
            except MemoryError:
                reply = m.Failed(CapacityError.code, f"{self.config.name}: out of memory"), ()
            except CrossdockError as error:
                print(f"{self.config.name}: {error}", file=sys.stderr, flush=True)
                reply = m.Failed(error.code, f"{self.config.name}: {error}"[:4000]), ()
            if reply is not None:
                control.send(*reply)

    def _next(self, control: _Control) -> Envelope:
        """The next request; further steps of the program that has just run are run and answered on the way."""
        program, self.repeated = self.repeated, None
        if program is not None and program.repeats and control.mailbox is not None:
            assert self.runner.walker is not None
            try:
                while (done := self.runner.walker.serve(program.script, control.mailbox)) is not None:
                    control.send(done, program.outputs)
            except Violation as violation:
                control.send(_violated(program, violation))
        return control.receive()

    def _allocate(self, request: m.Allocate, buffers: Buffers) -> Reply:
        segment = self.arenas.allocate(request.arena, request.nbytes, request.label, shadow=request.shadow)
        shadow = self.arenas.shadows.get(request.arena)
        if shadow is not None and self.runner.shadows is None:
            self.runner.shadows = Shadows(self.arenas, self.plane)
        return m.Allocated(request.arena, segment.path, "" if shadow is None else shadow.path), ()

    def _release(self, request: m.Release, buffers: Buffers) -> Reply:
        gone = set(request.arenas)
        self._drop([number for number, program in self.programs.items() if program.arenas & gone])
        for arena in request.arenas:
            self.arenas.release(arena)
        return None

    def _map_file(self, request: m.MapFile, buffers: Buffers) -> Reply:
        ranges = table_from(_only(buffers), 2, "ranges")
        self.arenas.map_file(request.arena, request.path, request.nbytes, ranges, request.digest)
        return m.Mapped(request.arena), ()

    def _load(self, request: m.Load, buffers: Buffers) -> Reply:
        pieces = table_from(_only(buffers), 3, "pieces")
        return m.Loaded(request.arena, self.arenas.load(request.file_arena, request.arena, pieces)), ()

    def _program(self, request: m.ProgramMessage, buffers: Buffers) -> Reply:
        if len(self.programs) >= MAX_PROGRAMS:
            raise ProtocolError(f"more than {MAX_PROGRAMS} programs")
        self.programs[request.program] = compile_program(
            request, buffers, self.arenas, self.plane, self.engine, self.n_workers, self.unsupported,
            self.runner.shadows, self.runner.board,
        )  # fmt: skip
        return m.Ready(request.program), ()

    def _forget(self, request: m.Forget, buffers: Buffers) -> Reply:
        self._drop(request.programs)
        return None

    def _drop(self, programs: Sequence[int]) -> None:
        """Forget programs, and what was mapped of peers for them alone."""
        for program in programs:
            self.programs.pop(program, None)
        read = {(peer.peer, peer.arena) for p in self.programs.values() for peer in p.message.peer_arenas}
        self.plane.retain(read)

    def _step(self, request: m.Step, buffers: Buffers) -> Reply:
        program = self.programs.get(request.program)
        if program is None:
            raise ProtocolError(f"step of unknown program {request.program}")
        self.repeated = program
        try:
            return self.runner.run(program, request.step, buffers)
        except Violation as violation:
            return _violated(program, violation), ()

    def _read(self, request: m.Read, buffers: Buffers) -> Reply:
        data = self.arenas.read(request.arena, request.offset, request.nbytes)
        return m.Bytes(request.arena, request.offset), (data,)

    def _write(self, request: m.Write, buffers: Buffers) -> Reply:
        self.arenas.write(request.arena, request.offset, _only(buffers))
        return m.Written(request.arena), ()

    def _stats(self, request: m.StatsRequest, buffers: Buffers) -> Reply:
        return m.Stats(_peak_nbytes(), self.arenas.allocated_nbytes), ()


def _violated(program: Compiled, violation: Violation) -> m.Violated:
    return m.Violated(program.message.program, violation.step, *violation.report)


def _peak_nbytes() -> int:
    """Most memory that this process has ever had in use. Linux's getrusage would count its parent's before exec."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _only(buffers: Buffers) -> memoryview:
    if len(buffers) != 1:
        raise ProtocolError(f"expected 1 buffer, got {len(buffers)}")
    return buffers[0]
