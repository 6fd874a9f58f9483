"""Functions of one value (UNARY, SQR, SQRT, SCALE, CLAMP) and gated ones (GLU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numba import njit

from protocol.ops import GluOp, Op, UnaryOp
from workers.kernels import row
from workers.kernels.access import (
    FLOATS,
    SEGMENT,
    SEGMENT_NBYTES,
    contiguous,
    extent,
    fetch,
    float_param,
    nelements,
    place,
    put,
    row_address,
    share,
    stride,
    word,
)
from workers.kernels.simd import (
    abs_f32x8,
    fma_f32x8,
    load_f32x8,
    load_f32x8_part,
    max_f32x8,
    min_f32x8,
    mul_f32x8,
    splat_f32x8,
    sqrt_f32x8,
    store_f32x8,
    store_f32x8_part,
    zero_f32x8,
)
from workers.kernels.stage import Operand, Stage, kernel
from workers.kernels.vecmath import exp8, gelu8, gelu_erf8, gelu_quick8, neg8, sigmoid8, silu8, tanh8

DST, A, B = row.DST, row.SRC[0], row.SRC[1]

_SQR, _SQRT, _SCALE, _CLAMP = 100, 101, 102, 103
_UNARY = {
    UnaryOp.ABS, UnaryOp.NEG, UnaryOp.TANH, UnaryOp.RELU, UnaryOp.SIGMOID, UnaryOp.GELU, UnaryOp.GELU_QUICK,
    UnaryOp.SILU, UnaryOp.EXP, UnaryOp.GELU_ERF,
}  # fmt: skip
_GLU = {GluOp.REGLU, GluOp.GEGLU, GluOp.SWIGLU, GluOp.GEGLU_ERF, GluOp.GEGLU_QUICK}
_CODES = {Op.SQR: _SQR, Op.SQRT: _SQRT, Op.SCALE: _SCALE, Op.CLAMP: _CLAMP}

# numba reads globals as constants, enum members not among them
_ABS, _NEG, _TANH, _RELU = int(UnaryOp.ABS), int(UnaryOp.NEG), int(UnaryOp.TANH), int(UnaryOp.RELU)
_SIGMOID, _GELU, _GELU_QUICK = int(UnaryOp.SIGMOID), int(UnaryOp.GELU), int(UnaryOp.GELU_QUICK)
_SILU, _EXP, _GELU_ERF = int(UnaryOp.SILU), int(UnaryOp.EXP), int(UnaryOp.GELU_ERF)
_REGLU, _GEGLU, _SWIGLU, _GEGLU_ERF = int(GluOp.REGLU), int(GluOp.GEGLU), int(GluOp.SWIGLU), int(GluOp.GEGLU_ERF)


@njit(nogil=True, error_model="numpy")
def _relu8(x):
    return max_f32x8(x, zero_f32x8())


@njit(nogil=True, error_model="numpy")
def _square8(x):
    return mul_f32x8(x, x)


def _loop(function: Any) -> Any:
    """Compiled `f(a, o, n)`: o[i] = function(a[i]) for n floats."""

    @njit(nogil=True, error_model="numpy")
    def run(a, o, n):
        whole = n & ~7
        for i in range(0, whole, 8):
            store_f32x8(o + 4 * i, function(load_f32x8(a + 4 * i)))
        rest = n - whole
        if rest > 0:
            store_f32x8_part(o + 4 * whole, function(load_f32x8_part(a + 4 * whole, rest)), rest)

    return run


def _gated_loop(function: Any) -> Any:
    """Compiled `f(a, b, o, n)`: o[i] = function(a[i]) * b[i] for n floats."""

    @njit(nogil=True, error_model="numpy")
    def run(a, b, o, n):
        whole = n & ~7
        for i in range(0, whole, 8):
            store_f32x8(o + 4 * i, mul_f32x8(function(load_f32x8(a + 4 * i)), load_f32x8(b + 4 * i)))
        rest = n - whole
        if rest > 0:
            gate = function(load_f32x8_part(a + 4 * whole, rest))
            store_f32x8_part(o + 4 * whole, mul_f32x8(gate, load_f32x8_part(b + 4 * whole, rest)), rest)

    return run


_abs, _neg, _tanh, _relu, _sigmoid = (_loop(f) for f in (abs_f32x8, neg8, tanh8, _relu8, sigmoid8))
_gelu, _gelu_quick, _silu, _exp, _gelu_erf = (_loop(f) for f in (gelu8, gelu_quick8, silu8, exp8, gelu_erf8))
_sqr, _sqrt = _loop(_square8), _loop(sqrt_f32x8)
_reglu, _geglu, _swiglu, _geglu_erf, _geglu_quick = (
    _gated_loop(f) for f in (_relu8, gelu8, silu8, gelu_erf8, gelu_quick8)
)


@njit(nogil=True, error_model="numpy")
def _scale(a, o, n, factor, bias):
    factor8, bias8 = splat_f32x8(factor), splat_f32x8(bias)
    whole = n & ~7
    for i in range(0, whole, 8):
        store_f32x8(o + 4 * i, fma_f32x8(load_f32x8(a + 4 * i), factor8, bias8))
    rest = n - whole
    if rest > 0:
        store_f32x8_part(o + 4 * whole, fma_f32x8(load_f32x8_part(a + 4 * whole, rest), factor8, bias8), rest)


@njit(nogil=True, error_model="numpy")
def _clamp(a, o, n, low, high):
    low8, high8 = splat_f32x8(low), splat_f32x8(high)
    whole = n & ~7
    for i in range(0, whole, 8):
        store_f32x8(o + 4 * i, min_f32x8(high8, max_f32x8(low8, load_f32x8(a + 4 * i))))
    rest = n - whole
    if rest > 0:
        x = load_f32x8_part(a + 4 * whole, rest)
        store_f32x8_part(o + 4 * whole, min_f32x8(high8, max_f32x8(low8, x)), rest)


@njit(nogil=True, error_model="numpy")
def _apply(code, a, o, n, p0, p1):
    """One function over n floats."""
    if code == _SILU:
        _silu(a, o, n)
    elif code == _GELU_ERF:
        _gelu_erf(a, o, n)
    elif code == _GELU:
        _gelu(a, o, n)
    elif code == _GELU_QUICK:
        _gelu_quick(a, o, n)
    elif code == _TANH:
        _tanh(a, o, n)
    elif code == _SIGMOID:
        _sigmoid(a, o, n)
    elif code == _EXP:
        _exp(a, o, n)
    elif code == _RELU:
        _relu(a, o, n)
    elif code == _ABS:
        _abs(a, o, n)
    elif code == _NEG:
        _neg(a, o, n)
    elif code == _SQR:
        _sqr(a, o, n)
    elif code == _SQRT:
        _sqrt(a, o, n)
    elif code == _SCALE:
        _scale(a, o, n, p0, p1)
    else:
        _clamp(a, o, n, p0, p1)


@njit(nogil=True, error_model="numpy")
def _apply_gated(code, a, b, o, n):
    """One gated function over n floats."""
    if code == _SWIGLU:
        _swiglu(a, b, o, n)
    elif code == _GEGLU:
        _geglu(a, b, o, n)
    elif code == _GEGLU_ERF:
        _geglu_erf(a, b, o, n)
    elif code == _REGLU:
        _reglu(a, b, o, n)
    else:
        _geglu_quick(a, b, o, n)


@kernel
def unary(r, ith, nth):
    """AUX: function, elements in a row, rows."""
    code, n0, rows = word(r, row.AUX), word(r, row.AUX + 1), word(r, row.AUX + 2)
    p0, p1 = float_param(r, 0), float_param(r, 1)
    n1, n2 = extent(r, DST, 1), extent(r, DST, 2)
    a_type, a_step = word(r, A + row.DTYPE), stride(r, A, 0)
    o_type, o_step = word(r, DST + row.DTYPE), stride(r, DST, 0)
    scratch = word(r, row.WORK) + ith * 2 * SEGMENT_NBYTES
    pieces = (n0 + SEGMENT - 1) // SEGMENT
    first, last = share(rows * pieces, ith, nth)
    for unit in range(first, last):
        i = unit // pieces
        at = (unit - i * pieces) * SEGMENT
        n = min(SEGMENT, n0 - at)
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a = fetch(row_address(r, A, i1, i2, i3) + at * a_step, a_step, a_type, n, scratch)
        target = row_address(r, DST, i1, i2, i3) + at * o_step
        o = place(target, o_step, o_type, scratch + SEGMENT_NBYTES)
        _apply(code, a, o, n, p0, p1)
        put(o, target, o_step, o_type, n)


@kernel
def gated(r, ith, nth):
    """AUX: function, elements in a row, rows, which half of src0 is the gate (-1: all of it, src1 is gated)."""
    code, n0, rows, offset = word(r, row.AUX), word(r, row.AUX + 1), word(r, row.AUX + 2), word(r, row.AUX + 3)
    n1, n2 = extent(r, DST, 1), extent(r, DST, 2)
    second = B if offset < 0 else A
    dtype, a_step, b_step = word(r, A + row.DTYPE), stride(r, A, 0), stride(r, second, 0)
    o_type, o_step = word(r, DST + row.DTYPE), stride(r, DST, 0)
    scratch = word(r, row.WORK) + ith * 3 * SEGMENT_NBYTES
    a_offset = max(offset, 0) * n0 * a_step
    b_offset = (1 - offset) * n0 * a_step if offset >= 0 else 0
    pieces = (n0 + SEGMENT - 1) // SEGMENT
    first, last = share(rows * pieces, ith, nth)
    for unit in range(first, last):
        i = unit // pieces
        at = (unit - i * pieces) * SEGMENT
        n = min(SEGMENT, n0 - at)
        i1, i2, i3 = i % n1, i // n1 % n2, i // (n1 * n2)
        a = fetch(row_address(r, A, i1, i2, i3) + a_offset + at * a_step, a_step, dtype, n, scratch)
        b = row_address(r, second, i1, i2, i3) + b_offset + at * b_step
        b = fetch(b, b_step, word(r, second + row.DTYPE), n, scratch + SEGMENT_NBYTES)
        target = row_address(r, DST, i1, i2, i3) + at * o_step
        o = place(target, o_step, o_type, scratch + 2 * SEGMENT_NBYTES)
        _apply_gated(code, a, b, o, n)
        put(o, target, o_step, o_type, n)


def stages(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """UNARY, SQR, SQRT, SCALE, CLAMP and GLU on F32, F16 and BF16; None for what is none of these."""
    if not src or src[0] is None or {dst.dtype, src[0].dtype} - FLOATS:
        return None
    if op is Op.GLU:
        return _glu_stages(dst, src, params, threads)
    code = _CODES.get(op)
    if op is Op.UNARY and params and params[0] in _UNARY:
        code = int(params[0])
    if code is None or dst.ne != src[0].ne:
        return None
    n0, rows = _rows(dst, (dst, src[0]))
    return (Stage(unary, work_nbytes=threads * 2 * SEGMENT_NBYTES, aux=(code, n0, rows)),)


def _rows(dst: Operand, operands: Sequence[Operand]) -> tuple[int, int]:
    """Elements in a row and rows; one long row where nothing lies between."""
    if all(contiguous(x) for x in operands):
        return nelements(dst), 1
    return dst.ne[0], nelements(dst) // dst.ne[0]


def _glu_stages(
    dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    a, b = src[0], src[1] if len(src) > 1 else None
    if a is None or not params or params[0] not in _GLU:
        return None
    if b is not None:
        if b.dtype not in FLOATS or a.ne != dst.ne or b.ne != dst.ne:
            return None
        (n0, rows), gate = _rows(dst, (dst, a, b)), -1
    else:
        if a.ne[0] != 2 * dst.ne[0] or a.ne[1:] != dst.ne[1:]:
            return None
        n0, rows = dst.ne[0], nelements(dst) // dst.ne[0]
        gate = 1 if len(params) > 1 and params[1] else 0
    return (Stage(gated, work_nbytes=threads * 3 * SEGMENT_NBYTES, aux=(int(params[0]), n0, rows, gate)),)
