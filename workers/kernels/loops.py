"""Loops over contiguous floats, emitted as LLVM code: one function holds a whole family's loops and a switch.

A numba function per loop would say the same, and take seven times as long to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workers.kernels.emit import I32, I64, const, f32x8, load, load_part, splat, store, store_part
from workers.kernels.jit import cgutils, ir, types
from workers.kernels.simd import address, make

Step = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]
"""Emits one vector of a result from vectors x and y and two scalars in all lanes."""


def loops(cases: Mapping[int, Step]) -> Any:
    """f(code, x, y, y_step, out, n, p, q) for compiled code: n floats out[i] = cases[code](x[i], y[i], p, q).

    `y_step` is how many bytes y moves on per vector: 32, or 0 for eight copies of one value. `out` may be x or y. The
    last n % 8 values go through the same code as all others, in a padded vector.
    """
    integer, real = types.int64, types.float32

    @make(types.void, integer, address, address, integer, address, integer, real, real)
    def emit(b: ir.IRBuilder, code: Any, x: Any, y: Any, y_step: Any, out: Any, n: Any, p: Any, q: Any) -> None:
        scalars = splat(b, p, f32x8.ir), splat(b, q, f32x8.ir)
        done = b.append_basic_block("done")
        switch = b.switch(b.trunc(code, I32), done)
        for number, step in cases.items():
            block = b.append_basic_block(f"case{number}")
            switch.add_case(const(I32, number), block)
            b.position_at_end(block)
            _emit_loop(b, step, (x, y, y_step, out, n), scalars)
            b.branch(done)
        b.position_at_end(done)

    return emit


def _emit_loop(b: ir.IRBuilder, step: Step, values: Any, scalars: tuple[ir.Value, ir.Value]) -> None:
    x, y, y_step, out, n = values
    count, rest = b.ashr(n, const(I64, 3)), b.and_(n, const(I64, 7))
    with cgutils.for_range(b, count) as loop:
        skip = b.mul(loop.index, const(I64, 32))
        first, second = load(b, b.add(x, skip), f32x8.ir), load(b, b.add(y, b.mul(loop.index, y_step)), f32x8.ir)
        store(b, step(b, first, second, *scalars), b.add(out, skip))
    with b.if_then(b.icmp_signed(">", rest, const(I64, 0))):
        skip = b.mul(count, const(I64, 32))
        first = load_part(b, b.add(x, skip), rest, f32x8.ir)
        at = b.add(y, b.mul(count, y_step))
        # eight copies are all there to be read, and the part of them too
        second = load_part(b, at, rest, f32x8.ir)
        store_part(b, step(b, first, second, *scalars), b.add(out, skip), rest)
