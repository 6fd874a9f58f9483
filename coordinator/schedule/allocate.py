"""Give every tensor its place: ggml's graph allocator over dynamic allocators with chunks and free lists."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coordinator.schedule.arrays import I64, N_OPS, Bools, GraphArrays, compiled, helper
from coordinator.schedule.chunks import MAX_FREE, Heap, free_block, new_heap, padded, take_block
from coordinator.schedule.devices import DeviceTable
from coordinator.schedule.tasks import NOWHERE, Tasks
from protocol.errors import CapacityError
from protocol.ops import Flag, Op

VIEWED = -2
"""Buffer number of a view that lies in its root's memory."""

INPLACE_OPS = frozenset({
    Op.FILL, Op.SCALE, Op.DIAG_MASK_ZERO, Op.DIAG_MASK_INF, Op.ADD, Op.ADD_ID, Op.ADD1, Op.SUB, Op.MUL, Op.DIV,
    Op.SQR, Op.SQRT, Op.LOG, Op.UNARY, Op.ROPE, Op.ROPE_BACK, Op.SILU_BACK, Op.RMS_NORM, Op.RMS_NORM_BACK,
    Op.SOFT_MAX, Op.SOFT_MAX_BACK,
})  # fmt: skip
"""Ops whose result may take the place of a source."""

FITS, GROWN, LEAFS = range(3)
"""Whether a graph can have the places of the last reservation; see `fit_places`."""

_CAN_INPLACE = np.zeros(N_OPS, np.bool_)
_CAN_INPLACE[list(INPLACE_OPS)] = True

_INPUT, _OUTPUT = int(Flag.INPUT), int(Flag.OUTPUT)
_NONE = int(Op.NONE)


class Places(NamedTuple):
    """Per id: buffer type (NOWHERE: none), chunk, offset and the bytes that were reserved."""

    buft: I64
    chunk: I64
    offset: I64
    nbytes: I64


def no_places(n: int) -> Places:
    """Nothing placed yet."""
    return Places(np.full(n, NOWHERE, np.int64), *np.zeros((3, n), np.int64))


class Uses(NamedTuple):
    """What is still to come while walking, per id: memory is owned, nodes that will read it, views of it."""

    owned: Bools
    children: I64
    views: I64


def reserve(g: GraphArrays, d: DeviceTable, tasks: Tasks, n_bufts: int) -> tuple[Places, list[tuple[int, ...]]]:
    """Plan all places from scratch; returns them and the bytes needed of each chunk of each buffer type.

    Raises CapacityError when a chunk is cut into more free blocks than ggml can keep.
    """
    n_ext = tasks.op.size
    heap = new_heap(n_bufts)
    places = no_places(n_ext)
    uses = Uses(np.zeros(n_ext, np.bool_), np.zeros(n_ext, np.int64), np.zeros(n_ext, np.int64))
    if not _walk(g.layout, d, tasks, heap, places, uses):
        raise CapacityError(f"graph allocation: more than {MAX_FREE} free blocks in one chunk")
    sizes = [tuple(heap.used[k, :count].tolist()) for k, count in enumerate(heap.n_chunks.tolist())]
    return places, sizes


@compiled
def fit_places(tasks: Tasks, before: Tasks, old: Tasks, reserved: Places, end: I64, places: Places) -> int:
    """Whether the graph can have the places reserved for `old`: FITS, and `places` has them, or GROWN, or LEAFS.

    GROWN is ggml's decision to reallocate: buffer types by position against the graph `before`, sizes of nodes and
    sources against what was reserved, never identity; leafs are not looked at. LEAFS says that they should have been:
    one stands where no place is, or would end behind its chunk. `end` [buft, chunk] are the sizes of the buffers.
    """
    if not (_same(before.node_buft, tasks.node_buft) and _same(before.leaf_buft, tasks.leaf_buft)):
        return GROWN
    width = old.node_src.shape[1]
    for i in range(tasks.node.size):
        if not tasks.is_hold[i]:
            at = NOWHERE if old.is_hold[i] else old.node[i]
            if not _fits_one(tasks, tasks.node[i], reserved, at):
                return GROWN
        for j in range(tasks.node_src.shape[1]):
            t = tasks.node_src[i, j]
            if t >= 0 and not _fits_one(tasks, t, reserved, old.node_src[i, j] if j < width else NOWHERE):
                return GROWN
    for i in range(tasks.leaf.size):
        t, at = tasks.leaf[i], old.leaf[i]
        if not tasks.outside[t] and tasks.view_src[t] < 0:
            b = reserved.buft[at]
            if b == NOWHERE or reserved.offset[at] + tasks.nbytes[t] > end[b, reserved.chunk[at]]:
                return LEAFS
    _take_all(tasks, old, reserved, places)
    return FITS


@helper
def _same(a: I64, b: I64) -> bool:
    i = 0
    while i < min(a.size, b.size) and a[i] == b[i]:
        i += 1
    return bool(i == a.size == b.size)


@helper
def _fits_one(tasks: Tasks, t: int, reserved: Places, before: int) -> bool:
    if tasks.outside[t] or tasks.view_src[t] >= 0:
        return True
    if before < 0 or reserved.buft[before] == NOWHERE:
        return False
    return bool(tasks.nbytes[t] <= reserved.nbytes[before])


@compiled
def take_places(tasks: Tasks, reserved: Places, places: Places) -> None:
    """Fill `places` from what was reserved for the same tasks."""
    _take_all(tasks, tasks, reserved, places)


@helper
def _take_all(tasks: Tasks, old: Tasks, reserved: Places, places: Places) -> None:
    """Fill `places` by position from what was reserved for `old`; the first position of a tensor decides."""
    for i in range(tasks.leaf.size):
        _take(tasks, tasks.leaf[i], reserved, old.leaf[i], places)
    for i in range(tasks.node.size):
        for j in range(tasks.node_src.shape[1]):
            if tasks.node_src[i, j] >= 0:
                before = old.node_src[i, j] if j < old.node_src.shape[1] else NOWHERE
                _take(tasks, tasks.node_src[i, j], reserved, before, places)
        if not tasks.is_hold[i]:
            _take(tasks, tasks.node[i], reserved, old.node[i], places)


@helper
def _take(tasks: Tasks, t: int, reserved: Places, before: int, places: Places) -> None:
    if places.buft[t] != NOWHERE or tasks.outside[t]:
        return
    root = tasks.view_src[t]
    if root >= 0:
        # Stays without memory when it is met before its root is placed and not again after that.
        if tasks.outside[root] or places.buft[root] != NOWHERE:
            places.buft[t] = VIEWED
    elif before >= 0:
        places.buft[t] = reserved.buft[before]
        places.chunk[t] = reserved.chunk[before]
        places.offset[t] = reserved.offset[before]
        places.nbytes[t] = tasks.nbytes[t]


@compiled
def _walk(layout: I64, d: DeviceTable, x: Tasks, heap: Heap, places: Places, u: Uses) -> bool:
    """Allocate leafs, explicit inputs and nodes in order, freeing each tensor after its last use."""
    for i in range(x.leaf.size):
        _allocate(layout, d, x, heap, places, u, x.leaf[i], -1, x.leaf_buft[i])
    for i in range(x.node.size):
        t = x.node[i]
        if not x.is_hold[i]:
            if x.view_src[t] >= 0 and x.op[t] != _NONE:
                u.views[x.view_src[t]] += 1
            if x.flags[t] & _INPUT:
                _allocate(layout, d, x, heap, places, u, t, i, x.node_buft[i])
        for j in range(x.node_src.shape[1]):
            s = x.node_src[i, j]
            if s >= 0:
                u.children[s] += 1
                if x.flags[s] & _INPUT:
                    _allocate(layout, d, x, heap, places, u, s, -1, x.node_buft[i])
    for i in range(x.node.size):
        for j in range(x.node_src.shape[1]):
            s = x.node_src[i, j]
            if s >= 0:
                _allocate(layout, d, x, heap, places, u, s, -1, x.node_buft[i])
        if not x.is_hold[i]:
            _allocate(layout, d, x, heap, places, u, x.node[i], i, x.node_buft[i])
        for j in range(x.node_src.shape[1]):
            s = x.node_src[i, j]
            if s >= 0 and not _release(d, x, heap, places, u, s):
                return False
    for t in range(x.op.size):
        if x.outside[t] or x.view_src[t] >= 0:
            places.buft[t] = NOWHERE
        else:
            places.nbytes[t] = x.nbytes[t]
    return True


@helper
def _allocate(
    layout: I64,
    d: DeviceTable,
    x: Tasks,
    heap: Heap,
    places: Places,
    u: Uses,
    t: int,
    i: int,
    buft: int,
) -> None:
    """Place tensor `t` (node number `i`, or -1: no sources) in `buft`, in a source's place if the op allows."""
    if x.outside[t] or u.owned[t] or x.view_src[t] >= 0:
        return
    u.owned[t] = True
    if i >= 0 and _CAN_INPLACE[x.op[t]]:
        for j in range(x.node_src.shape[1]):
            p = x.node_src[i, j]
            if p >= 0 and _can_take_over(layout, x, u, t, p):
                u.owned[p] = False
                places.buft[t] = places.buft[p]
                places.chunk[t] = places.chunk[p]
                places.offset[t] = places.offset[p]
                return
    places.buft[t] = buft
    places.chunk[t], places.offset[t] = take_block(heap, d.max_size[buft], buft, padded(x.nbytes[t], d.alignment[buft]))


@helper
def _can_take_over(layout: I64, x: Tasks, u: Uses, t: int, p: int) -> bool:
    """True when node `t` is the only one that still needs `p` and has the same layout.

    The same layout means the same size, so nothing is left over. A view is never taken over: ggml has rules for it,
    but asks first whether the allocator gave the view itself memory, which it never does.
    """
    if not u.owned[p] or x.flags[p] & _OUTPUT or u.children[p] != 1 or u.views[p] != 0:
        return False
    a, b = x.origin[t], x.origin[p]
    same = True
    for k in range(layout.shape[1]):
        same = same and layout[a, k] == layout[b, k]
    return same


@helper
def _release(d: DeviceTable, x: Tasks, heap: Heap, places: Places, u: Uses, s: int) -> bool:
    """One use of `s` is over; free it (or the tensor it is a view of) when that was the last."""
    u.children[s] -= 1
    if u.children[s] != 0 or u.views[s] != 0:
        return True
    root = x.view_src[s]
    if root >= 0:
        u.views[root] -= 1
        if u.views[root] != 0 or u.children[root] != 0:
            return True
        s = root
    if not u.owned[s] or x.flags[s] & _OUTPUT:
        return True
    u.owned[s] = False
    b = places.buft[s]
    return free_block(heap, b, places.chunk[s], places.offset[s], padded(x.nbytes[s], d.alignment[b]))
