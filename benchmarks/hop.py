"""One hop between two workers, 1 KB to 64 MB and its acknowledgement, against raw TCP and a plain copy."""

from __future__ import annotations

import ctypes
import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

import numpy as np

from benchmarks import models
from benchmarks.measure import Row, Timed, call_timer, compare, interleave
from coordinator.config import parse_workers
from coordinator.model.gguf_file import open_model
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.memory import Memory
from coordinator.runtime.session import devices_of
from protocol import messages as m
from protocol.program import Instruction, Kind, pack_instructions, pack_ops

SIZES = {1 << 10: 200, 16 << 10: 200, 256 << 10: 60, 4 << 20: 10, 64 << 20: 3}
"""Bytes of a hop, and how many there are in one step."""
SENDER, RECEIVER = 0, 1


class Workers:
    """Two idle workers that know one program per size: the first lends bytes, the second takes them, one by one."""

    def __init__(self, plane: str) -> None:
        topology = parse_workers("cpu:1,accel:1", 1)
        model = open_model(models.model_file("demo"))
        self.arenas: dict[int, list[int]] = {}  # of both workers, by bytes of a hop
        with ExitStack() as stack:
            self.fleet = stack.enter_context(Fleet(topology, FleetOptions(plane=plane)))
            self.fleet.start()
            self.fleet.handshake()
            self.memory = Memory(self.fleet, topology, devices_of(topology), model)
            self.programs = {nbytes: self._program(nbytes, hops) for nbytes, hops in SIZES.items()}
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End the workers."""
        self._stack.close()

    def _program(self, nbytes: int, hops: int) -> int:
        arenas = [self.memory.allocate(worker, nbytes, "hop") for worker in (SENDER, RECEIVER)]
        self.arenas[nbytes] = arenas
        number = next(self.fleet.program_numbers)
        for worker in (SENDER, RECEIVER):
            peer = 1 - worker
            instructions: list[Instruction] = []
            for hop in range(hops):
                if worker == SENDER:
                    instructions.append(Instruction(Kind.SEND, hop, peer, 0, arenas[SENDER], 0, nbytes))
                    instructions.append(Instruction(Kind.WAIT, hop, peer))
                else:
                    source = (arenas[SENDER], 0)
                    instructions.append(Instruction(Kind.RECV, hop, peer, 0, arenas[RECEIVER], 0, nbytes, source))
            peers = (self.memory.peer_arena(SENDER, arenas[SENDER]),) if worker == RECEIVER else ()
            message = m.ProgramMessage(number, f"hop {nbytes}", hops, (), (), (), peers, False)
            tables = (pack_ops([]).tobytes(), pack_instructions(instructions).tobytes())
            self.fleet.send(worker, message, tables)
        self.fleet.gather([SENDER, RECEIVER])
        return number

    def timer(self, nbytes: int) -> Timed:
        """Seconds per hop, as the slower of both workers measures its part of the step."""

        def timed() -> float:
            step = next(self.fleet.step_numbers)
            for worker in (SENDER, RECEIVER):
                self.fleet.send(worker, m.Step(self.programs[nbytes], step))
            done = [envelope.message for envelope in self.fleet.gather([SENDER, RECEIVER]).values()]
            return max(message.total_ns for message in done) / 1e9 / SIZES[nbytes]

        timed()
        return timed


def _sink(pipe: Connection, nbytes: int) -> None:
    """Takes `nbytes` from a TCP connection, answers with one byte, and again until it is closed."""
    server = socket.create_server(("127.0.0.1", 0))
    pipe.send(server.getsockname()[1])
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    view = memoryview(bytearray(nbytes))
    while True:
        at = 0
        while at < nbytes:
            got = connection.recv_into(view[at:])
            if not got:
                return
            at += got
        connection.sendall(b"k")


@contextmanager
def _tcp(nbytes: int) -> Iterator[Timed]:
    """Seconds per hop over a TCP connection of this host, as ggml's RPC backend has one."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_sink, args=(theirs, nbytes), daemon=True)
    process.start()
    with socket.create_connection(("127.0.0.1", ours.recv())) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = bytes(nbytes)

        def timed() -> float:
            start = time.perf_counter()
            for _ in range(SIZES[nbytes]):
                connection.sendall(data)
                connection.recv(1)
            return (time.perf_counter() - start) / SIZES[nbytes]

        timed()
        yield timed
    process.join()


def _copy(nbytes: int) -> Timed:
    """Seconds per copy within one process."""
    keep = (np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8))
    to, source = keep[0].ctypes.data, keep[1].ctypes.data

    def work(_keep: object = keep) -> None:
        ctypes.memmove(to, source, nbytes)

    return call_timer(work)


def rows(quick: bool) -> Iterator[Row]:
    """Shared memory (ours) against TCP; as other figures our messages over ZeroMQ, and a copy within a process."""
    with ExitStack() as stack:
        shared, messages = Workers("shared"), Workers("message")
        stack.callback(shared.close)
        stack.callback(messages.close)
        for nbytes in SIZES:
            with _tcp(nbytes) as tcp:
                rivals = {
                    "ours": shared.timer(nbytes),
                    "ZeroMQ": messages.timer(nbytes),
                    "TCP": tcp,
                    "copy": _copy(nbytes),
                }
                samples = interleave(rivals, 9 if quick else 31)
            yield compare("hop", f"hop of {nbytes >> 10} KB", samples, "ms", lambda s: s * 1e3, "", "TCP")
