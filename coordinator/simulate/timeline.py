"""What came out of a simulation: times of evaluations, how workers and links spent them, and, if kept, every slice."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from coordinator.simulate.fabric import Fabric
from coordinator.simulate.timed import Timed


class Slice(NamedTuple):
    """Time of a worker in seconds; `do` is a Do. RECV, SEND and WAIT slices are time spent waiting. `hop` is -1 for
    RUN and COPY."""

    worker: int
    start: float
    end: float
    do: int
    job: int
    split: int
    hop: int


class Carried(NamedTuple):
    """A transfer in seconds: ready (both sides were), start (the route was free), left, arrived. `last` is the worker
    that made it ready by being the later one."""

    route: int
    ready: float
    start: float
    left: float
    arrived: float
    job: int
    hop: int
    last: int


class Ran(NamedTuple):
    """One evaluation: its program, sequence and times in seconds."""

    program: int
    sequence: int
    tag: str
    released: float
    end: float
    cause: int  # the job whose end released it, -1: the start


class Depth(NamedTuple):
    """How many evaluations a worker has been given and has not finished."""

    time: float
    worker: int
    depth: int


@dataclass(slots=True)
class WorkerTotals:
    """Seconds of a worker: computing (copies within it included), waiting for bytes, for a slot to send from, and for
    loans to come back."""

    busy_s: float = 0.0
    recv_s: float = 0.0
    send_s: float = 0.0
    wait_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """The evaluations of one tag: how many, when the first was released and the last ended, and their seconds."""

    n: int = 0
    first_s: float = inf
    last_s: float = 0.0
    seconds: float = 0.0

    def add(self, released: float, end: float) -> None:
        """One more, in seconds."""
        self.n += 1
        self.first_s = min(self.first_s, released)
        self.last_s = max(self.last_s, end)
        self.seconds += end - released


@dataclass(slots=True)
class Timeline:
    """A finished simulation. `jobs`, `slices`, `carried` and `depths`, which grow with it, are empty unless it was told
    to record; everything else is as large for a million evaluations as for one."""

    programs: tuple[Timed, ...]
    fabric: Fabric
    end_s: float = 0.0
    n_events: int = 0
    workers: list[WorkerTotals] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)
    route_nbytes: list[int] = field(default_factory=list)
    route_busy_s: list[float] = field(default_factory=list)
    route_transfers: list[int] = field(default_factory=list)
    jobs: list[Ran] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)
    depths: list[Depth] = field(default_factory=list)

    def span(self, tag: str) -> float:
        """Seconds that the evaluations of this tag took, from the first's release to the last's end; 0 for none."""
        tally = self.tallies.get(tag)
        return tally.last_s - tally.first_s if tally is not None else 0.0
