"""MUL_MAT: dst[n, m, i2, i3] = sum over k of src0[k, n, i2 / r2, i3 / r3] * src1[k, m, i2, i3].

What holds for every type: a result's bits depend on its row of src0 and its column of src1 only, not on the number of
threads, rows, columns or batches, nor on the CPU. Float weights: `matfloats`. Quantised ones: activations become ggml's
8-bit blocks in scratch memory first (`quantize_rows`), then blocks give exact integers (`matquants`).
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.dtypes import DType
from workers.kernels import matfloats, matquants
from workers.kernels.matformats import FORMATS
from workers.kernels.matlanes import MAX_GROUPS
from workers.kernels.matpanels import group_nbytes
from workers.kernels.quantize_rows import QUANTIZE, column_nbytes, columns_nbytes
from workers.kernels.stage import Operand, Stage


def stages(
    dst: Operand, src: Sequence[Operand | None], params: tuple[int | float, ...], threads: int
) -> tuple[Stage, ...] | None:
    """The stages of a product, or None where there are no kernels for these types and layouts.

    src0: F32, F16, BF16 or a type of FORMATS, rows dense, other strides any. src1: F32, or F16 if src0 is; rows dense.
    dst: F32, rows dense.
    """
    if len(src) < 2 or src[0] is None or src[1] is None or not _fits(dst, src[0], src[1]):
        return None
    weights, columns = src[0], src[1]
    if weights.dtype.quantised:
        return _quantised(weights, columns, threads)
    pair = matfloats.PRODUCTS.get((weights.dtype, columns.dtype))
    return None if pair is None else (Stage(pair[columns.ne[1] > matfloats.FEW]),)


def _quantised(weights: Operand, columns: Operand, threads: int) -> tuple[Stage, ...] | None:
    form = FORMATS.get(int(weights.dtype))
    if form is None or columns.dtype != DType.F32:
        return None
    k = weights.ne[0]
    many = columns.ne[1] > matquants.FEW
    activations = columns_nbytes(form.activation, columns.ne)
    panel = MAX_GROUPS * group_nbytes(form, k) if many else 0
    work = activations + threads * panel
    aux = (column_nbytes(form.activation, k), activations, panel)
    quantise = Stage(QUANTIZE[form.activation], work, aux, makes=activations)
    return quantise, Stage(matquants.PRODUCTS[weights.dtype][many], work, aux, takes=activations)


def _fits(dst: Operand, weights: Operand, columns: Operand) -> bool:
    """Extents match as ggml wants them, and rows are dense."""
    (k, n, w2, w3), (y0, m, y2, y3) = weights.ne, columns.ne
    shapes = k == y0 and dst.ne == (n, m, y2, y3) and k % weights.dtype.block == 0
    broadcast = w2 > 0 and w3 > 0 and y2 % w2 == 0 and y3 % w3 == 0
    dense = all(t.nb[0] == t.dtype.block_nbytes for t in (dst, weights, columns))
    return shapes and broadcast and dense and dst.dtype == DType.F32
