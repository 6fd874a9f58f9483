"""Strangers, impostors and peers of another version: nobody but a run's own processes gets a word in."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from coordinator.config import Topology, parse_workers
from coordinator.runtime.fleet import Fleet, FleetOptions
from protocol import messages as m
from protocol import security, sockets
from protocol.errors import ProtocolError, WorkerError
from protocol.sharedmem import create
from protocol.version import MAJOR, MINOR
from protocol.wire import PRELUDE, decode, encode
from tests.patience import LATE_S

ONE = parse_workers("null:1", 1)


@contextmanager
def fleet(topology: Topology = ONE, transport: str = "ipc") -> Iterator[Fleet]:
    with Fleet(topology, FleetOptions(transport=transport, stall_timeout_s=LATE_S)) as made:
        yield made
    assert not os.path.exists(made.directory)


@contextmanager
def dealer(endpoint: str, identity: bytes, password: str | None = None) -> Iterator[Any]:
    context = sockets.new_context()
    client = sockets.control_client(context, identity)
    if password is not None:
        security.present(client, password)
    client.connect(endpoint)
    client.setsockopt(zmq.RCVTIMEO, int(LATE_S * 1000))
    try:
        yield client
    finally:
        client.close(linger=0)
        context.term()


def hello(made: Fleet, **changes: Any) -> m.Hello:
    facts: dict[str, Any] = {
        "name": "null0", "major": MAJOR, "minor": MINOR, "token": made._token, "pid": 1,
        "kind": "null", "features": (), "data_endpoint": "ipc:///nowhere",
    }  # fmt: skip
    return m.Hello(**{**facts, **changes})


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (lambda f: encode(hello(f, minor=7)), ["null0", f"speaks protocol {MAJOR}.7", f"expected {MAJOR}.{MINOR}"]),
        (lambda f: other_major(encode(hello(f))), ["null0", "protocol version 9", f"expected {MAJOR}"]),
        (lambda f: encode(hello(f, name="cpu7")), ["null0", "calls itself 'cpu7'"]),
        (lambda f: encode(m.Loaded(1, 2)), ["null0", "expected a hello, got Loaded"]),
        (lambda f: [b"GET / HTTP/1.1", b""], ["null0", "prelude"]),
    ],
)
def test_worker_that_cannot_be_understood_is_told(frames: Callable[[Fleet], list[Any]], words: list[str]) -> None:
    with fleet() as made, dealer(made.endpoint, made._identities[0]) as worker:
        worker.send_multipart(frames(made))
        with pytest.raises(ProtocolError) as info:
            made.handshake()
        for word in words:
            assert word in str(info.value)
        refused = decode(worker.recv_multipart()).message
        assert isinstance(refused, m.Refused)
        assert refused.reason in str(info.value)


def other_major(frames: list[Any]) -> list[Any]:
    magic, _, n_buffers, n_header = PRELUDE.unpack(frames[0])
    return [PRELUDE.pack(magic, 9, n_buffers, n_header), *frames[1:]]


def test_answers_are_the_right_ones() -> None:
    """A worker's answers are checked against what was asked."""
    for answer, words in (
        (encode(m.Mapped(1)), "expected Allocated, got Mapped"),
        (encode(m.Failed("capacity", "null0: no room")), "null0: no room"),
        ([b"junk"], "null0: message of 1 frames"),
    ):
        with fleet() as made, dealer(made.endpoint, made._identities[0]) as worker:
            worker.send_multipart(encode(hello(made)))
            made.handshake()
            assert isinstance(decode(worker.recv_multipart()).message, m.Welcome)
            worker.send_multipart(answer)
            with pytest.raises(Exception, match=words):
                made.request(0, m.Allocate(1, 8, "KV", shadow=False))


def test_sending_to_nobody() -> None:
    with fleet() as made, pytest.raises(WorkerError, match="null0: cannot be reached"):
        made.send(0, m.Shutdown())


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_strangers_cannot_disturb_a_run(transport: str) -> None:
    """They connect under their own names and a worker's, talk sense and nonsense, before and during the run."""
    with fleet(transport=transport) as made:
        words = [encode(hello(made, token="guess")), [b"junk"], [b""] * 50, encode(m.Failed("worker", "die"))]
        with dealer(made.endpoint, b"stranger", "guess") as one, dealer(made.endpoint, b"null0") as other:
            secret = made._token if transport == "tcp" else None
            say(words, one, other)
            with raw_connection(made.endpoint):
                made.start()
                made.handshake()
                say(words, one, other)
                for _ in range(20):
                    assert isinstance(made.request(0, m.StatsRequest()).message, m.Stats)
            assert secret is None or not one.poll(10)


def say(words: list[list[Any]], *clients: Any) -> None:
    """A socket that was turned away has nowhere to put a message, and would wait for ever."""
    for client in clients:
        for frames in words:
            with contextlib.suppress(zmq.Again):
                client.send_multipart(frames, zmq.DONTWAIT)


@contextmanager
def raw_connection(endpoint: str) -> Iterator[None]:
    """Somebody who speaks no ZeroMQ at all."""
    if not endpoint.startswith("tcp://"):
        yield
        return
    with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100_000))
        yield


def test_wrong_token_is_refused_and_the_right_one_still_welcome() -> None:
    with fleet() as made, dealer(made.endpoint, made._identities[0]) as worker:
        worker.send_multipart(encode(hello(made, token="guess")))
        worker.send_multipart(encode(hello(made)))
        made.handshake()
        answers = [decode(worker.recv_multipart()).message for _ in range(2)]
    assert [type(answer) for answer in answers] == [m.Refused, m.Welcome]


def test_flood_at_a_data_port_takes_no_memory() -> None:
    """A worker computes and does not look; a stranger pushes as much as it can."""
    context = sockets.new_context("the secret")
    inbox = sockets.data_socket(context, zmq.PULL)
    endpoint = sockets.bind(inbox, "tcp", "", "inbox")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with flooding(endpoint, None), flooding(endpoint, "a guess"):
        friend = sockets.data_socket(context, zmq.PUSH)
        sockets.connect(friend, endpoint, "the secret")
        friend.send_multipart([b"head", b"body"])
        assert inbox.poll(LATE_S * 1000)
        assert inbox.recv_multipart() == [b"head", b"body"]
        time.sleep(0.3)
        assert not inbox.poll(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    friend.close()
    inbox.close()
    context.term()


@contextmanager
def flooding(endpoint: str, password: str | None) -> Iterator[None]:
    context = sockets.new_context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 10)
    if password is not None:
        security.present(socket, password)
    socket.connect(endpoint)
    stop = threading.Event()
    junk = bytes(1 << 20)

    def push() -> None:
        while not stop.is_set():
            if socket.poll(10, zmq.POLLOUT):
                with contextlib.suppress(zmq.Again):  # turned away in between
                    socket.send(junk, zmq.DONTWAIT)

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        socket.close(linger=0)
        context.term()


# ---- a real worker, given nonsense


def worker(stdin: bytes, directory: str = "") -> tuple[int, str]:
    command = [sys.executable, "-P", "-m", "workers", directory, "null0"]
    result = subprocess.run(command, input=stdin, capture_output=True, timeout=LATE_S)
    assert result.stdout == b""
    return result.returncode, result.stderr.decode()


CONFIGURATION = {
    "name": "null0", "kind": "null", "memory": None, "threads": 1, "unsupported_ops": [],
    "arithmetic": "exact", "transport": "ipc", "plane": "shared", "board": "/nonexistent", "token": "t",
}  # fmt: skip


def test_worker_given_nonsense(tmp_path: Path) -> None:
    sound = {**CONFIGURATION, "endpoint": "ipc:///nowhere", "run_directory": str(tmp_path)}
    for stdin, words in (
        (b"", "ended before it sent a configuration"),
        (b"ls -l\n", "started by the coordinator"),
        (b"\xff\xfe\n", "started by the coordinator"),
        (b"[" * 100_000 + b"\n", "started by the coordinator"),
        (b"{}\n", "configuration: field 'name' is missing"),
        (json.dumps({**sound, "threads": "two"}).encode() + b"\n", "configuration.threads: expected int, got str"),
        (json.dumps({**sound, "rank": 3}).encode() + b"\n", "unknown field 'rank'"),
    ):
        status, stderr = worker(stdin)
        assert status == 7
        assert len(stderr.splitlines()) == 1
        assert stderr.startswith("crossdock worker: ")
        assert words in stderr


def test_worker_whose_coordinator_died_removes_only_a_runs_directory(tmp_path: Path) -> None:
    mine, private, run = tmp_path / "crossdock-mine", tmp_path / "other", tmp_path / "crossdock-run-abc"
    for path in (mine, private, run):
        path.mkdir(mode=0o700)
        (path / "control.sock").touch()
        worker(b"", str(path))
    assert [path.exists() for path in (mine, private, run)] == [True, True, False]


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ([b"junk"], 7, "message of 1 frames"),
        (encode(m.Refused("you are too old")), 7, "null0: refused: you are too old"),
        (encode(m.Loaded(1, 2)), 7, "null0: expected welcome, got Loaded"),
        (encode(m.Welcome(0, ("null0",), ("",), "shared")), 6, "cannot open /nonexistent"),
    ],
)
def test_worker_given_nonsense_by_a_coordinator(answer: list[Any], status: int, words: str, tmp_path: Path) -> None:
    with served(tmp_path, {}) as (server, process):
        identity, *frames = server.recv_multipart()
        assert isinstance(decode(frames).message, m.Hello)
        server.send_multipart([identity, *answer])
        process.wait(LATE_S)
        assert process.stderr is not None
        stderr = process.stderr.read().decode()
    assert process.returncode == status
    assert len(stderr.splitlines()) == 1
    assert words in stderr


def test_welcomed_worker_answers_nonsense_and_goes_on(tmp_path: Path) -> None:
    board = create(4 << 20, str(tmp_path), "board")
    with served(tmp_path, {"board": board.path}) as (server, process):
        identity = server.recv_multipart()[0]
        server.send_multipart([identity, *encode(m.Welcome(0, ("null0",), ("",), "shared"))])
        for request, words in (
            ([b"junk"], "message of 1 frames"),
            (encode(m.Loaded(1, 2)), "Loaded is no request"),
            (encode(m.Step(4, 1)), "unknown program 4"),
            (encode(m.Load(0, 1), [b"odd"]), "no table"),
            (encode(m.Load(0, 1)), "expected 1 buffer, got 0"),
            (encode(m.Allocate(1, -1, "KV", shadow=False)), "over the limits"),
        ):
            server.send_multipart([identity, *request])
            failed = decode(server.recv_multipart()[1:]).message
            assert isinstance(failed, m.Failed)
            assert failed.text.startswith("null0: ")
            assert words in failed.text
        server.send_multipart([identity, *encode(m.Shutdown())])
        assert process.wait(LATE_S) == 0
    board.close()


@contextmanager
def served(directory: Path, changes: dict[str, Any]) -> Iterator[tuple[Any, subprocess.Popen[bytes]]]:
    """A real worker, and the socket of its coordinator."""
    context = sockets.new_context()
    server = sockets.control_server(context)
    server.setsockopt(zmq.RCVTIMEO, int(LATE_S * 1000))
    endpoint = sockets.bind(server, "ipc", str(directory), "c")
    settings = {**CONFIGURATION, "endpoint": endpoint, "run_directory": str(directory), **changes}
    command = [sys.executable, "-P", "-m", "workers", str(directory), "null0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        try:
            yield server, process
        finally:
            process.kill()
            server.close(linger=0)
            context.term()
