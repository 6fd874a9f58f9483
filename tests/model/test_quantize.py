from __future__ import annotations

import ctypes
from pathlib import Path

import libggml
import numpy as np
import pytest

from coordinator.model.quantize import ENCODABLE, dequantize, quantize
from protocol.dtypes import DType
from protocol.errors import ModelError

# Largest error of one value, in units of its block's largest magnitude; measured types round to nearest, the 4- and
# 5-bit ones also lose half a step at the far end of their asymmetric range.
BOUND = {
    DType.F32: 0.0, DType.F16: 2**-11, DType.BF16: 2**-8, DType.Q8_0: 0.5 / 127 + 2**-10, DType.Q5_0: 1 / 16 + 2**-10,
    DType.Q5_1: 1 / 31 + 2**-9, DType.Q4_0: 1 / 8 + 2**-10, DType.Q4_1: 1 / 15 + 2**-9,
}  # fmt: skip


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    return ctypes.CDLL(str(next((Path(libggml.__file__).parent / "lib64").glob("libggml-base.so*"))))


def values(rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (rng.standard_normal((rows, width)) * rng.uniform(0.01, 10, (rows, 1))).astype(np.float32)


@pytest.mark.parametrize("dtype", ENCODABLE, ids=lambda dtype: dtype.label)
def test_round_trip_within_the_type_s_error(dtype: DType) -> None:
    source = values(6, 96)
    raw = quantize(source, dtype)
    assert raw.dtype == np.uint8
    assert raw.nbytes == dtype.row_nbytes(96) * 6
    back = dequantize(raw.tobytes(), dtype, (96, 6, 1, 1))
    assert back.shape == (6, 96)
    assert back.dtype == np.float32
    blocks = source.reshape(-1, dtype.block)
    error = np.abs(back.reshape(-1, dtype.block) - blocks).max(axis=1)
    assert (error <= BOUND[dtype] * np.abs(blocks).max(axis=1)).all()


@pytest.mark.parametrize("dtype", [DType.Q8_0, DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1], ids=lambda d: d.label)
def test_bytes_equal_ggml_s(dtype: DType, ggml: ctypes.CDLL) -> None:
    source = values(8, 128)
    ours = quantize(source, dtype)
    theirs = ggml_quantize(ggml, source, dtype)
    # ggml's quantisers round ties through fused arithmetic: a single step in a few bytes is allowed, scales are not.
    assert np.count_nonzero(ours != theirs) <= ours.nbytes // 200


@pytest.mark.parametrize(
    "dtype",
    [kind for kind in DType if kind.name in {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}],
    ids=lambda dtype: dtype.label,
)
def test_decoding_equals_ggml_s(dtype: DType, ggml: ctypes.CDLL) -> None:
    source = values(4, 512)
    raw = ggml_quantize(ggml, source, dtype)
    expected = np.empty_like(source)
    decode = getattr(ggml, f"dequantize_row_{dtype.label}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode.restype = None
    decode(raw.ctypes.data, expected.ctypes.data, expected.size)
    ours = dequantize(raw, dtype, (512, 4, 1, 1))
    # d * q + m is rounded once or twice: a matter of the compiler, not of the format.
    assert np.allclose(ours, expected, rtol=1e-6, atol=1e-6 * float(np.abs(source).max()))
    if dtype in {DType.Q8_0, DType.Q4_0, DType.Q5_0}:
        assert np.array_equal(ours, expected)


def ggml_quantize(ggml: ctypes.CDLL, source: np.ndarray, dtype: DType) -> np.ndarray:
    rows, width = source.shape
    raw = np.zeros(dtype.row_nbytes(width) * rows, np.uint8)
    chunk = ggml.ggml_quantize_chunk
    chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    chunk.restype = ctypes.c_size_t
    assert chunk(int(dtype), source.ctypes.data, raw.ctypes.data, 0, rows, width, None) == raw.nbytes
    return raw


def test_shapes_lose_trailing_ones_only() -> None:
    for ne, shape in (((8, 1, 1, 1), (8,)), ((2, 3, 4, 5), (5, 4, 3, 2)), ((8, 1, 2, 1), (2, 1, 8)), ((1,), (1,))):
        data = np.arange(np.prod(ne), dtype=np.float32)
        assert dequantize(data.tobytes(), DType.F32, ne).shape == shape


def test_refusals() -> None:
    good = values(1, 32)
    with pytest.raises(ModelError, match="w: type q4_K can be read but not written"):
        quantize(values(1, 256), DType.Q4_K, "w")
    with pytest.raises(ModelError, match="rows of 33"):
        quantize(values(1, 33), DType.Q8_0)
    for bad in (np.nan, np.inf, -np.inf):
        broken = good.copy()
        broken[0, 3] = bad
        with pytest.raises(ModelError, match="NaN or infinity"):
            quantize(broken, DType.F32)
    broken = good.copy()
    broken[0, 3] = -70000
    for dtype in (DType.F16, DType.Q8_0):
        with pytest.raises(ModelError, match="magnitude 70000"):
            quantize(broken, dtype)
    assert np.isfinite(dequantize(quantize(broken, DType.BF16), DType.BF16, (32,))).all()
    with pytest.raises(ModelError, match="33 bytes are no q8_0 tensor"):
        dequantize(bytes(33), DType.Q8_0, (32,))
    with pytest.raises(ModelError, match="cannot be decoded"):
        dequantize(bytes(36), DType.Q8_1, (32,))
