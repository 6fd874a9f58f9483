"""What the scheduler decides about one graph: the value between planning and lowering."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.graph.node import Graph


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
    """A planned graph.

    `backend` and `cause` are indexed by tensor id (-1 and "" where nothing was assigned). `places` by tensor id, None
    for tensors that the allocator never saw; a view's place is its own (root's offset + view_offs). `sources[i]` are
    the sources of `graph.nodes[i]` after rewriting: a value >= len(graph.tensors) means `copies[value - len]`.
    `buffer_sizes` are the bytes per buffer type after this graph, by chunk. `epoch` counts allocations on the
    scheduler.
    """

    graph: Graph
    devices: tuple[Device, ...]
    backend: tuple[int, ...]
    cause: tuple[str, ...]
    splits: tuple[Split, ...]
    copies: tuple[Copy, ...]
    sources: tuple[tuple[int, ...], ...]
    places: tuple[Place | None, ...]
    buffer_sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reallocated: bool = False
    epoch: int = 0
