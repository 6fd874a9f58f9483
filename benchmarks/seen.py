"""What a benchmark sees of real steps: whole ones, and the runs of ops in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.cli.calibrate_rig import Timed
from coordinator.runtime.evaluate import Shipped
from coordinator.runtime.session import Session
from coordinator.schedule.lower import Lowered
from coordinator.simulate.calibrate_fit import typical
from protocol.program import Kind
from protocol.timing import Times


@dataclass(frozen=True, slots=True)
class Pair:
    """Measured and simulated seconds of a split or a whole step; `rounds` are the measured ones round by round."""

    name: str
    real: float
    simulated: float
    rounds: Sequence[float] = ()

    @property
    def error(self) -> float:
        """Relative error of the simulation."""
        return self.simulated / self.real - 1.0


@dataclass(frozen=True, slots=True)
class Placement:
    """What is measured: a model, workers, and how many layers lie on accelerators."""

    model: str
    workers: str
    layers: int

    def __str__(self) -> str:
        return f"{self.model}, {self.workers}, {self.layers} layers"


@dataclass(slots=True)
class Seen:
    """Samples of one placement: whole steps, what of them is outside of operations, and how long each worker computed;
    each run of ops with its worker and split, from steps that are noted; the same of `further` graphs by name.

    `probes` are what the calibrated `case` took in between: how much of the machine neighbours left to either.
    """

    walls: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    computed: dict[int, list[float]] = field(default_factory=dict)
    runs: list[tuple[int, int, list[float]]] = field(default_factory=list)
    lowered: Lowered | None = None
    names: Sequence[str] = ()
    further: dict[str, Seen] = field(default_factory=dict)
    case: str = ""
    probes: list[float] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        """Put samples of a further round to these: the program is the same whenever it is measured."""
        self.lowered, self.names, self.case = other.lowered, other.names, other.case
        self.walls += other.walls
        self.outside += other.outside
        self.probes += other.probes
        for worker, seconds in other.computed.items():
            self.computed.setdefault(worker, []).extend(seconds)
        self.runs = self.runs or [(worker, split, []) for worker, split, _ in other.runs]
        for (_, _, mine), (_, _, more) in zip(self.runs, other.runs, strict=True):
            mine += more
        for name, seen in other.further.items():
            self.further.setdefault(name, Seen()).add(seen)

    def slower(self, calibrated: Mapping[str, Sequence[float]]) -> float:
        """How many times as long the case took as when it was calibrated."""
        return typical(self.probes) / typical(calibrated[self.case])

    def take(self, timed: Timed) -> None:
        """A whole step."""
        self.walls.append(timed.wall_s)
        self.outside.append(timed.outside_s)
        for worker, seconds in timed.compute_s.items():
            self.computed.setdefault(worker, []).append(seconds)

    def note(self, session: Session, shipped: Shipped, times: Mapping[int, Sequence[Times]]) -> None:
        """A step in which runs were noted."""
        if self.lowered is None:
            self.lowered, self.names = shipped.lowered, [device.name for device in session.devices]
            for worker, number in runs_of(shipped.lowered):
                self.runs.append((worker, shipped.lowered.programs[worker].instructions[number].split, []))
        for (worker, number), (_, _, found) in zip(runs_of(shipped.lowered), self.runs, strict=True):
            row = times[worker][number]
            found.append((row.end_ns - row.start_ns) * 1e-9)

    def splits(self) -> list[tuple[str, float]]:
        """What every run of ops takes: all that its worker computes where it has one run in a step, else as noted."""
        workers = [worker for worker, _, _ in self.runs]
        return [
            (f"{self.names[worker]} split {split}", typical(self.computed[worker] if alone else found))
            for worker, split, found in self.runs
            for alone in (workers.count(worker) == 1,)
        ]


def runs_of(lowered: Lowered) -> list[tuple[int, int]]:
    """Every run of ops: its worker, and its number among the worker's instructions."""
    programs = enumerate(lowered.programs)
    return [
        (worker, number)
        for worker, program in programs
        for number, item in enumerate(program.instructions)
        if item.kind is Kind.RUN
    ]
