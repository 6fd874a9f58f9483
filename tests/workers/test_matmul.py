"""Matrix products: against exact numbers, and the same bits for any threads, columns and CPU features."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import libggml
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.dtypes import DType
from workers.kernels import matmul, row
from workers.kernels.stage import Operand, Stage

CALL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
QUANTISED = [DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.Q8_0, DType.Q4_K, DType.Q5_K, DType.Q6_K]
FLOATS = [DType.F32, DType.F16, DType.BF16]
ERROR = {8: 1.2e-2, 4: 2e-6}
"""Relative to the product of norms: 8-bit activations, and sums of F32."""


@dataclass
class Tensor:
    """Bytes of a tensor, its layout, and its exact values in numpy's order of axes."""

    data: np.ndarray
    operand: Operand
    exact: np.ndarray
    offset: int = 0

    @property
    def address(self) -> int:
        return self.data.ctypes.data + self.offset


def contiguous(dtype: DType, ne: tuple[int, ...]) -> tuple[int, ...]:
    nb = [dtype.block_nbytes, dtype.row_nbytes(ne[0])]
    return (*nb, nb[1] * ne[1], nb[1] * ne[1] * ne[2])


def weights(rng: np.random.Generator, dtype: DType, ne: tuple[int, ...], offset: int = 2) -> Tensor:
    """Random weights, at an odd place for a vector; every bit pattern of quants and small scales occurs."""
    shape = ne[::-1]
    if dtype.quantised:
        blocks = int(np.prod(shape)) // dtype.block
        raw = rng.integers(0, 256, (blocks, dtype.block_nbytes), dtype=np.uint8)
        for at in {DType.Q6_K: [208]}.get(
            dtype, [0, 2] if dtype in (DType.Q4_1, DType.Q5_1, DType.Q4_K, DType.Q5_K) else [0]
        ):
            scale = (rng.standard_normal(blocks) * 0.01).astype(np.float16)
            raw[:, at : at + 2] = scale[:, None].view(np.uint8)
        kind = gguf.GGMLQuantizationType(int(dtype))
        exact = gguf.quants.dequantize(raw, kind).astype(np.float64).reshape(shape)
    else:
        values = rng.standard_normal(shape).astype(np.float32)
        raw, exact = encode(dtype, values)
    data = np.zeros(raw.nbytes + 64, np.uint8)
    data[offset : offset + raw.nbytes] = raw.reshape(-1).view(np.uint8)
    return Tensor(data, Operand(dtype, ne, contiguous(dtype, ne)), exact, offset)


def encode(dtype: DType, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if dtype == DType.BF16:
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
        return raw, (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    raw = values.astype({DType.F32: np.float32, DType.F16: np.float16}[dtype])
    return raw, raw.astype(np.float64)


def strided(t: Tensor, axes: tuple[int, int, int]) -> Tensor:
    """The same extents and values (plain types), dims 1 to 3 laid out in another order."""
    order = (0, *(1 + a for a in axes))
    ne = t.operand.ne
    packed = np.ascontiguousarray(np.transpose(t.exact, [3 - a for a in reversed(order)]))
    raw, _ = encode(t.operand.dtype, packed.astype(np.float32))
    step, nb = t.operand.dtype.block_nbytes * ne[0], [t.operand.dtype.block_nbytes, 0, 0, 0]
    for axis in order[1:]:
        nb[axis] = step
        step *= ne[axis]
    return Tensor(raw.reshape(-1).view(np.uint8).copy(), Operand(t.operand.dtype, ne, tuple(nb)), t.exact)


def run(w: Tensor, y: Tensor, threads: int = 1) -> np.ndarray:
    """The product by the kernels, called for each thread in turn, stage by stage."""
    (_, n, _, _), (_, m, y2, y3) = w.operand.ne, y.operand.ne
    ne = (n, m, y2, y3)
    dst = Operand(DType.F32, ne, contiguous(DType.F32, ne))
    out = np.full((y3 * y2 * m * n + 16,), np.nan, np.float32)
    stages = matmul.stages(dst, (w.operand, y.operand), (), threads)
    assert stages is not None
    execute(stages, (out.ctypes.data, dst), ((w.address, w.operand), (y.address, y.operand)), threads)
    assert np.isnan(out[-16:]).all(), "wrote beyond the end"
    return out[:-16].reshape(ne[::-1])


def execute(
    stages: tuple[Stage, ...], dst: tuple[int, Operand], src: tuple[tuple[int, Operand], ...], threads: int
) -> np.ndarray:
    """Runs the stages; returns what scratch memory holds in the end."""
    work = np.full(max(s.work_nbytes for s in stages) + 128, 0xAB, np.uint8)
    at = -(-work.ctypes.data // 64) * 64
    end = at - work.ctypes.data + max(s.work_nbytes for s in stages)
    for stage in stages:
        words = np.zeros(row.WORDS, np.int64)
        words[[row.KERNEL, row.WORK, row.WORK_NBYTES]] = stage.kernel.address(), at, stage.work_nbytes
        words[row.AUX : row.AUX + len(stage.aux)] = stage.aux
        for base, (address, operand) in zip((row.DST, *row.SRC), (dst, *src), strict=False):
            words[base : base + row.OPERAND] = (address, operand.dtype, *operand.ne, *operand.nb)
        for ith in range(threads):
            CALL(stage.kernel.address())(words.ctypes.data, ith, threads)
    assert (work[end:] == 0xAB).all(), "wrote beyond the scratch memory"
    return work[end - max(s.work_nbytes for s in stages) : end]


def exact_product(w: Tensor, y: Tensor) -> np.ndarray:
    a, c = w.exact, y.exact
    a = np.repeat(np.repeat(a, c.shape[0] // a.shape[0], 0), c.shape[1] // a.shape[1], 1)
    return c @ np.swapaxes(a, 2, 3)


def check(w: Tensor, y: Tensor, got: np.ndarray) -> None:
    a = np.repeat(np.repeat(w.exact, y.exact.shape[0] // w.exact.shape[0], 0), y.exact.shape[1] // w.exact.shape[1], 1)
    norms = np.linalg.norm(y.exact, axis=3)[..., None] * np.linalg.norm(a, axis=3)[..., None, :]
    error = np.abs(got - exact_product(w, y)) / (norms + 1e-30)
    assert error.max() < ERROR[8 if w.operand.dtype.quantised else 4], (w.operand, y.operand, error.max())


@pytest.mark.parametrize("dtype", QUANTISED + FLOATS, ids=lambda d: d.label)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 33])
def test_close_to_exact_numbers(dtype: DType, m: int) -> None:
    rng = np.random.default_rng(m)
    k = 512 if dtype.quantised else 515
    w, y = weights(rng, dtype, (k, 37, 1, 1)), weights(rng, DType.F32, (k, m, 1, 1), 4)
    check(w, y, run(w, y))


@pytest.mark.parametrize("dtype", QUANTISED + FLOATS, ids=lambda d: d.label)
def test_bits_depend_on_neither_threads_nor_columns_nor_rows(dtype: DType) -> None:
    rng = np.random.default_rng(1)
    k = 768 if dtype.quantised else 77
    w, y = weights(rng, dtype, (k, 43, 1, 1)), weights(rng, DType.F32, (k, 11, 1, 1))
    whole = run(w, y)
    for threads in (2, 3, 4, 9):
        np.testing.assert_array_equal(run(w, y, threads), whole)
    for m in (1, 2, 3, 6, 9):
        part = Tensor(y.data, Operand(DType.F32, (k, m, 1, 1), y.operand.nb), y.exact[:, :, :m], y.offset)
        np.testing.assert_array_equal(run(w, part), whole[:, :, :m])
    for n in (1, 5, 8, 9):
        top = Tensor(w.data, Operand(dtype, (k, n, 1, 1), w.operand.nb), w.exact[:, :, :n], w.offset)
        np.testing.assert_array_equal(run(top, y), whole[..., :n])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(QUANTISED + FLOATS))
    k = dtype.block * draw(st.integers(1, 4)) if dtype.quantised else draw(st.integers(1, 70))
    n, m = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    w2, w3, r2, r3 = (draw(st.integers(1, 3)) for _ in range(4))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    w = weights(rng, dtype, (k, n, w2, w3), draw(st.integers(0, 9)))
    kind = DType.F16 if dtype == DType.F16 and draw(st.booleans()) else DType.F32
    y = weights(rng, kind, (k, m, w2 * r2, w3 * r3), 4)
    axes = draw(st.permutations([0, 1, 2]))
    y = strided(y, tuple(axes))
    if not dtype.quantised:
        w = strided(w, tuple(draw(st.permutations([0, 1, 2]))))
    got = run(w, y, draw(st.integers(1, 4)))
    check(w, y, got)
    np.testing.assert_array_equal(got, run(w, y, 1))


def test_infinite_and_undefined_activations_show() -> None:
    rng = np.random.default_rng(2)
    for dtype in QUANTISED + FLOATS:
        w, y = weights(rng, dtype, (512, 8, 1, 1)), weights(rng, DType.F32, (512, 3, 1, 1), 0)
        values = y.data[: y.exact.size * 4].view(np.float32).reshape(3, 512)
        values[0, 7], values[1, 300] = np.inf, np.nan
        got = run(w, y)[0, 0]
        assert not np.isfinite(got[:2]).any(), dtype
        assert np.isfinite(got[2]).all(), dtype


@pytest.mark.parametrize(("plus", "minus"), [(3, 40), (40, 3), (8, 0), (0, 8), (255, 254), (17, 9), (9, 1), (6, 7)])
def test_first_of_the_largest_activations_decides_the_sign(plus: int, minus: int) -> None:
    """As in ggml: the scale of 256 activations is their largest over -127, and of two with one magnitude the first."""
    rng = np.random.default_rng(6)
    w, y = weights(rng, DType.Q4_K, (256, 8, 1, 1)), weights(rng, DType.F32, (256, 1, 1, 1), 0)
    values = y.data[:1024].view(np.float32)
    values[:] = np.clip(values, -3, 3)
    values[plus], values[minus] = 8, -8
    dst = Operand(DType.F32, (8, 1, 1, 1), contiguous(DType.F32, (8, 1, 1, 1)))
    out = np.zeros(8, np.float32)
    stages = matmul.stages(dst, (w.operand, y.operand), (), 1)
    assert stages is not None
    work = execute(stages[:1], (out.ctypes.data, dst), ((w.address, w.operand), (y.address, y.operand)), 1)
    first = values[min(plus, minus)]
    assert work[256:260].view(np.float32)[0] == np.float32(1) / (np.float32(-127) / first)
    assert work[min(plus, minus)].view(np.int8) == -127
    assert work[max(plus, minus)].view(np.int8) == 127


def test_zeros_and_tiny_activations() -> None:
    rng = np.random.default_rng(3)
    for dtype in QUANTISED:
        w, y = weights(rng, dtype, (256, 9, 1, 1)), weights(rng, DType.F32, (256, 2, 1, 1), 0)
        values = y.data[: y.exact.size * 4].view(np.float32).reshape(2, 256)
        values[0], values[1] = 0, 1e-41
        assert (run(w, y)[0, 0, 0] == 0).all()
        assert np.isfinite(run(w, y)).all()


@pytest.mark.parametrize(
    ("dst", "src0", "src1"),
    [
        (
            Operand(DType.F32, (4, 2, 1, 1), (4, 16, 32, 32)),
            Operand(DType.Q2_K, (256, 4, 1, 1), (84, 84, 336, 336)),
            256,
        ),
        (Operand(DType.F16, (4, 2, 1, 1), (2, 8, 16, 16)), Operand(DType.F32, (8, 4, 1, 1), (4, 32, 128, 128)), 8),
        (Operand(DType.F32, (4, 2, 1, 1), (4, 16, 32, 32)), Operand(DType.F32, (8, 4, 1, 1), (16, 4, 128, 128)), 8),
        (Operand(DType.F32, (5, 2, 1, 1), (4, 20, 40, 40)), Operand(DType.F32, (8, 4, 1, 1), (4, 32, 128, 128)), 8),
        (Operand(DType.F32, (4, 2, 3, 1), (4, 16, 32, 96)), Operand(DType.F32, (8, 4, 2, 1), (4, 32, 128, 256)), 8),
    ],
)
def test_what_is_not_supported(dst: Operand, src0: Operand, src1: int) -> None:
    ne = (src1, dst.ne[1], dst.ne[2], dst.ne[3])
    assert matmul.stages(dst, (src0, Operand(DType.F32, ne, contiguous(DType.F32, ne))), (), 1) is None


def digest() -> str:
    """Over the products of every type, few and many columns."""
    rng, digest = np.random.default_rng(4), hashlib.sha256()
    for dtype in QUANTISED + FLOATS:
        k = 512 if dtype.quantised else 83
        w, y = weights(rng, dtype, (k, 21, 1, 1)), weights(rng, DType.F32, (k, 19, 1, 1))
        digest.update(run(w, y).tobytes())
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("without", ["avx512", "vnni", "f16c", "avx2", "avx2,fma,f16c"])
def test_same_bits_without_cpu_features(without: str) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_CPU")}
    environ["CROSSDOCK_DISABLE"] = without
    code = "from tests.workers.test_matmul import digest; print(digest())"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest()


class Traits(ctypes.Structure):
    """ggml's `struct ggml_type_traits_cpu`."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("vec_dot", ctypes.CFUNCTYPE(None, ctypes.c_int, *[ctypes.c_void_p, ctypes.c_size_t] * 3, ctypes.c_int)),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """The real CPU backend."""
    folder = Path(libggml.__file__).parent / "lib64"
    ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    library.ggml_cpu_init()
    library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(Traits)
    return library


@pytest.mark.parametrize("dtype", [*QUANTISED, DType.F32], ids=lambda d: d.label)
def test_same_as_ggml_but_for_the_order_of_sums(ggml: ctypes.CDLL, dtype: DType) -> None:
    rng = np.random.default_rng(5)
    w, y = weights(rng, dtype, (1024, 16, 1, 1)), weights(rng, DType.F32, (1024, 1, 1, 1), 0)
    traits = ggml.ggml_get_type_traits_cpu(int(dtype)).contents
    column = np.zeros(8192, np.uint8)
    column[:4096] = y.data[:4096]
    if dtype.quantised:
        ggml.ggml_get_type_traits_cpu(traits.vec_dot_type).contents.from_float(y.address, column.ctypes.data, 1024)
    theirs = np.zeros(16, np.float32)
    for i in range(16):
        at = w.address + i * w.operand.nb[1]
        traits.vec_dot(1024, theirs.ctypes.data + 4 * i, 0, at, 0, column.ctypes.data, 0, 1)
    ours = run(w, y)[0, 0, 0]
    norms = np.linalg.norm(y.exact) * np.linalg.norm(w.exact, axis=3)[0, 0]
    assert (np.abs(ours - theirs) / norms).max() < 1e-6
