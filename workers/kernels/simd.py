"""Vectors of 128 and 256 bits for numba: types that live in registers and the functions on them.

Addresses are int64, no alignment is needed. Every function gives the same bits on every CPU: where an x86 instruction
is used, `features` decides, and the code that stands in for it is exact. Comparisons with NaN are false.

    load_T(address) store_T(address, v)      f32x8 i32x8 i16x16 i16x8 i8x32 i8x16; f16x8 and bf16x8 convert to f32x8
    load_T_part(address, n) store_T_part(address, v, n)     the first n of 1 to 7 lanes, 0 behind: f32x8 f16x8 bf16x8
    load_s(address) store_s(address, x)      f32 i64 i32 u32 i16 u16 i8 u8; f16 and bf16 convert to float32; store_f64
    splat_f32x8(x) zero_T()                  add_T, and sub mul div of f32x8, (a, b); fma_f32x8(a, b, c): a * b + c
    sum_f32x8(v) max_of_f32x8(v) sum_i32x8(v)               across lanes in one fixed order
    max_f32x8 min_f32x8 max_f32 min_f32      (a, b): b where one of them is NaN
    less_f32x8(a, b) select_f32x8(mask, a, b)               lane by lane
    to_f32x8(i32x8) to_i32x8(f32x8)          the latter rounds half to even and saturates, NaN becomes 0
    narrow_i32x8(address, v)                 store the low bytes of eight i32
    bits_f32x8(i32x8) bits_i32x8(f32x8) bits_f32(i32) bits_i32(f32)      the same bits, another type
"""

from __future__ import annotations

from typing import Any

from workers.kernels.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    i8x16,
    i8x32,
    i16x8,
    i16x16,
    larger,
    load,
    load_part,
    mask8,
    max_of_lanes,
    multiply_bytes,
    multiply_shorts,
    narrow_bfloat,
    narrow_half,
    prefetch_line,
    round_to_int,
    smaller,
    splat,
    store,
    store_part,
    sum_lanes,
    widen_bfloat,
    widen_half,
)
from workers.kernels.emit import call as call
from workers.kernels.emit import const as const
from workers.kernels.emit import f32x8 as f32x8
from workers.kernels.emit import fma as fma
from workers.kernels.emit import i32x8 as i32x8
from workers.kernels.emit import shuffle as shuffle
from workers.kernels.jit import intrinsic, ir, types

address = types.int64


def make(result: Any, *args: Any) -> Any:
    """Decorate `emit(builder, *values) -> value or None`: a function of these numba types for compiled code."""

    def decorate(emit: Any) -> Any:
        def generate(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            made = emit(b, *values)
            return context.get_dummy_value() if made is None else made

        # numba wants one named argument per type
        names = ", ".join(f"a{k}" for k in range(len(args)))
        scope: dict[str, Any] = {"signature": result(*args), "generate": generate}
        exec(f"def function(context{', ' + names if names else ''}): return signature, generate", scope)
        return intrinsic(scope["function"])

    return decorate


def _loader(result: Any, to: ir.Type, convert: Any = None) -> Any:
    return make(result, address)(lambda b, where: convert(b, load(b, where, to)) if convert else load(b, where, to))


def _storer(value: Any, convert: Any = None) -> Any:
    return make(types.void, address, value)(lambda b, where, v: store(b, convert(b, v) if convert else v, where))


def _part_loader(to: ir.Type, convert: Any = None) -> Any:
    return make(f32x8, address, types.int64)(
        lambda b, where, n: convert(b, load_part(b, where, n, to)) if convert else load_part(b, where, n, to)
    )


def _part_storer(convert: Any = None) -> Any:
    return make(types.void, address, f32x8, types.int64)(
        lambda b, where, v, n: store_part(b, convert(b, v) if convert else v, where, n)
    )


load_f32x8, load_i32x8 = _loader(f32x8, f32x8.ir), _loader(i32x8, i32x8.ir)
load_i16x16, load_i16x8 = _loader(i16x16, i16x16.ir), _loader(i16x8, i16x8.ir)
load_i8x32, load_i8x16 = _loader(i8x32, i8x32.ir), _loader(i8x16, i8x16.ir)
load_f16x8, load_bf16x8 = _loader(f32x8, i16x8.ir, widen_half), _loader(f32x8, i16x8.ir, widen_bfloat)
store_f32x8, store_i32x8 = _storer(f32x8), _storer(i32x8)
store_i16x16, store_i16x8 = _storer(i16x16), _storer(i16x8)
store_i8x32, store_i8x16 = _storer(i8x32), _storer(i8x16)
store_f16x8, store_bf16x8 = _storer(f32x8, narrow_half), _storer(f32x8, narrow_bfloat)

load_f32x8_part = _part_loader(f32x8.ir)
load_f16x8_part, load_bf16x8_part = _part_loader(i16x8.ir, widen_half), _part_loader(i16x8.ir, widen_bfloat)
store_f32x8_part, store_f16x8_part = _part_storer(), _part_storer(narrow_half)
store_bf16x8_part = _part_storer(narrow_bfloat)

load_f32, load_i64 = _loader(types.float32, F32), _loader(types.int64, I64)
load_i32, load_u32 = _loader(types.int32, I32), _loader(types.uint32, I32)
load_i16, load_u16 = _loader(types.int16, I16), _loader(types.uint16, I16)
load_i8, load_u8 = _loader(types.int8, I8), _loader(types.uint8, I8)
load_f16, load_bf16 = _loader(types.float32, I16, widen_half), _loader(types.float32, I16, widen_bfloat)
store_f32, store_i64 = _storer(types.float32), _storer(types.int64)
store_f64 = _storer(types.float64)
store_i32, store_u32 = _storer(types.int32), _storer(types.uint32)
store_i16, store_u16 = _storer(types.int16), _storer(types.uint16)
store_i8, store_u8 = _storer(types.int8), _storer(types.uint8)
store_f16, store_bf16 = _storer(types.float32, narrow_half), _storer(types.float32, narrow_bfloat)

splat_f32x8 = make(f32x8, types.float32)(lambda b, x: splat(b, x, f32x8.ir))
zero_f32x8, zero_i32x8 = make(f32x8)(lambda b: const(f32x8.ir, 0.0)), make(i32x8)(lambda b: const(i32x8.ir, 0))

add_f32x8 = make(f32x8, f32x8, f32x8)(lambda b, x, y: b.fadd(x, y))
sub_f32x8 = make(f32x8, f32x8, f32x8)(lambda b, x, y: b.fsub(x, y))
mul_f32x8 = make(f32x8, f32x8, f32x8)(lambda b, x, y: b.fmul(x, y))
div_f32x8 = make(f32x8, f32x8, f32x8)(lambda b, x, y: b.fdiv(x, y))
fma_f32x8 = make(f32x8, f32x8, f32x8, f32x8)(fma)
fma_f32 = make(types.float32, types.float32, types.float32, types.float32)(fma)
abs_f32x8 = make(f32x8, f32x8)(lambda b, x: call(b, "llvm.fabs.v8f32", f32x8.ir, [x]))
sqrt_f32x8 = make(f32x8, f32x8)(lambda b, x: call(b, "llvm.sqrt.v8f32", f32x8.ir, [x]))
floor_f32x8 = make(f32x8, f32x8)(lambda b, x: call(b, "llvm.floor.v8f32", f32x8.ir, [x]))
add_i32x8 = make(i32x8, i32x8, i32x8)(lambda b, x, y: b.add(x, y))

less_f32x8 = make(mask8, f32x8, f32x8)(lambda b, x, y: b.fcmp_ordered("<", x, y))
select_f32x8 = make(f32x8, mask8, f32x8, f32x8)(lambda b, mask, x, y: b.select(mask, x, y))
to_f32x8 = make(f32x8, i32x8)(lambda b, x: b.sitofp(x, f32x8.ir))
to_i32x8 = make(i32x8, f32x8)(round_to_int)
bits_f32x8 = make(f32x8, i32x8)(lambda b, x: b.bitcast(x, f32x8.ir))
bits_i32x8 = make(i32x8, f32x8)(lambda b, x: b.bitcast(x, i32x8.ir))
bits_f32 = make(types.float32, types.int32)(lambda b, x: b.bitcast(x, F32))
bits_i32 = make(types.int32, types.float32)(lambda b, x: b.bitcast(x, I32))
sum_f32x8 = make(types.float32, f32x8)(sum_lanes)
sum_i32x8 = make(types.int32, i32x8)(lambda b, x: call(b, "llvm.vector.reduce.add.v8i32", I32, [x]))
max_of_f32x8 = make(types.float32, f32x8)(max_of_lanes)
max_f32x8, min_f32x8 = make(f32x8, f32x8, f32x8)(larger), make(f32x8, f32x8, f32x8)(smaller)
max_f32, min_f32 = (make(types.float32, types.float32, types.float32)(f) for f in (larger, smaller))
multiply_i8x32, multiply_i16x16 = (
    make(i16x16, i8x32, i8x32)(multiply_bytes),
    make(i32x8, i16x16, i16x16)(multiply_shorts),
)
prefetch = make(types.void, address)(prefetch_line)
narrow_i32x8 = make(types.void, address, i32x8)(lambda b, where, v: store(b, b.trunc(v, ir.VectorType(I8, 8)), where))
