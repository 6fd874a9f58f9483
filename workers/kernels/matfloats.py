"""Products of F32, F16 and BF16 weights, rows as they lie with any stride between them: a kernel per pair of types.

An output has the same bits in tiles of any shape (`mattiles`), so for any number of columns, rows and threads. Half
precision weights meet activations in full precision: nothing is rounded before the result.
"""

from __future__ import annotations

from protocol.dtypes import DType
from workers.kernels import row as words
from workers.kernels.access import extent, row_address, share, stride
from workers.kernels.features import HAVE_AVX512
from workers.kernels.jit import njit
from workers.kernels.mattiles import WIDE, eight_by_one, eight_by_six, four_by_three
from workers.kernels.stage import OPTIONS, Kernel, kernel

FEW = 2
"""Up to so many columns a tile is eight rows of one column, else of several: six, or four rows of three."""

BLOCK_NBYTES = 1 << 19 if HAVE_AVX512 else 1 << 18
"""Of activations that all weights pass by before the next ones: what a second-level cache keeps."""

_W, _Y = words.SRC[0], words.SRC[1]
_F32_F32, _F16_F32, _BF16_F32, _F16_F16 = range(4)


@njit(**OPTIONS)
def _unit(row: int, unit: int, groups: int) -> tuple[int, int, int, int]:
    """Number of rows in the group of eight, addresses of its weights, activations and results."""
    group, batch = unit % groups, unit // groups
    i2, i3 = batch % extent(row, _Y, 2), batch // extent(row, _Y, 2)
    w2, w3 = i2 * extent(row, _W, 2) // extent(row, _Y, 2), i3 * extent(row, _W, 3) // extent(row, _Y, 3)
    out = row_address(row, words.DST, 0, i2, i3) + 32 * group
    rows = min(8, extent(row, _W, 1) - 8 * group)
    return rows, row_address(row, _W, 8 * group, w2, w3), row_address(row, _Y, 0, i2, i3), out


@njit(**OPTIONS)
def _units(row: int, ith: int, nth: int) -> tuple[int, tuple[int, int]]:
    """Groups of eight rows per batch, and the thread's share of all of them."""
    groups = (extent(row, _W, 1) + 7) // 8
    return groups, share(groups * extent(row, _Y, 2) * extent(row, _Y, 3), ith, nth)


@njit(inline="always")
def _few_columns(row: int, ith: int, nth: int, pair: int) -> None:
    groups, (first, last) = _units(row, ith, nth)
    k, out_step = extent(row, _W, 0), stride(row, words.DST, 1)
    w_step, y_step = stride(row, _W, 1), stride(row, _Y, 1)
    for unit in range(first, last):
        rows, w, y, out = _unit(row, unit, groups)
        for c in range(extent(row, _Y, 1)):
            eight_by_one(pair, w, w_step, rows, y + c * y_step, y_step, 1, k, out + c * out_step, out_step)


@njit(inline="always")
def _many_columns(row: int, ith: int, nth: int, pair: int) -> None:
    groups, (first, last) = _units(row, ith, nth)
    k, m, out_step = extent(row, _W, 0), extent(row, _Y, 1), stride(row, words.DST, 1)
    w_step, y_step = stride(row, _W, 1), stride(row, _Y, 1)
    most = max(1, BLOCK_NBYTES // (4 * WIDE * max(k, 1))) * WIDE
    blocks = (m + most - 1) // most  # of much the same size: a small one at the end costs a look at all weights, too
    block = (m + WIDE * blocks - 1) // (WIDE * blocks) * WIDE
    for start in range(0, m, block):
        end = min(start + block, m)
        for unit in range(first, last):
            rows, w, y, out = _unit(row, unit, groups)
            narrow = start
            if HAVE_AVX512 and rows == 8:
                narrow += (end - start) // WIDE * WIDE
                for c in range(start, narrow, WIDE):
                    eight_by_six(pair, w, w_step, y + c * y_step, y_step, k, out + c * out_step, out_step)
            for r in range(0, rows, 4):
                for c in range(narrow, end, 3):
                    four_by_three(
                        pair, w + r * w_step, w_step, rows - r, y + c * y_step, y_step, min(3, m - c), k,
                        out + c * out_step + 4 * r, out_step,
                    )  # fmt: skip


@kernel
def few_f32(row: int, ith: int, nth: int) -> None:
    """F32 weights, one or two columns."""
    _few_columns(row, ith, nth, _F32_F32)


@kernel
def many_f32(row: int, ith: int, nth: int) -> None:
    """F32 weights, any number of columns."""
    _many_columns(row, ith, nth, _F32_F32)


@kernel
def few_f16(row: int, ith: int, nth: int) -> None:
    """F16 weights, one or two columns."""
    _few_columns(row, ith, nth, _F16_F32)


@kernel
def many_f16(row: int, ith: int, nth: int) -> None:
    """F16 weights, any number of columns."""
    _many_columns(row, ith, nth, _F16_F32)


@kernel
def few_bf16(row: int, ith: int, nth: int) -> None:
    """BF16 weights, one or two columns."""
    _few_columns(row, ith, nth, _BF16_F32)


@kernel
def many_bf16(row: int, ith: int, nth: int) -> None:
    """BF16 weights, any number of columns."""
    _many_columns(row, ith, nth, _BF16_F32)


@kernel
def few_f16_f16(row: int, ith: int, nth: int) -> None:
    """F16 weights and activations, one or two columns."""
    _few_columns(row, ith, nth, _F16_F16)


@kernel
def many_f16_f16(row: int, ith: int, nth: int) -> None:
    """F16 weights and activations, any number of columns."""
    _many_columns(row, ith, nth, _F16_F16)


PRODUCTS: dict[tuple[DType, DType], tuple[Kernel, Kernel]] = {
    (DType.F32, DType.F32): (few_f32, many_f32),
    (DType.F16, DType.F32): (few_f16, many_f16),
    (DType.BF16, DType.F32): (few_bf16, many_bf16),
    (DType.F16, DType.F16): (few_f16_f16, many_f16_f16),
}
"""Kernels for few and for many columns, by the types of weights and activations."""
