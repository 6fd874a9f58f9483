"""What an op asks of a device: bytes read and written, floating-point operations, types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Final

from coordinator.simulate.hardware import GEMM_ROWS, Work
from protocol.dtypes import DType
from protocol.ops import Op
from protocol.program import OperandRef, OpRecord

_MOVES = frozenset(
    {Op.DUP, Op.CPY, Op.CONT, Op.CONCAT, Op.PAD, Op.UNPAD, Op.REPEAT, Op.IM2COL, Op.GET_ROWS, Op.SET_ROWS}
)
"""Ops that put bytes elsewhere."""

_AS_ONE = frozenset({Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.SCALE, Op.UNARY, Op.DUP, Op.CONT, Op.CPY})
"""Ops that take operands of one shape as one line, where these are contiguous or a single value."""

OUTPUT: Final = "OUTPUT"
"""Measured costs have an entry of this name for results that a worker puts into its reply."""
DIGEST: Final = "DIGEST"
"""And of this one for their hashes."""

_FLOPS_PER_VALUE: Mapping[Op, int] = {
    Op.NORM: 8, Op.RMS_NORM: 4, Op.SOFT_MAX: 6, Op.ROPE: 6, Op.UNARY: 8, Op.GLU: 9, Op.L2_NORM: 4,
}  # fmt: skip
"""Roughly; memory decides how long these take."""


def work_of(op: OpRecord, streams: int = 1) -> Work:
    """The work of one op.

    `streams` independent sequences share an attention op: each of its rows looks at its own sequence's part of the
    cache, so that all of it is read and 1/streams of the products are computed.
    """
    work = _SPECIAL.get(op.op, _plain)(op, streams)
    return replace(work, op=op.op.name) if work.kind in ("elementwise", "copy") else work


def _plain(op: OpRecord, streams: int) -> Work:
    if op.op in _MOVES:
        return _move(op)
    read = sum(_nbytes(src) for src in op.src if src is not None)
    dst = _size(op.dst)
    flops = dst * _FLOPS_PER_VALUE.get(op.op, 1)
    angles = op.dst.ne[0] * prod(op.dst.ne[2:]) if op.op is Op.ROPE else 0  # once for all heads
    return Work(
        "elementwise", op.dst.dtype, 0, 0, read, _nbytes(op.dst), flops, op.dst.ne[1], lines=_lines(op), exps=angles
    )  # fmt: skip


def _lines(op: OpRecord) -> int:
    """Lines of values that are worked on one after the other: one where operands lie as one, else every row."""
    whole = (src for src in op.src if src is not None and _size(src) > 1)
    if op.op in _AS_ONE and all(src.ne == op.dst.ne and _is_contiguous(src) for src in whole):
        return 1
    return prod(op.dst.ne[1:]) * (2 if op.op is Op.CONCAT and op.params[:1] == (0,) else 1)


def _is_contiguous(operand: OperandRef) -> bool:
    nb = operand.dtype.row_nbytes(operand.ne[0])
    for n, step in zip(operand.ne[1:], operand.nb[1:], strict=True):
        if n > 1 and step != nb:
            return False
        nb *= n
    return True


def _mul_mat(op: OpRecord, streams: int) -> Work:
    """dst = src0 [k, n, ...] times src1 [k, rows, ...]: each matrix of src0 is read once for all its rows.

    With many rows the other operand and the result are read and written while products are computed, which takes
    longer: laws do not count them.
    """
    weights, x = op.src[0], op.src[1]
    assert weights is not None
    assert x is not None
    matrices = weights.ne[2] * weights.ne[3]
    rows = prod(x.ne[1:]) // max(1, matrices)
    n = _size(weights)
    if rows >= GEMM_ROWS:
        return Work(
            "matmat", weights.dtype, _nbytes(weights), n, 0, 0, 2 * n * rows, rows, op.op.name,
            hidden_nbytes=_nbytes(x), lines=_size(op.dst),
        )  # fmt: skip
    return Work("matvec", weights.dtype, _nbytes(weights), n, _nbytes(x), _nbytes(op.dst), 2 * n * rows, rows)


def _attention(op: OpRecord, streams: int) -> Work:
    """q [d, T, heads], k and v [d, n_kv, kv heads]: q k' and its product with v are 2 d T n_kv heads each."""
    q, k, v = op.src[0], op.src[1], op.src[2]
    assert q is not None
    assert k is not None
    assert v is not None
    mask = op.src[3] if len(op.src) > 3 else None
    cache = _nbytes(k) + _nbytes(v)
    flops = 2 * (q.ne[0] + v.ne[0]) * q.ne[1] * k.ne[1] * q.ne[2] * q.ne[3] // streams
    read = _nbytes(q) + (0 if mask is None else _nbytes(mask))
    scores = q.ne[1] * k.ne[1] * q.ne[2] * q.ne[3] // streams
    return Work("attention", k.dtype, cache, 0, read, _nbytes(op.dst), flops, q.ne[1], exps=scores)


def _get_rows(op: OpRecord, streams: int) -> Work:
    """Only the rows that are asked for are read."""
    table = op.src[0]
    assert table is not None
    read = _typed(table.dtype, op.dst)
    return Work("copy", table.dtype, 0, 0, read, _nbytes(op.dst), 0, op.dst.ne[1], lines=prod(op.dst.ne[1:]))


def _set_rows(op: OpRecord, streams: int) -> Work:
    """The destination is a whole cache, of which only the given rows are written."""
    rows = op.src[0]
    assert rows is not None
    written = _typed(op.dst.dtype, rows)
    return Work("copy", op.dst.dtype, 0, 0, _nbytes(rows), written, 0, rows.ne[1], lines=prod(rows.ne[1:]))


def _im2col(op: OpRecord, streams: int) -> Work:
    """Only the image is read; the kernel gives its shape."""
    image = op.src[1]
    assert image is not None
    lines = prod(op.dst.ne[1:])
    return Work("copy", op.dst.dtype, 0, 0, _nbytes(image), _nbytes(op.dst), 0, op.dst.ne[1], lines=lines)


def _move(op: OpRecord) -> Work:
    read = min(sum(_nbytes(src) for src in op.src if src is not None), _nbytes(op.dst))
    return Work("copy", op.dst.dtype, 0, 0, read, _nbytes(op.dst), 0, op.dst.ne[1], lines=_lines(op))


_SPECIAL: Mapping[Op, Callable[[OpRecord, int], Work]] = {
    Op.MUL_MAT: _mul_mat,
    Op.FLASH_ATTN_EXT: _attention,
    Op.GET_ROWS: _get_rows,
    Op.SET_ROWS: _set_rows,
    Op.IM2COL: _im2col,
}


def copy_work(nbytes: int) -> Work:
    """A copy within a device."""
    return Work("copy", DType.F32, 0, 0, nbytes, nbytes, op="COPY")


def output_work(nbytes: int) -> Work:
    """A result on its way into a worker's reply."""
    return Work("copy", DType.F32, 0, 0, nbytes, 0, op=OUTPUT)


def digest_work(nbytes: int) -> Work:
    """The hash of a tensor that a worker tells of instead of its bytes. Answers with one are put together in Python,
    which is in what it was measured to cost."""
    return Work("copy", DType.F32, 0, 0, nbytes, 0, op=DIGEST)


def weight_footprint(ops: Iterable[OpRecord]) -> int:
    """Bytes of the different weights and caches that ops read."""
    found: dict[tuple[int, int], int] = {}
    for op in ops:
        for operand in op.src[:1] if op.op is Op.MUL_MAT else op.src[1:3] if op.op is Op.FLASH_ATTN_EXT else ():
            if operand is not None:
                key = operand.arena, operand.offset
                found[key] = max(found.get(key, 0), _nbytes(operand))
    return sum(found.values())


def _size(operand: OperandRef) -> int:
    return prod(operand.ne)


def _nbytes(operand: OperandRef) -> int:
    """Bytes of the elements, without what strides leave out."""
    return _typed(operand.dtype, operand)


def _typed(dtype: DType, operand: OperandRef) -> int:
    return prod(operand.ne) * dtype.block_nbytes // dtype.block
