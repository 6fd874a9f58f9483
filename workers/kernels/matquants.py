"""Products of quantised weights with activations from `quantize_rows`: a kernel per format, for few and many columns.

Both give the same bits: the value of an output depends on its row of weights and its column of activations alone, not
on the number of columns, rows or threads. Threads share groups of eight rows.
"""

from __future__ import annotations

from protocol.dtypes import DType
from workers.kernels import row as words
from workers.kernels.access import extent, row_address, share, stride, word
from workers.kernels.jit import njit
from workers.kernels.matlanes import COLUMNS, LANES, MAX_GROUPS, PANELS, ROWS
from workers.kernels.matpack import pack_rows
from workers.kernels.matpanels import dot_panels
from workers.kernels.matrows import dot_rows
from workers.kernels.simd import prefetch
from workers.kernels.stage import OPTIONS, Kernel, kernel

FEW = 2
"""Up to so many columns weights are used where they lie; more are worth packing them."""

_GROUPS = PANELS * LANES // ROWS
_W, _Y = words.SRC[0], words.SRC[1]
_Q4_0 = int(DType.Q4_0)
_Q4_1 = int(DType.Q4_1)
_Q5_0 = int(DType.Q5_0)
_Q5_1 = int(DType.Q5_1)
_Q8_0 = int(DType.Q8_0)
_Q4_K = int(DType.Q4_K)
_Q5_K = int(DType.Q5_K)
_Q6_K = int(DType.Q6_K)


@njit(**OPTIONS)
def _batch(row: int, batch: int) -> tuple[int, int, int]:
    """A batch's weights, first column in scratch memory, result."""
    i2, i3 = batch % extent(row, _Y, 2), batch // extent(row, _Y, 2)
    w2, w3 = i2 * extent(row, _W, 2) // extent(row, _Y, 2), i3 * extent(row, _W, 3) // extent(row, _Y, 3)
    columns = word(row, words.WORK) + batch * extent(row, _Y, 1) * word(row, words.AUX)
    return row_address(row, _W, 0, w2, w3), columns, row_address(row, words.DST, 0, i2, i3)


@njit(**OPTIONS)
def _groups(row: int) -> tuple[int, int]:
    """Groups of eight rows, and those of all batches together."""
    groups = (extent(row, _W, 1) + ROWS - 1) // ROWS
    return groups, groups * extent(row, _Y, 2) * extent(row, _Y, 3)


@njit(inline="always")
def _few_columns(row: int, ith: int, nth: int, form: int) -> None:
    groups, units = _groups(row)
    unit, last = share(units, ith, nth)
    n, k, m, distance = extent(row, _W, 1), extent(row, _W, 0), extent(row, _Y, 1), word(row, words.AUX)
    w_step, out_step = stride(row, _W, 1), stride(row, words.DST, 1)
    while unit < last:  # batch after batch: divisions take as long as a short row
        batch = unit // groups
        group = unit - batch * groups
        end = min(groups, group + last - unit)
        unit += end - group
        weights, y, out = _batch(row, batch)
        for g in range(group, end):
            for column in range(m):
                to = out + 4 * ROWS * g + column * out_step
                dot_rows(form, weights + ROWS * g * w_step, w_step, n - ROWS * g, y + column * distance, k, to)


@njit(inline="always")
def _many_columns(row: int, ith: int, nth: int, form: int) -> None:
    groups, units = _groups(row)
    first, last = share(units, ith, nth)
    n, k, m, distance = extent(row, _W, 1), extent(row, _W, 0), extent(row, _Y, 1), word(row, words.AUX)
    panel = word(row, words.WORK) + word(row, words.AUX + 1) + ith * word(row, words.AUX + 2)
    apart = 4 * ROWS if LANES > ROWS else word(row, words.AUX + 2) // MAX_GROUPS
    w_step, out_step = stride(row, _W, 1), stride(row, words.DST, 1)
    unit = first
    while unit < last:
        weights, y, out = _batch(row, unit // groups)
        group = unit % groups
        several = min(_GROUPS, groups - group, last - unit)
        unit += several
        rows = min(n - ROWS * group, ROWS * several)
        for p in range(several):
            w = weights + ROWS * (group + p) * w_step
            pack_rows(form, w, w_step, rows - ROWS * p, k, panel + p * apart)
        ahead = weights + ROWS * (group + several) * w_step  # the next rows, asked for while these are used
        lines = (ROWS * _GROUPS * COLUMNS * min(w_step, 2 * k) // 64 + m - 1) // m
        for c in range(0, m, COLUMNS):
            to = out + 4 * ROWS * group + c * out_step
            for _ in range(lines):
                prefetch(ahead)
                ahead += 64
            dot_panels(form, panel, rows, y + c * distance, distance, m - c, k, to, out_step)


@kernel
def few_q4_0(row: int, ith: int, nth: int) -> None:
    """Q4_0 weights, one or two columns."""
    _few_columns(row, ith, nth, _Q4_0)


@kernel
def many_q4_0(row: int, ith: int, nth: int) -> None:
    """Q4_0 weights, any number of columns."""
    _many_columns(row, ith, nth, _Q4_0)


@kernel
def few_q4_1(row: int, ith: int, nth: int) -> None:
    """Q4_1 weights, one or two columns."""
    _few_columns(row, ith, nth, _Q4_1)


@kernel
def many_q4_1(row: int, ith: int, nth: int) -> None:
    """Q4_1 weights, any number of columns."""
    _many_columns(row, ith, nth, _Q4_1)


@kernel
def few_q5_0(row: int, ith: int, nth: int) -> None:
    """Q5_0 weights, one or two columns."""
    _few_columns(row, ith, nth, _Q5_0)


@kernel
def many_q5_0(row: int, ith: int, nth: int) -> None:
    """Q5_0 weights, any number of columns."""
    _many_columns(row, ith, nth, _Q5_0)


@kernel
def few_q5_1(row: int, ith: int, nth: int) -> None:
    """Q5_1 weights, one or two columns."""
    _few_columns(row, ith, nth, _Q5_1)


@kernel
def many_q5_1(row: int, ith: int, nth: int) -> None:
    """Q5_1 weights, any number of columns."""
    _many_columns(row, ith, nth, _Q5_1)


@kernel
def few_q8_0(row: int, ith: int, nth: int) -> None:
    """Q8_0 weights, one or two columns."""
    _few_columns(row, ith, nth, _Q8_0)


@kernel
def many_q8_0(row: int, ith: int, nth: int) -> None:
    """Q8_0 weights, any number of columns."""
    _many_columns(row, ith, nth, _Q8_0)


@kernel
def few_q4_k(row: int, ith: int, nth: int) -> None:
    """Q4_K weights, one or two columns."""
    _few_columns(row, ith, nth, _Q4_K)


@kernel
def many_q4_k(row: int, ith: int, nth: int) -> None:
    """Q4_K weights, any number of columns."""
    _many_columns(row, ith, nth, _Q4_K)


@kernel
def few_q5_k(row: int, ith: int, nth: int) -> None:
    """Q5_K weights, one or two columns."""
    _few_columns(row, ith, nth, _Q5_K)


@kernel
def many_q5_k(row: int, ith: int, nth: int) -> None:
    """Q5_K weights, any number of columns."""
    _many_columns(row, ith, nth, _Q5_K)


@kernel
def few_q6_k(row: int, ith: int, nth: int) -> None:
    """Q6_K weights, one or two columns."""
    _few_columns(row, ith, nth, _Q6_K)


@kernel
def many_q6_k(row: int, ith: int, nth: int) -> None:
    """Q6_K weights, any number of columns."""
    _many_columns(row, ith, nth, _Q6_K)


PRODUCTS: dict[DType, tuple[Kernel, Kernel]] = {
    DType.Q4_0: (few_q4_0, many_q4_0),
    DType.Q4_1: (few_q4_1, many_q4_1),
    DType.Q5_0: (few_q5_0, many_q5_0),
    DType.Q5_1: (few_q5_1, many_q5_1),
    DType.Q8_0: (few_q8_0, many_q8_0),
    DType.Q4_K: (few_q4_k, many_q4_k),
    DType.Q5_K: (few_q5_k, many_q5_k),
    DType.Q6_K: (few_q6_k, many_q6_k),
}
"""Kernels for few and for many columns, by type."""
