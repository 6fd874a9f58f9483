"""Arenas of the workers: where weights, caches, kept tensors and compute buffers of a run lie."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coordinator.config import Topology
from coordinator.graph.node import Tensor
from coordinator.model.gguf_file import ModelFile, content_ranges
from coordinator.runtime.fleet import Fleet
from coordinator.schedule.lower import Home
from coordinator.schedule.plan import Device
from coordinator.schedule.residents import Key, purpose_of
from protocol import messages as m
from protocol.errors import CapacityError
from protocol.messages import PeerArena

ROUND_NBYTES = 64 << 20
"""What an accelerator copies between two reports of progress."""

Progress = Callable[[int, int], None]
"""Told how many bytes of how many accelerators have copied."""

HANDLES = {"cross_states": 0}
"""Slot of each tensor that a graph may find where an earlier one left it (see protocol.shadow)."""


@dataclass(frozen=True, slots=True)
class Arena:
    """An arena of a worker: bytes, and the path that peers open."""

    nbytes: int
    path: str
    label: str
    shadow_path: str = ""


Pieces = npt.NDArray[np.int64]
"""[n, 3]: offset in the file, offset in an arena, bytes."""


@dataclass(slots=True)
class Budget:
    """Bytes that a worker needs, by purpose."""

    parts: dict[str, int] = field(default_factory=dict)

    def add(self, purpose: str, nbytes: int) -> None:
        """Count bytes."""
        self.parts[purpose] = self.parts.get(purpose, 0) + nbytes

    @property
    def total(self) -> int:
        """Sum over purposes."""
        return sum(self.parts.values())


class Memory:
    """The arenas of all workers; answers the lowering's questions (`Homes`). Lives as long as the run.

    Compute arenas belong to a scheduler, by its number, and are replaced when its buffers grow. With `shadows` all
    arenas that programs write to have one (strict ownership).
    """

    def __init__(
        self,
        fleet: Fleet,
        topology: Topology,
        devices: tuple[Device, ...],
        model: ModelFile,
        *,
        shadows: bool = False,
    ) -> None:
        self.fleet, self.topology, self.devices, self.model = fleet, topology, devices, model
        self.shadows = shadows
        self.worker_of = {device.buft: index for index, device in enumerate(devices)}
        self.arenas: list[dict[int, Arena]] = [{} for _ in devices]
        self.resident: dict[Key, Home] = {}
        self.placed: list[tuple[int, int, int]] = []  # worker, arena, offset of what has memory of its own, sorted
        self._files: dict[int, int] = {}  # worker: arena of the mapped model file
        self.compute: dict[tuple[int, str, int], Home] = {}

    def check_budget(self, residents: dict[Key, Tensor], buffers: Iterable[dict[str, tuple[int, ...]]]) -> list[Budget]:
        """Bytes per worker, before anything is allocated.

        Raises CapacityError naming the worker, what it needs for what, what it has and what is missing.
        """
        budgets = [Budget() for _ in self.devices]
        for (_, buft), tensor in residents.items():
            worker = self.worker_of[buft]
            if not self._in_file(worker, tensor):
                budgets[worker].add(purpose_of(tensor), _aligned(tensor.nbytes, self.devices[worker].alignment))
        for sizes in buffers:
            for buft, chunks in sizes.items():
                budgets[self.worker_of[buft]].add("compute", sum(chunks))
        for spec, budget in zip(self.topology.workers, budgets, strict=True):
            if spec.memory is not None and budget.total > spec.memory:
                parts = ", ".join(f"{purpose} {nbytes:,}" for purpose, nbytes in budget.parts.items())
                raise CapacityError(
                    f"{spec.name}: needs {budget.total:,} bytes ({parts}), it has {spec.memory:,}: "
                    f"{budget.total - spec.memory:,} bytes short; try fewer --n-gpu-layers"
                )
        return budgets

    def load(self, residents: dict[Key, Tensor], progress: Progress | None = None) -> None:
        """Map the model file where it is needed, allocate and fill weights, allocate caches. Raises as workers do.

        No weight travels: workers open the file themselves and compare its digest. Accelerators copy their shares from
        it, all at the same time.
        """
        by_worker: list[list[Tensor]] = [[] for _ in self.devices]
        for (_, buft), tensor in residents.items():
            by_worker[self.worker_of[buft]].append(tensor)
        self._map_file([i for i, tensors in enumerate(by_worker) if any(map(_is_weight, tensors))])
        loads: list[tuple[int, int, Pieces]] = []
        for worker, tensors in enumerate(by_worker):
            for tensor in tensors:
                if self._in_file(worker, tensor):
                    offset = self.model.weights[tensor.name].offset
                    self.resident[_key(tensor)] = Home(worker, self._files[worker], offset)
            for label in ("weights", "KV", "kept"):
                share = [t for t in tensors if purpose_of(t) == label and not self._in_file(worker, t)]
                if share:
                    arena = self._place(worker, label, share)
                    if label == "weights":
                        loads.append((worker, arena, self._pieces(share)))
        self._copy(loads, progress or (lambda done, total: None))

    def _in_file(self, worker: int, tensor: Tensor) -> bool:
        """Workers that compute in host memory use weights where the file is mapped."""
        return _is_weight(tensor) and (self.devices[worker].is_host or self.topology.workers[worker].kind == "cpu")

    def _map_file(self, workers: list[int]) -> None:
        ranges = content_ranges(self.model)
        path = str(self.model.path.resolve())
        for worker in workers:
            arena = self._files[worker] = next(self.fleet.arena_numbers[worker])
            request = m.MapFile(arena, path, self.model.nbytes, self.model.fingerprint)
            self.fleet.send(worker, request, (ranges.tobytes(),))
            self.arenas[worker][arena] = Arena(self.model.nbytes, path, "file")
        self.fleet.gather(workers)

    def _place(self, worker: int, label: str, tensors: list[Tensor]) -> int:
        """One arena for all of them, in order, each at the device's alignment."""
        alignment, offset = self.devices[worker].alignment, 0
        offsets = []
        for tensor in tensors:
            offsets.append(offset)
            offset += _aligned(tensor.nbytes, alignment)
        arena = self.allocate(worker, offset, label)
        for tensor, start in zip(tensors, offsets, strict=True):
            self.resident[_key(tensor)] = Home(worker, arena, start)
            insort(self.placed, (worker, arena, start))
        return arena

    def _pieces(self, tensors: list[Tensor]) -> Pieces:
        weights = [self.model.weights[t.name] for t in tensors]
        offsets = [self.resident[_key(t)].offset for t in tensors]
        rows = [(weight.offset, offset, weight.nbytes) for weight, offset in zip(weights, offsets, strict=True)]
        return np.array(rows, np.int64)

    def _copy(self, loads: Sequence[tuple[int, int, Pieces]], progress: Progress) -> None:
        """Have each worker copy its pieces into its arena, all workers at once, as many rounds as the largest needs.

        A round is the same fraction of every share, so that those with less to copy do not hold up who has most.
        """
        sizes = [int(pieces[:, 2].sum()) for _, _, pieces in loads]
        n_rounds, done = -(-max(sizes, default=0) // ROUND_NBYTES), 0
        for k in range(n_rounds):
            for (worker, arena, pieces), nbytes in zip(loads, sizes, strict=True):
                part = cut(pieces, nbytes * k // n_rounds, nbytes * (k + 1) // n_rounds)
                self.fleet.send(worker, m.Load(self._files[worker], arena), (part.tobytes(),))
            answers = self.fleet.gather([worker for worker, _, _ in loads])
            done += sum(answer.message.nbytes for answer in answers.values())
            progress(done, sum(sizes))

    def allocate(self, worker: int, nbytes: int, label: str) -> int:
        """A new arena on a worker; its number."""
        arena = next(self.fleet.arena_numbers[worker])
        shadow = self.shadows and label != "weights"
        answer = self.fleet.request(worker, m.Allocate(arena, nbytes, label, shadow)).message
        assert isinstance(answer, m.Allocated)
        self.arenas[worker][arena] = Arena(nbytes, answer.path, label, answer.shadow_path)
        return arena

    def fit_compute(self, scheduler: int, buffer_sizes: dict[str, tuple[int, ...]]) -> bool:
        """Make the scheduler's compute arenas as large as its buffers; True when any had to be replaced."""
        replaced = False
        for buft, chunks in buffer_sizes.items():
            worker = self.worker_of[buft]
            for chunk, nbytes in enumerate(chunks):
                home = self.compute.get((scheduler, buft, chunk))
                if home is not None and self.arenas[worker][home.arena].nbytes >= nbytes:
                    continue
                if home is not None:
                    self.fleet.send(worker, m.Release((home.arena,)))
                    del self.arenas[worker][home.arena]
                    replaced = True
                arena = self.allocate(worker, nbytes, "compute")
                self.compute[scheduler, buft, chunk] = Home(worker, arena, 0)
        return replaced

    def release(self) -> None:
        """Give every arena back."""
        for worker, arenas in enumerate(self.arenas):
            if arenas:
                self.fleet.send(worker, m.Release(tuple(arenas)))
            arenas.clear()
        self.resident.clear()
        self.placed.clear()
        self.compute.clear()

    def homes(self, scheduler: int) -> SchedulerHomes:
        """The lowering's view for plans of one scheduler."""
        return SchedulerHomes(self, scheduler)

    def peer_arena(self, worker: int, arena: int) -> PeerArena:
        """What a peer has to know to read an arena."""
        found = self.arenas[worker][arena]
        return PeerArena(worker, arena, found.path, found.nbytes, found.shadow_path)

    def usage(self) -> list[dict[str, int]]:
        """Allocated bytes by worker and label; the mapped file is listed as such."""
        totals: list[dict[str, int]] = []
        for arenas in self.arenas:
            sums: dict[str, int] = {}
            for arena in arenas.values():
                sums[arena.label] = sums.get(arena.label, 0) + arena.nbytes
            totals.append(sums)
        return totals


@dataclass(frozen=True, slots=True)
class SchedulerHomes:
    """`Homes` for the plans of one scheduler."""

    memory: Memory
    scheduler: int

    def resident(self, tensor: Tensor) -> Home:
        """A weight, cache or kept tensor."""
        return self.memory.resident[_key(tensor)]

    def compute(self, buft: str, chunk: int) -> Home:
        """The start of a chunk of a compute buffer."""
        return self.memory.compute[self.scheduler, buft, chunk]

    def shadowed(self, worker: int, arena: int) -> bool:
        """True for arenas that programs write to, on workers that have memory at all."""
        label = self.memory.arenas[worker][arena].label
        return label not in ("weights", "file") and self.memory.topology.workers[worker].kind != "null"

    def epochs(self, worker: int) -> tuple[int, ...]:
        """A worker's compute arenas of this scheduler."""
        homes = self.memory.compute.items()
        return tuple(home.arena for (s, _, _), home in homes if s == self.scheduler and home.worker == worker)

    def number(self, home: Home) -> int:
        """From 1, of the resident tensor that has memory of its own there."""
        return bisect_right(self.memory.placed, (home.worker, home.arena, home.offset))

    def slot(self, tensor: Tensor) -> int | None:
        """Of a tensor that was left in a compute arena by an earlier graph (not safe), else None."""
        home = self.memory.resident[_key(tensor)]
        return HANDLES[tensor.name] if self.memory.arenas[home.worker][home.arena].label == "compute" else None

    def may_be_empty(self, tensor: Tensor) -> bool:
        """Self-attention's caches fill up token by token; what is empty is masked."""
        return tensor.name.startswith("cache_")


def cut(pieces: Pieces, first: int, last: int) -> Pieces:
    """Bytes [first, last) of pieces laid end to end; those of which nothing remains are left out."""
    ends = np.cumsum(pieces[:, 2])
    starts = ends - pieces[:, 2]
    skipped = np.clip(first - starts, 0, pieces[:, 2])
    nbytes = np.clip(last, starts, ends) - starts - skipped
    parts: Pieces = np.stack([pieces[:, 0] + skipped, pieces[:, 1] + skipped, nbytes], 1)[nbytes > 0]
    return parts


def _key(tensor: Tensor) -> Key:
    assert tensor.buffer is not None
    return (tensor.name, tensor.buffer.buft)


def _is_weight(tensor: Tensor) -> bool:
    return purpose_of(tensor) == "weights"


def _aligned(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
