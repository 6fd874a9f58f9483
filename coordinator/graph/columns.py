"""A graph's facts as arrays, one row per tensor: what planning reads, and what equal graphs are recognised by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from protocol.dtypes import DType

if TYPE_CHECKING:
    from coordinator.graph.node import Tensor

I64 = npt.NDArray[np.int64]

NONE = -1
"""In columns: no source, no root of a view, no buffer."""

_BLOCK = np.zeros(max(DType) + 1, np.int64)
_BLOCK_NBYTES = np.zeros(max(DType) + 1, np.int64)
for _dtype in DType:
    _BLOCK[_dtype], _BLOCK_NBYTES[_dtype] = _dtype.block, _dtype.block_nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Arrays [n] over tensor ids, and `layout` [n, 9] (type, ne, nb) and `src` [n, width]; NONE where there is none.

    `buft` counts the names in `bufts`, `usage` is 0 without a buffer; `nodes` and `leafs` are ids in visit order.
    `digest` is one of all that any pass looks at, names included (copies are named after their sources): two graphs
    of the same digest get the same plan, given the same pins. Nobody writes to the arrays.
    """

    op: I64
    flags: I64
    view_src: I64
    view_offs: I64
    buft: I64
    usage: I64
    nbytes: I64
    layout: I64
    src: I64
    nodes: I64
    leafs: I64
    bufts: tuple[str, ...]
    digest: bytes


def make_columns(tensors: Sequence[Tensor], nodes: Sequence[int], leafs: Sequence[int]) -> Columns:
    """The columns of a graph's tensors and of its order."""
    n = len(tensors)
    width = max((len(t.src) for t in tensors), default=0) or 1
    padding = [(NONE,) * (width - k) for k in range(width + 1)]
    buffers = [t.buffer for t in tensors]
    bufts = {name: k for k, name in enumerate(dict.fromkeys(b.buft for b in buffers if b is not None))}
    rows: list[Iterable[int]] = [
        [t.op for t in tensors],
        [t.flags for t in tensors],
        [NONE if t.view_src is None else t.view_src for t in tensors],
        [t.view_offs for t in tensors],
        [NONE if b is None else bufts[b.buft] for b in buffers],
        [0 if b is None else b.usage for b in buffers],
        chain.from_iterable((t.dtype, *t.ne, *t.nb) for t in tensors),
        chain.from_iterable(t.src + padding[len(t.src)] for t in tensors),
        nodes,
        leafs,
    ]
    sizes = (*(n,) * 6, 9 * n, width * n, len(nodes), len(leafs))
    everything = np.fromiter(chain.from_iterable(rows), np.int64, sum(sizes))
    parts = np.split(everything, np.cumsum(sizes)[:-1])
    texts = json.dumps([sizes, list(bufts), [t.name for t in tensors]])  # escapes what separates them
    digest = hashlib.sha256(texts.encode())
    digest.update(everything.data)
    op, flags, view_src, view_offs, buft, usage = parts[:6]
    layout = parts[6].reshape(n, 9)
    return Columns(
        op=op,
        flags=flags,
        view_src=view_src,
        view_offs=view_offs,
        buft=buft,
        usage=usage,
        nbytes=span_nbytes(layout),
        layout=layout,
        src=parts[7].reshape(n, width),
        nodes=parts[8],
        leafs=parts[9],
        bufts=tuple(bufts),
        digest=digest.digest(),
    )


def span_nbytes(layout: I64) -> I64:
    """Bytes that each row's tensor spans, strides included; 0 when an extent is 0 (`ggml_nbytes`)."""
    dtype, ne, nb = layout[:, 0], layout[:, 1:5], layout[:, 5:9]
    block = _BLOCK[dtype]
    outer = ((ne[:, 1:] - 1) * nb[:, 1:]).sum(axis=1)
    plain = _BLOCK_NBYTES[dtype] + (ne[:, 0] - 1) * nb[:, 0]
    blocks = ne[:, 0] * nb[:, 0] // block
    return np.where((ne > 0).all(axis=1), np.where(block == 1, plain, blocks) + outer, 0)
