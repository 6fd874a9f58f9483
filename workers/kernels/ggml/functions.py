"""Functions of the C library, and exp(x) of eight floats as ggml has it."""

from __future__ import annotations

from typing import Any

from workers.kernels.emit import F32, I32, call, const, f32x8, fma, i32x8, shuffle
from workers.kernels.jit import ir, types
from workers.kernels.simd import make

_REAL = types.float32
_LOG2E = float.fromhex("0x1.715476p+0")
_LN2_UPPER, _LN2_LOWER = float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20")
_ROUNDER, _ROUNDER_BITS = 12582912.0, 0x4B400000  # 1.5 * 2**23: a number plus this keeps its integer in the lower bits
_C1, _C2, _C3, _C4, _C5 = (
    float.fromhex(c) for c in ("0x1.ffffecp-1", "0x1.fffdb6p-2", "0x1.555e66p-3", "0x1.573e2ep-5", "0x1.0e4020p-7")
)
"""exp(r) = 1 + _C1 r + _C2 r**2 + ... on |r| <= ln(2) / 2: Arm's optimized-routines, as ggml has them."""


def _library(name: str) -> Any:
    return make(_REAL, _REAL)(lambda b, x: call(b, name, F32, [x]))


expf, cosf, sinf = _library("expf"), _library("cosf"), _library("sinf")
powf = make(_REAL, _REAL, _REAL)(lambda b, x, y: call(b, "powf", F32, [x, y]))
sqrtf = make(_REAL, _REAL)(lambda b, x: call(b, "llvm.sqrt.f32", F32, [x]))


def _c(value: float) -> ir.Constant:
    return const(f32x8.ir, value)


def _power_of_two(b: ir.IRBuilder, exponent: ir.Value) -> ir.Value:
    return b.bitcast(b.shl(b.add(exponent, const(i32x8.ir, 127)), const(i32x8.ir, 23)), f32x8.ir)


def emit_exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e**x: 2**n times a polynomial of the rest; in two steps where 2**n may not be a normal number."""
    shifted = fma(b, x, _c(_LOG2E), _c(_ROUNDER))
    n = b.fsub(shifted, _c(_ROUNDER))
    r = fma(b, n, _c(-_LN2_LOWER), fma(b, n, _c(-_LN2_UPPER), x))
    square = b.fmul(r, r)
    upper = fma(b, fma(b, _c(_C5), r, _c(_C4)), square, fma(b, _c(_C3), r, _c(_C2)))
    less_one = fma(b, upper, square, b.fmul(_c(_C1), r))
    exponent = b.sub(b.bitcast(shifted, i32x8.ir), const(i32x8.ir, _ROUNDER_BITS))
    scale = _power_of_two(b, exponent)
    near = fma(b, scale, less_one, scale)
    large = b.fcmp_ordered(">", n, _c(0.0))
    first = b.select(large, const(i32x8.ir, 127), const(i32x8.ir, -125))
    outer, inner = _power_of_two(b, first), _power_of_two(b, b.sub(exponent, first))
    far = b.fmul(fma(b, inner, less_one, inner), outer)
    size = call(b, "llvm.fabs.v8f32", f32x8.ir, [n])
    beyond = b.fcmp_ordered(">", size, _c(192.0))
    result = b.select(b.fcmp_ordered(">", size, _c(126.0)), far, near)
    return b.select(beyond, b.fmul(outer, outer), result)


def emit_silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x / (1 + e**-x)."""
    return b.fdiv(x, b.fadd(_c(1.0), emit_exp(b, b.fsub(_c(0.0), x))))


exp8, silu8 = make(f32x8, f32x8)(emit_exp), make(f32x8, f32x8)(emit_silu)


def emit_sum_neighbours(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """Eight lanes to one: 4 and 4, then neighbours, then both pairs."""
    v = b.fadd(shuffle(b, v, None, [0, 1, 2, 3]), shuffle(b, v, None, [4, 5, 6, 7]))
    x = [b.extract_element(v, const(I32, i)) for i in range(4)]
    return b.fadd(b.fadd(x[0], x[1]), b.fadd(x[2], x[3]))


sum_neighbours = make(_REAL, f32x8)(emit_sum_neighbours)
