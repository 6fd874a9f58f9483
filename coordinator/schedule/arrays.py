"""Graphs as arrays: what the planning passes work on, and the decorator that compiles them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from coordinator.graph.columns import I64 as I64
from coordinator.graph.node import Graph
from protocol.ops import VIEW_OPS, Op

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


IS_VIEW_OP = np.zeros(N_OPS, np.bool_)
IS_VIEW_OP[list(VIEW_OPS)] = True


def graph_arrays(graph: Graph, bufts: Mapping[str, int], foreign: int, devices: Mapping[str, int]) -> GraphArrays:
    """The arrays of `graph`. `bufts` numbers the buffer types that a device knows; all others are `foreign`."""
    c = graph.columns
    number = np.array([*(bufts.get(name, foreign) for name in c.bufts), NO_BUFFER], np.int64)
    pin = np.full(c.op.size, -1, np.int64)
    for ident, device in graph.pins:
        pin[ident] = devices[device]
    return GraphArrays(
        c.op, c.flags, c.view_src, c.view_offs, number[c.buft], c.usage, c.nbytes, c.layout, c.src, pin, c.nodes,
        c.leafs,
    )  # fmt: skip
