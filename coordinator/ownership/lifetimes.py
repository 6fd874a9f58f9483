"""Which tensors of a plan have given their memory back by the end of the graph."""

from __future__ import annotations

from coordinator.graph.node import ABSENT, Graph
from coordinator.schedule.plan import Plan
from protocol.ops import Flag, Op


def released(plan: Plan) -> frozenset[int]:
    """Tensors whose memory was free again, or taken over, when the last node had been planned.

    The allocator's count of children and views, without its memory. A tensor that no node reads is never released;
    OUTPUT protects a tensor, but not the tensor that it is a view of.
    """
    graph = plan.graph
    tensors, n = graph.tensors, len(graph.tensors)
    holds = [(s.start, t) for s in plan.splits for t in s.inputs]
    children: dict[int, int] = {}
    views: dict[int, int] = {}
    for _, t in holds:
        children[t] = children.get(t, 0) + 1
    for row, ident in zip(plan.sources, graph.nodes, strict=True):
        node = tensors[ident]
        if node.view_src is not None and node.op != Op.NONE:
            views[node.view_src] = views.get(node.view_src, 0) + 1
        for s in row:
            if s != ABSENT:
                children[s] = children.get(s, 0) + 1
    gone: set[int] = set()
    uses = [t for _, t in holds] + [s for row in plan.sources for s in row if s != ABSENT]
    for s in uses:
        children[s] -= 1
        if children[s] or views.get(s, 0):
            continue
        root = tensors[s].view_src if s < n else None
        if root is not None:
            views[root] = views.get(root, 0) - 1
            if views[root] or children.get(root, 0):
                continue
        owner = s if root is None else root
        if owner < n and not tensors[owner].flags & Flag.OUTPUT and tensors[owner].buffer is None:
            gone.add(owner)
    return frozenset(gone)


def topology(graph: Graph) -> tuple[object, ...]:
    """What makes two graphs the same computation, names and sizes apart."""
    return tuple((t.op, t.src, t.view_src, int(t.flags), t.buffer is None) for t in graph.tensors)


def identity(graph: Graph) -> tuple[object, ...]:
    """Everything that a plan of the graph may be reused for: all but names of tensors without memory of their own."""
    rows = [
        (t.op, t.dtype, t.ne, t.nb, t.params, t.src, t.view_src, t.view_offs, int(t.flags), t.buffer,
         None if t.buffer is None else t.name)
        for t in graph.tensors
    ]  # fmt: skip
    return (*rows, graph.expand, graph.pins)
