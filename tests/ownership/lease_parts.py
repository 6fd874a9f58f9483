"""What a cluster of `lease_machine` is made of: jobs, messages under way, workers, and memory that grows with plans."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.graph.node import Graph, Tensor
from coordinator.schedule.lower import Home, Lowered
from coordinator.schedule.plan import Device
from tests.ownership.lease_graphs import NOBODY, POISON, Meaning, Meant, Value

Ready = Callable[[], bool]
"""What a worker waits for; None where it could go on."""

Part = Iterator[Ready | None]


class Violation(AssertionError):  # noqa: N818 - a finding, not an error of the program
    """Somebody read or wrote what was not theirs, or nobody can go on."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What a worse implementation would do, one at a time."""

    acknowledge_early: bool = False  # before the copy is made
    acknowledge_half: bool = False  # in the middle of it
    send_late: bool = False  # nobody waits until a message's bytes were taken
    any_step: bool = False  # a doorbell of an earlier step counts
    watch_loans: bool = True  # report writes to lent bytes at once, without waiting for a wrong read


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation to be run by every worker: step numbers tell evaluations apart on the board."""

    lowered: Lowered
    graph: Graph
    meant: Meant
    step: int


@dataclass(slots=True)
class Message:
    """Bytes under way; those on loan are fetched when it arrives."""

    step: int
    transfer: int
    value: Callable[[], Value]


@dataclass(slots=True)
class Worker:
    """A worker: the jobs that it was given, and where it is in the first of them."""

    jobs: deque[Job] = field(default_factory=deque)
    part: Part | None = None
    ready: Ready | None = None
    early: dict[tuple[int, int], Value] = field(default_factory=dict)
    acts: int = 0


class Homes:
    """Residents in arena 1 of their device's worker; compute chunks in arenas that are replaced when they grow."""

    def __init__(self, meaning: Meaning, memory: dict[tuple[int, int], Value], devices: Sequence[Device]) -> None:
        self.meaning, self.memory = meaning, memory
        self.worker_of = {device.buft: k for k, device in enumerate(devices)}
        self.places: dict[str, Home] = {}
        self.chunks: dict[tuple[str, int], Home] = {}
        self.numbers = [2] * len(devices)

    def resident(self, tensor: Tensor) -> Home:
        assert tensor.buffer is not None
        if tensor.name not in self.places:
            worker = self.worker_of[tensor.buffer.buft]
            self.places[tensor.name] = Home(worker, self._new(worker, tensor.nbytes), 0)
            value = self.meaning.resident(tensor)
            arena = self.memory[worker, self.places[tensor.name].arena]
            arena.data[:], arena.who[:] = value.data, value.who
        return self.places[tensor.name]

    def compute(self, buft: str, chunk: int) -> Home:
        return self.chunks[buft, chunk]

    def fit(self, sizes: Mapping[str, tuple[int, ...]]) -> bool:
        """New arenas where a buffer grew; True when one was replaced: older programs must not run any more."""
        replaced = False
        for buft, chunks in sizes.items():
            worker = self.worker_of[buft]
            for k, nbytes in enumerate(chunks):
                home = self.chunks.get((buft, k))
                if home is not None and self.memory[worker, home.arena].data.size >= nbytes:
                    continue
                if home is not None:
                    del self.memory[worker, home.arena]
                    replaced = True
                self.chunks[buft, k] = Home(worker, self._new(worker, nbytes), 0)
        return replaced

    def _new(self, worker: int, nbytes: int) -> int:
        self.numbers[worker] += 1
        arena = Value(np.full(nbytes, POISON, np.uint8), np.full(nbytes, NOBODY))
        self.memory[worker, self.numbers[worker]] = arena
        return self.numbers[worker]
