"""What all products of quantised weights share, as LLVM code: eight rows, one per lane, exact within a block.

One block of 32 or 256 elements gives an exact integer per lane, which one fused step adds to the lane's sum:
`sum += scale * integer`, blocks in order. So a value is the same whether it comes from `dot_rows` (matrows.py, weights
as they lie) or from `dot_panel` (matpanels.py, weights packed), and whatever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.kernels.emit import (
    F32,
    I32,
    I64,
    apply_sign,
    call,
    const,
    f32x8,
    fma,
    i8x32,
    i32x8,
    load,
    multiply_bytes,
    opaque,
    shuffle,
    splat,
    store,
    store_part,
)  # fmt: skip
from workers.kernels.features import HAVE_AVX512, HAVE_VNNI
from workers.kernels.jit import intrinsic, ir, types
from workers.kernels.matformats import FORMATS, Format

ROWS = 8
"""Of a group: what threads share, and what weights that are used where they lie are taken by."""

LANES = 16 if HAVE_AVX512 else 8
"""Rows of a panel, one to a lane."""

PANELS, COLUMNS = (1, 8) if HAVE_AVX512 else (2 if HAVE_VNNI else 1, 4)
"""Of a tile, as far as there are registers."""

MAX_GROUPS = 2
"""Of rows in a tile, on any CPU: what scratch memory has room for."""

Values = list[ir.Value]


def reduce_rows(b: ir.IRBuilder, rows: Values) -> ir.Value:
    """Eight vectors of eight i32 (or f32, or pairs of i16) to one: lane r is the sum over row r, in a fixed order."""
    kind = rows[0].type
    lanes = f32x8.ir if kind == f32x8.ir else i32x8.ir
    steps = (
        ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    )
    add = b.fadd if kind == f32x8.ir else b.add
    for low, high in steps:
        wide = [b.bitcast(v, lanes) for v in rows]
        rows = [
            add(b.bitcast(shuffle(b, u, v, low), kind), b.bitcast(shuffle(b, u, v, high), kind))
            for u, v in zip(wide[::2], wide[1::2], strict=True)
        ]
    return rows[0]


def multiply(b: ir.IRBuilder, form: Format, x: ir.Value, y: ir.Value) -> ir.Value:
    """Quants times activations, pairs of bytes added: i16x16."""
    if not form.signed:
        return multiply_bytes(b, x, y)
    size = call(b, "llvm.abs.v32i8", i8x32.ir, [x, const(ir.IntType(1), 0)])
    return multiply_bytes(b, size, apply_sign(b, y, x))


def clamped_row(b: ir.IRBuilder, start: ir.Value, row: ir.Value, stride: ir.Value, count: ir.Value) -> ir.Value:
    """Address of a row (or column) of a tile; those beyond `count` stand for the last one."""
    last = b.sub(count, const(I64, 1))
    inside = b.icmp_signed("<", row, last)
    return b.add(start, b.mul(b.select(inside, row, last), stride))


def spread_rows(b: ir.IRBuilder, stride: ir.Value, n: int) -> Callable[[ir.Value], Values]:
    """Addresses of 2 n rows from that of the first one: two registers that move and n - 1 that stay."""
    strides = [b.mul(stride, const(I64, i)) for i in range(n + 1)]

    def rows(first: ir.Value) -> Values:
        first = opaque(b, first)
        second = opaque(b, b.add(first, strides[n]))
        return [b.add(start, distance) for start in (first, second) for distance in strides[:n]]

    return rows


Offsets = tuple[ir.Value, ir.Value, ir.Value]
"""Of a block's quants, scale and sums from where its column begins."""


def block_offsets(b: ir.IRBuilder, form: Format, k: ir.Value, index: ir.Value, blocks: ir.Value) -> Offsets:
    """Where a block lies in any column of activations (quantize_rows.py): one register each for all of them."""
    scale = b.add(k, b.mul(index, const(I64, 4)))
    sums = b.add(b.add(k, b.mul(blocks, const(I64, 4))), b.mul(index, const(I64, 32 if form.subs else 4)))
    return opaque(b, b.mul(index, const(I64, form.block))), opaque(b, scale), opaque(b, sums)


class Column:
    """Addresses of a block of a column's activations: quants, scale, sums."""

    def __init__(self, b: ir.IRBuilder, y: ir.Value, offsets: Offsets) -> None:
        self.quants, self.scale, self.sums = (b.add(y, offset) for offset in offsets)

    def start(self, b: ir.IRBuilder, form: Format, lanes: int) -> ir.Value:
        """What a block's integers are added to, i32 in all lanes: what quants that stand for more add too much."""
        kind = ir.VectorType(I32, lanes)
        if form.subs or not form.zero:
            return const(kind, 0)
        return splat(b, b.mul(load(b, self.sums, I32), const(I32, -form.zero)), kind)


def accumulate(
    b: ir.IRBuilder, form: Format, total: ir.Value, exact: ir.Value, other: ir.Value | None, w: Values, column: Column
) -> ir.Value:
    """Add one block to the sums: `exact` are the quants' products, `other` those of the sums; w: scale and floor."""
    kind = total.type
    factor = splat(b, load(b, column.scale, F32), kind)
    if form.zero and other is not None:
        exact = b.sub(exact, b.mul(other, const(other.type, form.zero)))
    total = fma(b, b.fmul(w[0], factor), b.sitofp(exact, kind), total)
    if form.floor < 0:
        return total
    if other is None:
        return fma(b, w[1], splat(b, load(b, column.sums, F32), kind), total)
    return fma(b, b.fneg(b.fmul(w[1], factor)), b.sitofp(other, kind), total)


def store_rows(b: ir.IRBuilder, v: ir.Value, out: ir.Value, count: ir.Value) -> None:
    """Write the first `count` of eight or sixteen values, all of them if there are more."""
    lanes = v.type.count
    with b.if_else(b.icmp_signed(">=", count, const(I64, lanes))) as (full, part):
        with full:
            store(b, v, out)
        with part:
            if lanes == 8:
                store_part(b, v, out, count)
            else:
                for half in (0, 8):
                    eight = shuffle(b, v, None, list(range(half, half + 8)))
                    store_rows(b, eight, b.add(out, const(I64, 4 * half)), b.sub(count, const(I64, half)))


def for_format(emit: Any, arguments: int) -> Any:
    """An intrinsic `f(format, *addresses and counts)` whose first argument is a constant, a key of FORMATS."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        emit(b, FORMATS[signature.args[0].literal_value], *values[1:])
        return context.get_dummy_value()

    def typed(form: Any) -> Any:
        if not isinstance(form, types.IntegerLiteral):
            return None
        return types.void(form, *[types.int64] * arguments), generate

    names = ", ".join(f"a{i}" for i in range(arguments))
    scope: dict[str, Any] = {"typed": typed}
    exec(f"def function(context, form, {names}): return typed(form)", scope)
    return intrinsic(scope["function"])
