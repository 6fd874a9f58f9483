"""Synthetic layers of language models: what operations cost among others, and not after their own kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from coordinator.simulate.calibrate_cases import alone, cases
from coordinator.simulate.calibrate_room import AUX, PONG, WEIGHTS, Case, Room
from protocol.dtypes import DType
from protocol.ops import GluOp, Op
from protocol.program import OperandRef, OpRecord

_SLOT: Final = 1 << 16
"""Bytes of each activation."""
_ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer: widths of the residual stream and of its feed-forward part, head size, heads, heads of the cache and its
    positions, type of weights."""

    width: int
    inner: int
    d: int
    heads: int
    kv_heads: int
    keys: int
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes of weights and caches, each on its own lines."""
        kv = self.kv_heads * self.d
        weights = 2 * self.width * (self.heads * self.d + kv) + 3 * self.width * self.inner
        return self.dtype.row_nbytes(weights) + 8 * self.width + 4 * kv * self.keys + 16 * _ALIGNMENT

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.d} at {self.keys}"
        return f"{self.dtype.label} {self.width}, {self.inner}, {heads}"


SMALL: Final = (Shape(128, 384, 32, 4, 4, 96, DType.Q8_0), Shape(192, 512, 32, 6, 2, 256, DType.Q8_0),
                Shape(128, 256, 64, 2, 2, 64, DType.F16))  # fmt: skip
"""Layers of which a few fit into the nearest caches."""
LARGE: Final = (Shape(512, 1408, 64, 8, 4, 256, DType.Q8_0), Shape(768, 2048, 64, 12, 4, 128, DType.Q4_1),
                Shape(1024, 2816, 64, 16, 8, 256, DType.F16))  # fmt: skip
"""Layers of which a step in a chain reads many, to drive everything else out of the caches."""
MIDDLE: Final = (Shape(256, 704, 64, 4, 2, 128, DType.Q8_0), Shape(384, 1024, 64, 6, 2, 128, DType.Q4_1))
"""Layers that are read from memory, and in which what operations cost among others still shows: of a layer with more
weights it is less than what memory's rate varies by."""
_HOT_NBYTES: Final = 3 << 18
_BEFORE: Final = 8
_OPS: Final = 19
"""Of a layer."""


def layer_cases(room: Room) -> Iterator[Case]:
    """Some layers in a row of each shape: a few, with weights in the cache, and, `missed`, as many as the room has.

    Those that it has no room for are left out. A small model runs step after step: few layers run often before.
    """
    for shape in SMALL:
        yield Case(f"few layers of {shape}", layers(room, shape, _HOT_NBYTES), before=_BEFORE)
    for shape in MIDDLE:
        if shape.nbytes <= room.cold_nbytes:
            yield Case(f"layers of {shape} from memory", layers(room, shape, room.cold_nbytes), missed=True)


def every_case(room: Room, *, quick: bool = False) -> Iterator[Case]:
    """The cases of single kinds, and those of the products and attention that layers have, each once."""
    known: set[str] = set()
    parts = (case for mixture in layer_cases(room) for case in alone(room, mixture.ops[:_OPS], missed=mixture.missed))
    for case in (*cases(room, quick=quick), *parts):
        if case.name not in known:
            known.add(case.name)
            yield case


@dataclass(frozen=True, slots=True)
class Ends:
    """What of a language model its host computes when layers lie elsewhere, for one token: a row of the embedding, the
    weights of the last norm, and the output, whose matrix is that of the embedding."""

    lookup: OpRecord
    norm: OpRecord
    output: OpRecord

    @property
    def ops(self) -> tuple[OpRecord, OpRecord, OpRecord]:
        """In their order."""
        return self.lookup, self.norm, self.output


def ends(room: Room, shape: Shape, nbytes: int, received: int) -> Ends:
    """Those around layers of this shape, with an output of about so many bytes.

    The lookup leaves its row at the arena's start; the norm finds its values at `received`; the output ends at PONG.
    """
    rows = nbytes // shape.dtype.row_nbytes(shape.width)
    table = room.operand(WEIGHTS, shape.dtype, shape.width, rows)
    weights = room.operand(WEIGHTS + -(-table.span // _ALIGNMENT) * _ALIGNMENT, DType.F32, shape.width)
    x, normed = (room.operand(at, DType.F32, shape.width) for at in (received, received + _SLOT))
    return Ends(
        OpRecord(0, Op.GET_ROWS, (), room.operand(0, DType.F32, shape.width), (table, room.operand(AUX, DType.I32, 1))),
        OpRecord(1, Op.MUL, (), normed, (x, weights)),
        OpRecord(2, Op.MUL_MAT, (), room.operand(PONG, DType.F32, rows), (table, normed)),
    )


def layers(room: Room, shape: Shape, nbytes: int) -> tuple[OpRecord, ...]:
    """Layers with at most so many bytes of weights, but at least one."""
    found: list[OpRecord] = []
    at = WEIGHTS
    for _ in range(max(1, nbytes // shape.nbytes)):
        layer = _Layer(room, shape, at, len(found))
        found += layer.ops()
        at = layer.at
    return tuple(found)


class _Layer:
    """One layer under construction: where its weights lie, in the order of files, and behind them its caches."""

    def __init__(self, room: Room, shape: Shape, at: int, number: int) -> None:
        self.room, self.shape, self.at, self.number = room, shape, at, number
        self.slots = 1  # slot 0 is the residual stream
        s, kv = shape, shape.kv_heads * shape.d
        matrices = {
            "down": (s.inner, s.width), "gate": (s.width, s.inner), "up": (s.width, s.inner),
            "k": (s.width, kv), "o": (s.heads * s.d, s.width), "q": (s.width, s.heads * s.d), "v": (s.width, kv),
        }  # fmt: skip
        norms = {"attn_norm": (s.width,), "ffn_norm": (s.width,)}
        self.weights = {name: self.placed(s.dtype, *ne) for name, ne in matrices.items()}
        self.weights |= {name: self.placed(DType.F32, *ne) for name, ne in norms.items()}

    def ops(self) -> Iterator[OpRecord]:
        """As a llama's layer for one token; each result in a place of its own."""
        s, stream = self.shape, self.room.operand(0, DType.F32, self.shape.width)
        kv = s.kv_heads * s.d
        x, *made = self.normed(stream, "attn_norm")
        yield from made
        q, k, v = (self.value(n) for n in (s.heads * s.d, kv, kv))
        for name, out in (("q", q), ("k", k), ("v", v)):
            yield self.product(name, x, out)
        q2, k2 = self.value(s.d, s.heads), self.value(s.d, s.kv_heads)
        yield self.rope(q, q2)
        yield self.rope(k, k2)
        keys, values = self.cache(), self.cache()
        ids = self.room.operand(AUX, DType.I64, 1)
        scratch = self.room.operand(AUX + (1 << 20), DType.F16, kv, s.keys)
        for new in (k2, v):
            yield self.op(Op.SET_ROWS, scratch, _reshaped(new, kv), ids)
        a = self.value(s.d, s.heads)
        head = _reshaped(q2, s.d, 1, s.heads)
        mask = self.room.operand(AUX, DType.F16, s.keys)
        yield self.op(Op.FLASH_ATTN_EXT, a, head, keys, values, mask, params=(s.d**-0.5, 0.0, 0.0, 0))
        o, h = self.value(s.width), self.value(s.width)
        yield self.product("o", _reshaped(a, s.heads * s.d), o)
        yield self.op(Op.ADD, h, o, stream)
        x, *made = self.normed(h, "ffn_norm")
        yield from made
        gate, up, both = (self.value(s.inner) for _ in range(3))
        yield self.product("gate", x, gate)
        yield self.product("up", x, up)
        yield self.op(Op.GLU, both, gate, up, params=(int(GluOp.SWIGLU), 0))
        down = self.value(s.width)
        yield self.product("down", both, down)
        yield self.op(Op.ADD, stream, down, h)

    def normed(self, x: OperandRef, name: str) -> tuple[OperandRef, OpRecord, OpRecord]:
        """A norm and its weights: the result, and the two operations."""
        a, b = self.value(x.ne[0]), self.value(x.ne[0])
        return b, self.op(Op.RMS_NORM, a, x, params=(1e-5,)), self.op(Op.MUL, b, a, self.weights[name])

    def value(self, *ne: int) -> OperandRef:
        self.slots += 1
        return self.room.operand((self.slots - 1) * _SLOT, DType.F32, *ne)

    def placed(self, dtype: DType, *ne: int) -> OperandRef:
        found = self.room.operand(self.at, dtype, *ne)
        self.at += -(-found.span // _ALIGNMENT) * _ALIGNMENT
        return found

    def product(self, name: str, x: OperandRef, out: OperandRef) -> OpRecord:
        return self.op(Op.MUL_MAT, out, self.weights[name], x)

    def rope(self, x: OperandRef, out: OperandRef) -> OpRecord:
        params = (0, self.shape.d, 0, 0, 8192, 100000.0, 1.0, 0.0, 1.0, 32.0, 1.0)
        return self.op(Op.ROPE, out, _reshaped(x, *out.ne), self.room.operand(AUX, DType.I32, 1), params=params)

    def cache(self) -> OperandRef:
        """[d, positions, heads], a view of [d, heads, positions]."""
        s = self.shape
        row = DType.F16.row_nbytes(s.d)
        nb = (2, row * s.kv_heads, row, row * s.kv_heads * s.keys)
        at, self.at = self.at, self.at + row * s.kv_heads * s.keys
        return OperandRef(self.room.arena, at, DType.F16, (s.d, s.keys, s.kv_heads, 1), nb)

    def op(self, op: Op, out: OperandRef, *src: OperandRef, params: tuple[int | float, ...] = ()) -> OpRecord:
        self.number += 1
        return OpRecord(self.number - 1, op, params, out, src)


def _reshaped(x: OperandRef, *ne: int) -> OperandRef:
    a, b, c, d = (*ne, 1, 1, 1)[:4]
    row = x.dtype.row_nbytes(a)
    return OperandRef(x.arena, x.offset, x.dtype, (a, b, c, d), (x.dtype.block_nbytes, row, row * b, row * b * c))
