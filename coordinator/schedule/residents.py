"""Tensors that exist before the graphs do: weights, caches, and what is kept between graphs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from coordinator.graph.node import Graph, Tensor
from protocol.ops import Usage

_CACHE = re.compile(r"(cache|cross)_[kv]_l\d+")

Key = tuple[str, str]
"""A resident tensor: its name and buffer type."""


def residents(graphs: Iterable[Graph]) -> dict[Key, Tensor]:
    """Every tensor that exists before the graphs do, by name and buffer type; the largest of a name counts."""
    found: dict[Key, Tensor] = {}
    for graph in graphs:
        for ident in graph.leafs:
            tensor = graph.tensors[ident]
            if tensor.buffer is not None:
                key = (tensor.name, tensor.buffer.buft)
                if key not in found or found[key].nbytes < tensor.nbytes:
                    found[key] = tensor
    return found


def purpose_of(tensor: Tensor) -> str:
    """What a resident tensor counts as: weights, KV or kept."""
    assert tensor.buffer is not None
    if tensor.buffer.usage == Usage.WEIGHTS:
        return "weights"
    return "KV" if _CACHE.fullmatch(tensor.name) else "kept"
