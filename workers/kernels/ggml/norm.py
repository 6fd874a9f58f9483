"""RMS_NORM: squares rounded to F32, added up one after the other in float64; everything behind the sum in F32."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import INNER, extent, float_param, nelements, row_address, share, word
from workers.kernels.ggml.functions import sqrtf
from workers.kernels.jit import float32, float64, njit
from workers.kernels.simd import load_f32, load_f32x8, mul_f32x8, splat_f32x8, store_f32, store_f32x8
from workers.kernels.stage import Operand, Stage, kernel

DST, A = row.DST, row.SRC[0]


@njit(**INNER)
def _times(a: int, o: int, n: int, factor: float) -> None:
    """o[i] = a[i] * factor."""
    whole = n & ~7
    for i in range(0, 4 * whole, 32):
        store_f32x8(o + i, mul_f32x8(load_f32x8(a + i), splat_f32x8(factor)))
    for i in range(4 * whole, 4 * n, 4):
        store_f32(o + i, load_f32(a + i) * factor)


@kernel
def ggml_rms_norm(r: int, ith: int, nth: int) -> None:
    """AUX: rows."""
    n, n1, n2, eps = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2), float_param(r, 0)
    first, last = share(word(r, row.AUX), ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a = row_address(r, A, i1, i2, i3)
        total = float64(0.0)
        for j in range(0, 4 * n, 4):
            x = load_f32(a + j)
            total += float64(x * x)
        mean = float32(total / float64(n))
        _times(a, row_address(r, DST, i1, i2, i3), n, float32(1.0) / sqrtf(mean + eps))


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """RMS_NORM of what the default kernel takes."""
    return (Stage(ggml_rms_norm, aux=(nelements(dst) // dst.ne[0],)),)
