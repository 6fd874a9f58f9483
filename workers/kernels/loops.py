"""Loops over contiguous floats, emitted as LLVM code: one function holds a whole family's loops and a switch.

A numba function per loop would say the same, and take seven times as long to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workers.kernels.emit import F32, I32, I64, const, f32x8, load, load_part, splat, store, store_part
from workers.kernels.jit import cgutils, ir, types
from workers.kernels.simd import address, make

Step = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]
"""Emits one vector of a result from vectors x and y and two scalars in all lanes, for any number of lanes."""

LANES = 16
"""Floats at a time. Where the CPU's vectors are shorter LLVM makes two of one; where they are not, twice as much is
under way in chains as long as exp's."""

_HALF = f32x8.ir
_WHOLE = ir.VectorType(F32, LANES)


def loops(cases: Mapping[int, Step]) -> Any:
    """f(code, x, y, y_step, out, n, p, q) for compiled code: n floats out[i] = cases[code](x[i], y[i], p, q).

    `y_step` is how many bytes lie between y[i] and y[i + 1]: 4, or 0 for LANES copies of one value. `out` may be x or
    y. The last n % 8 values go through the same code as all others, in a padded vector.
    """
    integer, real = types.int64, types.float32

    @make(types.void, integer, address, address, integer, address, integer, real, real)
    def emit(b: ir.IRBuilder, code: Any, x: Any, y: Any, y_step: Any, out: Any, n: Any, p: Any, q: Any) -> None:
        done = b.append_basic_block("done")
        switch = b.switch(b.trunc(code, I32), done)
        for number, step in cases.items():
            block = b.append_basic_block(f"case{number}")
            switch.add_case(const(I32, number), block)
            b.position_at_end(block)
            _emit_loop(b, step, (x, y, y_step, out), n, (p, q))
            b.branch(done)
        b.position_at_end(done)

    return emit


def _emit_loop(b: ir.IRBuilder, step: Step, places: Any, n: ir.Value, scalars: tuple[ir.Value, ir.Value]) -> None:
    with cgutils.for_range(b, b.ashr(n, const(I64, 4))) as loop:
        _emit_step(b, step, places, b.mul(loop.index, const(I64, LANES)), _WHOLE, scalars)
    with b.if_then(b.icmp_signed("!=", b.and_(n, const(I64, 8)), const(I64, 0))):
        _emit_step(b, step, places, b.and_(n, const(I64, -LANES)), _HALF, scalars)
    rest = b.and_(n, const(I64, 7))
    with b.if_then(b.icmp_signed(">", rest, const(I64, 0))):
        _emit_step(b, step, places, b.and_(n, const(I64, -8)), _HALF, scalars, rest)


def _emit_step(
    b: ir.IRBuilder,
    step: Step,
    places: Any,
    i: ir.Value,
    to: ir.VectorType,
    scalars: tuple[ir.Value, ir.Value],
    part: ir.Value | None = None,
) -> None:
    """The values from the i-th on: a vector of them, or its first `part` lanes."""
    x, y, y_step, out = places
    skip = b.mul(i, const(I64, 4))
    sources = b.add(x, skip), b.add(y, b.mul(i, y_step))
    first, second = (load(b, at, to) if part is None else load_part(b, at, part, to) for at in sources)
    value = step(b, first, second, *(splat(b, scalar, to) for scalar in scalars))
    if part is None:
        store(b, value, b.add(out, skip))
    else:
        store_part(b, value, b.add(out, skip), part)
