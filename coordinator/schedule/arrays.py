"""Graphs as arrays: what the planning passes work on, and the decorator that compiles them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from coordinator.graph.node import ABSENT, Graph
from protocol.dtypes import DType
from protocol.ops import VIEW_OPS, Op

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_F = TypeVar("_F", bound=Callable[..., Any])

N_OPS = max(Op) + 1
NO_BUFFER = -1
"""In `GraphArrays.buft`: the tensor is not allocated before the graph."""


def compiled(function: _F) -> _F:
    """Compile a pass to machine code, once per installation (numba keeps the result on disk).

    Passes make no arrays: without reference counting, which `_nrt` turns off, they run ten times as fast.
    """
    return cast(_F, njit(cache=True, nogil=True, _nrt=False)(function))


def helper(function: _F) -> _F:
    """Compile a part of a pass: it lives inside the passes that call it and cannot be called from outside."""
    return cast(
        _F, njit(nogil=True, _nrt=False, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    )


class GraphArrays(NamedTuple):
    """A graph with one row per tensor id; a tuple of arrays because that is what compiled functions take.

    `src` [n, width] holds ids or ABSENT, `layout` [n, 9] type, ne and nb, `buft` the number of the buffer type of a
    pre-allocated tensor or NO_BUFFER, `pin` a device index or -1, `nodes` and `leafs` ids in visit order.
    """

    op: I64
    flags: I64
    view_src: I64
    view_offs: I64
    buft: I64
    usage: I64
    nbytes: I64
    layout: I64
    src: I64
    pin: I64
    nodes: I64
    leafs: I64


_BLOCK = np.zeros(max(DType) + 1, np.int64)
_BLOCK_NBYTES = np.zeros(max(DType) + 1, np.int64)
for _dtype in DType:
    _BLOCK[_dtype], _BLOCK_NBYTES[_dtype] = _dtype.block, _dtype.block_nbytes

IS_VIEW_OP = np.zeros(N_OPS, np.bool_)
IS_VIEW_OP[list(VIEW_OPS)] = True


def graph_arrays(graph: Graph, bufts: Mapping[str, int], foreign: int, devices: Mapping[str, int]) -> GraphArrays:
    """The arrays of `graph`. `bufts` numbers the buffer types that a device knows; all others are `foreign`."""
    tensors = graph.tensors
    n = len(tensors)
    width = max((len(t.src) for t in tensors), default=0) or 1
    padding = [(ABSENT,) * (width - k) for k in range(width + 1)]
    plain = _table(map(_PLAIN, tensors), n, 4)
    ne, nb = _table(map(_NE, tensors), n, 4), _table(map(_NB, tensors), n, 4)
    buffers = [t.buffer for t in tensors]
    layout = np.concatenate((plain[:, :1], ne, nb), axis=1)
    pin = np.full(n, -1, np.int64)
    for ident, device in graph.pins:
        pin[ident] = devices[device]
    return GraphArrays(
        op=plain[:, 1].copy(),
        flags=plain[:, 2].copy(),
        view_src=np.array([-1 if t.view_src is None else t.view_src for t in tensors], np.int64),
        view_offs=plain[:, 3].copy(),
        buft=np.array([NO_BUFFER if r is None else bufts.get(r.buft, foreign) for r in buffers], np.int64),
        usage=np.array([0 if r is None else r.usage for r in buffers], np.int64),
        nbytes=span_nbytes(layout),
        layout=layout,
        src=_table((t.src + padding[len(t.src)] for t in tensors), n, width),
        pin=pin,
        nodes=np.array(graph.nodes, np.int64),
        leafs=np.array(graph.leafs, np.int64),
    )


_PLAIN = attrgetter("dtype", "op", "flags", "view_offs")
_NE, _NB = attrgetter("ne"), attrgetter("nb")


def _table(rows: Iterable[tuple[int, ...]], n: int, width: int) -> I64:
    """Rows of ints as an array [n, width]: from an iterator, which is several times as fast as from nested tuples."""
    return np.fromiter(chain.from_iterable(rows), np.int64, n * width).reshape(n, width)


def span_nbytes(layout: I64) -> I64:
    """Bytes that each row's tensor spans, strides included; 0 when an extent is 0 (`ggml_nbytes`)."""
    dtype, ne, nb = layout[:, 0], layout[:, 1:5], layout[:, 5:9]
    block = _BLOCK[dtype]
    outer = ((ne[:, 1:] - 1) * nb[:, 1:]).sum(axis=1)
    plain = _BLOCK_NBYTES[dtype] + (ne[:, 0] - 1) * nb[:, 0]
    blocks = ne[:, 0] * nb[:, 0] // block
    return np.where((ne > 0).all(axis=1), np.where(block == 1, plain, blocks) + outer, 0)


def same_arrays(a: GraphArrays, b: GraphArrays) -> bool:
    """True when two graphs are the same to every pass: ops, shapes, strides, sources, flags, buffers, pins, order."""
    return all(x is y or np.array_equal(x, y) for x, y in zip(a, b, strict=True))
