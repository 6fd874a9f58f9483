"""Which kernels compute an op: the one place that knows all families."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from protocol.errors import PlanError, UsageError
from protocol.ops import Op
from workers.kernels import activation, attention, copy, elementwise, layout, matmul, norm, rope, rows, softmax
from workers.kernels.stage import Operand, Stage

Params = tuple[int | float, ...]
Family = Callable[[Op, Operand, Sequence[Operand | None], Params, int], tuple[Stage, ...] | None]


def _matmul(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: Params, threads: int
) -> tuple[Stage, ...] | None:
    return matmul.stages(dst, src, params, threads)


EXACT, GGML = ARITHMETICS = ("exact", "ggml")
"""Kernels that are as exact as F32 allows, and kernels with ggml's bits on AVX2 (kernels/ggml)."""


def check_arithmetic(arithmetic: str) -> None:
    """Raises UsageError for an arithmetic that does not exist, CapacityError for one that this CPU has not."""
    if arithmetic not in ARITHMETICS:
        raise UsageError(f"arithmetic {arithmetic[:40]!r}: expected {' or '.join(ARITHMETICS)}")
    if arithmetic == GGML:
        from workers.kernels.ggml.table import check_machine

        check_machine()


FAMILIES: dict[Op, Family] = {
    Op.MUL_MAT: _matmul,
    **dict.fromkeys((Op.ADD, Op.SUB, Op.MUL, Op.DIV), elementwise.stages),
    **dict.fromkeys((Op.UNARY, Op.GLU, Op.SQR, Op.SQRT, Op.SCALE, Op.CLAMP), activation.stages),
    **dict.fromkeys((Op.NORM, Op.RMS_NORM, Op.SUM_ROWS), norm.stages),
    **dict.fromkeys((Op.SOFT_MAX, Op.DIAG_MASK_INF), softmax.stages),
    **dict.fromkeys((Op.GET_ROWS, Op.SET_ROWS), rows.stages),
    **dict.fromkeys((Op.DUP, Op.CONT, Op.CPY), copy.stages),
    **dict.fromkeys((Op.CONCAT, Op.PAD, Op.UNPAD, Op.REPEAT, Op.ACC, Op.IM2COL), layout.stages),
    Op.ROPE: rope.stages,
    Op.FLASH_ATTN_EXT: attention.stages,
}
"""Op -> the family that may have kernels for it."""


def find(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: Params, threads: int, arithmetic: str = EXACT
) -> tuple[Stage, ...] | None:
    """The stages that compute an op on operands of these types, shapes and strides, or None.

    With `GGML` kernels that give ggml's bits, where there are any for these operands; else the default ones.
    """
    family = FAMILIES.get(op)
    stages = None if family is None else family(op, dst, src, params, threads)
    if stages is not None and arithmetic == GGML:
        from workers.kernels.ggml import table as like_ggml  # nobody else has to load, let alone compile it

        twin = like_ggml.FAMILIES.get(op)
        stages = (twin(op, dst, src, params, threads) if twin is not None else None) or stages
    return stages


def supports(op: Op, dst: Operand, src: Sequence[Operand | None], params: Params) -> bool:
    """True when `select` would succeed, for any number of threads. Tensors without elements need no kernel."""
    return 0 in dst.ne or find(op, dst, src, params, 1) is not None


def select(
    op: Op, dst: Operand, src: Sequence[Operand | None], params: Params, threads: int, arithmetic: str = EXACT
) -> tuple[Stage, ...]:
    """The stages that compute an op. Raises PlanError with op, types, shapes and strides when there are none."""
    stages = find(op, dst, src, params, threads, arithmetic)
    if stages is None:
        operands = ", ".join("absent" if s is None else _describe(s) for s in src)
        known = "no kernel for these operands" if op in FAMILIES else "no kernel for this op"
        raise PlanError(f"{op.name}{list(params)} of ({operands}) to {_describe(dst)}: {known}")
    return stages


def _describe(operand: Operand) -> str:
    shape, strides = ("x".join(map(str, dims)) for dims in (operand.ne, operand.nb))
    return f"{operand.dtype.label}[{shape} strides {strides}]"
