"""Elementary functions of eight floats at once; the polynomials were fitted for this project (Lawson's minimax).

Errors, against exact values: exp8 1.0 ulp over the whole range, denormal results and infinity included; tanh8 1.5 ulp;
phi8 (the normal distribution's integral) 2e-7 of its value down to -5 and 1e-6 of it behind. A lane's result depends on
that lane alone, so a tail is computed by the same code on a padded vector.
"""

from __future__ import annotations

from typing import Any

from workers.kernels.emit import call, const, f32x8, fma, i32x8, shuffle
from workers.kernels.jit import ir
from workers.kernels.simd import make

_LOG2E = 1.4426950408889634
_LN2_UPPER = 0.693145751953125  # 16 bits: its product with an exponent is exact
_LN2_LOWER = 1.4286068203094172e-06
_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, which then stands in the lower bits
_ROUNDER_BITS = 0x4B400000

_EXP = (0.4999999403953552, 0.16666515171527863, 0.04166845604777336, 0.008369418792426586, 0.001381314592435956)
"""(exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2."""

_TANH = (-0.33333277702331543, 0.13331331312656403, -0.05373000726103783, 0.020606176927685738, -0.005666978191584349)
"""(tanh(x) - x) / x**3 in powers of x**2 on |x| <= 0.63."""

_ERFC = (
    -1.2654414176940918, 0.9984925389289856, 0.3878997564315796, 0.028357047587633133, 0.020196078345179558,
    -0.11678755283355713, -0.651248574256897, 1.1224011182785034, -0.6660631895065308, 0.14219428598880768,
)  # fmt: skip
"""ln(erfc(x) / t) + x**2 in powers of t = 1 / (1 + x / 2), x >= 0."""


def _c(value: float) -> ir.Constant:
    return const(f32x8.ir, value)


def _polynomial(b: ir.IRBuilder, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    """Horner's scheme."""
    value: ir.Value = _c(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = fma(b, value, x, _c(coefficient))
    return value


def _power_of_two(b: ir.IRBuilder, exponent: ir.Value) -> ir.Value:
    biased = b.add(exponent, const(i32x8.ir, 127))
    return b.bitcast(b.shl(biased, const(i32x8.ir, 23)), f32x8.ir)


def emit_exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e**x. The power of two is applied in two factors, so that results may be denormal or infinite."""
    lost = b.fcmp_ordered("<", x, _c(-103.97208))
    x = b.select(lost, _c(-104.0), x)
    x = b.select(b.fcmp_ordered(">", x, _c(89.0)), _c(89.0), x)
    shifted = fma(b, x, _c(_LOG2E), _c(_ROUNDER))
    whole = b.fsub(shifted, _c(_ROUNDER))
    r = fma(b, whole, _c(-_LN2_UPPER), x)
    r = fma(b, whole, _c(-_LN2_LOWER), r)
    value = fma(b, b.fmul(r, r), _polynomial(b, r, _EXP), r)
    value = b.select(lost, _c(0.0), b.fadd(value, _c(1.0)))
    exponent = b.sub(b.bitcast(shifted, i32x8.ir), const(i32x8.ir, _ROUNDER_BITS))
    half = b.ashr(exponent, const(i32x8.ir, 1))
    value = b.fmul(value, _power_of_two(b, half))
    return b.fmul(value, _power_of_two(b, b.sub(exponent, half)))


def emit_sigmoid(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + e**-x)."""
    return b.fdiv(_c(1.0), b.fadd(_c(1.0), emit_exp(b, b.fneg(x))))


def emit_tanh(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Near 0 a polynomial, else 1 - 2 / (e**2|x| + 1)."""
    size = call(b, "llvm.fabs.v8f32", f32x8.ir, [x])
    far = b.fadd(emit_exp(b, b.fadd(size, size)), _c(1.0))
    far = b.fsub(_c(1.0), b.fdiv(_c(2.0), far))
    far = call(b, "llvm.copysign.v8f32", f32x8.ir, [far, x])
    square = b.fmul(x, x)
    near = fma(b, b.fmul(square, x), _polynomial(b, square, _TANH), x)
    return b.select(b.fcmp_ordered("<", size, _c(0.625)), near, far)


def emit_phi(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """(1 + erf(x / sqrt(2))) / 2 by erfc of the absolute value, so that it stays precise far below 0."""
    size = b.fmul(call(b, "llvm.fabs.v8f32", f32x8.ir, [x]), _c(0.7071067811865476))
    t = b.fdiv(_c(1.0), fma(b, size, _c(0.5), _c(1.0)))
    exponent = fma(b, b.fneg(size), size, _polynomial(b, t, _ERFC))
    lower = b.fmul(b.fmul(t, _c(0.5)), emit_exp(b, exponent))
    lower = b.select(b.fcmp_unordered("uno", x, x), x, lower)
    return b.select(b.fcmp_ordered("<", x, _c(0.0)), lower, b.fsub(_c(1.0), lower))


def emit_silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x * sigmoid(x)."""
    return b.fdiv(x, b.fadd(_c(1.0), emit_exp(b, b.fneg(x))))


def emit_gelu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The tanh form, as x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x**3)."""
    u = b.fmul(b.fmul(x, _c(-1.5957691216057308)), fma(b, b.fmul(x, x), _c(0.044715), _c(1.0)))
    return b.fdiv(x, b.fadd(_c(1.0), emit_exp(b, u)))


def emit_gelu_erf(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x * phi(x)."""
    return b.fmul(x, emit_phi(b, x))


def emit_gelu_quick(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x * sigmoid(1.702 x)."""
    return b.fdiv(x, b.fadd(_c(1.0), emit_exp(b, b.fmul(x, _c(-1.702)))))


def _one(emit: Any) -> Any:
    return make(f32x8, f32x8)(emit)


exp8, neg8 = _one(emit_exp), _one(lambda b, x: b.fneg(x))
swap_pairs8 = _one(lambda b, x: shuffle(b, x, None, [1, 0, 3, 2, 5, 4, 7, 6]))
