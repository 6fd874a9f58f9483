"""Tensors and graphs: plain facts, ids instead of pointers, ggml's visit order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.graph.columns import Columns, make_columns
from protocol.dtypes import DType
from protocol.errors import PlanError
from protocol.ops import VIEW_OPS, Flag, Op, Usage

Dims = tuple[int, int, int, int]
"""Four extents (elements, `ne`) or strides (bytes, `nb`), innermost first, as ggml counts them."""

NO_FLAGS = Flag(0)

ABSENT = -1
"""Id of an optional source that a node does not have (a NULL `src` in ggml)."""


@dataclass(frozen=True, slots=True)
class BufferRef:
    """Where a pre-allocated tensor lies: a buffer type and what the buffer is for."""

    buft: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a graph (`struct ggml_tensor`).

    `src` and `view_src` are ids of tensors with smaller ids in the same graph; `view_src` is the root of a chain of
    views and `view_offs` the offset in bytes from it. `buffer` is set for tensors that exist before the graph does.
    """

    id: int
    name: str
    dtype: DType
    ne: Dims
    nb: Dims
    op: Op = Op.NONE
    params: tuple[int | float, ...] = ()
    flags: Flag = NO_FLAGS
    src: tuple[int, ...] = ()
    view_src: int | None = None
    view_offs: int = 0
    buffer: BufferRef | None = None

    @property
    def nbytes(self) -> int:
        """Bytes from the first to behind the last element, strides included (`ggml_nbytes`)."""
        return span_nbytes(self.dtype, self.ne, self.nb)

    @property
    def nelements(self) -> int:
        """Number of elements."""
        return self.ne[0] * self.ne[1] * self.ne[2] * self.ne[3]

    @property
    def is_view_op(self) -> bool:
        """True for VIEW, RESHAPE, PERMUTE and TRANSPOSE."""
        return self.op in VIEW_OPS


def span_nbytes(dtype: DType, ne: Dims, nb: Dims) -> int:
    """Bytes that a strided tensor spans; 0 when an extent is 0."""
    if 0 in ne:
        return 0
    if dtype.block == 1:
        return dtype.block_nbytes + sum((n - 1) * b for n, b in zip(ne, nb, strict=True))
    return ne[0] * nb[0] // dtype.block + sum((n - 1) * b for n, b in zip(ne[1:], nb[1:], strict=True))


def contiguous_nb(dtype: DType, ne: Dims) -> Dims:
    """Strides in bytes of a freshly made tensor."""
    nb1 = dtype.row_nbytes(ne[0]) if ne[0] % dtype.block == 0 else dtype.block_nbytes * (ne[0] // dtype.block)
    return (dtype.block_nbytes, nb1, nb1 * ne[1], nb1 * ne[1] * ne[2])


@dataclass(frozen=True, slots=True)
class Graph:
    """A computation graph (`struct ggml_cgraph`): all tensors, and ids in the order in which ggml visits them.

    `expand` are the outputs in the order in which they were added. `pins` assign tensors to devices by name, as
    `ggml_backend_sched_set_tensor_backend` does.
    """

    name: str
    tensors: tuple[Tensor, ...]
    expand: tuple[int, ...]
    nodes: tuple[int, ...]
    leafs: tuple[int, ...]
    pins: tuple[tuple[int, str], ...] = ()
    by_name: dict[str, int] = field(default_factory=dict, compare=False)
    _columns: Columns | None = field(default=None, init=False, compare=False, repr=False)  # `replace` starts anew

    @property
    def columns(self) -> Columns:
        """The graph as arrays; made once."""
        if self._columns is None:
            object.__setattr__(self, "_columns", make_columns(self.tensors, self.nodes, self.leafs))
        assert self._columns is not None
        return self._columns

    def named(self, name: str) -> Tensor:
        """The last tensor of that name. Raises KeyError when there is none."""
        return self.tensors[self.by_name[name]]


def make_graph(
    name: str, tensors: Sequence[Tensor], expand: Iterable[int], pins: Iterable[tuple[int, str]] = ()
) -> Graph:
    """Visit `expand` depth first, sources left to right, and freeze the result (`ggml_build_forward_expand`).

    Raises PlanError when a source's id is unknown or sources form a cycle.
    """
    expand = tuple(expand)
    nodes, leafs = visit(tensors, expand)
    return freeze(name, tensors, expand, nodes, leafs, pins)


def freeze(
    name: str,
    tensors: Sequence[Tensor],
    expand: Iterable[int],
    nodes: tuple[int, ...],
    leafs: tuple[int, ...],
    pins: Iterable[tuple[int, str]] = (),
) -> Graph:
    """The graph of tensors whose order is known, with its columns."""
    by_name = {t.name: t.id for t in tensors}
    graph = Graph(name, tuple(tensors), tuple(expand), nodes, leafs, tuple(pins), by_name)
    assert graph.columns
    return graph


def visit(tensors: Sequence[Tensor], expand: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Nodes and leafs in ggml's order; iterative, since graphs are deeper than Python's stack.

    Raises PlanError when a source's id is unknown or sources form a cycle.
    """
    open_, done = 1, 2
    state = bytearray(len(tensors))
    nodes: list[int] = []
    leafs: list[int] = []
    for root in expand:
        stack: list[tuple[int, int]] = [(root, 0)]
        while stack:
            ident, k = stack.pop()
            if not 0 <= ident < len(tensors):
                raise PlanError(f"tensor id {ident} does not exist: expected 0 to {len(tensors) - 1}")
            tensor = tensors[ident]
            if k == 0:
                if state[ident] == done:
                    continue
                if state[ident] == open_:
                    raise PlanError(f"tensor {tensor.name!r} (id {ident}) depends on itself")
                state[ident] = open_
            while k < len(tensor.src) and (
                tensor.src[k] == ABSENT or (0 <= tensor.src[k] < len(tensors) and state[tensor.src[k]] == done)
            ):
                k += 1
            if k < len(tensor.src):
                stack.append((ident, k + 1))
                stack.append((tensor.src[k], 0))
                continue
            state[ident] = done
            is_leaf = tensor.op == Op.NONE and not tensor.flags & Flag.PARAM
            (leafs if is_leaf else nodes).append(ident)
    return tuple(nodes), tuple(leafs)
