"""Idle workers that run synthetic programs: what `crossdock calibrate` measures on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import numpy as np

from coordinator.config import Topology
from coordinator.runtime.fleet import Fleet, FleetOptions
from protocol import messages as m
from protocol.messages import PeerArena
from protocol.program import NOWHERE, Instruction, Kind, OpRecord, pack_instructions, pack_ops
from protocol.timing import unpack_times
from protocol.wire import Envelope

_WRITE_NBYTES: Final = 16 << 20
_SMALL, _LARGE = 0x20, 0x40
"""Bytes from here to there are ordinary numbers in every type, F32, F16 and scales of blocks alike: neither NaN nor
denormal, which some processors are slow at."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker runs in a step: operations and instructions, RUN over all operations where there are none."""

    ops: Sequence[OpRecord] = ()
    instructions: Sequence[Instruction] = ()
    outputs: tuple[m.Port, ...] = ()

    @property
    def program(self) -> Sequence[Instruction]:
        """The instructions."""
        return self.instructions or (Instruction(Kind.RUN, 0, len(self.ops)),)


class Rig:
    """The workers of a topology, each with one arena of `nbytes` (number ARENA) full of ordinary numbers.

    Use as a context manager. Raises what workers fail with.
    """

    ARENA: Final = 1

    def __init__(self, topology: Topology, nbytes: Sequence[int], plane: str | None = None) -> None:
        self.topology, self.sizes = topology, nbytes
        self.fleet = Fleet(topology, FleetOptions(plane=plane))
        self._stack = ExitStack()
        self._arenas: list[PeerArena] = []

    def __enter__(self) -> Rig:
        with ExitStack() as stack:
            stack.enter_context(self.fleet)
            self.fleet.start()
            self.fleet.handshake()
            for worker, nbytes in enumerate(self.sizes):
                self._fill(worker, nbytes)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, tb)

    def _fill(self, worker: int, nbytes: int) -> None:
        answer = self.fleet.request(worker, m.Allocate(self.ARENA, nbytes, "calibrate", False)).message
        assert isinstance(answer, m.Allocated)
        self._arenas.append(PeerArena(worker, self.ARENA, answer.path, nbytes, answer.shadow_path))
        rng = np.random.default_rng(worker)
        for start in range(0, nbytes, _WRITE_NBYTES):
            data = rng.integers(_SMALL, _LARGE, min(_WRITE_NBYTES, nbytes - start), np.uint8)
            self.write(worker, start, data.tobytes())

    def write(self, worker: int, offset: int, data: bytes) -> None:
        """Put bytes into a worker's arena."""
        self.fleet.request(worker, m.Write(self.ARENA, offset), (data,))

    def ship(self, name: str, shares: Mapping[int, Share], timing: str = "") -> Loaded:
        """Programs of one step on these workers, timed as `timing` says (protocol.timing).

        Raises CapacityError for an op without a kernel.
        """
        number = next(self.fleet.program_numbers)
        transfers = [i.transfer for share in shares.values() for i in share.program if i.kind is Kind.SEND]
        for worker, share in shares.items():
            received = {i.peer for i in share.program if i.kind is Kind.RECV and i.src[0] != NOWHERE}
            peers = tuple(self._arenas[peer] for peer in sorted(received))
            message = m.ProgramMessage(number, name, len(transfers), (), share.outputs, (), peers, False, timing)
            tables = (pack_ops(share.ops).tobytes(), pack_instructions(share.program).tobytes())
            self.fleet.send(worker, message, tables)
        self.fleet.gather(list(shares))
        return Loaded(self, number, tuple(shares))


@dataclass(frozen=True, slots=True)
class Timed:
    """A step in seconds, without what neighbours took from the workers while they computed: the whole of it, and
    computing by worker."""

    wall_s: float
    compute_s: Mapping[int, float]

    @property
    def outside_s(self) -> float:
        """What is not computing; workers compute in turn."""
        return self.wall_s - sum(self.compute_s.values())


class ProcessorTime:
    """Processor time of each worker's first thread since this was made, which bounds what it computed, however long
    others had its processor meanwhile. Only where workers have one thread, and Linux says how long that has run."""

    def __init__(self, fleet: Fleet) -> None:
        self.pids = [p.pid if p.spec.threads == 1 else 0 for p in fleet.processes]
        self.before = [_processor_s(pid) for pid in self.pids]

    def timed(self, wall_s: float, compute_s: Mapping[int, float]) -> Timed:
        """A step whose workers say that they computed for so long."""
        least: dict[int, float] = {}
        for worker, seconds in compute_s.items():
            before, after = self.before[worker], _processor_s(self.pids[worker])
            least[worker] = seconds if before is None or after is None else min(seconds, after - before)
        return Timed(wall_s - sum(compute_s.values()) + sum(least.values()), least)


def _processor_s(pid: int) -> float | None:
    try:
        with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
            return int(file.read().split()[0]) * 1e-9
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A program that the rig's workers hold."""

    rig: Rig
    number: int
    workers: tuple[int, ...]

    def run(self) -> dict[int, Envelope]:
        """One step; what each worker says of it (Done)."""
        fleet = self.rig.fleet
        step = next(fleet.step_numbers)
        for worker in self.workers:
            fleet.send(worker, m.Step(self.number, step))
        return dict(fleet.gather(self.workers))

    def noted(self, worker: int, number: int) -> float:
        """One step of a program with timing "trace": how many seconds a worker was at one of its instructions."""
        row = unpack_times(self.run()[worker].buffers[-1])[number]
        return (row.end_ns - row.start_ns) * 1e-9

    def timed(self) -> Timed:
        """One step: its wall time, and how long each worker computed."""
        watch = ProcessorTime(self.rig.fleet)
        start = time.perf_counter()
        answers = self.run()
        wall_s = time.perf_counter() - start
        return watch.timed(wall_s, {worker: answer.message.compute_ns * 1e-9 for worker, answer in answers.items()})

    def forget(self) -> None:
        """The workers drop it."""
        for worker in self.workers:
            self.rig.fleet.send(worker, m.Forget((self.number,)))
