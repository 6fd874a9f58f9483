"""Blocks of ggml's quantised types back to floats, one format per function; the arithmetic order is ggml's."""

from __future__ import annotations

from protocol.dtypes import DType
from workers.kernels.access import INNER
from workers.kernels.emit import I8, I32, I64, const, i32x8, load, splat
from workers.kernels.jit import float32, int64, ir, njit, types
from workers.kernels.simd import (
    add_f32x8,
    address,
    load_f16,
    load_i8,
    load_u32,
    make,
    mul_f32x8,
    splat_f32x8,
    store_f32x8,
    sub_f32x8,
    to_f32x8,
)

TYPES = frozenset(
    {DType.Q8_0, DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.Q4_K, DType.Q5_K, DType.Q6_K}
)  # fmt: skip
"""What `dequantise` reads."""

_Q8_0, _Q4_0, _Q4_1, _Q5_0, _Q5_1 = (int(DType[name]) for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"))
_Q4_K, _Q5_K = int(DType.Q4_K), int(DType.Q5_K)


_BYTES = ir.VectorType(I8, 8)

_byte = make(types.int64, address)(lambda b, where: b.zext(load(b, where, I8), I64))
_bytes = make(i32x8, address)(lambda b, where: b.zext(load(b, where, _BYTES), i32x8.ir))
_signed_bytes = make(i32x8, address)(lambda b, where: b.sext(load(b, where, _BYTES), i32x8.ir))


@make(i32x8, i32x8, types.int64, types.int64)
def _field(b: ir.IRBuilder, x: ir.Value, at: ir.Value, mask: ir.Value) -> ir.Value:
    """The bits of `mask` of each x >> at."""
    moved = b.lshr(x, splat(b, b.trunc(at, I32), i32x8.ir))
    return b.and_(moved, splat(b, b.trunc(mask, I32), i32x8.ir))


@make(i32x8, types.int64)
def _eight_bits(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The lowest eight bits of an integer, one per lane, as 0 or 16."""
    lane = b.lshr(splat(b, b.trunc(bits, I32), i32x8.ir), const(i32x8.ir, list(range(8))))
    return b.shl(b.and_(lane, const(i32x8.ir, 1)), const(i32x8.ir, 4))


@make(i32x8, i32x8, i32x8, types.int64)
def _join(b: ir.IRBuilder, low: ir.Value, high: ir.Value, at: ir.Value) -> ir.Value:
    """low | high << at."""
    return b.or_(low, b.shl(high, splat(b, b.trunc(at, I32), i32x8.ir)))


_minus = make(i32x8, i32x8, types.int64)(lambda b, x, y: b.sub(x, splat(b, b.trunc(y, I32), i32x8.ir)))


@njit(**INNER)
def _four_bits(out: int, quants: int, fifth: int, d: float, m: float, zero: int) -> None:
    """32 values (q - zero) * d + m: 16 bytes at `quants` of two nibbles each, fifth bits in `fifth`."""
    scale, minimum = splat_f32x8(d), splat_f32x8(m)
    for j in range(0, 16, 8):
        q = _bytes(quants + j)
        for half in range(2):
            value = _join(_field(q, 4 * half, 15), _eight_bits(fifth >> (j + 16 * half)), 0)
            value = to_f32x8(_minus(value, zero))
            store_f32x8(out + 4 * j + 64 * half, add_f32x8(mul_f32x8(value, scale), minimum))


@njit(**INNER)
def _scale_and_min(scales: int, k: int) -> tuple[int, int]:
    """The k-th of eight pairs of six bits in twelve bytes."""
    if k < 4:
        return _byte(scales + k) & 63, _byte(scales + k + 4) & 63
    shared = _byte(scales + k + 4)
    scale = (shared & 15) | (_byte(scales + k - 4) >> 6) << 4
    return scale, (shared >> 4) | (_byte(scales + k) >> 6) << 4


@njit(**INNER)
def _q45_k(block: int, out: int, five: int) -> None:
    """d f16 | dmin f16 | 12 bytes of scales | (five) 32 bytes of fifth bits | 128 bytes of nibbles.

    `five` is 1 or 0 and masks the fifth bit.
    """
    d, dmin = load_f16(block), load_f16(block + 2)
    high = block + 16
    quants = high + 32 * five
    for k in range(8):
        scale, minimum = _scale_and_min(block + 4, k)
        factor, offset = splat_f32x8(d * float32(scale)), splat_f32x8(dmin * float32(minimum))
        for j in range(0, 32, 8):
            low = _field(_bytes(quants + 32 * (k >> 1) + j), 4 * (k & 1), 15)
            q = to_f32x8(_join(low, _field(_bytes(high + j), k, five), 4))
            store_f32x8(out + 4 * (32 * k + j), sub_f32x8(mul_f32x8(factor, q), offset))


@njit(**INNER)
def _q6_k(block: int, out: int) -> None:
    """128 bytes of lower nibbles | 64 bytes of upper two bits | 16 x i8 scales | d f16."""
    d = load_f16(block + 208)
    for i in range(0, 256, 8):
        part, j, quarter = i >> 7, i & 31, (i >> 5) & 3
        low = _field(_bytes(block + 64 * part + 32 * (quarter & 1) + j), 4 * (quarter >> 1), 15)
        high = _field(_bytes(block + 128 + 32 * part + j), 2 * quarter, 3)
        scale = splat_f32x8(d * float32(load_i8(block + 192 + (i >> 4))))
        store_f32x8(out + 4 * i, mul_f32x8(scale, to_f32x8(_minus(_join(low, high, 4), 32))))


@njit(**INNER)
def dequantise(dtype: int, blocks: int, n: int, out: int) -> None:
    """n values (a multiple of the block) from consecutive blocks to floats at `out`."""
    none = float32(0.0)
    if dtype in (_Q4_K, _Q5_K):
        five = 1 if dtype == _Q5_K else 0
        for i in range(n // 256):
            _q45_k(blocks + (144 + 32 * five) * i, out + 1024 * i, five)
    elif dtype == _Q8_0:
        for i in range(n // 32):
            d = splat_f32x8(load_f16(blocks + 34 * i))
            for j in range(0, 32, 8):
                q = to_f32x8(_signed_bytes(blocks + 34 * i + 2 + j))
                store_f32x8(out + 4 * (32 * i + j), mul_f32x8(q, d))
    elif dtype == _Q4_0:
        for i in range(n // 32):
            b = blocks + 18 * i
            _four_bits(out + 128 * i, b + 2, int64(0), load_f16(b), none, 8)
    elif dtype == _Q4_1:
        for i in range(n // 32):
            b = blocks + 20 * i
            _four_bits(out + 128 * i, b + 4, int64(0), load_f16(b), load_f16(b + 2), 0)
    elif dtype == _Q5_0:
        for i in range(n // 32):
            b = blocks + 22 * i
            _four_bits(out + 128 * i, b + 6, int64(load_u32(b + 2)), load_f16(b), none, 16)
    elif dtype == _Q5_1:
        for i in range(n // 32):
            b = blocks + 24 * i
            _four_bits(out + 128 * i, b + 8, int64(load_u32(b + 4)), load_f16(b), load_f16(b + 2), 0)
    else:
        for i in range(n // 256):
            _q6_k(blocks + 210 * i, out + 1024 * i)
