"""Runs one op through table, executor and kernels on numpy arrays."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.dtypes import DType
from protocol.ops import Op
from workers.execute import Executor, ResolvedOp, build_table
from workers.kernels.reference import REFERENCE
from workers.kernels.stage import Operand

Array = NDArray[Any]

DTYPES = {
    np.dtype(np.float32): DType.F32,
    np.dtype(np.float16): DType.F16,
    np.dtype(np.int32): DType.I32,
    np.dtype(np.int64): DType.I64,
}


@dataclass(frozen=True)
class Raw:
    """Bytes of a type that numpy lacks, contiguous: `ne` innermost first."""

    data: NDArray[np.uint8]
    dtype: DType
    ne: tuple[int, int, int, int]


def four(x: Array) -> Array:
    """The array with leading axes up to four."""
    return x[(None,) * (4 - x.ndim)]


def resolve(x: Array | Raw) -> tuple[int, Operand]:
    if isinstance(x, Raw):
        nb1 = x.dtype.row_nbytes(x.ne[0])
        nb = (x.dtype.block_nbytes, nb1, nb1 * x.ne[1], nb1 * x.ne[1] * x.ne[2])
        return x.data.ctypes.data, Operand(x.dtype, x.ne, nb)
    ne = tuple(int(n) for n in x.shape[::-1])
    nb = tuple(int(n) for n in x.strides[::-1])
    return x.ctypes.data, Operand(DTYPES[x.dtype], ne, nb)  # type: ignore[arg-type]


def run(
    op: Op, srcs: list[Array | Raw | None], dst: Array, params: tuple[int | float, ...] = (), threads: int = 1
) -> Array:
    """Compute into `dst` (four axes; may overlap a source) and return it."""
    resolved = ResolvedOp(op, params, resolve(dst), tuple(None if s is None else resolve(s) for s in srcs))
    with Executor(threads) as team:
        team.run(build_table([resolved], threads))
    return dst


def expect(op: Op, srcs: list[Array | None], dst: Array, params: tuple[int | float, ...] = ()) -> Array:
    """The reference's answer in float64 (integers stay what they are)."""
    wide = [None if s is None else s.astype(np.float64) if s.dtype.kind == "f" else s for s in srcs]
    ne = tuple(int(n) for n in dst.shape[::-1])
    return REFERENCE[op](params, ne, DTYPES[dst.dtype], wide)  # type: ignore[arg-type]


def close(actual: Array, expected: Array, tolerance: float = 2e-6) -> None:
    """Equal to `tolerance` of the largest value."""
    scale = max(1e-30, float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def peek(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)
