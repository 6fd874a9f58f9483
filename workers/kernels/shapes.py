"""What an op's operands and parameters must be for its kernels to stay inside them; checked before kernels are chosen.

Kernels trust their row: they check nothing while they run. Their families (`stages`) look at types and at whether rows
are dense, and have no kernel for the rest; here it is shapes, strides, parameters and overlaps that have to agree.
Indices of GET_ROWS and SET_ROWS are data: the kernels themselves leave out what lies beyond the table.

Every operand has strides that are multiples of its type's size, and no two of its elements share a byte: so its arena
bounds the number of its elements, the time to compute them and the scratch memory, and threads never write to one
place. A result may lie where a source lies only in the very same layout, for the ops that read each element before
they write it (`_Rule.in_place`, a superset of what ggml's allocator computes in place).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from protocol.dtypes import DType
from protocol.errors import PlanError
from protocol.ops import Op
from workers.kernels.stage import Dims, Operand

Params = tuple[int | float, ...]
Placed = tuple[int, Operand]
"""An operand and the address of its first element."""


@dataclass(frozen=True, slots=True)
class _Call:
    """An op with what it is asked to compute from and to."""

    op: Op
    dst: Operand
    src: tuple[Operand | None, ...]
    params: Params

    def maybe(self, k: int) -> Operand | None:
        """Source k, None if the op does without."""
        return self.src[k] if k < len(self.src) else None

    def source(self, k: int) -> Operand:
        """Source k, which must be there."""
        found = self.maybe(k)
        if found is None:
            self.refuse(f"source {k}", "a tensor", "none")
        return found

    def integer(self, i: int) -> int:
        """Parameter i, which must be there."""
        if i >= len(self.params):
            self.refuse("parameters", f"at least {i + 1}", len(self.params))
        return int(self.params[i])

    def same(self, what: str, expected: object, actual: object) -> None:
        """Refuse what is not as expected."""
        if expected != actual:
            self.refuse(what, _show(expected), _show(actual))

    def tiles(self, what: str, ne: Sequence[int], whole: Sequence[int]) -> None:
        """Refuse extents that do not repeat into those of the whole."""
        if any(n < 1 or m % n for n, m in zip(ne, whole, strict=True)):
            self.refuse(what, f"extents that divide {_show(whole)}", _show(ne))

    def at_least(self, what: str, least: int, actual: int) -> None:
        """Refuse a number that is too small."""
        if actual < least:
            self.refuse(what, f"at least {least}", actual)

    def refuse(self, what: str, expected: object, actual: object) -> NoReturn:
        """Raise the error."""
        raise PlanError(f"{self.op.name} {what}: expected {expected}, got {actual}")


@dataclass(frozen=True, slots=True)
class _Rule:
    """Of one op: the shapes' condition, and which sources its kernels need, may have, and tolerate under the result."""

    agree: Callable[[_Call], None]
    needs: tuple[int, ...] = (0,)
    takes: tuple[int, ...] = ()
    in_place: tuple[int, ...] = ()

    def read(self, src: Sequence[object | None]) -> tuple[int, ...]:
        """Positions of the present sources whose bytes count."""
        return tuple(k for k in (*self.needs, *self.takes) if k < len(src) and src[k] is not None)


def check(op: Op, dst: Operand, src: Sequence[Operand | None], params: Sequence[int | float]) -> None:
    """Shapes, strides and parameters agree as the op's kernels assume; a result without elements needs nothing.

    For an op that is in no family there is nothing to check: `table.select` refuses it. Raises PlanError naming op,
    operand, expected and actual.
    """
    rule = RULES.get(op)
    if rule is None or 0 in dst.ne:
        return
    call = _Call(op, dst, tuple(src), tuple(params))
    for k in rule.needs:
        call.source(k)
    _check_layout(call, "destination", dst)
    for k in rule.read(src):
        _check_layout(call, f"source {k}", call.source(k))
    rule.agree(call)


def check_overlaps(op: Op, dst: Placed, src: Sequence[Placed | None]) -> None:
    """The result shares no byte with a source that is read, or lies exactly on one that may be computed in place.

    Raises PlanError naming op, source, and both places.
    """
    rule = RULES.get(op)
    if rule is None or 0 in dst[1].ne:
        return
    for k in rule.read(src):
        source = src[k]
        if source is None or not _share_bytes(dst, source) or (k in rule.in_place and _same_layout(dst, source)):
            continue
        away = source[0] - dst[0]
        allowed = "the result's own layout or other bytes" if k in rule.in_place else "other bytes than the result's"
        raise PlanError(
            f"{op.name} source {k}: expected {allowed}, got {_describe(source[1])} "
            f"{abs(away)} bytes {'before' if away < 0 else 'behind'} the start of {_describe(dst[1])}"
        )


# -- layouts


def _check_layout(call: _Call, what: str, t: Operand) -> None:
    if 0 in t.ne:
        return
    size = t.dtype.block_nbytes
    if any(n > 1 and nb % size for n, nb in _axes(t)):
        call.refuse(what, f"strides in multiples of {size}", _describe(t))
    if _shares_with_itself(t):
        call.refuse(what, "elements that share no bytes", _describe(t))


def _axes(t: Operand) -> list[tuple[int, int]]:
    """Steps and bytes per step of each axis; the first axis in blocks."""
    return list(zip((-(-t.ne[0] // t.dtype.block), *t.ne[1:]), t.nb, strict=True))


def _span(t: Operand) -> int:
    """Bytes from the first to behind the last element."""
    return 0 if 0 in t.ne else t.dtype.block_nbytes + sum((n - 1) * nb for n, nb in _axes(t))


def _shares_with_itself(t: Operand) -> bool:
    """True unless each axis steps over all that the axes with smaller strides span: so do all views of one tensor."""
    reach = t.dtype.block_nbytes
    for nb, n in sorted((nb, n) for n, nb in _axes(t) if n > 1):
        if nb < reach:
            return True
        reach += (n - 1) * nb
    return False


def _same_layout(a: Placed, b: Placed) -> bool:
    """Element i of one is where element i of the other is."""
    return (a[0], a[1].ne, a[1].nb, a[1].dtype.block_nbytes) == (b[0], b[1].ne, b[1].nb, b[1].dtype.block_nbytes)


def _share_bytes(a: Placed, b: Placed) -> bool:
    """True when the operands may have a byte in common: their spans do, and they are no columns beside each other."""
    a_span, b_span = _span(a[1]), _span(b[1])
    if not a_span or not b_span or a[0] + a_span <= b[0] or b[0] + b_span <= a[0]:
        return False
    periods = {nb for t in (a[1], b[1]) for n, nb in _axes(t) if n > 1 and nb}
    return not any(_side_by_side(a, b, period) for period in periods)


def _side_by_side(a: Placed, b: Placed, period: int) -> bool:
    """True when modulo the period each keeps to a part of its own."""
    first, second = (
        t.dtype.block_nbytes + sum((n - 1) * nb for n, nb in _axes(t) if nb % period) for t in (a[1], b[1])
    )
    away = (b[0] - a[0]) % period
    return first <= away and away + second <= period


def _show(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _describe(t: Operand) -> str:
    return f"{t.dtype.label} {_show(t.ne)} strides {_show(t.nb)}"


# -- shapes


def _like_source(call: _Call) -> None:
    call.same("destination", call.source(0).ne, call.dst.ne)


def _binary(call: _Call) -> None:
    _like_source(call)
    call.tiles("source 1", call.source(1).ne, call.dst.ne)


def _glu(call: _Call) -> None:
    gated, ne = call.maybe(1), call.dst.ne
    if gated is None:
        call.same("source 0", (2 * ne[0], *ne[1:]), call.source(0).ne)
    else:
        _like_source(call)
        call.same("source 1", ne, gated.ne)


def _sum_rows(call: _Call) -> None:
    call.same("destination", (1, *call.source(0).ne[1:]), call.dst.ne)
    call.at_least("source 0, elements in a row", 1, call.source(0).ne[0])


def _soft_max(call: _Call) -> None:
    _like_source(call)
    mask = call.maybe(1)
    if mask is not None:
        call.same("source 1, columns", call.dst.ne[0], mask.ne[0])
        call.at_least("source 1, rows", call.dst.ne[1], mask.ne[1])
        call.tiles("source 1, axes 2 and 3", mask.ne[2:], call.dst.ne[2:])


def _rope(call: _Call) -> None:
    _like_source(call)
    n_dims, factors = call.integer(1), call.maybe(2)
    if n_dims % 2 or not 0 < n_dims <= call.dst.ne[0]:
        call.refuse("parameter 1", f"an even number of dimensions up to {call.dst.ne[0]}", n_dims)
    _vector(call, 1, call.dst.ne[2])
    if factors is not None:
        _vector(call, 2, n_dims // 2)


def _vector(call: _Call, k: int, least: int) -> None:
    """Of one axis alone: extents of 0 elsewhere would leave it without any bytes."""
    ne = call.source(k).ne
    if ne[0] < least or ne[1:] != (1, 1, 1):
        call.refuse(f"source {k}", f"a vector of at least {least} elements", _show(ne))


def _flash_attention(call: _Call) -> None:
    q, k, v, mask = call.source(0), call.source(1), call.source(2), call.maybe(3)
    width, n, heads, batches = q.ne
    call.same("source 1, width of a head", width, k.ne[0])
    call.same("source 1, batches", batches, k.ne[3])
    call.tiles("source 1, heads", k.ne[2:3], (heads,))
    call.same("source 2, all but the width", k.ne[1:], v.ne[1:])
    call.same("destination", (v.ne[0], heads, n, batches), call.dst.ne)
    if mask is not None:
        call.same("source 3, columns", k.ne[1], mask.ne[0])
        call.at_least("source 3, rows", n, mask.ne[1])
        call.tiles("source 3, axes 2 and 3", mask.ne[2:], (heads, batches))


def _mul_mat(call: _Call) -> None:
    weights, columns = call.source(0), call.source(1)
    call.same("source 1, elements in a row", weights.ne[0], columns.ne[0])
    call.tiles("source 0, axes 2 and 3", weights.ne[2:], columns.ne[2:])
    call.same("destination", (weights.ne[1], *columns.ne[1:]), call.dst.ne)


def _get_rows(call: _Call) -> None:
    rows, indices = call.source(0), call.source(1)
    call.same("source 1, axis 3", 1, indices.ne[3])
    call.same("source 1, axes 1 and 2", rows.ne[2:], indices.ne[1:3])
    call.same("destination", (rows.ne[0], *indices.ne[:3]), call.dst.ne)


def _set_rows(call: _Call) -> None:
    rows, indices = call.source(0), call.source(1)
    call.same("source 0, all but the rows", (call.dst.ne[0], *call.dst.ne[2:]), (rows.ne[0], *rows.ne[2:]))
    call.same("source 1, indices", rows.ne[1], indices.ne[0])
    call.tiles("source 1, axes 1 and 2", indices.ne[1:3], rows.ne[2:])
    call.same("source 1, axis 3", 1, indices.ne[3])


def _copy(call: _Call) -> None:
    call.same("destination, elements", math.prod(call.source(0).ne), math.prod(call.dst.ne))


def _concat(call: _Call) -> None:
    axis, a, b = call.integer(0), call.source(0), call.source(1)
    if not 0 <= axis < 4:
        call.refuse("parameter 0", "an axis from 0 to 3", axis)
    call.same("source 1", _with(b.ne, axis, a.ne), a.ne)
    call.same("destination", tuple(m + n if i == axis else m for i, (m, n) in enumerate(zip(a.ne, b.ne, strict=True))),
              call.dst.ne)  # fmt: skip


def _with(ne: Dims, axis: int, other: Dims) -> Dims:
    """`ne` without a say about one axis."""
    a, b, c, d = (other[i] if i == axis else n for i, n in enumerate(ne))
    return (a, b, c, d)


def _pad(call: _Call) -> None:
    left, right = ([call.integer(2 * i + side) for i in range(4)] for side in (0, 1))
    call.at_least("parameters", 0, min(*left, *right))
    call.same("destination", tuple(sum(n) for n in zip(left, call.source(0).ne, right, strict=True)), call.dst.ne)


def _unpad(call: _Call) -> None:
    drop = [call.integer(i) for i in range(4)]
    call.at_least("parameters", 0, min(drop))
    call.same("destination", tuple(n - m for n, m in zip(call.source(0).ne, drop, strict=True)), call.dst.ne)


def _repeat(call: _Call) -> None:
    call.tiles("source 0", call.source(0).ne, call.dst.ne)


def _acc(call: _Call) -> None:
    """The part of the result that is added to is a tensor of its own, with source 1's extents, inside the result."""
    _like_source(call)
    strides, offset, added = [call.integer(i) for i in range(3)], call.integer(3), call.source(1)
    call.at_least("source 1, elements", 1, math.prod(added.ne))
    call.at_least("parameters", 0, min(*strides, offset))
    part = Operand(DType.F32, added.ne, (4, strides[0], strides[1], strides[2]))
    _check_layout(call, "part of the destination", part)
    end = offset + _span(part)
    if offset % 4 or end > _span(call.dst):
        call.refuse("parameters", f"elements among {_span(call.dst)} bytes", f"bytes [{offset}, {end})")


def _im2col(call: _Call) -> None:
    kernel, image = call.source(0).ne, call.source(1).ne
    steps, pads, dilations = ([call.integer(2 * i + axis) for axis in (0, 1)] for i in range(3))
    call.at_least("parameters, strides and dilations", 1, min(*steps, *dilations))
    call.at_least("parameters, padding", 0, min(pads))
    call.same("source 1, channels", kernel[2], image[2])
    size = [
        (image[i] + 2 * pads[i] - dilations[i] * (kernel[i] - 1) - 1) // steps[i] + 1 for i in (0, 1)
    ]  # fmt: skip
    call.same("destination", (math.prod(kernel[:3]), *size, image[3]), call.dst.ne)


_ELEMENTWISE = _Rule(_like_source, in_place=(0,))

RULES: dict[Op, _Rule] = {
    **dict.fromkeys((Op.ADD, Op.SUB, Op.MUL, Op.DIV), _Rule(_binary, (0, 1), in_place=(0, 1))),
    **dict.fromkeys((Op.UNARY, Op.SQR, Op.SQRT, Op.SCALE, Op.CLAMP, Op.DIAG_MASK_INF), _ELEMENTWISE),
    **dict.fromkeys((Op.NORM, Op.RMS_NORM), _ELEMENTWISE),  # a row is read whole before it is written
    **dict.fromkeys((Op.DUP, Op.CONT, Op.CPY), _Rule(_copy, in_place=(0,))),  # CPY's source 1 is the result itself
    Op.GLU: _Rule(_glu, takes=(1,), in_place=(0, 1)),
    Op.SUM_ROWS: _Rule(_sum_rows),
    Op.SOFT_MAX: _Rule(_soft_max, takes=(1,), in_place=(0, 1)),
    Op.ROPE: _Rule(_rope, (0, 1), (2,), in_place=(0,)),
    Op.FLASH_ATTN_EXT: _Rule(_flash_attention, (0, 1, 2), (3,)),
    Op.MUL_MAT: _Rule(_mul_mat, (0, 1)),
    Op.GET_ROWS: _Rule(_get_rows, (0, 1)),
    Op.SET_ROWS: _Rule(_set_rows, (0, 1)),  # source 2 is what the result is a view of
    Op.CONCAT: _Rule(_concat, (0, 1)),
    Op.PAD: _Rule(_pad),
    Op.UNPAD: _Rule(_unpad),
    Op.REPEAT: _Rule(_repeat),
    Op.ACC: _Rule(_acc, (0, 1), in_place=(0,)),
    Op.IM2COL: _Rule(_im2col, (0, 1)),
}
"""One for each op of `table.FAMILIES`."""
