"""Activations of a matrix product in 8 bits, as ggml quantises them, laid out for `matlanes`.

A column of k elements: quants i8[k]; scale f32[blocks]; sums. The numbers are those of ggml's blocks:

    q8_0    32 per block, scale rounded to F16; sums i32[blocks] of the quants
    q8_1    the same; sums f32[blocks]: scale times sum, rounded to F16
    q8_K    256 per block, scale F32; sums i16[blocks][16] of sixteen quants each

A block with an infinity or a NaN gets the scale NaN.
"""

from __future__ import annotations

from workers.kernels import row as words
from workers.kernels.access import extent, row_address, share, word
from workers.kernels.jit import float32, int16, njit
from workers.kernels.matformats import Activation
from workers.kernels.simd import (
    abs_f32x8,
    add_f32x8,
    add_i32x8,
    fma_f32x8,
    less_f32x8,
    load_f16,
    load_f32,
    load_f32x8,
    max_f32x8,
    max_of_f32x8,
    mul_f32x8,
    narrow_i32x8,
    select_f32x8,
    splat_f32x8,
    store_f16,
    store_f32,
    store_i16,
    store_i32,
    sub_f32x8,
    sum_f32x8,
    sum_i32x8,
    to_i32x8,
    zero_f32x8,
)
from workers.kernels.stage import OPTIONS, Dims, Kernel, kernel


def column_nbytes(activation: Activation, k: int) -> int:
    """Bytes of one column of `k` elements in scratch memory, a multiple of 64."""
    nbytes = k + k // 256 * 36 if activation == "q8_K" else k + k // 32 * 8
    return -(-nbytes // 64) * 64


@njit(**OPTIONS)
def quantize_32(x: int, quants: int, scale: int, sums: int, with_scale: bool) -> None:
    """One block of 32: `x` f32 in; the sum is an i32, or an F32 times the scale when `with_scale`."""
    v0, v1, v2, v3 = load_f32x8(x), load_f32x8(x + 32), load_f32x8(x + 64), load_f32x8(x + 96)
    size = max_f32x8(max_f32x8(abs_f32x8(v0), abs_f32x8(v1)), max_f32x8(abs_f32x8(v2), abs_f32x8(v3)))
    largest = max_of_f32x8(size)
    zero = zero_f32x8()
    nothing = fma_f32x8(
        v0, zero, fma_f32x8(v1, zero, fma_f32x8(v2, zero, mul_f32x8(v3, zero)))
    )  # NaN if one is infinite
    d = largest / float32(127) + sum_f32x8(nothing)
    inverse = splat_f32x8(float32(127) / largest if largest != float32(0) else float32(0))
    q0, q1 = to_i32x8(mul_f32x8(v0, inverse)), to_i32x8(mul_f32x8(v1, inverse))
    q2, q3 = to_i32x8(mul_f32x8(v2, inverse)), to_i32x8(mul_f32x8(v3, inverse))
    narrow_i32x8(quants, q0)
    narrow_i32x8(quants + 8, q1)
    narrow_i32x8(quants + 16, q2)
    narrow_i32x8(quants + 24, q3)
    total = sum_i32x8(add_i32x8(add_i32x8(q0, q1), add_i32x8(q2, q3)))
    if with_scale:
        store_f16(sums, d * float32(total))
        store_f32(sums, load_f16(sums))
    else:
        store_i32(sums, total)
    store_f16(scale, d)
    store_f32(scale, load_f16(scale))


@njit(**OPTIONS)
def quantize_256(x: int, quants: int, scale: int, sums: int) -> None:
    """One block of 256: the element of the largest magnitude becomes -127, so the scale may be negative."""
    size, first, zero = zero_f32x8(), zero_f32x8(), zero_f32x8()
    even, odd = zero_f32x8(), zero_f32x8()  # become NaN if an element is infinite
    for i in range(0, 32, 2):
        v0, v1 = load_f32x8(x + 32 * i), load_f32x8(x + 32 * i + 32)
        first = select_f32x8(less_f32x8(size, abs_f32x8(v0)), v0, first)
        size = max_f32x8(abs_f32x8(v0), size)
        first = select_f32x8(less_f32x8(size, abs_f32x8(v1)), v1, first)
        size = max_f32x8(abs_f32x8(v1), size)
        even, odd = fma_f32x8(v0, zero, even), fma_f32x8(v1, zero, odd)
    nothing, largest = add_f32x8(even, odd), max_of_f32x8(size)
    signed = largest if max_of_f32x8(first) == largest else -largest
    if signed == max_of_f32x8(sub_f32x8(zero, first)):  # both signs: the first element of all decides
        for i in range(256):
            signed = load_f32(x + 4 * i)
            if abs(signed) == largest:
                break
    inverse = float32(-127) / signed if largest != float32(0) else float32(0)
    d = float32(1) / inverse if largest != float32(0) else float32(0)
    factor = splat_f32x8(inverse)
    for i in range(16):
        q0 = to_i32x8(mul_f32x8(load_f32x8(x + 64 * i), factor))
        q1 = to_i32x8(mul_f32x8(load_f32x8(x + 64 * i + 32), factor))
        narrow_i32x8(quants + 16 * i, q0)
        narrow_i32x8(quants + 16 * i + 8, q1)
        store_i16(sums + 2 * i, int16(sum_i32x8(add_i32x8(q0, q1))))
    store_f32(scale, d + sum_f32x8(nothing))


_Y = words.SRC[1]


@njit(**OPTIONS)
def _column(row: int, column: int) -> tuple[int, int]:
    """Addresses of a column's elements, and of its place in scratch memory."""
    i1, outer = column % extent(row, _Y, 1), column // extent(row, _Y, 1)
    x = row_address(row, _Y, i1, outer % extent(row, _Y, 2), outer // extent(row, _Y, 2))
    return x, word(row, words.WORK) + column * word(row, words.AUX)


@njit(**OPTIONS)
def _share_of_blocks(row: int, blocks: int, ith: int, nth: int) -> tuple[int, int]:
    """The thread's part of all columns' blocks, which follow each other."""
    columns = extent(row, _Y, 1) * extent(row, _Y, 2) * extent(row, _Y, 3)
    return share(columns * blocks, ith, nth)


@njit(inline="always")
def _quantize_32(row: int, ith: int, nth: int, with_scale: bool) -> None:
    k = extent(row, _Y, 0)
    blocks = k // 32
    unit, last = _share_of_blocks(row, blocks, ith, nth)
    while unit < last:  # column after column: divisions take as long as a block
        column = unit // blocks
        x, to = _column(row, column)
        index = unit - column * blocks
        end = min(blocks, index + last - unit)
        unit += end - index
        for i in range(index, end):
            quantize_32(x + 128 * i, to + 32 * i, to + k + 4 * i, to + k + 4 * (blocks + i), with_scale)


@kernel
def quantize_q8_0(row: int, ith: int, nth: int) -> None:
    """All columns of source 1 to scratch memory; AUX[0] is the distance of columns."""
    _quantize_32(row, ith, nth, False)


@kernel
def quantize_q8_1(row: int, ith: int, nth: int) -> None:
    """As `quantize_q8_0`, for weights with a minimum per block."""
    _quantize_32(row, ith, nth, True)


@kernel
def quantize_q8_k(row: int, ith: int, nth: int) -> None:
    """As `quantize_q8_0`, for K weights."""
    k = extent(row, _Y, 0)
    blocks = k // 256
    unit, last = _share_of_blocks(row, blocks, ith, nth)
    while unit < last:
        column = unit // blocks
        x, to = _column(row, column)
        index = unit - column * blocks
        end = min(blocks, index + last - unit)
        unit += end - index
        for i in range(index, end):
            quantize_256(x + 1024 * i, to + 256 * i, to + k + 4 * i, to + k + 4 * blocks + 32 * i)


QUANTIZE: dict[Activation, Kernel] = {"q8_0": quantize_q8_0, "q8_1": quantize_q8_1, "q8_K": quantize_q8_k}


def columns_nbytes(activation: Activation, ne: Dims) -> int:
    """Bytes of all columns of a source of extents `ne` in scratch memory."""
    return column_nbytes(activation, ne[0]) * ne[1] * ne[2] * ne[3]
