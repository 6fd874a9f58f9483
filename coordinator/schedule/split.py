"""Split a graph by device and find what must be copied: the fifth pass of ggml's scheduler."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coordinator.graph.node import Graph
from coordinator.schedule.arrays import I64, IS_VIEW_OP, NO_BUFFER, GraphArrays, compiled, helper
from coordinator.schedule.assign import UNASSIGNED, reads
from coordinator.schedule.devices import DeviceTable
from protocol.errors import PlanError
from protocol.ops import Flag, Usage

PARALLEL_COPIES = 4
"""ggml's GGML_SCHED_MAX_COPIES: copies of every input when evaluations overlap."""

SPLIT_INPUTS = 30
"""ggml's GGML_SCHED_MAX_SPLIT_INPUTS: inputs after which a split's list is full."""

FIRST, CHANGE, WEIGHT_MOVE, FULL = range(4)
SPLIT_CAUSES = ("5.first", "5.backend", "5.weight", "5.full")
"""Why a split starts: the graph does, the device changes, a weight has to be copied, the input list is full."""

# Columns of the table of splits; the inputs of all splits lie in one list, one run per split.
BACKEND, START, END, FIRST_INPUT, N_INPUTS, CAUSE = range(6)

_INPUT = int(Flag.INPUT)
_WEIGHTS = int(Usage.WEIGHTS)


class SplitArrays(NamedTuple):
    """Splits, their inputs and all copies.

    `splits` [s, 6], `inputs` ids, `copy_of` [c] source's id, `copy_backend` and `copy_index` [c]. `copy_id`
    [n, backends, n_copies] is the id of a tensor's copy: n + c, or the tensor itself for the current copy of a graph
    input, or -1. `src` are the sources after rewriting, `graph_inputs` the inputs with copies of their own.
    """

    splits: I64
    inputs: I64
    copy_of: I64
    copy_backend: I64
    copy_index: I64
    copy_id: I64
    src: I64
    graph_inputs: I64


def split(
    graph: Graph, g: GraphArrays, d: DeviceTable, backend: I64, capacity: I64, n_copies: int, current: int, stale: int
) -> SplitArrays:
    """Cut the nodes into splits and list the copies.

    `capacity` holds the length of each split's input list and outlives the graph: it is grown in place and must have
    at least nodes + 1 entries. `current` is the copy that this evaluation uses, `stale` the backend of the last
    graph's first split: a graph of nothing but views keeps it, as in ggml.
    """
    n = g.op.size
    edges = g.nodes.size * g.src.shape[1]  # at most; memory that is never touched costs nothing
    most = edges * (2 * n_copies - 1) + 1
    splits = np.zeros((g.nodes.size + 1, 6), np.int64)
    inputs = np.empty(edges + 1, np.int64)
    graph_inputs = np.empty(edges + 1, np.int64)
    copies = np.empty((3, most), np.int64)
    copy_id = np.full((n, d.buft.size, n_copies), -1, np.int64)
    src = g.src.copy()
    n_splits, n_inputs, n_made, n_graph_inputs, loose = _cut(
        g, d, backend, capacity, current, stale, splits, inputs, copies, copy_id, src, graph_inputs
    )
    if loose >= 0:
        raise PlanError(
            f"tensor {graph.tensors[loose].name!r} is a view of a tensor neither allocated nor part of the graph"
        )
    return SplitArrays(
        splits=splits[:n_splits],
        inputs=inputs[:n_inputs],
        copy_of=copies[0, :n_made],
        copy_backend=copies[1, :n_made],
        copy_index=copies[2, :n_made],
        copy_id=copy_id,
        src=src,
        graph_inputs=graph_inputs[:n_graph_inputs],
    )


@helper
def _needs_copy(g: GraphArrays, d: DeviceTable, backend: I64, s: int, b: int) -> bool:
    return bool(backend[s] != b and not reads(g, d, backend, s, b))


@helper
def _start_cause(g: GraphArrays, d: DeviceTable, backend: I64, t: int, b: int, full: bool, copy_id: I64) -> int:
    """Why node `t` cannot join the running split on device `b`, which has inputs; FIRST when it can."""
    for k in range(g.src.shape[1]):
        s = g.src[t, k]
        if s < 0:
            continue
        if g.buft[s] != NO_BUFFER and g.usage[s] == _WEIGHTS and _needs_copy(g, d, backend, s, b):
            # A new split lets the memory of the weights copied so far be used again.
            return WEIGHT_MOVE
        if full and copy_id[s, b, 0] < 0 and _needs_copy(g, d, backend, s, b):
            return FULL
    return FIRST


@helper
def _make_copies(copies: I64, n_made: int, copy_id: I64, s: int, b: int, n: int, keep: int) -> int:
    """Make every copy of `s` on device `b`; copy number `keep` is the tensor itself (-1: none is)."""
    for c in range(copy_id.shape[2]):
        if c == keep:
            copy_id[s, b, c] = s
        else:
            copies[0, n_made], copies[1, n_made], copies[2, n_made] = s, b, c
            copy_id[s, b, c] = n + n_made
            n_made += 1
    return n_made


@compiled
def _cut(
    g: GraphArrays,
    d: DeviceTable,
    backend: I64,
    capacity: I64,
    current: int,
    stale: int,
    splits: I64,
    inputs: I64,
    copies: I64,
    copy_id: I64,
    src: I64,
    graph_inputs: I64,
) -> tuple[int, int, int, int, int]:
    """Fill the tables; returns the numbers of splits, inputs, copies and graph inputs, and a tensor at fault or -1."""
    n, width = g.src.shape
    n_inputs = n_made = n_graph_inputs = 0
    i = 0
    while i < g.nodes.size and IS_VIEW_OP[g.op[g.nodes[i]]]:
        i += 1
    b = backend[g.nodes[i]] if i < g.nodes.size else stale
    k = 0
    splits[0, BACKEND] = b
    while i < g.nodes.size:
        t = g.nodes[i]
        if not IS_VIEW_OP[g.op[t]]:
            cause = FIRST
            if backend[t] != b:
                cause = CHANGE
            elif splits[k, N_INPUTS] > 0:
                cause = _start_cause(g, d, backend, t, b, splits[k, N_INPUTS] == capacity[k], copy_id)
            if cause != FIRST:
                splits[k, END] = i
                k += 1
                b = backend[t]
                splits[k, BACKEND], splits[k, START] = b, i
                splits[k, FIRST_INPUT], splits[k, CAUSE] = n_inputs, cause
            for j in range(width):
                s = g.src[t, j]
                if s < 0:
                    continue
                if backend[s] == UNASSIGNED:
                    return 0, 0, 0, 0, s
                home = backend[s]
                if copy_id.shape[2] > 1 and g.flags[s] & _INPUT and copy_id[s, home, 0] < 0:
                    n_made = _make_copies(copies, n_made, copy_id, s, home, n, current)
                    graph_inputs[n_graph_inputs] = s
                    n_graph_inputs += 1
                if _needs_copy(g, d, backend, s, b):
                    if copy_id[s, b, 0] < 0:
                        n_made = _make_copies(copies, n_made, copy_id, s, b, n, -1)
                        if splits[k, N_INPUTS] == capacity[k]:
                            capacity[k] *= 2
                        inputs[n_inputs] = s
                        n_inputs += 1
                        splits[k, N_INPUTS] += 1
                    src[t, j] = copy_id[s, b, current]
        i += 1
    splits[k, END] = g.nodes.size
    return k + 1, n_inputs, n_made, n_graph_inputs, -1
