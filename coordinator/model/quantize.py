"""Encode F32 arrays in ggml's tensor types and decode them again."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

from protocol.dtypes import DType
from protocol.errors import ModelError

F32 = npt.NDArray[np.float32]

ENCODABLE: Final = (
    DType.F32, DType.F16, DType.BF16, DType.Q8_0, DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1,
)  # fmt: skip
"""Types that `quantize` writes; the K types are read only."""

_F16_MAX: Final = 65504.0
_F16_FULL: Final = 65520.0  # rounds to infinity from here on


def quantize(values: F32, dtype: DType, name: str = "tensor") -> npt.NDArray[np.uint8]:
    """The bytes of `values` [..., n] in `dtype`, rows kept together, as a flat array.

    Raises ModelError when the type cannot be written, rows do not divide into blocks, a value is not finite or is
    beyond F16 (65504), which is also the type of the scales of blocks.
    """
    if dtype not in ENCODABLE:
        names = ", ".join(kind.label for kind in ENCODABLE)
        raise ModelError(f"{name}: type {dtype.label} can be read but not written: expected one of {names}")
    if values.shape[-1] % dtype.block:
        raise ModelError(f"{name}: rows of {values.shape[-1]} are no multiple of {dtype.label}'s {dtype.block}")
    values = np.ascontiguousarray(values, dtype=np.float32)
    peak = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(peak):
        raise ModelError(f"{name} holds NaN or infinity")
    if dtype not in (DType.F32, DType.BF16) and peak >= _F16_FULL:
        raise ModelError(f"{name} holds a value of magnitude {peak:.6g}: {dtype.label} ends at {_F16_MAX:g}")
    if dtype == DType.F32:
        return values.astype("<f4", copy=False).reshape(-1).view(np.uint8)
    if dtype == DType.F16:
        return values.astype("<f2").reshape(-1).view(np.uint8)
    return np.asarray(quants.quantize(values, GGMLQuantizationType(dtype))).reshape(-1).view(np.uint8)


def dequantize(raw: bytes | memoryview | npt.NDArray[np.uint8], dtype: DType, ne: tuple[int, ...]) -> F32:
    """Decode a tensor's bytes to F32, shape `ne` reversed without its trailing ones: ne (64, 300, 1, 1) -> [300, 64].

    Raises ModelError when the number of bytes is not the one that `dtype` and `ne` call for, or for a type that
    weights cannot have.
    """
    shape = list(ne)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    shape.reverse()
    data = np.frombuffer(raw, np.uint8)
    elements = int(np.prod(shape, dtype=np.int64))
    if shape[-1] % dtype.block or data.nbytes != dtype.row_nbytes(elements):
        raise ModelError(f"{data.nbytes:,} bytes are no {dtype.label} tensor of extents {list(ne)}")
    if dtype == DType.F32:
        return data.view("<f4").reshape(shape).astype(np.float32)
    if dtype == DType.F16:
        return data.view("<f2").reshape(shape).astype(np.float32)
    try:
        # Blocks do not know about rows: decoding them as one row each spares the library its grouping.
        blocks = data.reshape(-1, dtype.block_nbytes)
        return np.asarray(quants.dequantize(blocks, GGMLQuantizationType(dtype)), np.float32).reshape(shape)
    except NotImplementedError:
        raise ModelError(f"type {dtype.label} cannot be decoded") from None
