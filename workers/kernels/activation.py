"""Functions of one value (UNARY, SQR, SQRT, SCALE, CLAMP) and gated ones (GLU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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
from workers.kernels.emit import call, const, fma, kind, larger, smaller
from workers.kernels.jit import ir
from workers.kernels.loops import Step, loops
from workers.kernels.stage import Operand, Stage, kernel
from workers.kernels.vecmath import (
    emit_exp,
    emit_gelu,
    emit_gelu_erf,
    emit_gelu_quick,
    emit_sigmoid,
    emit_silu,
    emit_tanh,
)

DST, A, B = row.DST, row.SRC[0], row.SRC[1]

_SQR, _SQRT, _SCALE, _CLAMP = 100, 101, 102, 103
_UNARY = {
    UnaryOp.ABS, UnaryOp.NEG, UnaryOp.TANH, UnaryOp.RELU, UnaryOp.SIGMOID, UnaryOp.GELU, UnaryOp.GELU_QUICK,
    UnaryOp.SILU, UnaryOp.EXP, UnaryOp.GELU_ERF,
}  # fmt: skip
_GLU = {GluOp.REGLU, GluOp.GEGLU, GluOp.SWIGLU, GluOp.GEGLU_ERF, GluOp.GEGLU_QUICK}
_CODES = {Op.SQR: _SQR, Op.SQRT: _SQRT, Op.SCALE: _SCALE, Op.CLAMP: _CLAMP}

_UNUSED = np.float32(0.0)


def _one(emit: Any) -> Step:
    return lambda b, x, y, p, q: emit(b, x)


def _gate(emit: Any) -> Step:
    return lambda b, x, y, p, q: b.fmul(emit(b, x), y)


def _emit_relu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return larger(b, x, const(x.type, 0.0))


_apply = loops(
    {
        UnaryOp.ABS: _one(lambda b, x: call(b, f"llvm.fabs.{kind(x.type)}", x.type, [x])),
        UnaryOp.NEG: _one(lambda b, x: b.fneg(x)),
        UnaryOp.TANH: _one(emit_tanh),
        UnaryOp.RELU: _one(_emit_relu),
        UnaryOp.SIGMOID: _one(emit_sigmoid),
        UnaryOp.GELU: _one(emit_gelu),
        UnaryOp.GELU_QUICK: _one(emit_gelu_quick),
        UnaryOp.GELU_ERF: _one(emit_gelu_erf),
        UnaryOp.SILU: _one(emit_silu),
        UnaryOp.EXP: _one(emit_exp),
        _SQR: lambda b, x, y, p, q: b.fmul(x, x),
        _SQRT: lambda b, x, y, p, q: call(b, f"llvm.sqrt.{kind(x.type)}", x.type, [x]),
        _SCALE: lambda b, x, y, p, q: fma(b, x, p, q),
        _CLAMP: lambda b, x, y, p, q: smaller(b, q, larger(b, p, x)),
    }
)
_apply_gated = loops(
    {
        GluOp.REGLU: _gate(_emit_relu),
        GluOp.GEGLU: _gate(emit_gelu),
        GluOp.SWIGLU: _gate(emit_silu),
        GluOp.GEGLU_ERF: _gate(emit_gelu_erf),
        GluOp.GEGLU_QUICK: _gate(emit_gelu_quick),
    }
)


@kernel
def unary(r: int, ith: int, nth: int) -> None:
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
        _apply(code, a, a, 4, o, n, p0, p1)
        put(o, target, o_step, o_type, n)


@kernel
def gated(r: int, ith: int, nth: int) -> None:
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
        _apply_gated(code, a, b, 4, o, n, _UNUSED, _UNUSED)
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
