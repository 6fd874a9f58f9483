"""The scheduler: plans one graph after another over buffers that outlive them, as ggml_backend_sched does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from coordinator.graph.node import Graph
from coordinator.schedule import allocate, assign, split
from coordinator.schedule.allocate import Places
from coordinator.schedule.arrays import I64, GraphArrays, graph_arrays
from coordinator.schedule.chunks import MAX_CHUNKS
from coordinator.schedule.decisions import Decisions, tensor_name
from coordinator.schedule.devices import make_devices
from coordinator.schedule.plan import Device, Plan
from coordinator.schedule.split import SplitArrays
from coordinator.schedule.tasks import Tasks, arrange, homeless_leaf
from protocol.errors import PlanError


@dataclass(frozen=True, slots=True)
class _Draft:
    """One graph after the passes: what the allocator gets and what the plan is made of."""

    graph: Graph
    arrays: GraphArrays
    backend: I64
    cause: I64
    parts: SplitArrays
    tasks: Tasks
    grown: bool  # a split's list of inputs became longer


class Scheduler:
    """Plans graphs over `devices` (priority order, the last a cpu) and keeps what ggml keeps between graphs.

    `parallel` makes 4 copies of every input (pipeline parallelism), `op_offload` lets devices take ops whose weights
    lie in host memory. Raises PlanError for devices that cannot be meant.
    """

    def __init__(self, devices: Sequence[Device], *, parallel: bool = False, op_offload: bool = False) -> None:
        self._devices = make_devices(devices)
        self._op_offload = op_offload
        self._n_copies = split.PARALLEL_COPIES if parallel else 1
        self._copy = 0
        self._next_copy = 0
        self._allocated = False
        self._n_splits = 0
        self._first_backend = 0
        self._capacity = np.full(16, split.SPLIT_INPUTS, np.int64)
        self._sizes: list[tuple[int, ...] | None] = [None] * self._devices.n_compute
        self._reserved: tuple[Tasks, Places] | None = None
        self._before: Tasks | None = None
        self._last: tuple[_Draft, Plan] | None = None
        self._epoch = 0
        self._rescues = 0

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices in priority order."""
        return self._devices.devices

    @property
    def buffer_sizes(self) -> dict[str, tuple[int, ...]]:
        """Bytes of each chunk of each compute buffer, by buffer type; empty tuples before the first allocation."""
        return {self._devices.buft_names[k]: size or () for k, size in enumerate(self._sizes)}

    @property
    def epoch(self) -> int:
        """How often a graph was allocated, or buffers were replaced: bytes of an earlier epoch may be overwritten."""
        return self._epoch

    @property
    def rescues(self) -> int:
        """Graphs planned anew because a leaf did not fit the place at its position: ggml does not look and crashes."""
        return self._rescues

    def reset(self) -> None:
        """Forget the assignments of the last graph; its tensors are dangling from now on."""
        self._allocated = False

    def reserve(self, graph: Graph) -> dict[str, tuple[int, ...]]:
        """Size the buffers for `graph` without allocating it; returns `buffer_sizes`. The scheduler is reset after it.

        Raises PlanError when the graph cannot be planned.
        """
        if not self._allocated:
            self._next_copy = 0
        self._last = None
        if self._reserve(self._draft(graph)):
            self._epoch += 1
        self.reset()
        return self.buffer_sizes

    @property
    def n_splits(self) -> int:
        """Splits of the graph that was reserved or allocated last."""
        return self._n_splits

    def allocate(self, graph: Graph, *, reset: bool = True) -> Plan:
        """Plan `graph` and give its tensors their places; with `reset` the last graph is let go first.

        Raises PlanError when the graph cannot be planned, or when the last graph is still allocated and `reset` is
        False (ggml aborts there).
        """
        if reset:
            self.reset()
        if self._allocated:
            raise PlanError(f"graph {graph.name!r}: the last graph is still allocated, expected a reset before it")
        last, self._last = self._last, None
        if last and self._is_repeat(graph, last[0]):
            return self._repeat(graph, *last)
        self._copy = self._next_copy
        self._next_copy = (self._next_copy + 1) % self._n_copies
        draft = self._draft(graph)
        places = allocate.no_places(draft.tasks.op.size)
        reallocated = not self._reuse(draft.tasks, places)
        if reallocated:
            self._reserve(draft)
            assert self._reserved is not None
            allocate.take_places(draft.tasks, self._reserved[1], places)
        self._before = draft.tasks
        self._epoch += 1
        self._allocated = True
        plan = self._finish(draft, places, reallocated)
        self._last = draft, plan
        return plan

    def _is_repeat(self, graph: Graph, last: _Draft) -> bool:
        """True when `graph` is the graph planned last to every pass, and ggml would come to the same result.

        It would: the passes see the same facts, and the allocator finds every position as it left it. Two things
        could still differ and are excluded: copies take turns when there are several, and a split whose list of
        inputs was full and grew has more room the second time. Names matter because copies are named after them.
        """
        if self._n_copies > 1 or last.grown:
            return False
        return graph is last.graph or (
            graph.pins == last.graph.pins and graph.columns.digest == last.graph.columns.digest
        )

    def _repeat(self, graph: Graph, draft: _Draft, plan: Plan) -> Plan:
        self._epoch += 1
        self._allocated = True
        self._n_splits = len(draft.parts.splits)
        plan = replace(plan, graph=graph, reallocated=False, epoch=self._epoch)
        self._last = replace(draft, graph=graph), plan
        return plan

    def _draft(self, graph: Graph) -> _Draft:
        self._check_pins(graph)
        known = self._devices
        arrays = graph_arrays(graph, known.buft_index, known.foreign, known.index)
        backend, cause = assign.assign(graph, arrays, known, self._op_offload)
        missing = len(graph.nodes) + 1 - self._capacity.size
        if missing > 0:
            self._capacity = np.concatenate((self._capacity, np.full(missing, split.SPLIT_INPUTS, np.int64)))
        room = int(self._capacity.sum())
        parts = split.split(
            graph, arrays, known.table, backend, self._capacity, self._n_copies, self._copy, self._first_backend
        )
        grown = int(self._capacity.sum()) > room
        self._first_backend = int(parts.splits[0, split.BACKEND])
        self._n_splits = len(parts.splits)
        tasks = arrange(arrays, known.table, backend, parts, self._copy)
        return _Draft(graph, arrays, backend, cause, parts, tasks, grown)

    def _check_pins(self, graph: Graph) -> None:
        for ident, device in graph.pins:
            if not 0 <= ident < len(graph.tensors):
                raise PlanError(f"pinned tensor id {ident} does not exist: expected 0 to {len(graph.tensors) - 1}")
            if device not in self._devices.index:
                names = ", ".join(self._devices.index)
                raise PlanError(f"tensor id {ident} is pinned to unknown device {device!r}: expected one of {names}")

    def _reuse(self, tasks: Tasks, places: Places) -> bool:
        """Fill `places` from the last reservation, unless ggml would reallocate, or a leaf does not fit.

        ggml does not look at leafs.
        """
        if self._reserved is None:
            return False
        old, reserved = self._reserved
        ends = np.zeros((len(self._sizes), MAX_CHUNKS), np.int64)
        for k, size in enumerate(self._sizes):
            ends[k, : len(size or ())] = size or ()
        found = allocate.fit_places(tasks, self._before or old, old, reserved, ends, places)
        self._rescues += found == allocate.LEAFS
        return found == allocate.FITS

    def _reserve(self, draft: _Draft) -> bool:
        """Plan the places of a graph from scratch; returns whether a buffer had to be replaced."""
        leaf = homeless_leaf(draft.tasks)
        if leaf >= 0:
            name = tensor_name(draft.graph, leaf)
            raise PlanError(
                f"leaf {name!r} lies in no buffer, is no input and no node reads it itself: no device has it"
            )
        places, sizes = allocate.reserve(draft.arrays, self._devices.table, draft.tasks, self._devices.n_compute)
        replaced = False
        for k, size in enumerate(sizes):
            have = self._sizes[k]
            if have is None or any(s > (have[c] if c < len(have) else 0) for c, s in enumerate(size)):
                self._sizes[k] = size
                replaced = True
        self._reserved = draft.tasks, places
        self._before = draft.tasks
        return replaced

    def _finish(self, draft: _Draft, places: Places, reallocated: bool) -> Plan:
        decisions = Decisions(draft.graph, self._devices, draft.arrays, draft.backend, draft.cause, draft.parts, places)
        return Plan(draft.graph, self._devices.devices, decisions, self.buffer_sizes, reallocated, self._epoch)
