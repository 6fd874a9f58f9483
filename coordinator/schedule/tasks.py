"""The graph as the allocator walks it: split by split, with the copies of inputs between."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coordinator.schedule.arrays import I64, NO_BUFFER, Bools, GraphArrays, compiled
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
        is_hold=np.zeros(m, np.bool_),
        node_src=np.full((m, width), -1, np.int64),
        node_buft=np.empty(m, np.int64),
        leaf=np.empty(n_ahead + g.leafs.size, np.int64),
        leaf_buft=np.empty(n_ahead + g.leafs.size, np.int64),
        op=_extend(g.op, n_ext, _NONE),
        flags=_extend(g.flags, n_ext, _INPUT | _OUTPUT if n_copies > 1 else 0),
        view_src=_extend(g.view_src, n_ext, -1),
        nbytes=np.concatenate((g.nbytes, g.nbytes[s.copy_of])),
        origin=np.concatenate((np.arange(n), s.copy_of)),
        outside=np.concatenate((g.buft != NO_BUFFER, np.zeros(s.copy_of.size, np.bool_))),
    )
    tasks.flags[s.graph_inputs] |= _INPUT | _OUTPUT
    roots = tasks.view_src[s.graph_inputs]
    tasks.flags[roots[roots >= 0]] |= _OUTPUT  # ggml_set_output marks a view's root as well
    _arrange_nodes(g, d, backend, s, current, tasks)
    if n_ahead:
        _arrange_copies(d, backend, s, tasks)
    owner = backend[g.leafs]
    tasks.leaf[n_ahead:] = g.leafs
    tasks.leaf_buft[n_ahead:] = np.where(owner >= 0, d.buft[owner], NOWHERE)
    return tasks


def _extend(values: I64, size: int, fill: int) -> I64:
    out = np.full(size, fill, np.int64)
    out[: values.size] = values
    return out


@compiled
def _arrange_nodes(g: GraphArrays, d: DeviceTable, backend: I64, s: SplitArrays, current: int, x: Tasks) -> None:
    m = 0
    for k in range(s.splits.shape[0]):
        b = s.splits[k, BACKEND]
        first = s.splits[k, FIRST_INPUT]
        for i in range(first, first + s.splits[k, N_INPUTS]):
            t = s.inputs[i]
            x.node[m], x.is_hold[m], x.node_src[m, 0], x.node_buft[m] = t, True, t, d.buft[backend[t]]
            x.node[m + 1], x.node_buft[m + 1] = s.copy_id[t, b, current], d.buft[b]
            m += 2
        for i in range(s.splits[k, START], s.splits[k, END]):
            t = g.nodes[i]
            x.node[m], x.node_buft[m] = t, d.buft[backend[t]]
            for j in range(s.src.shape[1]):
                x.node_src[m, j] = s.src[t, j]
            m += 1


@compiled
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
