"""ROPE: the angle is multiplied on from pair to pair in F32, cosine and sine are the C library's."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.ops import Op
from workers.kernels import row
from workers.kernels.access import INNER, extent, float_param, int_param, nelements, row_address, share, stride, word
from workers.kernels.ggml.functions import cosf, powf, sinf
from workers.kernels.jit import float32, njit
from workers.kernels.simd import fma_f32, load_f32, load_i32, store_f32
from workers.kernels.stage import Operand, Stage, kernel

DST, A, POSITIONS, FACTORS = row.DST, row.SRC[0], row.SRC[1], row.SRC[2]
_NEOX = 2


@njit(**INNER)
def _angles(r: int, position: int, n_dims: int, cos: int, sin: int) -> None:
    """Fill the tables of a position: n_dims / 2 values each."""
    base, scale, magnitude = float_param(r, 5), float_param(r, 6), float_param(r, 8)
    step = powf(base, float32(-2.0) / float32(n_dims))
    angle, factors = float32(position), word(r, FACTORS)
    for i in range(n_dims // 2):
        x = angle
        if factors != 0:
            x = x / load_f32(factors + i * stride(r, FACTORS, 0))
        x = scale * x
        store_f32(cos + 4 * i, cosf(x) * magnitude)
        store_f32(sin + 4 * i, sinf(x) * magnitude)
        angle = angle * step


@kernel
def ggml_rope(r: int, ith: int, nth: int) -> None:
    """AUX: rows, bytes of scratch per thread."""
    n_dims, neox = int_param(r, 1), int_param(r, 2) == _NEOX
    n0, n1, n2 = extent(r, DST, 0), extent(r, DST, 1), extent(r, DST, 2)
    step, far = (4, 2 * n_dims) if neox else (8, 4)  # bytes from pair to pair, and between the two of a pair
    cos = word(r, row.WORK) + ith * word(r, row.AUX + 1)
    sin = cos + 2 * n_dims
    known = -1  # the token that the tables are for
    first, last = share(word(r, row.AUX), ith, nth)
    for i in range(first, last):
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        if i2 != known:
            known = i2
            _angles(r, load_i32(word(r, POSITIONS) + i2 * stride(r, POSITIONS, 0)), n_dims, cos, sin)
        a, o = row_address(r, A, i1, i2, i3), row_address(r, DST, i1, i2, i3)
        for j in range(n_dims // 2):
            x, y = load_f32(a + j * step), load_f32(a + j * step + far)
            c, s = load_f32(cos + 4 * j), load_f32(sin + 4 * j)
            store_f32(o + j * step, fma_f32(x, c, -(y * s)))
            store_f32(o + j * step + far, fma_f32(x, s, y * c))
        if a != o:
            for j in range(4 * n_dims, 4 * n0, 4):
                store_f32(o + j, load_f32(a + j))


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """ROPE of what the default kernel takes."""
    room = -(-4 * int(params[1]) // 64) * 64
    return (Stage(ggml_rope, work_nbytes=threads * room, aux=(nelements(dst) // dst.ne[0], room)),)
