"""Assign tensors to devices: the first four passes of ggml's scheduler, with a cause kept per tensor."""

from __future__ import annotations

import numpy as np

from coordinator.graph.node import Graph
from coordinator.schedule.arrays import I64, IS_VIEW_OP, NO_BUFFER, GraphArrays, compiled, helper
from coordinator.schedule.devices import Devices, DeviceTable
from protocol.errors import PlanError
from protocol.ops import MAX_SRC, Flag, Op, Usage

UNASSIGNED = -1

# Causes, under the labels of ggml's debug builds.
NO_CAUSE, USER, DST, VIEW_SRC, INPUT, OFFLOAD, SUPPORTED, BEST, UPGRADE, FROM_VIEW, FROM_NODE, WEIGHT = range(12)
CAUSES = (
    *("", "usr", "1.dst", "1.vsrc", "1.inp", "1.off", "2.sup", "3.best", "3.upg", "4.vsrc", "4.cur"),
    *(f"1.wgt{k}" for k in range(MAX_SRC)),
)
"""Label of a cause by number; WEIGHT + k says that source k, a weight, decided."""

OK, STUCK, NOBODY = range(3)
"""How the passes ended: STUCK (pre-allocated where the op cannot run), NOBODY (no device supports the op)."""

_INPUT = int(Flag.INPUT)
_WEIGHTS = int(Usage.WEIGHTS)
_NONE, _ROPE, _FLASH = int(Op.NONE), int(Op.ROPE), int(Op.FLASH_ATTN_EXT)
_MUL_MAT, _MUL_MAT_ID, _GET_ROWS = int(Op.MUL_MAT), int(Op.MUL_MAT_ID), int(Op.GET_ROWS)


def assign(graph: Graph, arrays: GraphArrays, devices: Devices, op_offload: bool) -> tuple[I64, I64]:
    """Device index and cause number per tensor id (UNASSIGNED and NO_CAUSE where nothing was decided).

    Raises PlanError when a pre-allocated tensor lies where its op cannot run, or when no device supports an op.
    """
    backend = arrays.pin.copy()
    cause = np.full(backend.size, NO_CAUSE, np.int64)
    if graph.pins:
        cause[backend >= 0] = USER
    end, ident = run_passes(arrays, devices.table, op_offload, backend, cause)
    if end == OK:
        return backend, cause
    tensor = graph.tensors[ident]
    if end == STUCK:
        root = tensor if tensor.view_src is None else graph.tensors[tensor.view_src]
        buft = root.buffer.buft if root.buffer else "none"
        raise PlanError(
            f"pre-allocated tensor ({tensor.name}) in a buffer ({buft}) that cannot run the operation"
            f" ({tensor.op.name})"
        )
    names = ", ".join(d.name for d in devices.devices)
    raise PlanError(f"node {tensor.name!r}: no device supports {tensor.op.name} (devices: {names})")


@compiled
def run_passes(g: GraphArrays, d: DeviceTable, op_offload: bool, backend: I64, cause: I64) -> tuple[int, int]:
    """Run passes 1 to 4 in place; returns how it ended and the tensor at fault."""
    for ids in (g.leafs, g.nodes):
        for t in ids:
            if backend[t] == UNASSIGNED:
                backend[t], cause[t] = _from_current(g, d, op_offload, t, cause[t])
                if backend[t] == UNASSIGNED and _root_buft(g, t) != NO_BUFFER:
                    return STUCK, t
    _spread(g, d, backend, cause, True, True)
    _spread(g, d, backend, cause, True, False)
    _spread(g, d, backend, cause, False, True)
    _spread(g, d, backend, cause, False, False)
    for t in g.nodes:
        if not IS_VIEW_OP[g.op[t]]:
            if backend[t] == UNASSIGNED:
                _choose_best(g, d, backend, cause, t)
            else:
                _upgrade(g, d, backend, cause, t)
    for t in g.nodes:
        _settle(g, d, backend, cause, t)
        if backend[t] == UNASSIGNED:
            return NOBODY, t
    return OK, 0


@helper
def _root_buft(g: GraphArrays, t: int) -> int:
    """Buffer type that `t` (or the tensor it is a view of) was allocated in before the graph, or NO_BUFFER."""
    return int(g.buft[g.view_src[t]] if g.view_src[t] >= 0 else g.buft[t])


@helper
def _from_buffer(g: GraphArrays, d: DeviceTable, t: int, op: int) -> int:
    """The first device that can use the buffer of `t` and run `op`."""
    buft = _root_buft(g, t)
    if buft != NO_BUFFER:
        for b in range(d.buft.size):
            if d.supports_buft[b, buft] and d.supports_op[b, op]:
                return b
    return UNASSIGNED


@helper
def _batch(g: GraphArrays, t: int) -> int:
    """Rows that a weight would be used for: what offloading has to pay off against."""
    op = g.op[t]
    if op == _GET_ROWS:
        return 0
    if op == _MUL_MAT:
        return int(g.layout[t, 2])
    if op in (_MUL_MAT_ID, _ROPE):
        return int(g.layout[t, 3])
    return int(g.layout[t, 2] * g.layout[t, 3] * g.layout[t, 4])


@helper
def _from_current(g: GraphArrays, d: DeviceTable, op_offload: bool, t: int, cause: int) -> tuple[int, int]:
    """Pass 1: where the tensor or its weights already lie decides."""
    op = g.op[t]
    b = _from_buffer(g, d, t, op)
    if b != UNASSIGNED:
        # A view whose own buffer is not known yet is placed by its root's.
        return b, DST if g.view_src[t] < 0 or g.buft[t] != NO_BUFFER else VIEW_SRC
    if _root_buft(g, t) != NO_BUFFER:
        return UNASSIGNED, cause
    last = d.buft.size - 1
    if g.flags[t] & _INPUT:
        return last, INPUT
    if op in (_ROPE, _FLASH):
        # Their small extra sources (frequency factors, sinks) must not decide.
        return UNASSIGNED, cause
    for k in range(g.src.shape[1]):
        s = g.src[t, k]
        if s < 0 or g.buft[s] == NO_BUFFER or g.usage[s] != _WEIGHTS:
            continue
        b = _from_buffer(g, d, s, op)
        if op_offload and b == last and d.is_host[g.buft[s]]:
            for other in range(last):
                if d.supports_op[other, op] and d.offload_op[other, op] and _batch(g, t) >= d.offload_min[other]:
                    return other, OFFLOAD
        return b, WEIGHT + k
    return UNASSIGNED, cause


@helper
def _spread(g: GraphArrays, d: DeviceTable, backend: I64, cause: I64, skip_last: bool, down: bool) -> None:
    """Pass 2, one sweep: an assignment spreads to the next unassigned nodes that its device can run."""
    n = g.nodes.size
    current = UNASSIGNED
    for i in range(n):
        t = g.nodes[i] if down else g.nodes[n - 1 - i]
        if IS_VIEW_OP[g.op[t]]:
            continue
        if backend[t] != UNASSIGNED:
            # The first two sweeps do not spread the last device: it is the fallback.
            current = UNASSIGNED if skip_last and backend[t] == d.buft.size - 1 else backend[t]
        elif current != UNASSIGNED and d.supports_op[current, g.op[t]]:
            backend[t], cause[t] = current, SUPPORTED


@helper
def reads(g: GraphArrays, d: DeviceTable, backend: I64, t: int, b: int) -> bool:
    """True when device `b` can read `t` where it lies or will lie."""
    buft = _root_buft(g, t)
    if buft == NO_BUFFER:
        owner = backend[t]
        if owner == UNASSIGNED and g.view_src[t] >= 0:
            owner = backend[g.view_src[t]]
        if owner == UNASSIGNED:
            return False
        buft = d.buft[owner]
    return bool(d.supports_buft[b, buft])


@helper
def _choose_best(g: GraphArrays, d: DeviceTable, backend: I64, cause: I64, t: int) -> None:
    """Pass 3 for a node without a device: the one that can read most of its sources."""
    most = -1
    for b in range(d.buft.size):
        if not d.supports_op[b, g.op[t]]:
            continue
        count = 0
        for k in range(g.src.shape[1]):
            s = g.src[t, k]
            if s >= 0 and reads(g, d, backend, s, b):
                count += 1
        if count > most:
            most = count
            backend[t], cause[t] = b, BEST


@helper
def _upgrade(g: GraphArrays, d: DeviceTable, backend: I64, cause: I64, t: int) -> None:
    """Pass 3 for a node with a device: a higher-priority one of the same buffer type takes it."""
    for b in range(backend[t]):
        if d.buft[b] != d.buft[backend[t]] or not d.supports_op[b, g.op[t]]:
            continue
        readable = True
        for k in range(g.src.shape[1]):
            s = g.src[t, k]
            if s >= 0 and not reads(g, d, backend, s, b):
                readable = False
                break
        if readable:
            backend[t], cause[t] = b, UPGRADE
            return


@helper
def _settle(g: GraphArrays, d: DeviceTable, backend: I64, cause: I64, t: int) -> None:
    """Pass 4: views follow their root, sources follow their view's root or the node, the rest take any device."""
    if g.view_src[t] >= 0 and backend[t] == UNASSIGNED:
        backend[t], cause[t] = backend[g.view_src[t]], FROM_VIEW
    for k in range(g.src.shape[1]):
        s = g.src[t, k]
        if s >= 0 and backend[s] == UNASSIGNED:
            if g.view_src[s] >= 0:
                backend[s], cause[s] = backend[g.view_src[s]], FROM_VIEW
            else:
                backend[s], cause[s] = backend[t], FROM_NODE
    for b in range(d.buft.size):
        if backend[t] != UNASSIGNED:
            break
        if d.supports_op[b, g.op[t]]:
            backend[t], cause[t] = b, SUPPORTED
