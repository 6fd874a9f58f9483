"""What every operation means: slow, plain numpy definitions that the kernels and the graphs are tested against.

Each definition is `f(params, dst_ne, dst_dtype, srcs) -> array`. Arrays have the shape of a tensor's reversed `ne`
(ne3, ne2, ne1, ne0); quantised weights arrive as their dequantised values. Sums run in float64 and the result is
rounded once, to the destination's type. When a source is a float64 array nothing is rounded at all and the result is
float64: evaluate a graph so to see how much of an error is rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.dtypes import DType
from protocol.errors import PlanError
from protocol.ops import GluOp, Op, UnaryOp

Array = NDArray[Any]
Params = tuple[int | float, ...]
Dims = tuple[int, int, int, int]
Sources = Sequence[Array | None]
Definition = Callable[[Params, Dims, DType, Sources], Array]

_NUMPY: dict[DType, type] = {
    DType.F32: np.float32,
    DType.F16: np.float16,
    DType.F64: np.float64,
    DType.I8: np.int8,
    DType.I16: np.int16,
    DType.I32: np.int32,
    DType.I64: np.int64,
}


def numpy_type(dtype: DType) -> type:
    """The numpy type of a plain tensor type. Raises PlanError for BF16 and the quantised types."""
    try:
        return _NUMPY[dtype]
    except KeyError:
        raise PlanError(f"type {dtype.label} has no numpy equivalent: expected a plain type") from None


def _need(srcs: Sources, i: int) -> Array:
    src = srcs[i] if i < len(srcs) else None
    assert src is not None, f"source {i} is absent"
    return src


def _maybe(srcs: Sources, i: int) -> Array | None:
    return srcs[i] if i < len(srcs) else None


def _round(x: Array, dtype: DType, srcs: Sources) -> Array:
    """`x` in the destination's type, or as it is when a source is wide."""
    if any(s is not None and s.dtype == np.float64 for s in srcs):
        return x
    with np.errstate(over="ignore"):
        return x.astype(numpy_type(dtype))


def _f64(x: Array) -> Array:
    return x.astype(np.float64)


def _tile(x: Array, shape: tuple[int, ...]) -> Array:
    """ggml's broadcast: the whole array repeated, so element i is x[i % n]."""
    assert all(n % m == 0 for n, m in zip(shape, x.shape, strict=True)), (x.shape, shape)
    return np.tile(x, [n // m for n, m in zip(shape, x.shape, strict=True)])


def _get_rows(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    table, ids = _need(srcs, 0), _need(srcs, 1)
    out = np.empty(ne[::-1], table.dtype)
    for k, j, i in np.ndindex(ids.shape[1:]):
        out[k, j, i] = table[k, j, ids[0, k, j, i]]
    return _round(out, dtype, srcs)


def _set_rows(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    """Sources: the new rows, their indices, the destination. The result is the whole destination."""
    rows, ids, dst = _need(srcs, 0), _need(srcs, 1), _need(srcs, 2)
    out = dst.copy()
    for k, j, i in np.ndindex(rows.shape[:3]):
        out[k, j, ids[0, k % ids.shape[1], j % ids.shape[2], i]] = rows[k, j, i]
    return out


def _rms_norm(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    x = _f64(_need(srcs, 0))
    return _round(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + params[0]), dtype, srcs)


def _norm(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    x = _f64(_need(srcs, 0))
    x = x - np.mean(x, axis=-1, keepdims=True)
    return _round(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + params[0]), dtype, srcs)


def _binary(f: Callable[[Array, Array], Array]) -> Definition:
    def define(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
        a, b = _f64(_need(srcs, 0)), _f64(_need(srcs, 1))
        return _round(f(a, _tile(b, a.shape)), dtype, srcs)

    return define


def _scale(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    bias = params[1] if len(params) > 1 else 0.0
    return _round(_f64(_need(srcs, 0)) * params[0] + bias, dtype, srcs)


def _rope(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    """x [head_dim, heads, tokens], positions [tokens], frequency factors [n_dims/2] or absent; no YaRN ramp."""
    x, positions, factors = _f64(_need(srcs, 0)), _need(srcs, 1).reshape(-1), _maybe(srcs, 2)
    n_dims, mode, base, scale, ext, magnitude = (params[i] for i in (1, 2, 5, 6, 7, 8))
    assert ext == 0, params
    assert mode in (0, 2), params
    half = int(n_dims) // 2
    inverse = float(base) ** (-2.0 * np.arange(half) / n_dims) * scale
    if factors is not None:
        inverse = inverse / _f64(factors).reshape(-1)[:half]
    angle = positions[:, None, None] * inverse
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    first = slice(0, 2 * half, 2) if mode == 0 else slice(0, half)
    second = slice(1, 2 * half, 2) if mode == 0 else slice(half, 2 * half)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return _round(out, dtype, srcs)


def _slopes(max_bias: float, n_head: int) -> Array:
    """ALiBi's factor of the mask for each head; all 1 without ALiBi."""
    if max_bias <= 0:
        return np.ones(n_head)
    n = 1 << int(math.log2(n_head))
    m0, m1 = 2.0 ** (-max_bias / n), 2.0 ** (-max_bias / 2 / n)
    return np.array([m0 ** (h + 1) if h < n else m1 ** (2 * (h - n) + 1) for h in range(n_head)])


def _masked(scores: Array, mask: Array | None, max_bias: float) -> Array:
    """scores [keys, queries, heads, batch] plus the mask, which may have more rows than there are queries."""
    if mask is None:
        return scores
    n_batch, n_head, n_query = scores.shape[:3]
    mask = _f64(mask[:, :, :n_query])
    full = _tile(mask, (n_batch, n_head, *mask.shape[2:]))
    return scores + _slopes(max_bias, n_head)[:, None, None] * full


def _probabilities(scores: Array) -> Array:
    """Softmax over the keys; a row in which every key is masked is all 0."""
    top = np.max(scores, axis=-1, keepdims=True)
    p = np.exp(scores - np.where(np.isinf(top), 0.0, top))
    total = np.sum(p, axis=-1, keepdims=True)
    return p / np.where(total == 0.0, 1.0, total)


def _soft_max(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    scores = _f64(_need(srcs, 0)) * params[0]
    return _round(_probabilities(_masked(scores, _maybe(srcs, 1), params[1])), dtype, srcs)


def _flash_attn_ext(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    """q [d, queries, heads, b], k [d, keys, kv heads, b], v [dv, keys, kv heads, b] -> [dv, heads, queries, b]."""
    q, k, v = (_f64(_need(srcs, i)) for i in range(3))
    scale, max_bias, softcap = params[:3]
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    k, v = (np.repeat(x, q.shape[0] // x.shape[0], axis=0) for x in (k, v))
    scores = np.matmul(q, k.swapaxes(-1, -2)) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    p = _probabilities(_masked(scores, _maybe(srcs, 3), max_bias))
    return _round(np.matmul(p, v).swapaxes(1, 2), dtype, srcs)


def _mul_mat(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    """a [k, m, a2, a3], b [k, n, b2, b3] -> [m, n, b2, b3]; a's matrix i serves b2/a2 neighbouring ones of b."""
    a, b = _f64(_need(srcs, 0)), _f64(_need(srcs, 1))
    a = np.repeat(np.repeat(a, b.shape[1] // a.shape[1], axis=1), b.shape[0] // a.shape[0], axis=0)
    return _round(np.matmul(b, a.swapaxes(-1, -2)), dtype, srcs)


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * x * x)))


def _gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))


def _gelu_quick(x: Array) -> Array:
    return x * _sigmoid(1.702 * x)


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


UNARY: dict[UnaryOp, Callable[[Array], Array]] = {
    UnaryOp.ABS: np.abs,
    UnaryOp.SGN: np.sign,
    UnaryOp.NEG: np.negative,
    UnaryOp.STEP: lambda x: np.where(x > 0, 1.0, 0.0),
    UnaryOp.TANH: np.tanh,
    UnaryOp.ELU: lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    UnaryOp.RELU: _relu,
    UnaryOp.SIGMOID: _sigmoid,
    UnaryOp.GELU: _gelu,
    UnaryOp.GELU_QUICK: _gelu_quick,
    UnaryOp.SILU: _silu,
    UnaryOp.HARDSWISH: lambda x: x * np.clip((x + 3.0) / 6.0, 0.0, 1.0),
    UnaryOp.HARDSIGMOID: lambda x: np.clip((x + 3.0) / 6.0, 0.0, 1.0),
    UnaryOp.EXP: np.exp,
    UnaryOp.EXPM1: np.expm1,
    UnaryOp.SOFTPLUS: lambda x: np.logaddexp(0.0, x),
    UnaryOp.GELU_ERF: _gelu_erf,
    UnaryOp.FLOOR: np.floor,
    UnaryOp.CEIL: np.ceil,
    UnaryOp.TRUNC: np.trunc,
}
"""The one-argument functions, in float64."""

GLU: dict[GluOp, Callable[[Array], Array]] = {
    GluOp.REGLU: _relu,
    GluOp.GEGLU: _gelu,
    GluOp.SWIGLU: _silu,
    GluOp.GEGLU_ERF: _gelu_erf,
    GluOp.GEGLU_QUICK: _gelu_quick,
}
"""What is done to the gate before it is multiplied with the other half, in float64."""


def _unary(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    return _round(UNARY[UnaryOp(int(params[0]))](_f64(_need(srcs, 0))), dtype, srcs)


def _glu(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    """Two sources (gate, up), or one whose rows hold the gate and then the other half (`swapped`: in reverse)."""
    x, up = _f64(_need(srcs, 0)), _maybe(srcs, 1)
    if up is None:
        half = x.shape[-1] // 2
        x, up = (x[..., half:], x[..., :half]) if len(params) > 1 and params[1] else (x[..., :half], x[..., half:])
    return _round(GLU[GluOp(int(params[0]))](x) * up, dtype, srcs)


def _same_values(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    """DUP, CONT, CPY, RESHAPE and a contiguous VIEW of the first elements: the same values in the same order."""
    flat = _need(srcs, 0).reshape(-1)[: math.prod(ne)]
    return _round(flat.reshape(ne[::-1]), dtype, srcs)


def _permute(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    """Axis i of the source becomes axis params[i], axes counted from the innermost."""
    order = [0] * 4
    for i, axis in enumerate(params):
        order[3 - int(axis)] = 3 - i
    return np.transpose(_need(srcs, 0), order)


def _transpose(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    return _need(srcs, 0).swapaxes(-1, -2)


def _concat(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    return np.concatenate([_need(srcs, 0), _need(srcs, 1)], axis=3 - int(params[0]))


def _pad(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    widths = [(int(params[2 * i]), int(params[2 * i + 1])) for i in (3, 2, 1, 0)]
    return np.pad(_need(srcs, 0), widths)


def _unpad(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    return _need(srcs, 0)[: ne[3], : ne[2], : ne[1], : ne[0]].copy()


def _im2col(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    """kernel [kw, kh, channels, _] (shape only), image [w, h, channels, n] -> [channels*kh*kw, ow, oh, n]."""
    kernel, image = _need(srcs, 0), _need(srcs, 1)
    s0, s1, p0, p1, d0, d1, is_2d = (int(p) for p in params)
    assert is_2d, "one-dimensional convolutions are not defined"
    kh, kw = kernel.shape[-2:]
    padded = np.pad(image, [(0, 0), (0, 0), (p1, p1), (p0, p0)])
    out = np.empty((ne[3], ne[2], ne[1], image.shape[1], kh, kw), image.dtype)
    for oy, ox, dy, dx in np.ndindex(ne[2], ne[1], kh, kw):
        out[:, oy, ox, :, dy, dx] = padded[:, :, oy * s1 + dy * d1, ox * s0 + dx * d0]
    return _round(out.reshape(ne[::-1]), dtype, [image])


def _repeat(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    return _tile(_need(srcs, 0), ne[::-1])


def _acc(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    """The first source with the second added to the part of it that the byte strides and offset (of F32) name."""
    a, b = _need(srcs, 0), _need(srcs, 1)
    nb1, nb2, nb3, offset = (int(p) // 4 for p in params[:4])
    out = _f64(a).reshape(-1)
    for i3, i2, i1 in np.ndindex(b.shape[:3]):
        at = offset + i1 * nb1 + i2 * nb2 + i3 * nb3
        out[at : at + b.shape[3]] += b[i3, i2, i1]
    return _round(out.reshape(a.shape), dtype, srcs)


def _diag_mask_inf(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    out = _need(srcs, 0).copy()
    for i in range(ne[1]):
        out[:, :, i, int(params[0]) + i + 1 :] = -np.inf
    return out


def _sum_rows(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    return _round(np.sum(_f64(_need(srcs, 0)), axis=-1, keepdims=True), dtype, srcs)


def _clamp(params: Params, ne: Dims, dtype: DType, srcs: Sources) -> Array:
    return _round(np.clip(_f64(_need(srcs, 0)), params[0], params[1]), dtype, srcs)


REFERENCE: dict[Op, Definition] = {
    Op.GET_ROWS: _get_rows,
    Op.SET_ROWS: _set_rows,
    Op.RMS_NORM: _rms_norm,
    Op.NORM: _norm,
    Op.ADD: _binary(np.add),
    Op.SUB: _binary(np.subtract),
    Op.MUL: _binary(np.multiply),
    Op.DIV: _binary(np.divide),
    Op.SQR: lambda p, ne, dtype, srcs: _round(np.square(_f64(_need(srcs, 0))), dtype, srcs),
    Op.SQRT: lambda p, ne, dtype, srcs: _round(np.sqrt(_f64(_need(srcs, 0))), dtype, srcs),
    Op.SCALE: _scale,
    Op.ROPE: _rope,
    Op.SOFT_MAX: _soft_max,
    Op.FLASH_ATTN_EXT: _flash_attn_ext,
    Op.MUL_MAT: _mul_mat,
    Op.UNARY: _unary,
    Op.GLU: _glu,
    Op.DUP: _same_values,
    Op.CONT: _same_values,
    Op.CPY: _same_values,
    Op.RESHAPE: _same_values,
    Op.VIEW: _same_values,
    Op.PERMUTE: _permute,
    Op.TRANSPOSE: _transpose,
    Op.CONCAT: _concat,
    Op.PAD: _pad,
    Op.UNPAD: _unpad,
    Op.IM2COL: _im2col,
    Op.REPEAT: _repeat,
    Op.ACC: _acc,
    Op.DIAG_MASK_INF: _diag_mask_inf,
    Op.SUM_ROWS: _sum_rows,
    Op.CLAMP: _clamp,
}
"""Operation -> definition."""
