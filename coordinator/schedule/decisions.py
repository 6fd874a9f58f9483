"""What the passes decided about one graph, read from their arrays when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from coordinator.graph.node import Graph
from coordinator.schedule import allocate, assign, split
from coordinator.schedule.allocate import Places
from coordinator.schedule.arrays import I64, NO_BUFFER, GraphArrays
from coordinator.schedule.devices import Devices
from coordinator.schedule.plan import Copy, Place, Split
from coordinator.schedule.split import SplitArrays

_NAME_MAX = 63
"""Characters of a tensor's name that ggml keeps."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """Arrays of the passes, which nobody writes to any more, and the views of them that `Plan` describes.

    Most plans are repeated or sent away without anybody looking at every tensor: each view is made when it is first
    asked for. Without slots, because that is where the views are kept.
    """

    _graph: Graph
    _devices: Devices
    _arrays: GraphArrays
    _backend: I64
    _cause: I64
    _parts: SplitArrays
    _places: Places

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Decisions):
            return NotImplemented
        return self._views() == other._views()

    __hash__ = None  # type: ignore[assignment]

    def _views(self) -> tuple[object, ...]:
        return self.backend, self.cause, self.splits, self.copies, self.sources, self.places

    @cached_property
    def backend(self) -> tuple[int, ...]:
        """Device index by tensor id."""
        return tuple(self._backend.tolist())

    @cached_property
    def cause(self) -> tuple[str, ...]:
        """Cause by tensor id."""
        return tuple(map(assign.CAUSES.__getitem__, self._cause.tolist()))

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        """Splits in order."""
        inputs = self._parts.inputs.tolist()
        return tuple(
            Split(backend, start, end, tuple(inputs[first : first + count]), split.SPLIT_CAUSES[cause])
            for backend, start, end, first, count, cause in self._parts.splits.tolist()
        )

    @cached_property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """Sources per node after rewriting."""
        rows = self._parts.src[self._arrays.nodes].tolist()
        tensors = self._graph.tensors
        return tuple(tuple(row[: len(tensors[t].src)]) for row, t in zip(rows, self._graph.nodes, strict=True))

    @cached_property
    def places(self) -> tuple[Place | None, ...]:
        """Places of tensors; views lie where their root lies, pre-allocated ones in the document's buffer type."""
        names, places, g = self._devices.buft_names, self._places, self._arrays
        n = g.op.size
        is_view = g.view_src >= 0
        root = np.where(is_view, g.view_src, np.arange(n))
        viewed = places.buft[:n] == allocate.VIEWED
        ours = np.where(viewed, places.buft[root], places.buft[:n])
        offset = places.offset[root] + np.where(is_view, g.view_offs, 0)
        rows = zip(ours.tolist(), places.chunk[root].tolist(), offset.tolist(), strict=True)
        out = [Place(names[b], c, o) if b >= 0 else None for b, c, o in rows]
        before = (g.buft[root] != NO_BUFFER) & (viewed | ~is_view | (g.buft != NO_BUFFER))
        tensors = self._graph.tensors
        known: dict[str, Place] = {}
        for t, r in zip(before.nonzero()[0].tolist(), root[before].tolist(), strict=True):
            buffer = tensors[r].buffer
            assert buffer is not None
            out[t] = known.get(buffer.buft) or known.setdefault(buffer.buft, Place(buffer.buft, None, None))
        return tuple(out)

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """Copies, named as ggml names them."""
        devices, names, parts, places = self._devices.devices, self._devices.buft_names, self._parts, self._places
        n = self._arrays.op.size
        table = np.stack(
            (parts.copy_of, parts.copy_backend, parts.copy_index, places.buft[n:], places.chunk[n:], places.offset[n:])
        )
        copies = []
        for tensor, backend, index, buft, chunk, offset in table.T.tolist():
            assert buft >= 0, (tensor, backend)
            name = f"{devices[backend].name}#{tensor_name(self._graph, tensor)}#{index}"[:_NAME_MAX]
            copies.append(Copy(name, tensor, backend, index, Place(names[buft], chunk, offset)))
        return tuple(copies)


def tensor_name(graph: Graph, ident: int) -> str:
    """A tensor's name; nameless ones get ggml's, which count nodes and leafs in visit order."""
    if name := graph.tensors[ident].name[:_NAME_MAX]:
        return name
    if ident in graph.leafs:
        return f"leaf_{graph.leafs.index(ident)}"
    return f"node_{graph.nodes.index(ident)}"
