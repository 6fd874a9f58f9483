"""Give every tensor its place: ggml's graph allocator over dynamic allocators with chunks and free lists."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coordinator.schedule.arrays import I64, N_OPS, NO_BUFFER, Bools, GraphArrays, compiled
from coordinator.schedule.devices import UNLIMITED, DeviceTable
from coordinator.schedule.split import BACKEND, END, FIRST_INPUT, N_INPUTS, START, SplitArrays
from protocol.errors import CapacityError
from protocol.ops import Flag, Op

MAX_CHUNKS = 16
"""ggml's GGML_VBUFFER_MAX_CHUNKS; the last one is unlimited."""

MAX_FREE = 256
"""ggml's MAX_FREE_BLOCKS per chunk."""

NOWHERE = -1
"""Buffer number of a tensor that the allocator does not place: a view, or allocated before the graph."""

VIEWED = -2
"""Buffer number of a view that lies in its root's memory."""

INPLACE_OPS = frozenset({
    Op.FILL, Op.SCALE, Op.DIAG_MASK_ZERO, Op.DIAG_MASK_INF, Op.ADD, Op.ADD_ID, Op.ADD1, Op.SUB, Op.MUL, Op.DIV,
    Op.SQR, Op.SQRT, Op.LOG, Op.UNARY, Op.ROPE, Op.ROPE_BACK, Op.SILU_BACK, Op.RMS_NORM, Op.RMS_NORM_BACK,
    Op.SOFT_MAX, Op.SOFT_MAX_BACK,
})  # fmt: skip
"""Ops whose result may take the place of a source."""

_CAN_INPLACE = np.zeros(N_OPS, np.bool_)
_CAN_INPLACE[list(INPLACE_OPS)] = True

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


class Heap(NamedTuple):
    """One dynamic allocator per buffer type (first axis) with chunks (second) and free blocks (third)."""

    offset: I64
    size: I64
    n_free: I64
    used: I64
    n_chunks: I64


class Places(NamedTuple):
    """Per id: buffer type (NOWHERE: none), chunk, offset and the bytes that were reserved."""

    buft: I64
    chunk: I64
    offset: I64
    nbytes: I64


def arrange(g: GraphArrays, d: DeviceTable, backend: I64, s: SplitArrays, current: int) -> Tasks:
    """Lay out the allocator's graph; `current` is the copy of split inputs that is used."""
    n, width = g.src.shape
    n_ext = n + s.copy_of.size
    m = g.nodes.size + 2 * s.inputs.size
    n_copies = s.copy_id.shape[2]
    n_leafs = g.leafs.size
    if n_copies > 1:
        n_leafs += n_copies * (s.graph_inputs.size + s.inputs.size)
    tasks = Tasks(
        node=np.empty(m, np.int64),
        is_hold=np.zeros(m, np.bool_),
        node_src=np.full((m, width), -1, np.int64),
        node_buft=np.empty(m, np.int64),
        leaf=np.empty(n_leafs, np.int64),
        leaf_buft=np.empty(n_leafs, np.int64),
        op=_extend(g.op, n_ext, _NONE),
        flags=_extend(g.flags, n_ext, _INPUT | _OUTPUT if n_copies > 1 else 0),
        view_src=_extend(g.view_src, n_ext, -1),
        nbytes=np.concatenate((g.nbytes, g.nbytes[s.copy_of])),
        origin=np.concatenate((np.arange(n), s.copy_of)),
        outside=np.concatenate((g.buft != NO_BUFFER, np.zeros(s.copy_of.size, np.bool_))),
    )
    tasks.flags[s.graph_inputs] |= _INPUT | _OUTPUT
    _arrange_nodes(g, d, backend, s, current, tasks)
    _arrange_leafs(g, d, backend, s, tasks)
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
        for t in s.inputs[first : first + s.splits[k, N_INPUTS]]:
            x.node[m], x.is_hold[m], x.node_src[m, 0], x.node_buft[m] = t, True, t, d.buft[backend[t]]
            x.node[m + 1], x.node_buft[m + 1] = s.copy_id[t, b, current], d.buft[b]
            m += 2
        for t in g.nodes[s.splits[k, START] : s.splits[k, END]]:
            x.node[m], x.node_buft[m] = t, d.buft[backend[t]]
            x.node_src[m] = s.src[t]
            m += 1


@compiled
def _arrange_leafs(g: GraphArrays, d: DeviceTable, backend: I64, s: SplitArrays, x: Tasks) -> None:
    m = 0
    n_copies = s.copy_id.shape[2]
    if n_copies > 1:
        for t in s.graph_inputs:
            for c in range(n_copies):
                x.leaf[m], x.leaf_buft[m] = s.copy_id[t, backend[t], c], d.buft[backend[t]]
                m += 1
        for k in range(s.splits.shape[0]):
            b = s.splits[k, BACKEND]
            first = s.splits[k, FIRST_INPUT]
            for t in s.inputs[first : first + s.splits[k, N_INPUTS]]:
                for c in range(n_copies):
                    x.leaf[m], x.leaf_buft[m] = s.copy_id[t, b, c], d.buft[b]
                    m += 1
    for t in g.leafs:
        x.leaf[m], x.leaf_buft[m] = t, d.buft[backend[t]] if backend[t] >= 0 else NOWHERE
        m += 1


def homeless_leaf(tasks: Tasks) -> int:
    """A leaf that needs a place but was assigned to no device, or -1."""
    found = (tasks.leaf_buft == NOWHERE) & ~tasks.outside[tasks.leaf] & (tasks.view_src[tasks.leaf] < 0)
    return int(tasks.leaf[found.argmax()]) if found.any() else -1


def reserve(g: GraphArrays, d: DeviceTable, tasks: Tasks, n_bufts: int) -> tuple[Places, list[tuple[int, ...]]]:
    """Plan all places from scratch; returns them and the bytes needed of each chunk of each buffer type.

    Raises CapacityError when a chunk is cut into more free blocks than ggml can keep.
    """
    n_ext = tasks.op.size
    heap = Heap(
        np.empty((n_bufts, MAX_CHUNKS, MAX_FREE), np.int64),
        np.empty((n_bufts, MAX_CHUNKS, MAX_FREE), np.int64),
        np.zeros((n_bufts, MAX_CHUNKS), np.int64),
        np.zeros((n_bufts, MAX_CHUNKS), np.int64),
        np.zeros(n_bufts, np.int64),
    )
    places = Places(np.full(n_ext, NOWHERE, np.int64), *np.zeros((3, n_ext), np.int64))
    if not _walk(g.layout, d, tasks, heap, places):
        raise CapacityError(f"graph allocation: more than {MAX_FREE} free blocks in one chunk")
    places.nbytes[:] = tasks.nbytes
    fixed = tasks.outside | (tasks.view_src >= 0)
    places.buft[fixed] = NOWHERE
    places.nbytes[fixed] = 0
    sizes = [tuple(int(v) for v in heap.used[k, : heap.n_chunks[k]]) for k in range(n_bufts)]
    return places, sizes


@compiled
def fits(tasks: Tasks, old: Tasks, reserved: Places) -> bool:
    """True when every node and source fits the place reserved at its position; leafs are not looked at (as in ggml)."""
    width = old.node_src.shape[1]
    for i in range(tasks.node.size):
        if not tasks.is_hold[i]:
            before = NOWHERE if old.is_hold[i] else old.node[i]
            if not _fits_one(tasks, tasks.node[i], reserved, before):
                return False
        for j in range(tasks.node_src.shape[1]):
            t = tasks.node_src[i, j]
            if t >= 0 and not _fits_one(tasks, t, reserved, old.node_src[i, j] if j < width else NOWHERE):
                return False
    return True


@compiled
def _fits_one(tasks: Tasks, t: int, reserved: Places, before: int) -> bool:
    if tasks.outside[t] or tasks.view_src[t] >= 0:
        return True
    if before < 0 or reserved.buft[before] == NOWHERE:
        return False
    return bool(tasks.nbytes[t] <= reserved.nbytes[before])


@compiled
def leafs_have_places(tasks: Tasks, old: Tasks, reserved: Places) -> bool:
    """True when each leaf that needs a place stands at a position that has one."""
    for i in range(tasks.leaf.size):
        t = tasks.leaf[i]
        if not tasks.outside[t] and tasks.view_src[t] < 0 and reserved.buft[old.leaf[i]] == NOWHERE:
            return False
    return True


@compiled
def take_places(tasks: Tasks, old: Tasks, reserved: Places, places: Places) -> None:
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


@compiled
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
def _walk(layout: I64, d: DeviceTable, x: Tasks, heap: Heap, places: Places) -> bool:
    """Allocate leafs, explicit inputs and nodes in order, freeing each tensor after its last use."""
    n_ext = x.op.size
    owned = np.zeros(n_ext, np.bool_)
    children = np.zeros(n_ext, np.int64)
    views = np.zeros(n_ext, np.int64)
    for i in range(x.leaf.size):
        _allocate(layout, d, x, heap, places, owned, children, views, x.leaf[i], -1, x.leaf_buft[i])
    for i in range(x.node.size):
        t = x.node[i]
        if not x.is_hold[i]:
            if x.view_src[t] >= 0 and x.op[t] != _NONE:
                views[x.view_src[t]] += 1
            if x.flags[t] & _INPUT:
                _allocate(layout, d, x, heap, places, owned, children, views, t, i, x.node_buft[i])
        for j in range(x.node_src.shape[1]):
            s = x.node_src[i, j]
            if s >= 0:
                children[s] += 1
                if x.flags[s] & _INPUT:
                    _allocate(layout, d, x, heap, places, owned, children, views, s, -1, x.node_buft[i])
    for i in range(x.node.size):
        for j in range(x.node_src.shape[1]):
            s = x.node_src[i, j]
            if s >= 0:
                _allocate(layout, d, x, heap, places, owned, children, views, s, -1, x.node_buft[i])
        if not x.is_hold[i]:
            _allocate(layout, d, x, heap, places, owned, children, views, x.node[i], i, x.node_buft[i])
        for j in range(x.node_src.shape[1]):
            s = x.node_src[i, j]
            if s >= 0 and not _release(d, x, heap, places, owned, children, views, s):
                return False
    return True


@compiled
def _allocate(
    layout: I64,
    d: DeviceTable,
    x: Tasks,
    heap: Heap,
    places: Places,
    owned: Bools,
    children: I64,
    views: I64,
    t: int,
    i: int,
    buft: int,
) -> None:
    """Place tensor `t` (node number `i`, or -1: no sources) in `buft`, in a source's place if the op allows."""
    if x.outside[t] or owned[t] or x.view_src[t] >= 0:
        return
    owned[t] = True
    if i >= 0 and _CAN_INPLACE[x.op[t]]:
        for j in range(x.node_src.shape[1]):
            p = x.node_src[i, j]
            if p >= 0 and _can_take_over(layout, x, owned, children, views, t, p):
                owned[p] = False
                places.buft[t] = places.buft[p]
                places.chunk[t] = places.chunk[p]
                places.offset[t] = places.offset[p]
                _free_rest(d, x, heap, places, t, p)
                return
    places.buft[t] = buft
    places.chunk[t], places.offset[t] = _take_block(heap, d, buft, _padded(x.nbytes[t], d.alignment[buft]))


@compiled
def _can_take_over(layout: I64, x: Tasks, owned: Bools, children: I64, views: I64, t: int, p: int) -> bool:
    """True when node `t` is the only one that still needs `p` and has the same layout.

    A view is never taken over: ggml has rules for it, but asks first whether the allocator gave the view itself
    memory, which it never does.
    """
    if not owned[p] or x.flags[p] & _OUTPUT or children[p] != 1 or views[p] != 0:
        return False
    for k in range(layout.shape[1]):
        if layout[x.origin[t], k] != layout[x.origin[p], k]:
            return False
    return True


@compiled
def _release(
    d: DeviceTable, x: Tasks, heap: Heap, places: Places, owned: Bools, children: I64, views: I64, s: int
) -> bool:
    """One use of `s` is over; free it (or the tensor it is a view of) when that was the last."""
    children[s] -= 1
    if children[s] != 0 or views[s] != 0:
        return True
    root = x.view_src[s]
    if root >= 0:
        views[root] -= 1
        if views[root] != 0 or children[root] != 0:
            return True
        s = root
    if not owned[s] or x.flags[s] & _OUTPUT:
        return True
    owned[s] = False
    b = places.buft[s]
    return _free(heap, b, places.chunk[s], places.offset[s], _padded(x.nbytes[s], d.alignment[b]))


@compiled
def _free_rest(d: DeviceTable, x: Tasks, heap: Heap, places: Places, t: int, p: int) -> None:
    """Free the end of `p`'s place that `t`, which takes it over, does not need."""
    b = places.buft[p]
    before = _padded(x.nbytes[p], d.alignment[b])
    after = _padded(x.nbytes[t], d.alignment[b])
    if before > after:
        _free(heap, b, places.chunk[p], places.offset[p] + after, before - after)


@compiled
def _padded(nbytes: int, alignment: int) -> int:
    return (nbytes + alignment - 1) & -alignment


@compiled
def _take_block(heap: Heap, d: DeviceTable, b: int, size: int) -> tuple[int, int]:
    """Chunk and offset of `size` bytes: the best hole, else the end of a chunk, else a new chunk."""
    c, k = _best_hole(heap, b, size)
    if k < 0:
        c, k = _best_end(heap, b, size)
    if k < 0:
        c, k = _new_chunk(heap, b, max(size, d.max_size[b])), 0
    offset = heap.offset[b, c, k]
    heap.offset[b, c, k] += size
    heap.size[b, c, k] -= size
    if heap.size[b, c, k] == 0:
        _remove(heap, b, c, k)
    heap.used[b, c] = max(heap.used[b, c], offset + size)
    return c, offset


@compiled
def _best_hole(heap: Heap, b: int, size: int) -> tuple[int, int]:
    """The smallest hole (any free block but the last of its chunk) of the last chunk that has one."""
    chunk = block = -1
    for c in range(heap.n_chunks[b]):
        best = UNLIMITED
        for k in range(heap.n_free[b, c] - 1):
            if size <= heap.size[b, c, k] <= best:
                chunk, block, best = c, k, heap.size[b, c, k]
    return chunk, block


@compiled
def _best_end(heap: Heap, b: int, size: int) -> tuple[int, int]:
    """The last free block whose use wastes least of what its chunk has reached, or else grows it least."""
    chunk = block = -1
    best = -UNLIMITED - 1
    for c in range(heap.n_chunks[b]):
        k = heap.n_free[b, c] - 1
        if k < 0:
            continue
        spare = heap.used[b, c] - heap.offset[b, c, k] - size
        better = (best < 0 and spare > best) or (0 <= spare < best)
        if heap.size[b, c, k] >= size and better:
            chunk, block, best = c, k, spare
    return chunk, block


@compiled
def _new_chunk(heap: Heap, b: int, size: int) -> int:
    """Open a chunk of `size` bytes; the last possible one has no limit."""
    c = heap.n_chunks[b]
    heap.offset[b, c, 0] = 0
    heap.size[b, c, 0] = UNLIMITED if c == MAX_CHUNKS - 1 else size
    heap.n_free[b, c] = 1
    heap.used[b, c] = 0
    heap.n_chunks[b] += 1
    return c


@compiled
def _free(heap: Heap, b: int, c: int, offset: int, size: int) -> bool:
    """Give bytes back, joining them with free neighbours; False when there is no room in the list."""
    for k in range(heap.n_free[b, c]):
        if heap.offset[b, c, k] + heap.size[b, c, k] == offset:
            heap.size[b, c, k] += size
            if k + 1 < heap.n_free[b, c] and offset + size == heap.offset[b, c, k + 1]:
                heap.size[b, c, k] += heap.size[b, c, k + 1]
                _remove(heap, b, c, k + 1)
            return True
        if offset + size == heap.offset[b, c, k]:
            heap.offset[b, c, k] = offset
            heap.size[b, c, k] += size
            if k > 0 and heap.offset[b, c, k - 1] + heap.size[b, c, k - 1] == offset:
                heap.size[b, c, k - 1] += heap.size[b, c, k]
                _remove(heap, b, c, k)
            return True
    return _insert(heap, b, c, offset, size)


@compiled
def _insert(heap: Heap, b: int, c: int, offset: int, size: int) -> bool:
    n = heap.n_free[b, c]
    if n == MAX_FREE:
        return False
    k = n
    while k > 0 and heap.offset[b, c, k - 1] >= offset:
        heap.offset[b, c, k] = heap.offset[b, c, k - 1]
        heap.size[b, c, k] = heap.size[b, c, k - 1]
        k -= 1
    heap.offset[b, c, k] = offset
    heap.size[b, c, k] = size
    heap.n_free[b, c] = n + 1
    return True


@compiled
def _remove(heap: Heap, b: int, c: int, k: int) -> None:
    for i in range(k, heap.n_free[b, c] - 1):
        heap.offset[b, c, i] = heap.offset[b, c, i + 1]
        heap.size[b, c, i] = heap.size[b, c, i + 1]
    heap.n_free[b, c] -= 1
