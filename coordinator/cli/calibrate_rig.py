"""Idle workers that run synthetic programs: what `crossdock calibrate` measures on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from coordinator.config import Topology
from coordinator.runtime.evaluate import Evaluator, Shipped, StepResult
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.memory import Memory
from coordinator.runtime.stopwatch import Stopwatch
from coordinator.schedule.lower import Lowered, Transfer, WorkerProgram
from coordinator.schedule.plan import Plan
from protocol import messages as m
from protocol.messages import PeerArena
from protocol.program import Instruction, Kind, OpRecord

_WRITE_NBYTES: Final = 16 << 20
_SMALL, _LARGE = 0x20, 0x40
"""Bytes from here to there are ordinary numbers in every type, F32, F16 and scales of blocks alike: neither NaN nor
denormal, which some processors are slow at."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker runs in a step: operations and instructions, RUN over all operations where there are none."""

    ops: Sequence[OpRecord] = ()
    instructions: Sequence[Instruction] = ()
    inputs: tuple[m.Port, ...] = ()
    outputs: tuple[m.Port, ...] = ()
    digests: tuple[m.Port, ...] = ()

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
        self.stopwatch = Stopwatch(keep=True)
        memory = cast(Memory, self)  # of which programs that are planned already ask only for peers' arenas
        self.plain = Evaluator(self.fleet, memory, ())
        self.noting = Evaluator(self.fleet, memory, (), stopwatch=self.stopwatch)
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

    def ship(self, name: str, shares: Mapping[int, Share], *, noted: bool = False) -> Loaded:
        """Programs of one step on these workers, which note times when it is `noted`.

        Raises CapacityError for an op without a kernel.
        """
        programs = [WorkerProgram((), (), (), (), ())] * len(self.sizes)
        for worker, share in shares.items():
            programs[worker] = WorkerProgram(
                tuple(share.ops), tuple(share.program), share.inputs, share.outputs, share.digests
            )
        n_transfers = sum(item.kind is Kind.SEND for program in programs for item in program.instructions)
        # There is no graph behind them: whoever ships and runs programs does not ask for plans and transfers.
        lowered = Lowered(cast(Plan, None), tuple(programs), (cast(Transfer, None),) * n_transfers)
        evaluator = self.noting if noted else self.plain
        return Loaded(self, evaluator, evaluator.ship(name, 0, lowered, (), None))

    def peer_arena(self, worker: int, arena: int) -> PeerArena:
        """Where peers find a worker's arena, as of a run's Memory."""
        return self._arenas[worker]


@dataclass(frozen=True, slots=True)
class Timed:
    """A step in seconds: the whole of it, and computing by worker."""

    wall_s: float
    compute_s: Mapping[int, float]

    @property
    def outside_s(self) -> float:
        """What is not computing; workers compute in turn."""
        return self.wall_s - sum(self.compute_s.values())


def timed_step(result: StepResult) -> Timed:
    """How long a step took.

    As clocks on the wall say: that of a process which runs on another processor may be a tick behind, milliseconds, so
    that processor time says too little as often as neighbours make the wall clock say too much.
    """
    return Timed(result.wall_ns * 1e-9, {worker: done.compute_ns * 1e-9 for worker, done in result.done.items()})


@dataclass(frozen=True, slots=True)
class Loaded:
    """A program that the rig's workers hold, to be run as the coordinator of a model runs it."""

    rig: Rig
    evaluator: Evaluator
    shipped: Shipped

    def run(self) -> StepResult:
        """One step."""
        return self.evaluator.run(self.shipped, self._inputs())

    def noted(self, worker: int, numbers: Sequence[int]) -> list[float]:
        """One step of a program that is noted: how many seconds a worker was at its instructions of these numbers."""
        self.run()
        rows = self.rig.stopwatch.taken.pop().times[worker]
        return [(rows[number].end_ns - rows[number].start_ns) * 1e-9 for number in numbers]

    def timed(self) -> Timed:
        """One step: its wall time, and how long each worker computed."""
        return timed_step(self.run())

    def _inputs(self) -> dict[str, NDArray[np.uint8]]:
        ports = (port for program in self.shipped.lowered.programs for port in program.inputs)
        return {port.name: np.zeros(port.nbytes, np.uint8) for port in ports}
