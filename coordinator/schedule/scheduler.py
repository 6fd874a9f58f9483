"""The scheduler: plans one graph after another over buffers that outlive them, as ggml_backend_sched does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from coordinator.graph.node import Graph
from coordinator.schedule import allocate, assign, split
from coordinator.schedule.allocate import Places
from coordinator.schedule.arrays import I64, NO_BUFFER, GraphArrays, graph_arrays, same_arrays
from coordinator.schedule.chunks import MAX_CHUNKS
from coordinator.schedule.devices import make_devices
from coordinator.schedule.plan import Copy, Device, Place, Plan, Split
from coordinator.schedule.tasks import NOWHERE, Tasks, arrange, homeless_leaf
from protocol.errors import PlanError

_NAME_MAX = 63
"""Characters of a tensor's name that ggml keeps."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """One graph after the passes: what the allocator gets and what the plan is made of."""

    graph: Graph
    arrays: GraphArrays
    backend: I64
    cause: I64
    parts: split.SplitArrays
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
        if self._reserve(self._draft(graph, self._arrays(graph))):
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
        arrays = last[0].arrays if last and graph is last[0].graph else self._arrays(graph)
        if last and self._is_repeat(graph, arrays, last[0]):
            return self._repeat(graph, *last)
        self._copy = self._next_copy
        self._next_copy = (self._next_copy + 1) % self._n_copies
        draft = self._draft(graph, arrays)
        reallocated = not self._can_reuse(draft.tasks)
        if reallocated:
            self._reserve(draft)
        self._before = draft.tasks
        self._epoch += 1
        self._allocated = True
        plan = self._finish(draft, reallocated)
        self._last = draft, plan
        return plan

    def _is_repeat(self, graph: Graph, arrays: GraphArrays, last: _Draft) -> bool:
        """True when `graph` is the graph planned last to every pass, and ggml would come to the same result.

        It would: the passes see the same facts, and the allocator finds every position as it left it. Two things
        could still differ and are excluded: copies take turns when there are several, and a split whose list of
        inputs was full and grew has more room the second time. Names matter because copies are named after them,
        and buffer types that no device knows because they have one number.
        """
        if self._n_copies > 1 or last.grown:
            return False
        if graph is last.graph:
            return True
        return same_arrays(arrays, last.arrays) and all(
            a.name == b.name and a.buffer == b.buffer for a, b in zip(graph.tensors, last.graph.tensors, strict=True)
        )

    def _repeat(self, graph: Graph, draft: _Draft, plan: Plan) -> Plan:
        self._epoch += 1
        self._allocated = True
        self._n_splits = len(plan.splits)
        plan = replace(plan, graph=graph, reallocated=False, epoch=self._epoch)
        self._last = replace(draft, graph=graph), plan
        return plan

    def _arrays(self, graph: Graph) -> GraphArrays:
        self._check_pins(graph)
        known = self._devices
        return graph_arrays(graph, known.buft_index, known.foreign, known.index)

    def _draft(self, graph: Graph, arrays: GraphArrays) -> _Draft:
        known = self._devices
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

    def _can_reuse(self, tasks: Tasks) -> bool:
        """ggml's decision not to reallocate: position, buffer type and size are compared, never identity."""
        if self._reserved is None:
            return False
        old, places = self._reserved
        before = self._before or old
        if not (
            np.array_equal(before.node_buft, tasks.node_buft)
            and np.array_equal(before.leaf_buft, tasks.leaf_buft)
            and allocate.fits(tasks, old, places)
        ):
            return False
        ends = np.zeros((len(self._sizes), MAX_CHUNKS), np.int64)
        for k, size in enumerate(self._sizes):
            ends[k, : len(size or ())] = size or ()
        if allocate.leafs_fit(tasks, old, places, ends):
            return True
        self._rescues += 1
        return False

    def _reserve(self, draft: _Draft) -> bool:
        """Plan the places of a graph from scratch; returns whether a buffer had to be replaced."""
        leaf = homeless_leaf(draft.tasks)
        if leaf >= 0:
            name = _name(draft.graph, leaf)
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

    def _finish(self, draft: _Draft, reallocated: bool) -> Plan:
        assert self._reserved is not None
        old, reserved = self._reserved
        n_ext = draft.tasks.op.size
        places = Places(np.full(n_ext, NOWHERE, np.int64), *np.zeros((3, n_ext), np.int64))
        allocate.take_places(draft.tasks, old, reserved, places)
        n = len(draft.graph.tensors)
        return Plan(
            graph=draft.graph,
            devices=self._devices.devices,
            backend=tuple(draft.backend.tolist()),
            cause=tuple(map(assign.CAUSES.__getitem__, draft.cause.tolist())),
            splits=_splits(draft.parts),
            copies=self._copies(draft, places, n),
            sources=_sources(draft),
            places=tuple(self._places(draft, places, n)),
            buffer_sizes=self.buffer_sizes,
            reallocated=reallocated,
            epoch=self._epoch,
        )

    def _places(self, draft: _Draft, places: Places, n: int) -> list[Place | None]:
        """Places of tensors; views lie where their root lies, pre-allocated ones in the document's buffer type."""
        names = self._devices.buft_names
        g = draft.arrays
        is_view = g.view_src >= 0
        root = np.where(is_view, g.view_src, np.arange(n))
        viewed = places.buft[:n] == allocate.VIEWED
        ours = np.where(viewed, places.buft[root], places.buft[:n])
        offset = places.offset[root] + np.where(is_view, g.view_offs, 0)
        rows = zip(ours.tolist(), places.chunk[root].tolist(), offset.tolist(), strict=True)
        out = [Place(names[b], c, o) if b >= 0 else None for b, c, o in rows]
        before = (g.buft[root] != NO_BUFFER) & (viewed | ~is_view | (g.buft != NO_BUFFER))
        tensors = draft.graph.tensors
        known: dict[str, Place] = {}
        for t, r in zip(before.nonzero()[0].tolist(), root[before].tolist(), strict=True):
            buffer = tensors[r].buffer
            assert buffer is not None
            out[t] = known.get(buffer.buft) or known.setdefault(buffer.buft, Place(buffer.buft, None, None))
        return out

    def _copies(self, draft: _Draft, places: Places, n: int) -> tuple[Copy, ...]:
        devices, names, parts = self._devices.devices, self._devices.buft_names, draft.parts
        copies = []
        for c, (tensor, backend, index) in enumerate(
            zip(parts.copy_of.tolist(), parts.copy_backend.tolist(), parts.copy_index.tolist(), strict=True)
        ):
            buft, chunk, offset = int(places.buft[n + c]), int(places.chunk[n + c]), int(places.offset[n + c])
            assert buft >= 0, (tensor, backend)
            name = f"{devices[backend].name}#{_name(draft.graph, tensor)}#{index}"[:_NAME_MAX]
            copies.append(Copy(name, tensor, backend, index, Place(names[buft], chunk, offset)))
        return tuple(copies)


def _splits(parts: split.SplitArrays) -> tuple[Split, ...]:
    inputs = parts.inputs.tolist()
    return tuple(
        Split(backend, start, end, tuple(inputs[first : first + count]), split.SPLIT_CAUSES[cause])
        for backend, start, end, first, count, cause in parts.splits.tolist()
    )


def _sources(draft: _Draft) -> tuple[tuple[int, ...], ...]:
    """Sources per node after rewriting."""
    rows = draft.parts.src[draft.arrays.nodes].tolist()
    tensors = draft.graph.tensors
    return tuple(tuple(row[: len(tensors[t].src)]) for row, t in zip(rows, draft.graph.nodes, strict=True))


def _name(graph: Graph, ident: int) -> str:
    """A tensor's name; nameless ones get ggml's, which count nodes and leafs in visit order."""
    if name := graph.tensors[ident].name[:_NAME_MAX]:
        return name
    if ident in graph.leafs:
        return f"leaf_{graph.leafs.index(ident)}"
    return f"node_{graph.nodes.index(ident)}"
