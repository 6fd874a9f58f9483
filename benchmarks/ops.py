"""Single operations against ggml's CPU library: the best of its native and its repacked kernels is the peer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.measure import Row, call_timer, compare, interleave
from benchmarks.twins import Bytes, Ggml, Ours, check_close, ggml_name, memory_of
from coordinator.graph.build import Builder
from coordinator.graph.node import BufferRef, Graph, Tensor
from coordinator.model.hparams import WeightInfo
from protocol.dtypes import DType
from protocol.ops import GluOp, UnaryOp, Usage

VECTOR_TYPES = (
    DType.F32, DType.F16, DType.BF16, DType.Q8_0, DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.Q4_K,
    DType.Q5_K, DType.Q6_K,
)  # fmt: skip
MATRIX_TYPES = (DType.Q8_0, DType.Q4_0, DType.Q4_K, DType.Q4_1, DType.F16, DType.F32)
_SCALES = {DType.Q6_K: (208,), DType.Q8_0: (0,), DType.Q4_0: (0,), DType.Q5_0: (0,)}
LOOSE, TIGHT = 0.05, 2e-3
"""Tolerances relative to the largest value: 8-bit activations or sums in F16 (ggml's attention), everything else."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation: how to build it, what it counts (`work` in `unit`, 0: milliseconds) and bytes of its leafs."""

    name: str
    graph: Graph
    given: dict[str, Bytes]
    work: float
    unit: str
    tolerance: float = TIGHT


def random_weights(rng: np.random.Generator, dtype: DType, n: int) -> Bytes:
    """Bytes of `n` elements: any bit pattern for quants, small scales; plain types are normal."""
    if not dtype.quantised:
        values = (rng.standard_normal(n, np.float32) * np.float32(0.02)).astype(np.float32)
        if dtype == DType.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype({DType.F32: np.float32, DType.F16: np.float16}[dtype]).view(np.uint8)
    blocks = n // dtype.block
    raw = rng.integers(0, 256, (blocks, dtype.block_nbytes), np.uint8)
    for at in _SCALES.get(dtype, (0, 2)):
        scale = rng.uniform(0.5, 1.5, blocks) * (0.02 / 127 if dtype in (DType.Q8_0, DType.Q6_K) else 0.002)
        raw[:, at : at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    return raw.reshape(-1)


def builder(*weights: tuple[str, DType, tuple[int, ...]]) -> Builder:
    """A builder that knows weights by name, type and extents."""
    infos = {}
    for name, dtype, ne in weights:
        a, b, c, d = (*ne, 1, 1, 1)[:4]
        infos[name] = WeightInfo(name, dtype, (a, b, c, d), 0, dtype.row_nbytes(a * b * c * d))
    return Builder(infos, lambda _: BufferRef("CPU", Usage.WEIGHTS))


def filled(b: Builder, root: Tensor, seed: int = 0) -> tuple[Graph, dict[str, Bytes]]:
    """The graph of `root`, and random bytes for its leafs; integers count up, masks stay zero."""
    b.expand(root)
    graph, rng = b.graph("bench"), np.random.default_rng(seed)
    given = {}
    for ident in graph.leafs:
        t = graph.tensors[ident]
        if t.dtype in (DType.I32, DType.I64):
            given[t.name] = np.arange(t.nelements, dtype=np.int32 if t.dtype == DType.I32 else np.int64).view(np.uint8)
        elif "mask" not in t.name and t.view_src is None:
            scale = np.float32(1.0) if t.dtype == DType.F32 and t.buffer is None else None
            given[t.name] = (
                random_weights(rng, t.dtype, t.nelements)
                if scale is None
                else rng.standard_normal(t.nelements, np.float32).view(np.uint8)
            )
    return graph, given


def matrix_case(dtype: DType, k: int, n: int, m: int) -> Case:
    """A product of weights [k, n] and F32 activations [k, m]; GB/s of weights for m = 1, else GFLOP/s."""
    b = builder(("w", dtype, (k, n)))
    graph, given = filled(b, b.mul_mat(b.weight("w"), b.input("x", DType.F32, k, m)))
    if m == 1:
        return Case(
            f"MUL_MAT {dtype.label} {k} x {n}, 1 column", graph, given, dtype.row_nbytes(k * n) / 1e9, "GB/s", LOOSE
        )
    return Case(f"MUL_MAT {dtype.label} {k} x {n}, {m} columns", graph, given, 2e-9 * k * n * m, "GFLOP/s", LOOSE)


def attention_case(
    label: str, d: int, heads: int, kv_heads: int, rows: int, keys: int, dtype: DType, causal: bool = False
) -> Case:
    """FLASH_ATTN_EXT over permuted views, as the models' graphs have them."""
    b = builder()
    q = b.permute(b.input("q", DType.F32, d, heads, rows), 0, 2, 1, 3)
    k, v = (b.permute(b.input(name, dtype, d, kv_heads, keys), 0, 2, 1, 3) for name in ("k", "v"))
    mask = b.input("mask", DType.F16, keys, rows)
    graph, given = filled(b, b.flash_attn_ext(q, k, v, mask, 1 / math.sqrt(d)))
    seen = keys * rows
    if causal:
        allowed = np.arange(keys)[None, :] <= np.arange(rows)[:, None] + keys - rows
        given["mask"] = np.where(allowed, np.float16(0), np.float16(-np.inf)).reshape(-1).view(np.uint8)
        seen = int(allowed.sum())
    shape = f"{heads}/{kv_heads} heads of {d}, {rows} x {keys} {dtype.label}"
    return Case(f"FLASH_ATTN_EXT {label}, {shape}", graph, given, 4e-9 * d * heads * seen, "GFLOP/s", LOOSE)


def simple_cases() -> Iterator[Case]:
    """Everything that is neither a product nor attention; milliseconds."""

    def case(name: str, make: Callable[[Builder], Tensor], *weights: tuple[str, DType, tuple[int, ...]]) -> Case:
        b = builder(*weights)
        graph, given = filled(b, make(b))
        return Case(name, graph, given, 0.0, "ms")

    def x(b: Builder, *ne: int, name: str = "x") -> Tensor:
        return b.input(name, DType.F32, *ne)

    rope = (0, 128, 0, 0, 8192, 500000.0, 1.0, 0.0, 1.0, 32.0, 1.0)
    yield case("RMS_NORM 4096 x 512", lambda b: b.rms_norm(x(b, 4096, 512), 1e-5))
    yield case("RMS_NORM 2048 x 1", lambda b: b.rms_norm(x(b, 2048), 1e-5))
    yield case("NORM 1280 x 1608", lambda b: b.norm(x(b, 1280, 1608), 1e-5))
    yield case("ROPE 128 x 32 x 128", lambda b: b.rope(x(b, 128, 32, 128), b.input("pos", DType.I32, 128), None, rope))
    yield case(
        "SOFT_MAX 1024 x 512, mask",
        lambda b: b.soft_max(x(b, 1024, 512), b.input("mask", DType.F16, 1024, 512), 0.1),
    )
    yield case("SWIGLU 8192 x 128", lambda b: b.glu(x(b, 8192, 128, name="g"), x(b, 8192, 128), GluOp.SWIGLU))
    yield case("SILU 8192 x 128", lambda b: b.unary(x(b, 8192, 128), UnaryOp.SILU))
    yield case("GELU (erf) 5120 x 402", lambda b: b.unary(x(b, 5120, 402), UnaryOp.GELU_ERF))
    yield case("GELU (tanh) 5120 x 402", lambda b: b.unary(x(b, 5120, 402), UnaryOp.GELU))
    yield case("ADD 4096 x 512", lambda b: b.add(x(b, 4096, 512), x(b, 4096, 512, name="y")))
    yield case("MUL 4096 x 512 by row", lambda b: b.mul(x(b, 4096, 512), x(b, 4096, name="y")))
    yield case("CPY f32 to f16 4096 x 512", lambda b: b.cast(x(b, 4096, 512), DType.F16))
    yield case("CONT of a transposed 1024 x 1024", lambda b: b.cont(b.transpose(x(b, 1024, 1024))))
    for dtype in (DType.Q8_0, DType.Q4_K):
        yield case(
            f"GET_ROWS {dtype.label} 4096 x 512",
            lambda b: b.get_rows(b.weight("w"), b.input("ids", DType.I32, 512)),
            ("w", dtype, (4096, 1024)),
        )
    yield case(
        "SET_ROWS f32 to f16 1024 x 512",
        lambda b: b.set_rows(b.input("cache", DType.F16, 1024, 4096), x(b, 1024, 512), b.input("ids", DType.I64, 512)),
    )
    yield case(
        "IM2COL 14 x 14 of 560 x 560",
        lambda b: b.im2col(b.weight("w"), x(b, 560, 560, 3), 14, DType.F32),
        ("w", DType.F16, (14, 14, 3, 1280)),
    )


def cases(quick: bool) -> Iterator[Case]:
    """All of them, made one at a time: some are large."""
    n, columns = (2048, (128,)) if quick else (8192, (32, 128, 512))
    for dtype in VECTOR_TYPES:
        yield matrix_case(dtype, 4096, n, 1)
    for m in columns:
        for dtype in MATRIX_TYPES:
            yield matrix_case(dtype, 2048, 2048, m)
    yield attention_case("decode", 128, 32, 8, 1, 1024, DType.F16)
    yield attention_case("decode", 64, 9, 3, 1, 256, DType.F16)
    yield attention_case("causal", 128, 32, 8, 128 if quick else 512, 512, DType.F16, causal=True)
    yield attention_case("causal", 64, 9, 3, 512, 512, DType.F16, causal=True)
    yield attention_case("bidirectional", 80, 16, 16, 402 if quick else 1608, 402 if quick else 1608, DType.F32)
    yield attention_case("cross", 128, 32, 8, 16, 1601, DType.F32)
    yield from simple_cases()


def measure(case: Case, threads: int, folder: str, rounds: int, budget_s: float = 20.0) -> Row:
    """Ours, ggml's native kernels and its repacked ones where there are any, in turn. They must agree first."""
    memory = memory_of(case.graph, case.given)
    ours = Ours(case.graph, memory, threads)
    theirs = {"native": Ggml(case.graph, memory, threads, folder=folder)}
    repacked = Ggml(case.graph, memory, threads, folder=folder, repack=True)
    if repacked.buffers:
        theirs["repacked"] = repacked
    else:
        repacked.close()
    try:
        check_close(case.graph, memory, ours, theirs, case.tolerance)
        rivals = {name: call_timer(rival.run, threads) for name, rival in ({"ours": ours} | theirs).items()}
        samples = interleave(rivals, rounds, budget_s)
    finally:
        ours.close()
        for peer in theirs.values():
            peer.close()
    name = f"{case.name}, {threads} thread" + ("s" if threads > 1 else "")
    figure = (lambda s: case.work / s) if case.work else (lambda s: s * 1e3)
    return compare("ops", name, samples, case.unit, figure, ggml_name(folder))


def rows(quick: bool, threads: tuple[int, ...], folder: str, match: str = "") -> Iterator[Row]:
    """All operations whose name contains `match`."""
    for case in cases(quick):
        if match.lower() in case.name.lower():
            for count in threads:
                yield measure(case, count, folder, 9 if quick else 21)
