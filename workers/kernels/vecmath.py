"""Elementary functions of vectors of floats; the polynomials were fitted for this project (Lawson's minimax).

Errors, against exact values: exp8 1.0 ulp over the whole range, denormal results and infinity included; tanh8 1.5 ulp;
phi8 (the normal distribution's integral) 2e-7 of its value down to -5 and 1e-6 of it behind. A lane's result depends on
that lane alone, so a tail is computed by the same code on a padded vector.
"""

from __future__ import annotations

import math
from typing import Any

from workers.kernels.emit import (
    F32,
    F64,
    I32,
    I64,
    call,
    const,
    f32x8,
    fma,
    kind,
    larger,
    load,
    shuffle,
    smaller,
    splat,
    store,
)
from workers.kernels.jit import ir, types
from workers.kernels.simd import address, make

_LOG2E = 1.4426950408889634
_LN2_UPPER = 0.693145751953125  # 16 bits: its product with an exponent is exact
_LN2_LOWER = 1.4286068203094172e-06
_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, which then stands in the lower bits
_ROUNDER_BITS = 0x4B400000

_EXP = (0.4999999403953552, 0.16666515171527863, 0.04166845604777336, 0.008369418792426586, 0.001381314592435956)
"""(exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2."""

_TANH = (-0.33333277702331543, 0.13331331312656403, -0.05373000726103783, 0.020606176927685738, -0.005666978191584349)
"""(tanh(x) - x) / x**3 in powers of x**2 on |x| <= 0.63."""

_HALF_PI = 1.5707963267948966, 6.123233995736766e-17
"""pi / 2 as a sum."""

_WHOLE = 6755399441055744.0
"""1.5 * 2**52: adding it rounds a float64 to an integer, which then stands in the lower bits."""

_ERFC = (
    -1.2654414176940918, 0.9984925389289856, 0.3878997564315796, 0.028357047587633133, 0.020196078345179558,
    -0.11678755283355713, -0.651248574256897, 1.1224011182785034, -0.6660631895065308, 0.14219428598880768,
)  # fmt: skip
"""ln(erfc(x) / t) + x**2 in powers of t = 1 / (1 + x / 2), x >= 0."""


def _c(x: ir.Value, value: float) -> ir.Constant:
    """A constant in as many lanes as x has."""
    return const(x.type, value)


def _i(x: ir.Value) -> ir.VectorType:
    """Integers in as many lanes as x has."""
    return ir.VectorType(I32, x.type.count)


def _abs(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return call(b, f"llvm.fabs.{kind(x.type)}", x.type, [x])


def _polynomial(b: ir.IRBuilder, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    """Horner's scheme."""
    value: ir.Value = _c(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = fma(b, value, x, _c(x, coefficient))
    return value


def _power_of_two(b: ir.IRBuilder, exponent: ir.Value) -> ir.Value:
    lanes = exponent.type
    biased = b.add(exponent, const(lanes, 127))
    return b.bitcast(b.shl(biased, const(lanes, 23)), ir.VectorType(F32, lanes.count))


def emit_exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e**x. The power of two is applied in two factors, so that results may be denormal or infinite."""
    lost = b.fcmp_ordered("<", x, _c(x, -103.97208))
    x = b.select(lost, _c(x, -104.0), x)
    x = b.select(b.fcmp_ordered(">", x, _c(x, 89.0)), _c(x, 89.0), x)
    shifted = fma(b, x, _c(x, _LOG2E), _c(x, _ROUNDER))
    whole = b.fsub(shifted, _c(x, _ROUNDER))
    r = fma(b, whole, _c(x, -_LN2_UPPER), x)
    r = fma(b, whole, _c(x, -_LN2_LOWER), r)
    value = fma(b, b.fmul(r, r), _polynomial(b, r, _EXP), r)
    value = b.select(lost, _c(x, 0.0), b.fadd(value, _c(x, 1.0)))
    exponent = b.sub(b.bitcast(shifted, _i(x)), const(_i(x), _ROUNDER_BITS))
    half = b.ashr(exponent, const(_i(x), 1))
    value = b.fmul(value, _power_of_two(b, half))
    return b.fmul(value, _power_of_two(b, b.sub(exponent, half)))


def _one_plus_exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 + e**x, the bits of emit_exp's result plus 1: no denormal power changes the 1, so one factor is enough.

    The factor is half of the power of two, which for the largest results is no float, and its other operand the double.
    """
    x = smaller(b, _c(x, 89.0), larger(b, _c(x, -87.0), x))
    shifted = fma(b, x, _c(x, _LOG2E), _c(x, _ROUNDER))
    whole = b.fsub(shifted, _c(x, _ROUNDER))
    r = fma(b, whole, _c(x, -_LN2_UPPER), x)
    r = fma(b, whole, _c(x, -_LN2_LOWER), r)
    value = fma(b, b.fmul(r, r), _polynomial(b, r, _EXP), r)
    value = b.fadd(value, _c(x, 1.0))
    half = b.add(b.shl(b.bitcast(shifted, _i(x)), const(_i(x), 23)), const(_i(x), 126 << 23))
    return b.fadd(_c(x, 1.0), b.fmul(b.fadd(value, value), b.bitcast(half, x.type)))


def emit_sigmoid(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + e**-x)."""
    return b.fdiv(_c(x, 1.0), _one_plus_exp(b, b.fneg(x)))


def emit_tanh(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Near 0 a polynomial, else 1 - 2 / (e**2|x| + 1)."""
    size = _abs(b, x)
    far = b.fsub(_c(x, 1.0), b.fdiv(_c(x, 2.0), _one_plus_exp(b, b.fadd(size, size))))
    far = call(b, f"llvm.copysign.{kind(x.type)}", x.type, [far, x])
    square = b.fmul(x, x)
    near = fma(b, b.fmul(square, x), _polynomial(b, square, _TANH), x)
    return b.select(b.fcmp_ordered("<", size, _c(x, 0.625)), near, far)


def emit_phi(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """(1 + erf(x / sqrt(2))) / 2 by erfc of the absolute value, so that it stays precise far below 0."""
    size = b.fmul(_abs(b, x), _c(x, 0.7071067811865476))
    t = b.fdiv(_c(x, 1.0), fma(b, size, _c(x, 0.5), _c(x, 1.0)))
    exponent = fma(b, b.fneg(size), size, _polynomial(b, t, _ERFC))
    lower = b.fmul(b.fmul(t, _c(x, 0.5)), emit_exp(b, exponent))
    lower = b.select(b.fcmp_unordered("uno", x, x), x, lower)
    return b.select(b.fcmp_ordered("<", x, _c(x, 0.0)), lower, b.fsub(_c(x, 1.0), lower))


def emit_silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x * sigmoid(x)."""
    return b.fdiv(x, _one_plus_exp(b, b.fneg(x)))


def emit_gelu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The tanh form, as x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x**3)."""
    u = b.fmul(b.fmul(x, _c(x, -1.5957691216057308)), fma(b, b.fmul(x, x), _c(x, 0.044715), _c(x, 1.0)))
    return b.fdiv(x, _one_plus_exp(b, u))


def emit_gelu_erf(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x * phi(x)."""
    return b.fmul(x, emit_phi(b, x))


def emit_gelu_quick(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x * sigmoid(1.702 x)."""
    return b.fdiv(x, _one_plus_exp(b, b.fmul(x, _c(x, -1.702))))


def _one(emit: Any) -> Any:
    return make(f32x8, f32x8)(emit)


exp8, neg8 = _one(emit_exp), _one(lambda b, x: b.fneg(x))
swap_pairs8 = _one(lambda b, x: shuffle(b, x, None, [1, 0, 3, 2, 5, 4, 7, 6]))


@make(types.void, address, types.float64)
def turn8(b: ir.IRBuilder, where: ir.Value, magnitude: ir.Value) -> None:
    """In place of eight float64 angles: their eight cosines, then their eight sines, times `magnitude`, as float32.

    In float64, within 2e-16 of the exact values up to 2**31; the series are Taylor's, on |r| <= pi / 4.
    """
    lanes, wide = ir.VectorType(F64, 8), ir.VectorType(I64, 8)

    def c(value: float) -> ir.Constant:
        return const(lanes, value)

    def fused(x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        return call(b, "llvm.fma.v8f64", lanes, [x, y, z])

    angle = load(b, where, lanes)
    shifted = b.fadd(b.fmul(angle, c(1 / _HALF_PI[0])), c(_WHOLE))
    quarters = b.fneg(b.fsub(shifted, c(_WHOLE)))
    r = fused(quarters, c(_HALF_PI[1]), fused(quarters, c(_HALF_PI[0]), angle))
    square = b.fmul(r, r)
    cosine, sine = c(1 / math.factorial(16)), c(-1 / math.factorial(15))
    for n in range(14, 0, -2):
        sign = -1 if n // 2 % 2 else 1
        cosine = fused(cosine, square, c(sign / math.factorial(n)))
        if n > 2:
            sine = fused(sine, square, c(sign * -1 / math.factorial(n - 1)))
    cosine, sine = fused(cosine, square, c(1.0)), fused(b.fmul(sine, square), r, r)
    turns = b.bitcast(shifted, wide)
    odd = b.icmp_signed("!=", b.and_(turns, const(wide, 1)), const(wide, 0))
    for k, (even_turns, odd_turns) in enumerate(((cosine, sine), (sine, cosine))):
        bits = b.bitcast(b.select(odd, odd_turns, even_turns), wide)
        negative = b.and_(b.shl(b.add(turns, const(wide, 1 - k)), const(wide, 62)), const(wide, -(1 << 63)))
        value = b.fmul(b.bitcast(b.xor(bits, negative), lanes), splat(b, magnitude, lanes))
        store(b, b.fptrunc(value, f32x8.ir), where, 32 * k)


def _spread(first: int) -> Any:
    lanes = [first + i // 2 for i in range(8)]
    return make(f32x8, f32x8)(lambda b, x: shuffle(b, x, None, lanes))


spread_low8, spread_high8 = _spread(0), _spread(4)
"""Four lanes, each of them twice."""
alternate8 = _one(lambda b, x: b.fmul(x, const(f32x8.ir, [-1.0, 1.0] * 4)))
"""Every other lane's sign turned, from the first on."""
