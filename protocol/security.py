"""Who may connect over TCP: only processes that know the run's secret (ZeroMQ's PLAIN mechanism).

Anybody on the machine can reach a loopback port. A stranger is turned away in ZeroMQ's handshake, before a message of
theirs is kept, so that they can neither speak for a worker nor fill a queue. Sockets in the run's private directory
need none of this. The secret travels in clear: this is for one machine, not for a network.
"""

from __future__ import annotations

import contextlib
import hmac
import threading

import zmq

_ENDPOINT = "inproc://zeromq.zap.01"  # where libzmq asks (ZeroMQ RFC 27)
_USER = "crossdock"


def guard(context: zmq.Context[zmq.Socket[bytes]], secret: str) -> None:
    """Decide who may connect to this context's `locked` sockets, in a thread that ends with the context."""
    socket = context.socket(zmq.REP)
    socket.bind(_ENDPOINT)
    threading.Thread(target=_decide, args=(socket, secret.encode()), name="crossdock-guard", daemon=True).start()


def lock(socket: zmq.Socket[bytes]) -> None:
    """Make a socket that will be bound ask `guard` about everybody who connects."""
    socket.setsockopt(zmq.PLAIN_SERVER, 1)


def present(socket: zmq.Socket[bytes], secret: str) -> None:
    """Make a socket that will connect to a locked one show the secret."""
    socket.setsockopt(zmq.PLAIN_USERNAME, _USER.encode())
    socket.setsockopt(zmq.PLAIN_PASSWORD, secret.encode())


def _decide(socket: zmq.Socket[bytes], secret: bytes) -> None:
    with contextlib.suppress(zmq.ContextTerminated):
        while True:
            frames = socket.recv_multipart()
            known = len(frames) == 8 and frames[5] == b"PLAIN" and hmac.compare_digest(frames[7], secret)
            verdict = (b"200", b"OK") if known else (b"400", b"not of this run")
            socket.send_multipart([b"1.0", frames[1] if len(frames) > 1 else b"", *verdict, b"", b""])
    socket.close(linger=0)
