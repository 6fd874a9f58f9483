"""SILU and SWIGLU: eight values at a time with ggml's own exp, what is left of a row with the C library's."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.dtypes import DType
from protocol.ops import GluOp, Op, UnaryOp
from workers.kernels import row
from workers.kernels.access import INNER, dense_rows, extent, nelements, row_address, share, word
from workers.kernels.ggml.functions import expf, silu8
from workers.kernels.jit import float32, njit
from workers.kernels.simd import load_f32, load_f32x8, mul_f32x8, store_f32, store_f32x8
from workers.kernels.stage import Operand, Stage, kernel

DST, A, B = row.DST, row.SRC[0], row.SRC[1]
_SEGMENT = 256
"""Elements that a thread takes at a time; a multiple of 8."""


@njit(**INNER)
def _silu(a: int, factor: int, o: int, n: int) -> None:
    """o[i] = silu(a[i]) * factor[i]; no factor: address 0."""
    whole = n & ~7
    for i in range(0, 4 * whole, 32):
        x = silu8(load_f32x8(a + i))
        if factor != 0:
            x = mul_f32x8(x, load_f32x8(factor + i))
        store_f32x8(o + i, x)
    for i in range(4 * whole, 4 * n, 4):
        y = load_f32(a + i)
        y = y / (float32(1.0) + expf(-y))
        if factor != 0:
            y *= load_f32(factor + i)
        store_f32(o + i, y)


@kernel
def ggml_silu(r: int, ith: int, nth: int) -> None:
    """AUX: rows; what is gated: 0 nothing, 1 source 1, 2 the second half of source 0, 3 the first half."""
    n, n1, n2, gated = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2), word(r, row.AUX + 1)
    pieces = (n + _SEGMENT - 1) // _SEGMENT
    first, last = share(word(r, row.AUX) * pieces, ith, nth)
    for unit in range(first, last):
        i, at = unit // pieces, unit % pieces * _SEGMENT
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a = row_address(r, A, i1, i2, i3) + 4 * at
        factor = 0
        if gated == 1:
            factor = row_address(r, B, i1, i2, i3) + 4 * at
        elif gated == 2:
            factor = a + 4 * n
        elif gated == 3:
            factor = a
            a = a + 4 * n
        _silu(a, factor, row_address(r, DST, i1, i2, i3) + 4 * at, min(_SEGMENT, n - at))


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """UNARY SILU and GLU SWIGLU of F32 with dense rows; None for anything else."""
    operands = (dst, *(s for s in src if s is not None))
    if not params or not src or src[0] is None or any(t.dtype != DType.F32 or not dense_rows(t) for t in operands):
        return None
    a, b = src[0], src[1] if len(src) > 1 else None
    rows = nelements(dst) // dst.ne[0]
    if op is Op.UNARY and params[0] == UnaryOp.SILU and a.ne == dst.ne:
        return (Stage(ggml_silu, aux=(rows, 0)),)
    if op is not Op.GLU or params[0] != GluOp.SWIGLU:
        return None
    if b is not None:
        return (Stage(ggml_silu, aux=(rows, 1)),) if a.ne == dst.ne == b.ne else None
    if a.ne[0] != 2 * dst.ne[0] or a.ne[1:] != dst.ne[1:]:
        return None
    return (Stage(ggml_silu, aux=(rows, 3 if len(params) > 1 and params[1] else 2)),)
