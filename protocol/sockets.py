"""ZeroMQ sockets with the options that this protocol needs, and endpoints that nobody else can take."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import zmq

from protocol import security
from protocol.errors import UsageError, WorkerError
from protocol.limits import MAX_BUFFER_NBYTES

LINGER_MS = 200
HANDSHAKE_MS = 10_000
_MAX_IPC_PATH = 107  # sockaddr_un.sun_path
_LOOPBACK = "127.0.0.1"

Context = zmq.Context[zmq.Socket[bytes]]


def new_context(secret: str = "") -> Context:
    """A context whose sockets never hang at the end; with a secret, its TCP sockets admit only who knows it."""
    context: Context = zmq.Context()
    context.setsockopt(zmq.LINGER, LINGER_MS)
    if secret:
        security.guard(context, secret)
    return context


def control_server(context: Context) -> zmq.Socket[bytes]:
    """The coordinator's ROUTER: sending to a worker that is gone raises instead of dropping silently."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return _common(socket)


def control_client(context: Context, own: bytes) -> zmq.Socket[bytes]:
    """A worker's DEALER; its identity is unique per run, since ZeroMQ ignores a second holder silently."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, own)
    return _common(socket)


def data_socket(context: Context, kind: int) -> zmq.Socket[bytes]:
    """PUSH or PULL between workers. Unbounded queues: what is in flight is bounded by the plan, not by a count."""
    return _common(context.socket(kind))


def _common(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """No heartbeats: both ends are on one machine, which closes the connections of the dead, while those of a process
    that is only halted, or slow with a large message, must not be dropped with what is on its way."""
    for option in (zmq.SNDHWM, zmq.RCVHWM):
        socket.setsockopt(option, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BUFFER_NBYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    return socket


def bind(socket: zmq.Socket[bytes], transport: str, directory: str, label: str, port: int = 0) -> str:
    """Bind to a fresh endpoint of this machine alone and return it.

    ipc: a socket file in the run's private directory. tcp: the loopback interface, `port` 0 for any free one, and
    only for those who know the secret of the socket's context.

    Raises UsageError when the port is taken or the directory's path too long, WorkerError when the system refuses.
    """
    if transport == "ipc":
        return _bind_ipc(socket, f"{directory}/{label}.sock")
    security.lock(socket)
    try:
        socket.bind(f"tcp://{_LOOPBACK}:{port or '*'}")
    except zmq.ZMQError as error:
        why = "another program listens there" if error.errno == zmq.EADDRINUSE else error.strerror
        raise UsageError(f"cannot listen on port {port} of {_LOOPBACK}: {why}; --port 0 takes any free one") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def _bind_ipc(socket: zmq.Socket[bytes], path: str) -> str:
    nbytes = len(path.encode("utf-8", "surrogateescape"))
    if nbytes > _MAX_IPC_PATH:
        raise UsageError(
            f"{path}: {nbytes} bytes, a socket's path has at most {_MAX_IPC_PATH}: set TMPDIR to a shorter one"
        )
    if Path(path).exists():
        raise WorkerError(f"{path}: already there, another run would lose its socket")
    try:
        socket.bind(f"ipc://{path}")
    except (zmq.ZMQError, UnicodeError) as error:
        raise WorkerError(f"{path}: cannot make a socket: {error}") from None
    return f"ipc://{path}"


def connect(socket: zmq.Socket[bytes], endpoint: str, secret: str) -> None:
    """Connect to what `bind` returned, in this process or another one. Raises WorkerError for what is no endpoint."""
    if endpoint.startswith("tcp://"):
        security.present(socket, secret)
    try:
        socket.connect(endpoint)
    except (zmq.ZMQError, UnicodeError) as error:
        raise WorkerError(f"cannot connect to {endpoint[:200]!r}: {error}") from None


def identity(name: str, token: str) -> bytes:
    """A worker's name on the control socket; nobody can take it before the worker does without knowing the token."""
    return f"{name}.{hashlib.sha256(token.encode()).hexdigest()[:16]}".encode()


def new_token() -> str:
    """A secret for one run: a worker proves with it that this run's coordinator started it."""
    return secrets.token_hex(16)
