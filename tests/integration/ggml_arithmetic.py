"""Compute our graphs with the real ggml's CPU code, bit for bit as llama.cpp built for AVX2 does.

All operations are ggml 0.20.2's own, through ctypes, but for FLASH_ATTN_EXT: there ggml 0.25.3 fuses a multiplication
and an addition that 0.20.2 does not, so attention is written out here as what it does with an F16 cache and fewer than
64 queries: queries rounded to F16, scores in 32 lanes, one key after the other, values added up in F16.
"""

from __future__ import annotations

import ctypes as c
import ctypes.util
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from coordinator.graph.node import ABSENT, Graph, Tensor
from coordinator.model.gguf_file import ModelFile
from protocol.dtypes import DType
from protocol.ops import Op
from tests.conformance.real_ggml import InitParams, TensorStruct, library_path
from workers.kernels import simd

Array = NDArray[Any]
P = c.c_void_p
STRUCT_ROOM = 512
"""Bytes that ggml takes for a tensor's structure and its list entry, with some to spare."""
WORK_ROOM = 16 << 20
MAX_QUERIES = 63
"""From 64 queries on ggml takes another way through attention."""

_expf = c.CDLL(ctypes.util.find_library("m")).expf
_expf.restype, _expf.argtypes = c.c_float, [c.c_float]
_ZERO, _ONE, _LOW = np.float32(0), np.float32(1), np.float32(-np.inf)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _dot(a: int, b: int, n: int, lanes: int) -> float:
    """Product of two rows of n F16 (a multiple of 32): four vectors of eight sums, halved until one is left."""
    s0, s1, s2, s3 = simd.zero_f32x8(), simd.zero_f32x8(), simd.zero_f32x8(), simd.zero_f32x8()
    for i in range(0, 2 * n, 64):
        s0 = simd.fma_f32x8(simd.load_f16x8(a + i), simd.load_f16x8(b + i), s0)
        s1 = simd.fma_f32x8(simd.load_f16x8(a + i + 16), simd.load_f16x8(b + i + 16), s1)
        s2 = simd.fma_f32x8(simd.load_f16x8(a + i + 32), simd.load_f16x8(b + i + 32), s2)
        s3 = simd.fma_f32x8(simd.load_f16x8(a + i + 48), simd.load_f16x8(b + i + 48), s3)
    simd.store_f32x8(lanes, simd.add_f32x8(simd.add_f32x8(s0, s2), simd.add_f32x8(s1, s3)))
    x0 = simd.load_f32(lanes) + simd.load_f32(lanes + 16)
    x1 = simd.load_f32(lanes + 4) + simd.load_f32(lanes + 20)
    x2 = simd.load_f32(lanes + 8) + simd.load_f32(lanes + 24)
    x3 = simd.load_f32(lanes + 12) + simd.load_f32(lanes + 28)
    return (x0 + x1) + (x2 + x3)  # type: ignore[no-any-return]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def one_query(
    q: int, k: int, k_step: int, v: int, v_step: int, mask: int, keys: int, n: int, scale: float, out: int, room: int
) -> None:
    """Attention of one query row; `room` has 8 n bytes."""
    query, values, lanes = room, room + 2 * n, room + 4 * n
    for i in range(0, n, 8):
        simd.store_f16x8(query + 2 * i, simd.load_f32x8(q + 4 * i))
        simd.store_f16x8(values + 2 * i, simd.zero_f32x8())
    total, top = _ZERO, _LOW
    for j in range(keys):
        bias = simd.load_f16(mask + 2 * j)
        if bias == _LOW:
            continue
        score = _dot(k + j * k_step, query, n, lanes) * scale + bias
        before, weight = _ONE, _ONE
        if score > top:
            before = _expf(top - score)
            top = score
            for i in range(0, 2 * n, 16):
                scaled = simd.mul_f32x8(simd.load_f16x8(values + i), simd.splat_f32x8(before))
                simd.store_f16x8(values + i, scaled)
        else:
            weight = _expf(score - top)
        for i in range(0, 2 * n, 16):
            more = simd.load_f16x8(v + j * v_step + i)
            sums = simd.fma_f32x8(more, simd.splat_f32x8(weight), simd.load_f16x8(values + i))
            simd.store_f16x8(values + i, sums)
        total = simd.fma_f32(total, before, weight)
    factor = simd.splat_f32x8(_ZERO if total == _ZERO else _ONE / total)
    for i in range(0, n, 8):
        simd.store_f32x8(out + 4 * i, simd.mul_f32x8(simd.load_f16x8(values + 2 * i), factor))


def libraries() -> tuple[c.CDLL, c.CDLL]:
    """The real ggml's base and CPU libraries, from the package libggml-python."""
    path = library_path()
    assert path is not None, "libggml-python is part of the test extra"
    return c.CDLL(str(path), c.RTLD_GLOBAL), c.CDLL(str(path.with_name("libggml-cpu.so")), c.RTLD_GLOBAL)


class Program:
    """A graph with memory for its nodes. Weights and caches lie in `resident`, by name, and stay there."""

    def __init__(self, libraries: tuple[c.CDLL, c.CDLL], graph: Graph, resident: Mapping[str, Array]) -> None:
        self.base, self.cpu = libraries
        self.cpu.ggml_cpu_init()
        self.base.ggml_init.restype, self.base.ggml_init.argtypes = P, [InitParams]
        self.base.ggml_free.restype, self.base.ggml_free.argtypes = None, [P]
        self.graph = graph
        self.memory: dict[int, Array] = {}
        for t in graph.tensors:
            if t.view_src is None:
                self.memory[t.id] = resident[t.name] if t.name in resident else np.zeros(max(t.nbytes, 8), np.uint8)
        self.contexts: list[int] = []
        self.structs = self._context(2 * len(graph.tensors) * STRUCT_ROOM + (4 << 20), True)
        self.steps = [self._part(part) for part in _parts(graph)]

    def close(self) -> None:
        for context in self.contexts:
            self.base.ggml_free(context)

    def run(self, inputs: Mapping[str, Array], output: str) -> Array:
        """The F32 elements of `output`, flat."""
        for name, value in inputs.items():
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            self.memory[self.graph.by_name[name]][: data.size] = data
        for step in self.steps:
            if isinstance(step, Tensor):
                self._attend(step)
                continue
            work = self._context(WORK_ROOM, False)
            assert self.cpu.ggml_graph_compute_with_ctx(P(work), P(step), c.c_int(1)) == 0
            self.base.ggml_free(self.contexts.pop())
        return self.memory[self.graph.by_name[output]].view(np.float32)

    def _context(self, nbytes: int, no_alloc: bool) -> int:
        self.contexts.append(self.base.ggml_init(InitParams(nbytes, None, no_alloc)))
        return self.contexts[-1]

    def _address(self, t: Tensor) -> int:
        root = t.id if t.view_src is None else t.view_src
        return int(self.memory[root].ctypes.data) + t.view_offs

    def _part(self, nodes: Sequence[int] | Tensor) -> int | Tensor:
        """A graph of ggml's of nodes that follow one another; what comes from before them is a leaf of it."""
        if isinstance(nodes, Tensor):
            return nodes
        made: dict[int, int] = {}
        self.base.ggml_new_graph_custom.restype = P
        part = self.base.ggml_new_graph_custom(P(self.structs), c.c_size_t(2048), c.c_bool(False))
        for ident in nodes:
            t = self.graph.tensors[ident]
            struct = TensorStruct.from_address(self._struct(made, t))
            struct.op = int(t.op)
            for i, word in enumerate(t.params):
                struct.op_params[i] = int(np.float32(word).view(np.int32)) if isinstance(word, float) else int(word)
            for i, source in enumerate(t.src):
                struct.src[i] = None if source == ABSENT else self._struct(made, self.graph.tensors[source])
            self.base.ggml_build_forward_expand(P(part), P(made[ident]))
        return int(part)

    def _struct(self, made: dict[int, int], t: Tensor) -> int:
        """ggml's structure for a tensor, a leaf as yet."""
        if t.id not in made:
            self.base.ggml_new_tensor.restype = P
            extents = (c.c_int64 * 4)(*t.ne)
            made[t.id] = self.base.ggml_new_tensor(P(self.structs), c.c_int(int(t.dtype)), c.c_int(4), extents)
            struct = TensorStruct.from_address(made[t.id])
            struct.nb, struct.data = (c.c_size_t * 4)(*t.nb), self._address(t)
        return made[t.id]

    def _attend(self, node: Tensor) -> None:
        q, k, v, mask = (self.graph.tensors[s] for s in node.src[:4])
        width, n, heads, _ = q.ne
        assert n <= MAX_QUERIES
        assert (k.dtype, v.dtype, mask.dtype) == (DType.F16, DType.F16, DType.F16)
        group = heads // k.ne[2]
        room = np.empty(8 * width + 64, np.uint8)
        scale = np.float32(node.params[0])
        for i in range(n):
            for head in range(heads):
                one_query(
                    self._address(q) + i * q.nb[1] + head * q.nb[2],
                    self._address(k) + head // group * k.nb[2], k.nb[1],
                    self._address(v) + head // group * v.nb[2], v.nb[1],
                    self._address(mask) + i * mask.nb[1], k.ne[1], width, scale,
                    self._address(node) + head * node.nb[1] + i * node.nb[2], room.ctypes.data,
                )  # fmt: skip


def _parts(graph: Graph) -> list[list[int] | Tensor]:
    """The nodes between attentions, and the attentions."""
    parts: list[list[int] | Tensor] = [[]]
    for ident in graph.nodes:
        t = graph.tensors[ident]
        if t.op == Op.FLASH_ATTN_EXT:
            parts += [t, []]
        else:
            last = parts[-1]
            assert isinstance(last, list)
            last.append(ident)
    return parts


def resident_bytes(model: ModelFile, graph: Graph) -> dict[str, Array]:
    """The weights' bytes, mapped from the file, and empty caches."""
    with open(model.path, "rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    found = {w.name: data[w.offset : w.offset + w.nbytes] for w in model.weights.values()}
    caches = [graph.tensors[i] for i in graph.leafs if graph.tensors[i].name.startswith("cache_")]
    return found | {t.name: np.zeros(t.nbytes, np.uint8) for t in caches}
