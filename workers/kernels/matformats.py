"""Weight formats of matrix products: where a block keeps what, and the LLVM code that takes quants and scales out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from protocol.dtypes import DType
from workers.kernels.emit import I32, const, i8x16, i8x32, i16x16, i32x4, i32x8, load, shuffle, splat
from workers.kernels.features import HAVE_VNNI
from workers.kernels.jit import ir

Activation = Literal["q8_0", "q8_1", "q8_K"]
"""What the other side is quantised to, as in ggml; see quantize_rows.py for how it lies in scratch memory."""


@dataclass(frozen=True, slots=True)
class Format:
    """A quantised weight type.

    Offsets are bytes within a block. `shift` is where the scale lies (F16), `floor` the second one (Q4_1's m, Q4_K's
    dmin; absent: -1). A quant stands for its value minus `zero`. `span` is how many products of byte pairs fit into 16
    bits; `subs` is the number of sub-blocks with scales of their own (0: none).
    """

    dtype: DType
    activation: Activation
    scale: int
    floor: int
    quants: int
    zero: int
    span: int
    subs: int
    high: int = -1
    scales: int = -1

    @property
    def block(self) -> int:
        """Elements per block."""
        return self.dtype.block

    @property
    def nbytes(self) -> int:
        """Bytes per block."""
        return self.dtype.block_nbytes

    @property
    def chunks(self) -> int:
        """Vectors of 32 quants per block."""
        return self.block // 32

    @property
    def signed(self) -> bool:
        """True when quants are signed bytes: where bytes are multiplied four at a time, they are moved up by 128."""
        return self.dtype == DType.Q8_0 and not HAVE_VNNI


FORMATS: dict[int, Format] = {
    int(f.dtype): f
    for f in (
        Format(DType.Q4_0, "q8_0", scale=0, floor=-1, quants=2, zero=8, span=8, subs=0),
        Format(DType.Q4_1, "q8_1", scale=0, floor=2, quants=4, zero=0, span=8, subs=0),
        Format(DType.Q5_0, "q8_0", scale=0, floor=-1, high=2, quants=6, zero=16, span=4, subs=0),
        Format(DType.Q5_1, "q8_1", scale=0, floor=2, high=4, quants=8, zero=0, span=4, subs=0),
        Format(DType.Q8_0, "q8_0", scale=0, floor=-1, quants=2, zero=128 if HAVE_VNNI else 0, span=1, subs=0),
        Format(DType.Q4_K, "q8_K", scale=0, floor=2, scales=4, quants=16, zero=0, span=8, subs=8),
        Format(DType.Q5_K, "q8_K", scale=0, floor=2, scales=4, high=16, quants=48, zero=0, span=4, subs=8),
        Format(DType.Q6_K, "q8_K", scale=208, floor=-1, quants=0, high=128, scales=192, zero=32, span=2, subs=16),
    )
}
"""By the type's number."""


Fetch = Callable[[int], ir.Value]
"""32 bytes at an offset within a block, as i8x32, or one such vector with any bytes of several blocks."""


def unpack_quants(b: ir.IRBuilder, form: Format, where: ir.Value) -> list[ir.Value]:
    """The block at `where` as vectors of 32 bytes, in the order of its elements."""
    if form.dtype == DType.Q8_0:
        quants = load(b, where, i8x32.ir, form.quants)
        return [quants if form.signed else b.xor(quants, const(i8x32.ir, -128))]
    if form.subs:
        return unpack_super(b, form, lambda offset: load(b, where, i8x32.ir, offset))
    low = load(b, where, i8x16.ir, form.quants)
    both = shuffle(b, low, b.lshr(low, const(i8x16.ir, 4)), list(range(32)))
    nibbles = b.and_(both, const(i8x32.ir, 15))
    return [nibbles if form.high < 0 else b.or_(nibbles, _fifth_bits(b, load(b, where, I32, form.high)))]


def super_offset(form: Format) -> tuple[int, int]:
    """Where the bytes of a K block's quants begin, and how many times 32 there are."""
    bits = {DType.Q4_K: 4, DType.Q5_K: 5, DType.Q6_K: 6}[form.dtype]
    return (form.quants if form.high < 0 else min(form.quants, form.high)), bits * form.block // 8 // 32


def unpack_super(b: ir.IRBuilder, form: Format, fetch: Fetch) -> list[ir.Value]:
    """`unpack_quants` of a K block's bytes, byte by byte: they may also be in another order, the same in all."""
    if form.dtype == DType.Q6_K:
        return [v for half in (0, 1) for v in _six_bits(b, form, fetch, half)]
    return [v for pair in range(4) for v in _sub_block_pair(b, form, fetch, pair)]


def unpack_scales(b: ir.IRBuilder, form: Format, where: ir.Value) -> ir.Value:
    """A K block's small scales as i16x16: sixteen for Q6_K, else eight scales and eight minima."""
    if form.dtype == DType.Q6_K:
        return b.sext(load(b, where, i8x16.ir, form.scales), i16x16.ir)
    packed: ir.Value = const(i32x4.ir, 0)
    for k, part in enumerate(scale_words(b, [load(b, where, I32, form.scales + 4 * k) for k in range(3)])):
        packed = b.insert_element(packed, part, const(I32, k))
    return b.zext(b.bitcast(packed, i8x16.ir), i16x16.ir)


def scale_words(b: ir.IRBuilder, words: list[ir.Value]) -> list[ir.Value]:
    """Four words of bytes, eight scales and eight minima, from the three of Q4_K and Q5_K; also of several rows."""
    kind = words[0].type
    six, four, two = const(kind, 0x3F3F3F3F), const(kind, 0x0F0F0F0F), const(kind, 0x03030303)

    def upper(low: ir.Value, high: ir.Value) -> ir.Value:  # four values of 4 bits here and 2 bits there
        top = b.shl(b.and_(b.lshr(high, const(kind, 6)), two), const(kind, 4))
        return b.or_(b.and_(low, four), top)

    return [
        b.and_(words[0], six),
        upper(words[2], words[0]),
        b.and_(words[1], six),
        upper(b.lshr(words[2], const(kind, 4)), words[1]),
    ]


def _fifth_bits(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """32 bits to 32 bytes of 16 or 0."""
    spread = b.bitcast(splat(b, bits, i32x8.ir), i8x32.ir)
    spread = shuffle(b, spread, None, [i // 8 + 16 * (i // 16) for i in range(32)])
    chosen = b.and_(spread, const(i8x32.ir, [1 << i % 8 if i % 8 < 7 else -128 for i in range(32)]))
    return b.select(b.icmp_signed("!=", chosen, const(i8x32.ir, 0)), const(i8x32.ir, 16), const(i8x32.ir, 0))


def _sub_block_pair(b: ir.IRBuilder, form: Format, fetch: Fetch, pair: int) -> tuple[ir.Value, ir.Value]:
    """Sub-blocks 2 * pair (low nibbles) and 2 * pair + 1 of Q4_K and Q5_K."""
    both = fetch(form.quants + 32 * pair)
    low, high = b.and_(both, const(i8x32.ir, 15)), b.lshr(both, const(i8x32.ir, 4))
    if form.high < 0:
        return low, high
    bits = fetch(form.high)
    return b.or_(low, _moved_bits(b, bits, 2 * pair, 1)), b.or_(high, _moved_bits(b, bits, 2 * pair + 1, 1))


def _six_bits(b: ir.IRBuilder, form: Format, fetch: Fetch, half: int) -> list[ir.Value]:
    """128 elements of Q6_K: 4 bits from 64 bytes, 2 bits from 32 bytes."""
    first, second = (fetch(form.quants + 64 * half + 32 * k) for k in (0, 1))
    bits = fetch(form.high + 32 * half)
    mask, four = const(i8x32.ir, 15), const(i8x32.ir, 4)
    lower = [b.and_(first, mask), b.and_(second, mask), b.lshr(first, four), b.lshr(second, four)]
    return [b.or_(low, _moved_bits(b, bits, 2 * k, 3)) for k, low in enumerate(lower)]


def _moved_bits(b: ir.IRBuilder, bytes_: ir.Value, at: int, mask: int) -> ir.Value:
    """Bits `at` and up of each byte, as far as `mask` (1 or 3) keeps them, moved to bit 4."""
    move = const(i8x32.ir, abs(at - 4))
    moved = b.shl(bytes_, move) if at < 4 else b.lshr(bytes_, move)
    return b.and_(moved, const(i8x32.ir, mask << 4))
