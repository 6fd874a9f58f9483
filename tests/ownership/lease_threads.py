"""The real thing in threads: `Runner`, planes, board and arenas, with naps wherever a process might be held up."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import zmq

from coordinator.schedule.lower import Lowered
from protocol import sharedmem, sockets
from protocol.board import Board
from protocol.messages import PeerArena, ProgramMessage
from protocol.ops import WRITES_ONLY
from protocol.program import NOWHERE, Instruction, Kind, OperandRef, OpRecord, pack_instructions, pack_ops
from tests.ownership.lease_graphs import Meant, mix, spots
from tests.ownership.lease_machine import Cluster
from workers.arena import Arenas
from workers.peers import Check, MessagePlane, Plane, SharedPlane
from workers.run import Compiled, Runner, compile_program

PATIENCE_S = 60.0
TOKEN = "threads"


@dataclass
class Naps:
    """How long one worker is held up, each time that it might be: mostly not at all, at times much longer."""

    rng: random.Random
    longest_s: float = 0.0
    before_copy_s: dict[int, float] = field(default_factory=dict)  # by transfer, besides
    before_run_s: float = 0.0
    before_post_s: float = 0.0

    def nap(self) -> None:
        if self.longest_s and self.rng.random() < 0.2:
            time.sleep(self.rng.random() ** 3 * self.longest_s)


class TinyEngine:
    """Computes `lease_graphs.mix`, source by source, on the worker's real arenas."""

    def __init__(self, naps: Naps) -> None:
        self.naps = naps

    def build(self, ops: Sequence[OpRecord], arenas: Arenas, *, overlaps: bool) -> tuple[Sequence[OpRecord], Arenas]:
        return ops, arenas

    def run(self, built: tuple[Sequence[OpRecord], Arenas], first: int, last: int) -> None:
        ops, arenas = built
        time.sleep(self.naps.before_run_s)

        def at(ref: OperandRef) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
            return arenas.segments[ref.arena].view, spots(ref.ne, ref.nb) + ref.offset

        for op in ops[first:last]:
            sources = []
            for k, ref in enumerate(op.src):
                if ref is not None and WRITES_ONLY.get(op.op) != k:
                    memory, where = at(ref)
                    sources.append(memory[where])
                    self.naps.nap()
            memory, where = at(op.dst)
            half = where.size // 2
            result = mix(op.op, op.node, sources, where.size)
            memory[where[:half]] = result[:half]
            self.naps.nap()
            memory[where[half:]] = result[half:]

    def close(self) -> None:
        """Nothing to end."""


class SlowShared(SharedPlane):
    """Held up between publication and copy, within the copy, and before the acknowledgement; or acknowledging early."""

    def __init__(self, board: Board, naps: Naps, early: bool) -> None:
        super().__init__(board)
        self.naps, self.early = naps, early

    def send(self, program: int, step: int, item: Instruction, base: int) -> None:
        self.naps.nap()
        super().send(program, step, item, base)

    def receive(self, program: int, step: int, item: Instruction, base: int, check: Check | None = None) -> None:
        self.naps.nap()
        self.board.wait_published(item.transfer, step)
        if self.early:
            self.board.acknowledge(item.transfer, step)
        time.sleep(self.naps.before_copy_s.get(item.transfer, 0.0))
        source = self.mapped[item.peer, item.src[0]].address + item.src[1]
        sharedmem.copy(base + item.offset, source, item.nbytes)
        self.naps.nap()
        self.board.acknowledge(item.transfer, step)


class SlowMessages(MessagePlane):
    """Held up before each message, both ways."""

    naps: Naps

    def send(self, program: int, step: int, item: Instruction, base: int) -> None:
        self.naps.nap()
        super().send(program, step, item, base)

    def receive(self, program: int, step: int, item: Instruction, base: int, check: Check | None = None) -> None:
        self.naps.nap()
        super().receive(program, step, item, base, check)


class LateOutbox:
    """A PUSH socket that hands frames to ZeroMQ later, in order: those that were not copied are read only then."""

    def __init__(self, socket: zmq.Socket[bytes], naps: Naps) -> None:
        self.socket, self.naps = socket, naps
        self.posts: queue.Queue[tuple[bytes, bytes | zmq.Frame] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def send_multipart(self, parts: tuple[bytes, memoryview | zmq.Frame]) -> None:
        head, body = parts
        self.posts.put((head, body if isinstance(body, zmq.Frame) else bytes(body)))

    def _work(self) -> None:
        while (parts := self.posts.get()) is not None:
            time.sleep(self.naps.before_post_s)
            self.naps.nap()
            self.socket.send_multipart(parts)
            parts = None  # the last reference to a frame keeps its loan out

    def close(self) -> None:
        self.posts.put(None)
        self.thread.join(PATIENCE_S)
        self.socket.close()


class Threads:
    """One thread per worker of a `Cluster`, which plans for them. Use `threads_of`."""

    def __init__(
        self, cluster: Cluster, arenas: Sequence[Arenas], planes: Sequence[Plane], naps: Sequence[Naps], board: Board
    ):
        self.cluster, self.arenas, self.planes, self.naps, self.board = cluster, arenas, planes, naps, board
        n = len(cluster.workers)
        self.engines = [TinyEngine(naps[k]) for k in range(n)]
        self.runners = [Runner(k, arenas[k], planes[k], board, self.engines[k]) for k in range(n)]
        self.jobs: list[queue.Queue[tuple[Compiled, int, Meant] | None]] = [queue.Queue() for _ in range(n)]
        self.answers: queue.Queue[tuple[int, dict[str, bytes]]] = queue.Queue()
        self.threads = [threading.Thread(target=self._work, args=(k,), daemon=True) for k in range(n)]
        for thread in self.threads:
            thread.start()
        self.number = 0

    def _work(self, index: int) -> None:
        while (job := self.jobs[index].get()) is not None:
            compiled, step, meant = job
            ports = compiled.message.inputs
            inputs = [memoryview(meant.inputs[port.name].data.tobytes()) for port in ports]
            _, outputs = self.runners[index].run(compiled, step, inputs)
            names = [port.name for port in compiled.message.outputs]
            self.answers.put((step, dict(zip(names, outputs, strict=True))))

    def ship(self, lowered: Lowered) -> list[Compiled]:
        """Through the tables of the wire; arenas as the cluster has them."""
        self._mirror()
        self.number += 1
        compiled = []
        for k, program in enumerate(lowered.programs):
            pairs = {(i.peer, i.src[0]) for i in program.instructions if i.kind is Kind.RECV and i.src[0] != NOWHERE}
            peers = tuple(self._peer(*pair) for pair in sorted(pairs))
            message = ProgramMessage(
                self.number, "g", len(lowered.transfers), program.inputs, program.outputs, program.digests, peers,
                overlaps=False,
            )  # fmt: skip
            tables = pack_ops(program.ops).tobytes(), pack_instructions(program.instructions).tobytes()
            buffers = [memoryview(table) for table in tables]
            compiled.append(
                compile_program(
                    message, buffers, self.arenas[k], self.planes[k], self.engines[k], len(self.jobs), frozenset()
                )
            )
        return compiled

    def _peer(self, worker: int, arena: int) -> PeerArena:
        segment = self.arenas[worker].segments[arena]
        return PeerArena(worker, arena, segment.path, segment.nbytes, "")

    def _mirror(self) -> None:
        for (worker, arena), value in self.cluster.memory.items():
            if arena not in self.arenas[worker].segments:
                segment = self.arenas[worker].allocate(arena, value.data.size, "arena")
                segment.view[: value.data.size] = value.data
        for worker, arenas in enumerate(self.arenas):
            for arena in [a for a in arenas.segments if (worker, a) not in self.cluster.memory]:
                arenas.release(arena)

    def run(
        self, lowered: Lowered, compiled: Sequence[Compiled], steps: int, patience_s: float = PATIENCE_S
    ) -> list[str]:
        """Steps of one program, handed out at once; the outputs that have other bytes than they should."""
        meant: dict[int, Meant] = {}
        for _ in range(steps):
            self.cluster.step += 1
            step = self.cluster.step
            meant[step] = self.cluster.meaning.evaluate(lowered.plan.graph, step, {})
            for k, jobs in enumerate(self.jobs):
                jobs.put((compiled[k], step, meant[step]))
        wrong = []
        for _ in range(steps * len(self.jobs)):
            try:
                step, outputs = self.answers.get(timeout=patience_s)
            except queue.Empty:
                self._free(lowered, meant)
                return ["no answer"]
            wrong += [
                f"step {step}: {n}" for n, data in outputs.items() if data != meant[step].outputs[n].data.tobytes()
            ]
        return wrong

    def _free(self, lowered: Lowered, steps: Iterable[int]) -> None:
        """Ring every doorbell until nobody waits any more: these workers wait for each other."""
        for jobs in self.jobs:
            jobs.put(None)
        while any(thread.is_alive() for thread in self.threads):
            for step in steps:
                for transfer in lowered.transfers:
                    self.board.publish(transfer.number, step)
                    self.board.acknowledge(transfer.number, step)
                time.sleep(0.01)

    def close(self) -> None:
        """End the threads, give memory back."""
        for jobs in self.jobs:
            jobs.put(None)
        for thread in self.threads:
            thread.join(PATIENCE_S)
        for k, plane in enumerate(self.planes):
            plane.close()
            for arena in list(self.arenas[k].segments):
                self.arenas[k].release(arena)


def in_pieces(naps: Naps) -> object:
    """`sharedmem.copy` that is held up between its halves."""
    whole = sharedmem.copy

    def copy(destination: int, source: int, nbytes: int) -> None:
        half = nbytes // 2
        whole(destination, source, half)
        naps.nap()
        whole(destination + half, source + half, nbytes - half)
        naps.nap()

    return copy


@contextmanager
def threads_of(cluster: Cluster, directory: str, seed: int, *, early: bool = False) -> Iterator[Threads]:
    """Running threads on the cluster's plane; `early`: they acknowledge before they copy."""
    n = len(cluster.workers)
    naps = [Naps(random.Random(f"{seed} {k}")) for k in range(n)]
    with ExitStack() as stack:
        board = Board.create(directory)
        stack.callback(board.segment.close)
        shared = cluster.plane == "shared"
        arenas = [Arenas(directory, f"w{k}", limit=None, shared=shared, virtual=False) for k in range(n)]
        planes: list[Plane]
        if shared:
            planes = [SlowShared(board, naps[k], early) for k in range(n)]
        else:
            context = sockets.new_context()
            stack.callback(context.term)
            planes = list(_message_planes(context, directory, naps, arenas))
        threads = Threads(cluster, arenas, planes, naps, board)
        stack.callback(threads.close)
        yield threads


def _message_planes(
    context: sockets.Context, directory: str, naps: Sequence[Naps], arenas: Sequence[Arenas]
) -> Iterator[SlowMessages]:
    inboxes = [sockets.data_socket(context, zmq.PULL) for _ in naps]
    endpoints = [sockets.bind(inbox, "ipc", directory, f"w{k}") for k, inbox in enumerate(inboxes)]
    for k, inbox in enumerate(inboxes):
        outboxes: list[zmq.Socket[bytes] | None] = []
        for other, endpoint in enumerate(endpoints):
            outboxes.append(None if other == k else sockets.data_socket(context, zmq.PUSH))
            if (outbox := outboxes[-1]) is not None:
                sockets.connect(outbox, endpoint, "")
                outboxes[-1] = LateOutbox(outbox, naps[k])  # type: ignore[call-overload]
        plane = SlowMessages(inbox, outboxes, TOKEN, arenas[k].segments, virtual=False)
        plane.naps = naps[k]
        yield plane
