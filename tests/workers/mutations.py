"""A catalogue of valid ops, most of them from the graphs of the demo model, and ways to spoil one of them a little."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from guarded import Case

from coordinator.cli.options import DEMO_MODEL
from coordinator.graph.language import CrossState, build_language
from coordinator.graph.language_2024 import build_language_2024
from coordinator.graph.node import ABSENT, BufferRef, Graph, contiguous_nb
from coordinator.graph.vision import build_vision
from coordinator.graph.vision_2024 import build_vision_2024
from coordinator.model.gguf_file import open_model
from coordinator.model.params import read_params
from protocol.dtypes import DType
from protocol.ops import PARAM_KINDS, GluOp, Op, UnaryOp, Usage
from workers.kernels import shapes
from workers.kernels.dequantise import TYPES as QUANTISED
from workers.kernels.stage import Dims, Operand
from workers.kernels.table import FAMILIES

ROPE = (0, 8, 0, 0, 64, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0)


def _graphs() -> Iterator[Graph]:
    model = open_model(DEMO_MODEL)
    params, weights = read_params(model), model.weights
    assert params.vision is not None
    for n_tokens in (1, 19):
        sizes = {"n_tokens": n_tokens, "n_kv": 64, "n_outputs": 1, "n_ctx": 128, "kv_dtype": DType.F16}
        yield build_language(params, weights, _place, **sizes, cross=CrossState(40, n_tokens > 1))
        yield build_language_2024(params, weights, _place, **sizes, n_past=3, n_cross=40, cross_write=n_tokens > 1)
    for build in (build_vision, build_vision_2024):
        yield build(params.vision, params.text.n_embd, weights, _place)


def _place(name: str) -> BufferRef:
    return BufferRef("CPU", Usage.WEIGHTS)


def dense(*ne: int, dtype: DType = DType.F32) -> Operand:
    """A contiguous operand."""
    a, b, c, d = (*ne, 1, 1, 1)[:4]
    return Operand(dtype, (a, b, c, d), contiguous_nb(dtype, (a, b, c, d)))


def _others() -> Iterator[Case]:
    """Ops and forms that the graphs do without."""
    x, turned = dense(24, 3, 5, 2), Operand(DType.F32, (24, 3, 5, 2), (12, 4, 288, 1440))
    half = dense(24, 3, 5, 2, dtype=DType.F16)
    for op in (Op.ADD, Op.SUB, Op.MUL, Op.DIV):
        for other in (x, turned, half, dense(1), dense(24), dense(8, 3), dense(24, 1, 5)):
            yield Case(op, (), x, (x, other))
    for op, params in ((Op.SQR, ()), (Op.SQRT, ()), (Op.CLAMP, (-1.0, 1.0)), (Op.SCALE, (2.0, 1.0)),
                       (Op.UNARY, (int(UnaryOp.SILU),)), (Op.DUP, ()), (Op.CONT, ())):  # fmt: skip
        yield Case(op, params, x, (turned,))
        yield Case(op, params, half, (half,))
        yield Case(op, params, half, (x,))
    for op, params in ((Op.NORM, (1e-5,)), (Op.RMS_NORM, (1e-5,)), (Op.SOFT_MAX, (0.5, 0.0)), (Op.DIAG_MASK_INF, (2,))):
        yield Case(op, params, x, (x,))
    yield Case(Op.SUM_ROWS, (), dense(1, 3, 5, 2), (x,))
    for mask in (dense(24, 4, 5, dtype=DType.F16), x):
        yield Case(Op.SOFT_MAX, (0.5, 0.0), x, (x, mask))
    for swapped in (0, 1):
        yield Case(Op.GLU, (int(GluOp.SWIGLU), swapped), dense(24, 5), (dense(48, 5),))
    for mode in (0, 2):
        yield Case(Op.ROPE, (*ROPE[:2], mode, *ROPE[3:]), x, (x, dense(5, dtype=DType.I32), dense(4)))
    yield Case(Op.ACC, (48, 192, 768, 100, 0), dense(12, 4, 4, 2), (dense(12, 4, 4, 2), dense(5, 3, 2)))
    for axis, b in enumerate((dense(9, 3, 5, 2), dense(24, 4, 5, 2), dense(24, 3, 1, 2), dense(24, 3, 5, 3))):
        ne = tuple(m + n if i == axis else m for i, (m, n) in enumerate(zip(x.ne, b.ne, strict=True)))
        yield Case(Op.CONCAT, (axis,), dense(*ne), (turned, b))
    yield Case(Op.PAD, (0, 3, 0, 1, 0, 2, 0, 1), dense(27, 4, 7, 3), (x,))
    yield Case(Op.UNPAD, (3, 1, 2, 1), dense(21, 2, 3, 1), (x,))
    yield Case(Op.REPEAT, (), dense(48, 3, 15, 2), (x,))
    yield Case(Op.IM2COL, (2, 1, 1, 0, 1, 2, 1), dense(18, 5, 5, 2), (dense(3, 2, 3, 7), dense(9, 7, 3, 2)))
    for kind in (DType.F32, DType.F16, DType.BF16, *sorted(QUANTISED)):
        wide = 256 if kind.block == 256 else 64
        rows, index = dense(wide, 9, 3, 2, dtype=kind), dense(4, 3, 2, dtype=DType.I32)
        yield Case(Op.GET_ROWS, (), dense(wide, 4, 3, 2), (rows, index))
        for m in (1, 5):
            yield Case(Op.MUL_MAT, (), dense(9, m, 6, 2), (rows, dense(wide, m, 6, 2)))
    yield Case(Op.MUL_MAT, (), dense(9, 5), (dense(21, 9, dtype=DType.F16), dense(21, 5, dtype=DType.F16)))
    for kind in (DType.F32, DType.F16, DType.BF16):
        table, index = dense(70, 9, 3, 2, dtype=kind), dense(4, 3, 1, dtype=DType.I64)
        yield Case(Op.SET_ROWS, (), table, (dense(70, 4, 3, 2), index, table))
    for kind, n in ((DType.F32, 3), (DType.F16, 70)):
        q, k, v = dense(20, n, 6, 2), dense(20, 70, 3, 2, dtype=kind), dense(12, 70, 3, 2, dtype=kind)
        mask = dense(70, n, 6, dtype=DType.F16)
        yield Case(Op.FLASH_ATTN_EXT, (0.2, 0.0, 0.0, 10), dense(12, 6, n, 2), (q, k, v, mask))
    q, k = dense(32, 5, 4), dense(32, 70, 2, dtype=DType.F16)
    yield Case(Op.FLASH_ATTN_EXT, (0.2, 0.0, 0.0, 10), dense(32, 4, 5), (q, k, k))


def _in_place(case: Case) -> Iterator[Case]:
    """The case with its result on a source of its layout."""
    for k in shapes.RULES[case.op].in_place:
        source = case.src[k] if k < len(case.src) else None
        if (
            source is not None
            and source[1:] == case.dst[1:]
            and source.dtype.block_nbytes == case.dst.dtype.block_nbytes
        ):
            yield replace(case, alias=(k, 0))


@cache
def catalogue() -> tuple[Case, ...]:
    """Valid ops: those of the demo model's graphs in both dialects, every family and type, and their in-place forms."""
    found: dict[Case, None] = {}
    for graph in _graphs():
        for ident in graph.nodes:
            t = graph.tensors[ident]
            if t.op in FAMILIES and t.nelements:
                kinds = PARAM_KINDS.get(t.op, "")
                params = (*t.params, *(0 for _ in kinds[len(t.params) :]))
                src = (None if s == ABSENT else graph.tensors[s] for s in t.src)
                operands = tuple(None if s is None else Operand(s.dtype, s.ne, s.nb) for s in src)
                found[Case(t.op, params, Operand(t.dtype, t.ne, t.nb), operands)] = None
    found |= dict.fromkeys(_others())
    return tuple(found) + tuple(alias for case in found for alias in _in_place(case))


# -- mutations


def mutate(case: Case, rng: random.Random) -> Case:
    """One to three changes; now and then the same extent everywhere, so that everything still agrees."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        case = rng.choice(_MUTATIONS)(case, rng)
    return case


def _operand(case: Case, rng: random.Random) -> int:
    """0 for the result, k + 1 for source k that is there."""
    return rng.choice([0, *(k + 1 for k, s in enumerate(case.src) if s is not None)])


def _put(case: Case, which: int, operand: Operand | None) -> Case:
    if which == 0:
        assert operand is not None
        return replace(case, dst=operand)
    return replace(case, src=(*case.src[: which - 1], operand, *case.src[which:]))


def _get(case: Case, which: int) -> Operand:
    found = case.dst if which == 0 else case.src[which - 1]
    assert found is not None
    return found


def _at(dims: Dims, axis: int, value: int) -> Dims:
    a, b, c, d = (max(0, value) if i == axis else n for i, n in enumerate(dims))
    return (a, b, c, d)


def _extent(case: Case, rng: random.Random) -> Case:
    which, axis = _operand(case, rng), rng.randrange(4)
    t = _get(case, which)
    n = t.ne[axis]
    value = rng.choice((0, 1, n - 1, n + 1, 2 * n, n // 2, n + 8, n + t.dtype.block, 1 << 20, 1 << 40))
    changed = t._replace(ne=_at(t.ne, axis, value))
    if rng.random() < 0.5 and not changed.ne[0] % t.dtype.block:
        changed = dense(*changed.ne, dtype=t.dtype)
    return _put(case, which, changed)


def _extent_everywhere(case: Case, rng: random.Random) -> Case:
    n = rng.choice([n for n in _get(case, _operand(case, rng)).ne if n > 1] or [1])
    value = rng.choice((1, n - 1, n + 1, 2 * n, 3, 7, 33))

    def changed(t: Operand | None) -> Operand | None:
        if t is None or n not in t.ne:
            return t
        ne = tuple(value if m == n else m for m in t.ne)
        return t if ne[0] % t.dtype.block else dense(*ne, dtype=t.dtype)

    dst = changed(case.dst)
    assert dst is not None
    return replace(case, dst=dst, src=tuple(changed(s) for s in case.src))


def _stride(case: Case, rng: random.Random) -> Case:
    which, axis = _operand(case, rng), rng.randrange(4)
    t = _get(case, which)
    nb, size = t.nb[axis], t.dtype.block_nbytes
    value = rng.choice((0, 1, 2, size, nb - size, nb + size, nb + 1, 2 * nb, 4 * nb, nb // 2, 1 << 16, 1 << 45))
    return _put(case, which, t._replace(nb=_at(t.nb, axis, value)))


def _swap_axes(case: Case, rng: random.Random) -> Case:
    """Another order of the axes; of the strides alone, or of the extents with them."""
    which, (i, j) = _operand(case, rng), rng.sample(range(4), 2)
    t = _get(case, which)
    if not t.dtype.quantised and rng.random() < 0.5:
        t = t._replace(ne=_at(_at(t.ne, i, t.ne[j]), j, t.ne[i]))
    return _put(case, which, t._replace(nb=_at(_at(t.nb, i, t.nb[j]), j, t.nb[i])))


def _type(case: Case, rng: random.Random) -> Case:
    which, dtype = _operand(case, rng), rng.choice(list(DType))
    t = _get(case, which)
    pack = rng.random() < 0.7 and not t.ne[0] % dtype.block
    return _put(case, which, dense(*t.ne, dtype=dtype) if pack else t._replace(dtype=dtype))


def _parameter(case: Case, rng: random.Random) -> Case:
    if not case.params:
        return case
    i = rng.randrange(len(case.params))
    kind = PARAM_KINDS[case.op][i]
    old = int(case.params[i]) if kind == "i" else 0
    wholes = (0, 1, 2, -1, old + 1, old - 1, 2 * old, -old, old + 4, old // 2, (1 << 31) - 1, -(1 << 31))
    value = rng.choice(wholes) if kind == "i" else rng.choice((0.0, -1.0, 1e30, float("inf"), float("nan")))
    value = max(-(1 << 31), min((1 << 31) - 1, value)) if kind == "i" else value
    return replace(case, params=(*case.params[:i], value, *case.params[i + 1 :]))


def _sources(case: Case, rng: random.Random) -> Case:
    """Leave one out, exchange two, or give one more."""
    src = list(case.src)
    what = rng.randrange(4)
    if what == 0 and src:
        src[rng.randrange(len(src))] = None
    elif what == 1 and len(src) > 1:
        i, j = rng.sample(range(len(src)), 2)
        src[i], src[j] = src[j], src[i]
    elif what == 2:
        src.insert(rng.randrange(len(src) + 1), None)
    else:
        src.append(_get(case, _operand(case, rng)))
    src = src[:6]
    alias = case.alias if case.alias and case.alias[0] < len(src) and src[case.alias[0]] is not None else None
    return replace(case, src=tuple(src), alias=alias)


def _other_op(case: Case, rng: random.Random) -> Case:
    op = rng.choice(list(FAMILIES))
    kinds = PARAM_KINDS.get(op, "")
    params = tuple(rng.choice((0, 1, 2)) if kind == "i" else 1.0 for kind in kinds)
    return replace(case, op=op, params=params)


def _place_result(case: Case, rng: random.Random) -> Case:
    present = [k for k, s in enumerate(case.src) if s is not None]
    if not present:
        return case
    k = rng.choice(present)
    source, result = case.src[k], case.dst
    assert source is not None
    shift = rng.choice((0, 0, source.nb[0], result.nb[1], -result.nb[1], source.nb[1], source.nb[2], 1, -4, 64))
    return replace(case, alias=(k, shift if abs(shift) < 1 << 16 else 0))


_MUTATIONS = (
    _extent, _extent, _extent, _extent_everywhere, _extent_everywhere, _stride, _stride, _swap_axes, _type, _parameter,
    _parameter, _sources, _other_op, _place_result,
)  # fmt: skip
