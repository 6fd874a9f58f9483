"""Vectors in numba: conversions to the bit, tails, NaN, and the same bits on CPUs that lack features."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit

from workers.kernels import features, simd
from workers.kernels.stage import OPTIONS


@njit(**OPTIONS)
def widen_halves(source: int, to: int, n: int) -> None:
    for i in range(0, n, 8):
        simd.store_f32x8(to + 4 * i, simd.load_f16x8(source + 2 * i))


@njit(**OPTIONS)
def widen_half_each(source: int, to: int, n: int) -> None:
    for i in range(n):
        simd.store_f32(to + 4 * i, simd.load_f16(source + 2 * i))


@njit(**OPTIONS)
def narrow_halves(source: int, to: int, n: int) -> None:
    for i in range(0, n, 8):
        simd.store_f16x8(to + 2 * i, simd.load_f32x8(source + 4 * i))


@njit(**OPTIONS)
def narrow_half_each(source: int, to: int, n: int) -> None:
    for i in range(n):
        simd.store_f16(to + 2 * i, simd.load_f32(source + 4 * i))


@njit(**OPTIONS)
def narrow_bfloats(source: int, to: int, n: int) -> None:
    for i in range(0, n, 8):
        simd.store_bf16x8(to + 2 * i, simd.load_f32x8(source + 4 * i))


@njit(**OPTIONS)
def widen_bfloats(source: int, to: int, n: int) -> None:
    for i in range(0, n, 8):
        simd.store_f32x8(to + 4 * i, simd.load_bf16x8(source + 2 * i))


@njit(**OPTIONS)
def to_integers(source: int, to: int, n: int) -> None:
    for i in range(0, n, 8):
        simd.store_i32x8(to + 4 * i, simd.to_i32x8(simd.load_f32x8(source + 4 * i)))


@njit(**OPTIONS)
def copy_part(source: int, to: int, n: int) -> None:
    simd.store_f32x8_part(to, simd.load_f32x8_part(source, n), n)


@njit(**OPTIONS)
def pad_part(source: int, to: int, n: int) -> None:
    simd.store_f32x8(to, simd.load_f16x8_part(source, n))


@njit(**OPTIONS)
def byte_products(source: int, to: int, n: int) -> None:
    """Of 32 bytes each at `source` and 32 behind them: sums of pairs, then of pairs of these."""
    for i in range(n):
        x, y = simd.load_i8x32(source + 64 * i), simd.load_i8x32(source + 64 * i + 32)
        shorts = simd.multiply_i8x32(x, y)
        simd.store_i16x16(to + 64 * i, shorts)
        simd.store_i32x8(to + 64 * i + 32, simd.multiply_i16x16(shorts, shorts))


@njit(**OPTIONS)
def arithmetic(source: int, to: int, n: int) -> None:
    for i in range(0, n, 8):
        v, w = simd.load_f32x8(source + 4 * i), simd.load_f32x8(source + 4 * (n - 8 - i))
        v = simd.fma_f32x8(v, w, simd.splat_f32x8(simd.sum_f32x8(w)))
        v = simd.max_f32x8(simd.floor_f32x8(v), simd.mul_f32x8(v, w))
        v = simd.select_f32x8(simd.less_f32x8(v, w), simd.sqrt_f32x8(simd.abs_f32x8(v)), simd.div_f32x8(v, w))
        simd.store_f32x8(to + 4 * i, simd.fma_f32x8(v, v, simd.splat_f32x8(simd.max_of_f32x8(v))))
        simd.store_f32(
            to + 4 * i, simd.fma_f32(simd.load_f32(to + 4 * i), simd.load_f32(source + 4 * i), np.float32(1))
        )


def samples() -> np.ndarray:
    """F32 of all kinds: any bits, usual sizes, halves' range and its borders."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 1 << 16, dtype=np.uint32).view(np.float32)
    usual = (rng.standard_normal(1 << 16) * 10.0 ** rng.integers(-9, 6, 1 << 16)).astype(np.float32)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    near = [np.nextafter(between, np.float32(np.inf)), np.nextafter(between, np.float32(0))]
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65519.99, 65520, -65520, 65536, 1e-45], np.float32)
    values = np.concatenate([bits, usual, halves, -between, *near, special])
    return np.resize(values, len(values) + -len(values) % 8)


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bits; NaN is any NaN."""
    nan = np.isnan(a)
    np.testing.assert_array_equal(nan, np.isnan(b))
    kind = np.dtype(f"u{a.itemsize}")
    np.testing.assert_array_equal(a[~nan].view(kind), b[~nan].view(kind))


@pytest.mark.parametrize("convert", [widen_halves, widen_half_each])
def test_every_half_widens_exactly(convert) -> None:
    halves, got = np.arange(65536, dtype=np.uint16), np.empty(65536, np.float32)
    convert(halves.ctypes.data, got.ctypes.data, 65536)
    same(got, halves.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("convert", [narrow_halves, narrow_half_each])
def test_narrowing_to_half_rounds_to_even(convert) -> None:
    values = samples()
    got = np.empty(values.size, np.float16)
    convert(values.ctypes.data, got.ctypes.data, values.size)
    with np.errstate(all="ignore"):
        same(got, values.astype(np.float16))


def test_bfloats() -> None:
    values = samples()
    got, back = np.empty(values.size, np.uint16), np.empty(values.size, np.float32)
    narrow_bfloats(values.ctypes.data, got.ctypes.data, values.size)
    widen_bfloats(got.ctypes.data, back.ctypes.data, values.size)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    rounded[np.isnan(values)] = np.nan
    same(back, rounded)


def test_rounding_to_integers_saturates() -> None:
    values = np.array([0.5, 1.5, -2.5, 3e9, -3e9, np.nan, np.inf, -0.49999], np.float32)
    got = np.empty(8, np.int32)
    to_integers(values.ctypes.data, got.ctypes.data, 8)
    assert got.tolist() == [0, 2, -2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 0]


@pytest.mark.parametrize("n", range(1, 8))
def test_parts_touch_nothing_else(n: int) -> None:
    source, to = np.arange(1, 9, dtype=np.float32), np.full(8, 99, np.float32)
    copy_part(source.ctypes.data, to.ctypes.data, n)
    assert to.tolist() == [*range(1, n + 1), *[99] * (8 - n)]
    pad_part(source.astype(np.float16).ctypes.data, to.ctypes.data, n)
    assert to.tolist() == [*range(1, n + 1), *[0] * (8 - n)]


def test_byte_products_saturate() -> None:
    values = np.random.default_rng(1).integers(0, 256, (100, 64), dtype=np.uint8)
    values[0], values[1, :32], values[1, 32:] = 255, 255, 127
    got = np.empty((100, 64), np.uint8)
    byte_products(values.ctypes.data, got.ctypes.data, 100)
    pairs = values[:, :32].astype(int) * values[:, 32:].view(np.int8).astype(int)
    shorts = np.clip(pairs[:, ::2] + pairs[:, 1::2], -32768, 32767)
    np.testing.assert_array_equal(got[:, :32].view(np.int16), shorts)
    np.testing.assert_array_equal(got[:, 32:].view(np.int32), shorts[:, ::2] ** 2 + shorts[:, 1::2] ** 2)


def digest() -> str:
    values, results = samples(), hashlib.sha256()
    for convert in (
        narrow_halves,
        narrow_half_each,
        narrow_bfloats,
        widen_halves,
        widen_half_each,
        to_integers,
        arithmetic,
    ):
        to = np.zeros(values.size, np.float32)
        convert(values.ctypes.data, to.ctypes.data, values.size)
        results.update(to.tobytes())
    to = np.zeros(values.nbytes, np.uint8)
    byte_products(values.ctypes.data, to.ctypes.data, values.nbytes // 64)
    results.update(to.tobytes())
    return results.hexdigest()


def elsewhere(code: str, **environ: str) -> str:
    """What a process of its own prints."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_CPU", "CROSSDOCK"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environ, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("without", ["f16c", "avx2", "fma", "AVX2, fma,f16c,memfd"])
def test_same_bits_without_cpu_features(without: str) -> None:
    code = "from tests.workers.test_simd import digest; print(digest())"
    assert elsewhere(code, CROSSDOCK_DISABLE=without) == digest()


@pytest.mark.slow
def test_same_bits_on_a_plain_cpu() -> None:
    code = "from tests.workers.test_simd import digest; print(digest())"
    assert elsewhere(code, NUMBA_CPU_NAME="x86-64" if features.HAVE else "generic") == digest()


def test_features_that_are_withheld() -> None:
    assert features.detect({"CROSSDOCK_DISABLE": "avx2,fma,f16c"}) == frozenset()
    assert features.detect({"NUMBA_CPU_NAME": "generic"}) == frozenset()
    assert features.detect({"NUMBA_CPU_FEATURES": "+avx2,+fma,-avx2"}) == {"fma"}
    wide = {"NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni"}
    assert features.detect(wide) == {"avx2", "fma", "f16c", "vnni", "avx512"}
    assert features.detect(wide | {"CROSSDOCK_DISABLE": "avx512"}) == {"avx2", "fma", "f16c", "vnni"}
    assert features.detect(wide | {"CROSSDOCK_DISABLE": "vnni"}) == {"avx2", "fma", "f16c"}
    assert features.disabled({"CROSSDOCK_DISABLE": " AVX2,,memfd"}) == {"avx2", "memfd"}


def test_each_choice_of_features_has_its_own_cache(tmp_path: Path) -> None:
    code = "from workers.kernels import features as f; print(f.configure_cache()); print(f.configure_cache())"
    plain = elsewhere(code, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    other = elsewhere(code, NUMBA_CACHE_DIR=str(tmp_path), CROSSDOCK_DISABLE="avx2").splitlines()
    child = elsewhere(code, NUMBA_CACHE_DIR=plain[0]).splitlines()
    assert plain[0] == plain[1] == child[0]
    assert other[0] == other[1]
    assert other[0].endswith("-portable") if not features.HAVE - {"avx2"} else other[0] != plain[0]
    assert Path(plain[0]).parent == Path(other[0]).parent == tmp_path


def test_cache_depends_on_what_other_modules_compile_in() -> None:
    assert {"emit", "simd", "matlanes", "row", "stage"} <= set(features.shared_sources())
    assert not {"matmul", "table", "__init__"} & set(features.shared_sources())
