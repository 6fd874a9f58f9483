"""ZeroMQ sockets with the options that this protocol needs, and endpoints that nobody else can take."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

import zmq

from protocol.errors import UsageError, WorkerError
from protocol.limits import MAX_BUFFER_NBYTES

TRANSPORTS = ("ipc", "tcp")
LINGER_MS = 200
HEARTBEAT_MS = 2000
_MAX_IPC_PATH = 107  # sockaddr_un.sun_path
_LOOPBACK = "127.0.0.1"


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context whose sockets never hang at the end."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.setsockopt(zmq.LINGER, LINGER_MS)
    return context


def control_server(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The coordinator's ROUTER: sending to a worker that is gone raises instead of dropping silently."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return _common(socket)


def control_client(context: zmq.Context[zmq.Socket[bytes]], identity: str) -> zmq.Socket[bytes]:
    """A worker's DEALER; the identity is unique per incarnation, since ZeroMQ ignores a second holder silently."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    return _common(socket)


def data_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """PUSH or PULL between workers. Unbounded queues: what is in flight is bounded by the plan, not by a count."""
    return _common(context.socket(kind))


def _common(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    for option in (zmq.SNDHWM, zmq.RCVHWM):
        socket.setsockopt(option, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BUFFER_NBYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    return socket


def bind(socket: zmq.Socket[bytes], transport: str, directory: str, label: str, port: int = 0) -> str:
    """Bind to a fresh endpoint of this machine alone and return it.

    ipc: a socket file in the run's private directory. tcp: the loopback interface, `port` 0 for any free one.

    Raises UsageError when the port is taken or the directory's path too long.
    """
    if transport == "ipc":
        path = f"{directory}/{label}.sock"
        if len(path.encode()) > _MAX_IPC_PATH:
            raise UsageError(
                f"{path}: longer than the {_MAX_IPC_PATH} bytes of a socket path: set TMPDIR to a shorter one"
            )
        if Path(path).exists():
            raise WorkerError(f"{path}: already there, another run would lose its socket")
        socket.bind(f"ipc://{path}")
        return f"ipc://{path}"
    try:
        socket.bind(f"tcp://{_LOOPBACK}:{port or '*'}")
    except zmq.ZMQError as error:
        raise UsageError(f"cannot listen on {_LOOPBACK}:{port}: {error.strerror} (port taken?)") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def run_directory() -> str:
    """A new directory that only this user can enter, for sockets, logs and file-backed memory of one run."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = bool(base) and os.path.isdir(base) and os.access(base, os.W_OK)
    path = tempfile.mkdtemp(prefix="crossdock-", dir=base if usable else None)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    return path


def remove_run_directory(path: str) -> None:
    """Remove what `run_directory` made; more than one process may try."""
    if Path(path).name.startswith("crossdock-"):
        shutil.rmtree(path, ignore_errors=True)


def new_token() -> str:
    """A secret for one run: a worker proves with it that this run's coordinator started it."""
    return secrets.token_hex(16)
