"""The graph as the allocator walks it: split by split, with the copies of inputs between."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coordinator.schedule.arrays import I64, NO_BUFFER, Bools, GraphArrays, compiled, helper
from coordinator.schedule.devices import DeviceTable
from coordinator.schedule.split import BACKEND, END, FIRST_INPUT, N_INPUTS, START, SplitArrays
from protocol.ops import Flag, Op

NOWHERE = -1
"""Buffer number of a tensor that the allocator does not place: a view, or allocated before the graph."""

_INPUT, _OUTPUT = int(Flag.INPUT), int(Flag.OUTPUT)
_NONE = int(Op.NONE)


class Tasks(NamedTuple):
    """The graph as the allocator walks it: the nodes of all splits, preceded by what holds and receives their inputs.

    Ids below n are tensors, from n on copies. `node` [m] with `is_hold` (a stand-in view that keeps its source alive
    until it has been copied; `node` is then the source), `node_src` [m, width] and `node_buft` [m]; `leaf` and
    `leaf_buft`. Per id: `op`, `flags`, `view_src`, `nbytes`, `layout` (row in the graph's layouts), `outside`.
    """

    node: I64
    is_hold: Bools
    node_src: I64
    node_buft: I64
    leaf: I64
    leaf_buft: I64
    op: I64
    flags: I64
    view_src: I64
    nbytes: I64
    origin: I64
    outside: Bools


def arrange(g: GraphArrays, d: DeviceTable, backend: I64, s: SplitArrays, current: int) -> Tasks:
    """Lay out the allocator's graph; `current` is the copy of split inputs that is used."""
    n, width = g.src.shape
    n_ext = n + s.copy_of.size
    m = g.nodes.size + 2 * s.inputs.size
    n_copies = s.copy_id.shape[2]
    n_ahead = n_copies * (s.graph_inputs.size + s.inputs.size) if n_copies > 1 else 0
    tasks = Tasks(
        node=np.empty(m, np.int64),
        is_hold=np.empty(m, np.bool_),
        node_src=np.empty((m, width), np.int64),
        node_buft=np.empty(m, np.int64),
        leaf=np.empty(n_ahead + g.leafs.size, np.int64),
        leaf_buft=np.empty(n_ahead + g.leafs.size, np.int64),
        op=np.empty(n_ext, np.int64),
        flags=np.empty(n_ext, np.int64),
        view_src=np.empty(n_ext, np.int64),
        nbytes=np.empty(n_ext, np.int64),
        origin=np.empty(n_ext, np.int64),
        outside=np.empty(n_ext, np.bool_),
    )
    _fill(g, d, backend, s, current, tasks)
    return tasks


@compiled
def _fill(g: GraphArrays, d: DeviceTable, backend: I64, s: SplitArrays, current: int, x: Tasks) -> None:
    _describe(g, s, x)
    _arrange_nodes(g, d, backend, s, current, x)
    start = x.leaf.size - g.leafs.size
    if start:
        _arrange_copies(d, backend, s, x)
    for i in range(g.leafs.size):
        t = g.leafs[i]
        x.leaf[start + i] = t
        x.leaf_buft[start + i] = d.buft[backend[t]] if backend[t] >= 0 else NOWHERE


@helper
def _describe(g: GraphArrays, s: SplitArrays, x: Tasks) -> None:
    """Facts per tensor and per copy; copies look like their sources and are leafs of their own."""
    n = g.op.size
    several = s.copy_id.shape[2] > 1
    for t in range(n):
        x.op[t], x.flags[t], x.view_src[t], x.nbytes[t] = g.op[t], g.flags[t], g.view_src[t], g.nbytes[t]
        x.origin[t], x.outside[t] = t, g.buft[t] != NO_BUFFER
    for c in range(s.copy_of.size):
        t = n + c
        x.op[t], x.flags[t], x.view_src[t] = _NONE, _INPUT | _OUTPUT if several else 0, -1
        x.nbytes[t], x.origin[t], x.outside[t] = g.nbytes[s.copy_of[c]], s.copy_of[c], False
    for t in s.graph_inputs:
        x.flags[t] |= _INPUT | _OUTPUT
        if x.view_src[t] >= 0:
            x.flags[x.view_src[t]] |= _OUTPUT  # ggml_set_output marks a view's root as well


@helper
def _arrange_nodes(g: GraphArrays, d: DeviceTable, backend: I64, s: SplitArrays, current: int, x: Tasks) -> None:
    m, width = 0, s.src.shape[1]
    for k in range(s.splits.shape[0]):
        b = s.splits[k, BACKEND]
        first = s.splits[k, FIRST_INPUT]
        for i in range(first, first + s.splits[k, N_INPUTS]):
            t = s.inputs[i]
            x.node[m], x.is_hold[m], x.node_buft[m] = t, True, d.buft[backend[t]]
            x.node[m + 1], x.is_hold[m + 1], x.node_buft[m + 1] = s.copy_id[t, b, current], False, d.buft[b]
            for j in range(width):
                x.node_src[m, j] = x.node_src[m + 1, j] = -1
            x.node_src[m, 0] = t
            m += 2
        for i in range(s.splits[k, START], s.splits[k, END]):
            t = g.nodes[i]
            x.node[m], x.is_hold[m], x.node_buft[m] = t, False, d.buft[backend[t]]
            for j in range(width):
                x.node_src[m, j] = s.src[t, j]
            m += 1


@helper
def _arrange_copies(d: DeviceTable, backend: I64, s: SplitArrays, x: Tasks) -> None:
    """All copies as leafs: those of graph inputs, then those of split inputs."""
    n_copies = s.copy_id.shape[2]
    m = 0
    for i in range(s.graph_inputs.size):
        t = s.graph_inputs[i]
        for c in range(n_copies):
            x.leaf[m], x.leaf_buft[m] = s.copy_id[t, backend[t], c], d.buft[backend[t]]
            m += 1
    for k in range(s.splits.shape[0]):
        b = s.splits[k, BACKEND]
        first = s.splits[k, FIRST_INPUT]
        for i in range(first, first + s.splits[k, N_INPUTS]):
            for c in range(n_copies):
                x.leaf[m], x.leaf_buft[m] = s.copy_id[s.inputs[i], b, c], d.buft[b]
                m += 1


def homeless_leaf(tasks: Tasks) -> int:
    """A leaf that was assigned to no device, or -1. ggml aborts there even when the leaf needs no memory."""
    found = tasks.leaf_buft == NOWHERE
    return int(tasks.leaf[found.argmax()]) if found.any() else -1
