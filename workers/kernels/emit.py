"""Vector types for numba, and the LLVM code of what simd.py offers: building blocks for intrinsics.

The blocks take an IRBuilder and LLVM values, know nothing of numba's types, and give the same bits on every CPU.
"""

from __future__ import annotations

from typing import Any

from workers.kernels.features import HAVE_AVX2, HAVE_AVX512, HAVE_F16C, HAVE_VNNI
from workers.kernels.jit import cgutils, ir, models, register_model, types

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class VectorType(types.Type):  # type: ignore[misc]
    """A numba type whose value is an LLVM vector of `count` elements."""

    def __init__(self, name: str, element: ir.Type, count: int) -> None:
        self.ir = ir.VectorType(element, count)
        super().__init__(name=name)


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: VectorType) -> None:
        super().__init__(manager, fe_type, fe_type.ir)


f32x8, f32x4 = VectorType("f32x8", F32, 8), VectorType("f32x4", F32, 4)
i32x8, i32x4 = VectorType("i32x8", I32, 8), VectorType("i32x4", I32, 4)
i16x16, i16x8 = VectorType("i16x16", I16, 16), VectorType("i16x8", I16, 8)
i8x32, i8x16 = VectorType("i8x32", I8, 32), VectorType("i8x16", I8, 16)
mask8 = VectorType("mask8", I1, 8)


def pointer(b: ir.IRBuilder, where: ir.Value, offset: int, to: ir.Type) -> ir.Value:
    """Pointer of type `to`* to `where` + `offset` bytes.

    LLVM may see an address plus a constant as an offset from that constant, and take it for null where it is 0:
    functions that make pointers of numbers must not be optimised as if null were never read.
    """
    set.add(b.function.attributes, "null_pointer_is_valid")  # llvmlite's own list of attributes lacks it
    return b.inttoptr(b.add(where, ir.Constant(I64, offset)) if offset else where, to.as_pointer())


def load(b: ir.IRBuilder, where: ir.Value, to: ir.Type, offset: int = 0) -> ir.Value:
    """A value of type `to` at `where` + `offset`, aligned or not."""
    return b.load(pointer(b, where, offset, to), align=1)


def store(b: ir.IRBuilder, value: ir.Value, where: ir.Value, offset: int = 0) -> None:
    """Write `value` at `where` + `offset`, aligned or not."""
    b.store(value, pointer(b, where, offset, value.type), align=1)


def call(b: ir.IRBuilder, name: str, to: ir.Type, args: list[ir.Value]) -> ir.Value:
    """Call an LLVM intrinsic."""
    function = ir.FunctionType(to, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, function, name), args)


def opaque(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same i64, of which LLVM knows nothing: sums with it stay what the code says.

    Offsets that many base addresses share are worth one register; LLVM would give each sum a register of its own.
    """
    return b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [value], False)


def const(to: ir.Type, value: Any) -> ir.Constant:
    """A constant; for a vector type the same one in all lanes, or a list of them."""
    if isinstance(to, ir.VectorType):
        value = list(value) if isinstance(value, (list, tuple)) else [value] * to.count
    return ir.Constant(to, value)


def shuffle(b: ir.IRBuilder, u: ir.Value, v: ir.Value | None, lanes: list[int]) -> ir.Value:
    """Pick lanes: those of `u` count from 0, those of `v` from behind them."""
    v = ir.Constant(u.type, ir.Undefined) if v is None else v
    return b.shuffle_vector(u, v, const(ir.VectorType(I32, len(lanes)), lanes))


def splat(b: ir.IRBuilder, scalar: ir.Value, to: ir.VectorType) -> ir.Value:
    """The scalar in all lanes."""
    first = b.insert_element(ir.Constant(to, ir.Undefined), scalar, const(I32, 0))
    return shuffle(b, first, None, [0] * to.count)


def kind(to: ir.Type) -> str:
    """How names of LLVM's intrinsics end for F32 and vectors of it."""
    return f"v{to.count}f32" if isinstance(to, ir.VectorType) else "f32"


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once, also where the CPU has no such instruction (then by libm)."""
    return call(b, f"llvm.fma.{kind(x.type)}", x.type, [x, y, z])


def widen_half(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """F16 as i16 (one or a vector) to F32, exactly; signalling NaNs become quiet."""
    wide = ir.VectorType(I32, bits.type.count) if isinstance(bits.type, ir.VectorType) else I32
    real = ir.VectorType(F32, wide.count) if isinstance(wide, ir.VectorType) else F32
    if HAVE_F16C:
        half = ir.VectorType(F16, wide.count) if isinstance(wide, ir.VectorType) else F16
        return b.fpext(b.bitcast(bits, half), real)
    h = b.zext(bits, wide)
    sign = b.shl(b.and_(h, const(wide, 0x8000)), const(wide, 16))
    size = b.and_(h, const(wide, 0x7FFF))
    moved = b.shl(size, const(wide, 13))
    small = b.bitcast(b.fmul(b.sitofp(size, real), const(real, 2.0**-24)), wide)
    value = b.select(b.icmp_signed("<", size, const(wide, 0x400)), small, b.add(moved, const(wide, 112 << 23)))
    special = b.or_(moved, const(wide, 0x7F800000))
    value = b.select(b.icmp_signed(">=", size, const(wide, 0x7C00)), special, value)
    value = b.select(b.icmp_signed(">", size, const(wide, 0x7C00)), b.or_(value, const(wide, 0x400000)), value)
    return b.bitcast(b.or_(value, sign), real)


def narrow_half(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """F32 (one or a vector) to F16 as i16, half to even; NaNs stay NaN with their upper bits."""
    count = value.type.count if isinstance(value.type, ir.VectorType) else 0
    wide, short = (ir.VectorType(I32, count), ir.VectorType(I16, count)) if count else (I32, I16)
    if HAVE_F16C:
        return b.bitcast(b.fptrunc(value, ir.VectorType(F16, count) if count else F16), short)
    bits = b.bitcast(value, wide)
    sign = b.and_(b.lshr(bits, const(wide, 16)), const(wide, 0x8000))
    size = b.and_(bits, const(wide, 0x7FFFFFFF))
    upper = b.lshr(size, const(wide, 13))
    odd = b.and_(upper, const(wide, 1))
    rounded = b.add(b.add(b.sub(size, const(wide, 112 << 23)), const(wide, 0xFFF)), odd)
    normal = b.lshr(rounded, const(wide, 13))
    half = const(value.type, 0.5)  # adding it leaves a subnormal's bits, rounded, at the lower end
    small = b.sub(b.bitcast(b.fadd(b.bitcast(size, value.type), half), wide), const(wide, 0x3F000000))
    result = b.select(b.icmp_signed("<", size, const(wide, 0x38800000)), small, normal)
    result = b.select(b.icmp_signed(">=", size, const(wide, 0x477FF000)), const(wide, 0x7C00), result)
    nan = b.or_(b.and_(upper, const(wide, 0x3FF)), const(wide, 0x7E00))
    result = b.select(b.icmp_signed(">", size, const(wide, 0x7F800000)), nan, result)
    return b.trunc(b.or_(result, sign), short)


def widen_bfloat(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """BF16 as i16 (one or a vector) to F32, exactly."""
    count = bits.type.count if isinstance(bits.type, ir.VectorType) else 0
    wide, real = (ir.VectorType(I32, count), ir.VectorType(F32, count)) if count else (I32, F32)
    return b.bitcast(b.shl(b.zext(bits, wide), const(wide, 16)), real)


def narrow_bfloat(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """F32 (one or a vector) to BF16 as i16, half to even; NaNs become quiet."""
    count = value.type.count if isinstance(value.type, ir.VectorType) else 0
    wide, short = (ir.VectorType(I32, count), ir.VectorType(I16, count)) if count else (I32, I16)
    bits = b.bitcast(value, wide)
    upper = b.lshr(bits, const(wide, 16))
    rounded = b.lshr(b.add(b.add(bits, const(wide, 0x7FFF)), b.and_(upper, const(wide, 1))), const(wide, 16))
    nan = b.icmp_signed(">", b.and_(bits, const(wide, 0x7FFFFFFF)), const(wide, 0x7F800000))
    return b.trunc(b.select(nan, b.or_(upper, const(wide, 64)), rounded), short)


def round_to_int(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """F32 vector to i32, half to even, saturating; NaN becomes 0.

    LLVM's own saturating conversion goes lane by lane, with branches.
    """
    whole, edge = call(b, "llvm.rint.v8f32", f32x8.ir, [value]), const(f32x8.ir, 2.0**31)
    beyond = b.fcmp_ordered(">=", whole, edge)
    inside = b.select(b.fcmp_ordered("<", whole, edge), whole, const(f32x8.ir, 0.0))
    inside = larger(b, inside, b.fneg(edge))
    return b.select(beyond, const(i32x8.ir, 2**31 - 1), b.fptosi(inside, i32x8.ir))


def sum_lanes(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """Sum of eight F32 lanes: halves of 4, then of 2, then 1."""
    v = b.fadd(shuffle(b, v, None, [4, 5, 6, 7]), shuffle(b, v, None, [0, 1, 2, 3]))
    v = b.fadd(v, shuffle(b, v, None, [2, 3, 2, 3]))
    return b.fadd(b.extract_element(v, const(I32, 0)), b.extract_element(v, const(I32, 1)))


def max_of_lanes(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """The largest of eight F32 lanes; NaN lanes may or may not be passed over, always in the same way."""
    for lanes in ([4, 5, 6, 7, 0, 1, 2, 3], [2, 3, 0, 1, 6, 7, 4, 5], [1, 0, 3, 2, 5, 4, 7, 6]):
        v = larger(b, v, shuffle(b, v, None, lanes))
    return b.extract_element(v, const(I32, 0))


def larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """x where x > y, else y (so y where one of them is NaN)."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def smaller(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """x where x < y, else y (so y where one of them is NaN)."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def multiply_bytes(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """i8x32 pairs to i16x16: x[2i] * y[2i] + x[2i+1] * y[2i+1], x unsigned, y signed, saturating."""
    if HAVE_AVX2:
        return call(b, "llvm.x86.avx2.pmadd.ub.sw", i16x16.ir, [x, y])
    wide = ir.VectorType(I32, 16)
    even, odd = list(range(0, 32, 2)), list(range(1, 32, 2))
    products = [
        b.mul(b.zext(shuffle(b, x, None, lanes), wide), b.sext(shuffle(b, y, None, lanes), wide))
        for lanes in (even, odd)
    ]
    total = b.add(*products)
    total = b.select(b.icmp_signed(">", total, const(wide, 32767)), const(wide, 32767), total)
    total = b.select(b.icmp_signed("<", total, const(wide, -32768)), const(wide, -32768), total)
    return b.trunc(total, i16x16.ir)


def multiply_shorts(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """i16x16 pairs to i32x8: x[2i] * y[2i] + x[2i+1] * y[2i+1], both signed; i16x32 to i32x16 with HAVE_AVX512."""
    if x.type.count == 32:
        assert HAVE_AVX512
        return call(b, "llvm.x86.avx512.pmaddw.d.512", ir.VectorType(I32, 16), [x, y])
    if HAVE_AVX2:
        return call(b, "llvm.x86.avx2.pmadd.wd", i32x8.ir, [x, y])
    even, odd = list(range(0, 16, 2)), list(range(1, 16, 2))
    products = [
        b.mul(b.sext(shuffle(b, x, None, lanes), i32x8.ir), b.sext(shuffle(b, y, None, lanes), i32x8.ir))
        for lanes in (even, odd)
    ]
    return b.add(*products)


def add_products(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """i32x8: total + the products of four bytes each, x (i8x32) unsigned, y (i8x32) signed; only with HAVE_VNNI.

    With HAVE_AVX512 also twice as many lanes of each.
    """
    assert HAVE_AVX512 or (HAVE_VNNI and total.type.count == 8)
    to = total.type
    lanes = [total, b.bitcast(x, to), b.bitcast(y, to)]  # as LLVM had it before 22; it reads that, too
    return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * to.count}", to, lanes)


def apply_sign(b: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    """i8x32: x, -x or 0 as `by` is positive, negative or 0."""
    if HAVE_AVX2:
        return call(b, "llvm.x86.avx2.psign.b", i8x32.ir, [x, by])
    zero = const(i8x32.ir, 0)
    signed = b.select(b.icmp_signed("<", by, zero), b.sub(zero, x), x)
    return b.select(b.icmp_signed("==", by, zero), zero, signed)


def prefetch_line(b: ir.IRBuilder, where: ir.Value, offset: int = 0) -> None:
    """Ask for the cache line at `where` + `offset`, which need not exist, to come to the second-level cache.

    The first level is too small for what is asked for far ahead: that halved the rate of products from memory.
    """
    read, second_level, data = const(I32, 0), const(I32, 2), const(I32, 1)
    call(b, "llvm.prefetch.p0", ir.VoidType(), [pointer(b, where, offset, I8), read, second_level, data])


def load_part(b: ir.IRBuilder, where: ir.Value, count: ir.Value, to: ir.VectorType) -> ir.Value:
    """The first `count` (1 to 7) of eight lanes, zeros behind; reads nothing beyond them."""
    size = to.element.width // 8 if isinstance(to.element, ir.IntType) else 4
    last = b.sub(count, const(I64, 1))
    vector: ir.Value = const(to, 0)
    for lane in range(8):
        inside = b.icmp_signed("<", const(I64, lane), count)
        index = b.select(inside, const(I64, lane), last)
        value = load(b, b.add(where, b.mul(index, const(I64, size))), to.element)
        vector = b.insert_element(vector, b.select(inside, value, const(to.element, 0)), const(I32, lane))
    return vector


def store_part(b: ir.IRBuilder, vector: ir.Value, where: ir.Value, count: ir.Value) -> None:
    """Write the first `count` of eight lanes and touch nothing behind them."""
    size = vector.type.element.width // 8 if isinstance(vector.type.element, ir.IntType) else 4
    for lane in range(8):
        with b.if_then(b.icmp_signed("<", const(I64, lane), count)):
            store(b, b.extract_element(vector, const(I32, lane)), where, lane * size)
