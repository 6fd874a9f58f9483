"""What the scheduler decides about one graph: the value between planning and lowering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.graph.node import Graph

if TYPE_CHECKING:
    from coordinator.schedule.decisions import Decisions

ACCEL_ALIGNMENT = 128
HOST_ALIGNMENT = 32
"""Bytes that compute memory is aligned to on accelerators and on the host, as in ggml's CUDA and CPU backends."""


@dataclass(frozen=True, slots=True)
class Device:
    """One backend of the scheduler, in priority order; the last one must be of kind `cpu`.

    `buft` is the buffer type that it allocates compute memory in; devices may share one. `alignment` and `max_size`
    (bytes of the largest buffer, None: unlimited) belong to the buffer type. `extra_bufts` are further buffer types
    whose tensors it can use in place. `offload_ops`: ops that it wants even when the weight lies in host memory.
    """

    name: str
    kind: str = "gpu"  # gpu | igpu | accel | cpu
    buft: str = ""
    alignment: int = 32
    max_size: int | None = None
    is_host: bool = False
    extra_bufts: tuple[str, ...] = ()
    unsupported_ops: frozenset[str] = frozenset()
    offload_ops: frozenset[str] = frozenset()
    offload_min_batch: int = 0  # rows from which an op in `offload_ops` is worth it


@dataclass(frozen=True, slots=True)
class Split:
    """A run of nodes on one backend: `graph.nodes[start:end]`, and the tensors copied to it first."""

    backend: int
    start: int
    end: int
    inputs: tuple[int, ...]
    cause: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where the allocator put a tensor: buffer type, chunk and offset in bytes.

    `chunk` and `offset` are None for a tensor that was allocated before the graph (weights, caches).
    """

    buft: str
    chunk: int | None
    offset: int | None


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor's copy on another backend, `BACKEND#NAME#c`; `tensor` is the source's id, its layout is the source's."""

    name: str
    tensor: int
    backend: int
    index: int
    place: Place


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned graph; what was decided about it is read from the passes' arrays when it is asked for.

    `buffer_sizes` are the bytes per buffer type after this graph, by chunk. `epoch` counts allocations on the
    scheduler.
    """

    graph: Graph
    devices: tuple[Device, ...]
    decisions: Decisions
    buffer_sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reallocated: bool = False
    epoch: int = 0

    @property
    def backend(self) -> tuple[int, ...]:
        """Device index by tensor id, -1 where nothing was assigned."""
        return self.decisions.backend

    @property
    def cause(self) -> tuple[str, ...]:
        """Label of what assigned the device, by tensor id; empty where nothing was assigned."""
        return self.decisions.cause

    @property
    def splits(self) -> tuple[Split, ...]:
        """Runs of nodes in order."""
        return self.decisions.splits

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Every copy of a tensor on another backend."""
        return self.decisions.copies

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """Sources of `graph.nodes[i]` after rewriting: from len(graph.tensors) on they are `copies[value - len]`."""
        return self.decisions.sources

    @property
    def places(self) -> tuple[Place | None, ...]:
        """By tensor id, None for tensors that the allocator never saw; a view's is its root's offset + view_offs."""
        return self.decisions.places
