"""Run a graph node by node with the reference definitions: slow, sequential, every tensor in memory of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from coordinator.graph.node import ABSENT, Graph, Tensor
from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels.reference import REFERENCE, numpy_type

Array = np.ndarray[Any, Any]


def element_type(dtype: DType, wide: bool) -> type:
    """The numpy type in which a tensor's elements are kept; quantised weights are kept dequantised."""
    if dtype in (DType.I32, DType.I64):
        return numpy_type(dtype)
    if wide:
        return np.float64
    return np.float16 if dtype == DType.F16 else np.float32


class Evaluation:
    """The values of one run. `self[name]` is the last tensor of that name, as an array of the reversed shape."""

    def __init__(self, graph: Graph, leafs: Mapping[str, Array], wide: bool) -> None:
        self.graph, self.wide = graph, wide
        self.memory: dict[int, Array] = {}
        for ident in graph.leafs:
            leaf = graph.tensors[ident]
            if leaf.name in leafs:
                self.memory[ident] = self._adopt(leaf, leafs[leaf.name])
            elif leaf.nelements == 0:
                self.memory[ident] = np.empty(0, element_type(leaf.dtype, wide))

    def __getitem__(self, name: str) -> Array:
        return self.read(self.graph.by_name[name])

    def _adopt(self, leaf: Tensor, given: Array) -> Array:
        """The given array itself when it has the right type, so that what is written to a cache stays there."""
        assert given.size == leaf.nelements, (leaf.name, given.shape, leaf.ne)
        return np.ascontiguousarray(given, element_type(leaf.dtype, self.wide)).reshape(-1)

    def read(self, ident: int) -> Array:
        """The tensor's array; for a view, one in its root's memory."""
        t = self.graph.tensors[ident]
        root = ident if t.view_src is None else t.view_src
        flat, unit = self.memory[root], t.dtype.block_nbytes // t.dtype.block
        if t.dtype.quantised:
            assert t.view_src is None, t.name
            return flat.reshape(t.ne[::-1])
        strides = tuple(nb // unit * flat.itemsize for nb in reversed(t.nb))
        assert t.view_offs // unit + t.nbytes // unit <= flat.size, (t.name, t.view_offs, t.nbytes, flat.size)
        return as_strided(flat[t.view_offs // unit :], t.ne[::-1], strides)

    def compute(self, ident: int) -> None:
        """Compute one node into its own memory, or into its root's when it is a view that writes."""
        t = self.graph.tensors[ident]
        sources = [None if s == ABSENT else self.read(s) for s in t.src]
        if t.op == Op.CPY and len(sources) == 2:
            sources = sources[:1]
        value = REFERENCE[t.op](t.params, t.ne, t.dtype, sources)
        assert value.shape == t.ne[::-1], (t.name, value.shape, t.ne)
        if t.view_src is None:
            self.memory[ident] = np.empty(t.nelements, element_type(t.dtype, self.wide))
        self.read(ident)[...] = value


def run(graph: Graph, leafs: Mapping[str, Array], *, wide: bool = False) -> Evaluation:
    """Evaluate the whole graph. `leafs` holds inputs, weights and caches by name; caches are written in place.

    `wide` does everything in float64, weights included; caches have then to be float64 as well.
    """
    evaluation = Evaluation(graph, leafs, wide)
    for ident in graph.nodes:
        if not graph.tensors[ident].is_view_op:
            evaluation.compute(ident)
    return evaluation
