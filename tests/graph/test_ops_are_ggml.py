"""Every operation of the builder has ggml's shape, strides, name and parameters, and the reference its values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from twin import Twin, leafs, libraries

from protocol.dtypes import DType
from protocol.ops import GluOp, UnaryOp

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
HALF: dict[str, Any] = {"atol": 2e-3, "rtol": 2e-3}
"""ggml multiplies F16 matrices in F16 and looks GELU up in an F16 table."""


@pytest.fixture
def twin() -> Iterator[Twin]:
    found = libraries()
    assert found is not None, "libggml-python is part of the test extra"
    twin = Twin(*found)
    yield twin
    twin.close()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("b", [(6, 5, 4), (6,), (1,), (1, 5), (3, 5, 2), (6, 1, 4)])
def test_binary(twin: Twin, rng: np.random.Generator, op: str, b: tuple[int, ...]) -> None:
    t = leafs(twin, rng, x=(6, 5, 4), y=b)
    twin.check(twin.op(op, t["x"], t["y"]), **CLOSE)


@pytest.mark.parametrize("op", ["add", "mul"])
def test_binary_in_place(twin: Twin, rng: np.random.Generator, op: str) -> None:
    t = leafs(twin, rng, x=(6, 5), y=(6,))
    twin.check(twin.op(op, twin.op("scale", t["x"], 2.0), t["y"], inplace=True), **CLOSE)


def test_views(twin: Twin, rng: np.random.Generator) -> None:
    x = leafs(twin, rng, x=(8, 6, 4))["x"]
    part = twin.op("view", x, (4, 3, 2), (32, 192), 16)
    inner = twin.op("view", part, (4,), (), 32)
    turned = twin.op("permute", part, 2, 0, 1, 3)
    twin.check(twin.op("cont", turned), twin.op("cont", twin.op("transpose", turned)), twin.op("cont", inner))


def test_reshapes(twin: Twin, rng: np.random.Generator) -> None:
    x = leafs(twin, rng, x=(8, 6, 4))["x"]
    flat = twin.op("reshape", twin.op("reshape", x, 12, 16), 2, 6, 4, 4)
    twin.check(twin.op("cont", twin.op("permute", flat, 1, 0, 3, 2), 12, 16), twin.op("reshape", x, 192))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows(twin: Twin, rng: np.random.Generator, dtype: type) -> None:
    table = twin.leaf("table", rng.standard_normal((7, 8)).astype(dtype))
    ids = twin.leaf("ids", np.array([3, 0, 6, 3], np.int32))
    twin.check(twin.op("get_rows", table, ids))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_set_rows(twin: Twin, rng: np.random.Generator, dtype: type) -> None:
    cache = twin.leaf("cache", rng.standard_normal((7, 8)).astype(dtype))
    rows = leafs(twin, rng, rows=(8, 3))["rows"]
    twin.check(twin.op("set_rows", cache, rows, twin.leaf("ids", np.array([5, 1, 2], np.int64))))


def test_copies(twin: Twin, rng: np.random.Generator) -> None:
    x = leafs(twin, rng, x=(4, 6))["x"]
    cache = twin.leaf("cache", np.zeros(40, np.float16))
    there = twin.op("view", cache, (6, 4), (12,), 16)
    twin.check(twin.op("cpy", twin.op("transpose", x), there), twin.op("view", cache, (40,)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_concat(twin: Twin, rng: np.random.Generator, axis: int) -> None:
    shape = [2, 3, 4]
    shape[axis] = 5
    t = leafs(twin, rng, x=(2, 3, 4), y=tuple(shape))
    twin.check(twin.op("concat", t["x"], t["y"], axis))


def test_concat_to_nothing(twin: Twin, rng: np.random.Generator) -> None:
    t = leafs(twin, rng, none=(0, 3, 4), y=(1, 3, 4))
    twin.check(twin.op("concat", t["none"], t["y"], 0))


def test_pad_and_repeat(twin: Twin, rng: np.random.Generator) -> None:
    x = leafs(twin, rng, x=(2, 3, 4))["x"]
    twin.check(twin.op("pad", x, 0, 5), twin.op("repeat", x, 4, 3, 8))


@pytest.mark.parametrize("inplace", [False, True])
def test_acc(twin: Twin, rng: np.random.Generator, inplace: bool) -> None:
    t = leafs(twin, rng, x=(4, 5, 3), y=(4, 2, 3))
    x = twin.op("scale", t["x"], 1.0)
    twin.check(twin.op("acc", x, t["y"], x.nb[1:], 2 * x.nb[1], inplace=inplace))


@pytest.mark.parametrize("op", ["norm", "rms_norm"])
def test_norms(twin: Twin, rng: np.random.Generator, op: str) -> None:
    twin.check(twin.op(op, leafs(twin, rng, x=(33, 5, 2))["x"], 1e-5), **CLOSE)


def test_scale(twin: Twin, rng: np.random.Generator) -> None:
    x = leafs(twin, rng, x=(9, 5))["x"]
    twin.check(twin.op("scale", x, -1.0, 1.0), twin.op("scale", twin.op("cont", x), 3.0, inplace=True), **CLOSE)


@pytest.mark.parametrize("op", [op for op in UnaryOp if op not in (UnaryOp.ROUND, UnaryOp.XIELU)])
def test_unary(twin: Twin, rng: np.random.Generator, op: UnaryOp) -> None:
    x = leafs(twin, rng, x=(64, 5))["x"]
    tolerance = HALF if op in (UnaryOp.GELU, UnaryOp.GELU_QUICK) else CLOSE
    twin.check(twin.op("unary", x, op), twin.op("unary", twin.op("cont", x), op, inplace=True), **tolerance)


@pytest.mark.parametrize("op", [op for op in GluOp if op != GluOp.SWIGLU_OAI])
def test_glu(twin: Twin, rng: np.random.Generator, op: GluOp) -> None:
    t = leafs(twin, rng, gate=(64, 5), up=(64, 5))
    twin.check(twin.op("glu", t["gate"], t["up"], op), **HALF)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mul_mat(twin: Twin, rng: np.random.Generator, dtype: type) -> None:
    a = twin.leaf("a", rng.standard_normal((2, 5, 32)).astype(dtype))
    b = leafs(twin, rng, b=(32, 7, 4, 3))["b"]
    twin.check(twin.op("mul_mat", a, b), **(CLOSE if dtype == np.float32 else {"atol": 2e-2, "rtol": 2e-3}))


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("factors", [False, True])
def test_rope(twin: Twin, rng: np.random.Generator, mode: int, factors: bool) -> None:
    x = leafs(twin, rng, x=(16, 3, 5))["x"]
    positions = twin.leaf("positions", np.array([0, 1, 2, 40, 7], np.int32))
    by = twin.leaf("factors", np.linspace(1, 8, 6).astype(np.float32)) if factors else None
    params = (0, 12, mode, 0, 64, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0)
    twin.check(twin.op("rope", x, positions, by, params), **CLOSE)


def some_mask(rng: np.random.Generator, shape: tuple[int, int], dtype: type) -> np.ndarray[Any, Any]:
    mask = np.where(rng.random(shape) < 0.4, -np.inf, 0.0)
    mask[:, 2] = 0.0
    return mask.astype(dtype)


@pytest.mark.parametrize("masked", [False, True])
def test_soft_max(twin: Twin, rng: np.random.Generator, masked: bool) -> None:
    x = leafs(twin, rng, x=(9, 5, 4))["x"]
    mask = twin.leaf("mask", some_mask(rng, (32, 9), np.float32)) if masked else None
    outputs = [twin.op("soft_max", x, mask, 0.3)]
    if not masked:
        outputs.append(twin.op("soft_max", twin.op("cont", x), None, inplace=True))
    twin.check(*outputs, **CLOSE)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_flash_attention(twin: Twin, rng: np.random.Generator, dtype: type) -> None:
    q = twin.op("permute", leafs(twin, rng, q=(16, 4, 5))["q"], 0, 2, 1, 3)
    k, v = (twin.leaf(name, rng.standard_normal((9, 2, 16)).astype(dtype)) for name in "kv")
    k, v = (twin.op("permute", t, 0, 2, 1, 3) for t in (k, v))
    mask = twin.leaf("mask", some_mask(rng, (5, 9), np.float16))
    twin.check(twin.op("flash_attn_ext", q, k, v, mask, 0.25), **HALF)


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16])
def test_im2col(twin: Twin, rng: np.random.Generator, dtype: DType) -> None:
    kernel = twin.leaf("kernel", rng.standard_normal((2, 3, 4, 4)).astype(np.float16))
    image = leafs(twin, rng, image=(12, 8, 3, 2))["image"]
    twin.check(twin.op("im2col", kernel, image, 4, dtype))
