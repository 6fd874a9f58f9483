"""Debug inputs: `NAME_copy`, an unused INPUT tensor of NAME's shape and type, visited before everything else.

Such a tensor changes nothing that is computed, yet it changes where everything is allocated: the harmless addition
with which discussion 10780 of llama.cpp began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.graph.node import Graph, Tensor, contiguous_nb
from protocol.errors import UsageError
from protocol.ops import Flag, Op

SUFFIX = "_copy"


def add_debug_inputs(graph: Graph, names: Sequence[str]) -> Graph:
    """The graph with the debug inputs `names`, first in its order of expansion.

    Raises UsageError for a name that does not end in `_copy` or whose tensor is not in the graph.
    """
    if not names:
        return graph
    added = tuple(_debug_input(graph, name, len(graph.tensors) + i) for i, name in enumerate(dict.fromkeys(names)))
    ids = tuple(t.id for t in added)
    return replace(
        graph,
        tensors=graph.tensors + added,
        expand=ids + graph.expand,
        leafs=ids + graph.leafs,
        by_name=graph.by_name | {t.name: t.id for t in added},
    )


def route_debug_inputs(names: Sequence[str], *graphs: Graph) -> tuple[tuple[str, ...], ...]:
    """The names that belong to each graph: to every one that has the tensor.

    Raises UsageError for a name that belongs to none.
    """
    for name in names:
        if not any(_has(graph, name) for graph in graphs):
            raise _unknown(name, *graphs)
    return tuple(tuple(name for name in names if _has(graph, name)) for graph in graphs)


def _has(graph: Graph, name: str) -> bool:
    return name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in graph.by_name


def _debug_input(graph: Graph, name: str, ident: int) -> Tensor:
    if not _has(graph, name):
        raise _unknown(name, graph)
    like = graph.named(name.removesuffix(SUFFIX))
    return Tensor(ident, name, like.dtype, like.ne, contiguous_nb(like.dtype, like.ne), flags=Flag.INPUT)


def _unknown(name: str, *graphs: Graph) -> UsageError:
    tensors = [t for graph in graphs for t in graph.tensors]
    inputs = [t.name for t in tensors if t.flags & Flag.INPUT]
    results = [t.name for t in tensors if t.op != Op.NONE and not t.is_view_op and "(" not in t.name]
    shown = ", ".join(dict.fromkeys(f"{n}{SUFFIX}" for n in (*inputs, *results[:1], *results[-1:])))
    where = " or ".join(graph.name for graph in graphs)
    return UsageError(f"unknown debug tensor {name!r} in {where}: expected NAME{SUFFIX} for a tensor, such as {shown}")
