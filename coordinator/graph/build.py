"""The builder: makes tensors and views with ggml's shapes, strides, names and parameters, then freezes a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from coordinator.graph.node import (
    ABSENT,
    NO_FLAGS,
    BufferRef,
    Dims,
    Graph,
    Tensor,
    contiguous_nb,
    freeze,
    span_nbytes,
    visit,
)
from coordinator.model.hparams import WeightInfo
from protocol.dtypes import DType
from protocol.errors import ModelError
from protocol.ops import Flag, GluOp, Op, UnaryOp, Usage

Params = tuple[int | float, ...]
Place = Callable[[str], BufferRef]

NAME_LIMIT = 63
"""Bytes of a tensor's name (ggml's GGML_MAX_NAME less the final zero)."""

PRECISION_F32 = 10
"""ggml's GGML_PREC_F32, the fourth parameter of FLASH_ATTN_EXT."""


def dims(*ne: int) -> Dims:
    """`ne` filled up with ones."""
    assert 1 <= len(ne) <= 4, ne
    a, b, c, d = (*ne, 1, 1, 1)[:4]
    return (a, b, c, d)


def show_dims(ne: Sequence[int]) -> str:
    """`ne` without the trailing ones: `[64, 17]`."""
    n = max((i + 1 for i, extent in enumerate(ne) if extent != 1), default=1)
    return f"[{', '.join(map(str, ne[:n]))}]"


class Builder:
    """Collects the tensors of one graph (ggml's context and its operations).

    `weights` are the model's tensors by name. `place` says where a pre-allocated tensor lies; it is asked for every
    weight and resident tensor by name. Operations take and return `Tensor` values; a name given later by `name()`
    holds for the tensor, whichever value of it is used. Shapes that do not fit are our own fault and fail an
    assertion, but for those of weights, which are checked when they are asked for.
    """

    def __init__(self, weights: Mapping[str, WeightInfo], place: Place) -> None:
        self._weights = weights
        self._place = place
        self._tensors: list[Tensor] = []
        self._leafs: dict[tuple[str, str], Tensor] = {}
        self._expand: list[int] = []
        self._pins: dict[int, str] = {}

    # -- leafs

    def input(self, name: str, dtype: DType, *ne: int) -> Tensor:
        """A tensor that the caller fills before each evaluation."""
        return self._new(name, dtype, dims(*ne), flags=Flag.INPUT)

    def leaf(self, name: str, dtype: DType, *ne: int) -> Tensor:
        """A tensor that nobody fills: memory of the graph alone."""
        return self._new(name, dtype, dims(*ne))

    def weight(self, name: str, *ne: int, near: str | None = None) -> Tensor:
        """A tensor of the model file; asked for twice, it is the same leaf.

        `ne` is the shape it must have; 0 stands for any extent. With `near` the tensor is placed where the tensor of
        that name is: a weight that several devices hold is one leaf per buffer type. Raises ModelError when it is
        missing or of another shape.
        """
        info = self._weights.get(name)
        if info is None:
            raise ModelError(
                f"tensor {name!r} is missing from the model" + (f": expected {show_dims(ne)}" if ne else "")
            )
        if ne and any(want not in (0, got) for want, got in zip(dims(*ne), info.ne, strict=True)):
            raise ModelError(f"tensor {name!r} has the wrong shape: expected {show_dims(ne)}, got {show_dims(info.ne)}")
        return self._allocated(name, info.dtype, info.ne, self._place(near or name))

    def vector(self, name: str, *ne: int, near: str | None = None) -> Tensor:
        """A weight that is used element by element, so as F32: cast in the graph if the file holds another type."""
        tensor = self.weight(name, *ne, near=near)
        return tensor if tensor.dtype == DType.F32 else self.cast(tensor, DType.F32)

    def has(self, name: str) -> bool:
        """True when the model has that weight."""
        return name in self._weights

    def resident(self, name: str, dtype: DType, *ne: int) -> Tensor:
        """A tensor that outlives the graph and is no weight, such as a KV cache."""
        return self._allocated(name, dtype, dims(*ne), BufferRef(self._place(name).buft, Usage.ANY))

    def _allocated(self, name: str, dtype: DType, ne: Dims, buffer: BufferRef) -> Tensor:
        key = (name, buffer.buft)
        if key not in self._leafs:
            self._leafs[key] = self._new(name, dtype, ne, buffer=buffer)
        return self._leafs[key]

    # -- names, outputs and pins

    def name(self, tensor: Tensor, name: str) -> Tensor:
        """The tensor under a new name."""
        return self._change(replace(self._now(tensor), name=_clip(name)))

    def output(self, tensor: Tensor) -> Tensor:
        """The tensor flagged OUTPUT: its memory is never used for anything else."""
        now = self._now(tensor)
        return self._change(replace(now, flags=now.flags | Flag.OUTPUT))

    def expand(self, tensor: Tensor) -> Tensor:
        """Put the tensor and what it needs next in the graph's order (`ggml_build_forward_expand`)."""
        self._expand.append(tensor.id)
        return tensor

    def pin(self, tensor: Tensor, device: str) -> Tensor:
        """Bind the tensor to a device, by name (`ggml_backend_sched_set_tensor_backend`)."""
        self._pins[tensor.id] = device
        return tensor

    def graph(self, name: str) -> Graph:
        """The graph of everything that was expanded; nodes and leafs without a name get ggml's `node_N`, `leaf_N`."""
        tensors = list(self._tensors)
        nodes, leafs = visit(tensors, tuple(self._expand))
        for kind, order in (("node", nodes), ("leaf", leafs)):
            for position, ident in enumerate(order):
                if not tensors[ident].name:
                    tensors[ident] = replace(tensors[ident], name=f"{kind}_{position}")
        return freeze(name, tensors, self._expand, nodes, leafs, self._pins.items())

    # -- views

    def view(self, a: Tensor, ne: Sequence[int], nb: Sequence[int] = (), offset: int = 0) -> Tensor:
        """A VIEW of `ne` elements; `nb` are the strides of axis 1 and up in bytes, packed where not given."""
        a = self._now(a)
        strides = [a.dtype.block_nbytes, *nb]
        for axis in range(len(strides), 4):
            packed = a.dtype.row_nbytes(ne[0]) if axis == 1 else strides[axis - 1] * dims(*ne)[axis - 1]
            strides.append(packed)
        shape, four = dims(*ne), _four(strides)
        assert offset + span_nbytes(a.dtype, shape, four) <= a.nbytes, (a.name, a.ne, shape, four, offset)
        return self._view_op(Op.VIEW, a, shape, four, "view", offset=offset)

    def reshape(self, a: Tensor, *ne: int) -> Tensor:
        """The same elements in another shape; `a` must be contiguous."""
        shape = dims(*ne)
        assert math.prod(shape) == a.nelements, (a.name, a.ne, shape)
        assert a.nb == contiguous_nb(a.dtype, a.ne), (a.name, a.ne, a.nb)
        return self._view_op(Op.RESHAPE, a, shape, contiguous_nb(a.dtype, shape), "reshaped")

    def permute(self, a: Tensor, *axes: int) -> Tensor:
        """Axis i of `a` becomes axis `axes[i]`."""
        ne, nb = [0] * 4, [0] * 4
        for i, axis in enumerate(axes):
            ne[axis], nb[axis] = a.ne[i], a.nb[i]
        return self._view_op(Op.PERMUTE, a, _four(ne), _four(nb), "permuted", params=axes)

    def transpose(self, a: Tensor) -> Tensor:
        """Axes 0 and 1 exchanged."""
        ne = (a.ne[1], a.ne[0], a.ne[2], a.ne[3])
        return self._view_op(Op.TRANSPOSE, a, ne, (a.nb[1], a.nb[0], a.nb[2], a.nb[3]), "transposed")

    # -- rows and copies

    def get_rows(self, a: Tensor, ids: Tensor) -> Tensor:
        """Rows `ids` of `a`, as F32 (I32 stays)."""
        dtype = DType.I32 if a.dtype == DType.I32 else DType.F32
        return self._op(Op.GET_ROWS, (a, ids), (a.ne[0], *ids.ne[:3]), dtype)

    def set_rows(self, a: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """`rows` written to the rows `ids` (I64) of `a`, in place: a view of `a`."""
        assert rows.ne[0] == a.ne[0], (a.name, a.ne, rows.ne)
        assert rows.ne[1] == ids.ne[0], (rows.ne, ids.ne)
        return self._view_op(Op.SET_ROWS, a, a.ne, a.nb, "view", src=(rows, ids, a))

    def cpy(self, a: Tensor, to: Tensor) -> Tensor:
        """`a` written to the memory of `to`, in its type: a view of `to`."""
        assert a.nelements == to.nelements, (a.name, a.ne, to.name, to.ne)
        source, target = self._now(a).name, self._now(to).name
        name = f"{target} (copy of {source})" if target else f"{source} (copy)"
        return self.name(self._view_op(Op.CPY, to, to.ne, to.nb, "view", src=(a, to)), name)

    def cast(self, a: Tensor, dtype: DType) -> Tensor:
        """A copy in another type: a CPY with one source."""
        return self.name(self._op(Op.CPY, (a,), a.ne, dtype), f"{self._now(a).name} (copy)")

    def cont(self, a: Tensor, *ne: int) -> Tensor:
        """A contiguous copy, in the shape `ne` if given."""
        shape = dims(*ne) if ne else a.ne
        assert math.prod(shape) == a.nelements, (a.name, a.ne, shape)
        return self.name(self._op(Op.CONT, (a,), shape, a.dtype), f"{self._now(a).name} (cont)")

    def repeat(self, a: Tensor, *ne: int) -> Tensor:
        """`a` tiled to `ne`."""
        shape = dims(*ne)
        assert _repeats(a.ne, shape), (a.name, a.ne, shape)
        return self._op(Op.REPEAT, (a,), shape, a.dtype)

    def concat(self, a: Tensor, b: Tensor, axis: int) -> Tensor:
        """`a` and `b` side by side along `axis`; the other extents are equal."""
        assert a.dtype == b.dtype, (a.name, a.dtype, b.name, b.dtype)
        assert all(axis == i or m == n for i, (m, n) in enumerate(zip(a.ne, b.ne, strict=True))), (a.ne, b.ne, axis)
        ne = [*a.ne]
        ne[axis] += b.ne[axis]
        return self._op(Op.CONCAT, (a, b), _four(ne), a.dtype, (axis,))

    def pad(self, a: Tensor, *right: int) -> Tensor:
        """Zeros behind the end of each axis."""
        more = (*right, 0, 0, 0)[:4]
        params = tuple(n for pair in zip((0, 0, 0, 0), more, strict=True) for n in pair)
        return self._op(Op.PAD, (a,), _four([n + m for n, m in zip(a.ne, more, strict=True)]), a.dtype, params)

    def unpad(self, a: Tensor, *drop: int) -> Tensor:
        """Without the last `drop` elements of each axis."""
        less = (*drop, 0, 0, 0)[:4]
        return self._op(Op.UNPAD, (a,), _four([n - m for n, m in zip(a.ne, less, strict=True)]), a.dtype, less)

    def acc(self, a: Tensor, b: Tensor, nb: tuple[int, int, int], offset: int, *, inplace: bool = False) -> Tensor:
        """`a` with `b` added to the part of it that strides `nb` (axes 1 to 3) and `offset` name, in bytes."""
        return self._op(Op.ACC, (a, b), a.ne, a.dtype, (*nb, offset, int(inplace)), inplace=inplace)

    # -- arithmetic

    def add(self, a: Tensor, b: Tensor, *, inplace: bool = False) -> Tensor:
        """`a + b`, `b` repeated as needed."""
        return self._binary(Op.ADD, a, b, inplace)

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        """`a - b`, `b` repeated as needed."""
        return self._binary(Op.SUB, a, b, False)

    def mul(self, a: Tensor, b: Tensor, *, inplace: bool = False) -> Tensor:
        """`a * b`, `b` repeated as needed."""
        return self._binary(Op.MUL, a, b, inplace)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        """`a / b`, `b` repeated as needed."""
        return self._binary(Op.DIV, a, b, False)

    def scale(self, a: Tensor, factor: float, bias: float = 0.0, *, inplace: bool = False) -> Tensor:
        """`a * factor + bias`."""
        return self._op(Op.SCALE, (a,), a.ne, a.dtype, (factor, bias), inplace=inplace)

    def unary(self, a: Tensor, op: UnaryOp, *, inplace: bool = False) -> Tensor:
        """`op` of each element."""
        return self._op(Op.UNARY, (a,), a.ne, a.dtype, (int(op),), inplace=inplace)

    def glu(self, gate: Tensor, up: Tensor, op: GluOp) -> Tensor:
        """`op(gate) * up`."""
        assert gate.ne == up.ne, (gate.ne, up.ne)
        return self._op(Op.GLU, (gate, up), gate.ne, gate.dtype, (int(op), 0))

    def rms_norm(self, a: Tensor, eps: float) -> Tensor:
        """Each row divided by its root mean square."""
        return self._op(Op.RMS_NORM, (a,), a.ne, a.dtype, (eps,))

    def norm(self, a: Tensor, eps: float) -> Tensor:
        """Each row shifted to mean 0 and scaled to variance 1."""
        return self._op(Op.NORM, (a,), a.ne, a.dtype, (eps,))

    def mul_mat(self, a: Tensor, b: Tensor) -> Tensor:
        """`a` [k, m], `b` [k, n] -> F32 [m, n]; `a` is repeated over b's axes 2 and 3."""
        assert a.ne[0] == b.ne[0], (a.name, a.ne, b.name, b.ne)
        assert b.ne[2] % a.ne[2] == 0, (a.name, a.ne, b.name, b.ne)
        assert b.ne[3] % a.ne[3] == 0, (a.name, a.ne, b.name, b.ne)
        return self._op(Op.MUL_MAT, (a, b), (a.ne[1], *b.ne[1:]), DType.F32)

    def soft_max(self, a: Tensor, mask: Tensor | None, scale: float = 1.0, *, inplace: bool = False) -> Tensor:
        """Softmax of each row of `a * scale + mask`."""
        src = (a,) if mask is None else (a, mask)
        return self._op(Op.SOFT_MAX, src, a.ne, a.dtype, (scale, 0.0), inplace=inplace)

    def flash_attn_ext(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """q [d, T, heads], k and v [d, n_kv, kv heads], mask F16 [n_kv, T] -> [d, heads, T], summed in F32."""
        assert k.ne[:2] == (q.ne[0], v.ne[1]), (q.ne, k.ne, v.ne)
        assert mask is None or mask.ne[:2] == (k.ne[1], q.ne[1]), (q.ne, k.ne, mask)
        src = (q, k, v) if mask is None else (q, k, v, mask)
        ne = (v.ne[0], q.ne[2], q.ne[1], q.ne[3])
        return self._op(Op.FLASH_ATTN_EXT, src, ne, DType.F32, (scale, 0.0, 0.0, PRECISION_F32))

    def rope(self, a: Tensor, positions: Tensor, factors: Tensor | None, params: Params) -> Tensor:
        """`a` [head_dim, heads, T] rotated by `positions` [T]; `params` as in `protocol.ops`."""
        src = (a, positions) if factors is None else (a, positions, factors)
        return self._op(Op.ROPE, src, a.ne, a.dtype, params)

    def im2col(self, kernel: Tensor, image: Tensor, stride: int, dtype: DType) -> Tensor:
        """image [w, h, c, n] -> [c*kh*kw, ow, oh, n], without padding."""
        kw, kh, channels = kernel.ne[:3]
        assert channels == image.ne[2], (kernel.ne, image.ne)
        out = ((image.ne[0] - kw) // stride + 1, (image.ne[1] - kh) // stride + 1)
        ne = (channels * kh * kw, *out, image.ne[3])
        return self._op(Op.IM2COL, (kernel, image), ne, dtype, (stride, stride, 0, 0, 1, 1, 1))

    # -- machinery

    def _now(self, tensor: Tensor) -> Tensor:
        return self._tensors[tensor.id]

    def _change(self, tensor: Tensor) -> Tensor:
        self._tensors[tensor.id] = tensor
        return tensor

    def _binary(self, op: Op, a: Tensor, b: Tensor, inplace: bool) -> Tensor:
        assert _repeats(b.ne, a.ne), (op.name, a.name, a.ne, b.name, b.ne)
        return self._op(op, (a, b), a.ne, a.dtype, inplace=inplace)

    def _op(
        self, op: Op, src: Sequence[Tensor], ne: Dims, dtype: DType, params: Params = (), *, inplace: bool = False
    ) -> Tensor:
        if inplace:
            return self._view_op(op, src[0], src[0].ne, src[0].nb, "view", params=params, src=src)
        return self._new("", dtype, ne, op=op, params=params, src=_ids(src))

    def _view_op(
        self, op: Op, a: Tensor, ne: Dims, nb: Dims, suffix: str, *, params: Params = (),
        offset: int = 0, src: Sequence[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """A tensor in the memory of `a`: a view of a view points at the root."""
        a = self._now(a)
        root, start = (a.id, 0) if a.view_src is None else (a.view_src, a.view_offs)
        return self._new(
            f"{a.name} ({suffix})", a.dtype, ne, nb=nb, op=op, params=params, src=_ids(src or (a,)),
            view_src=root, view_offs=start + offset,
        )  # fmt: skip

    def _new(
        self, name: str, dtype: DType, ne: Dims, *, nb: Dims | None = None, op: Op = Op.NONE, params: Params = (),
        flags: Flag = NO_FLAGS, src: tuple[int, ...] = (), view_src: int | None = None, view_offs: int = 0,
        buffer: BufferRef | None = None,
    ) -> Tensor:  # fmt: skip
        tensor = Tensor(
            len(self._tensors), _clip(name), dtype, ne, nb or contiguous_nb(dtype, ne), op, params, flags, src,
            view_src, view_offs, buffer,
        )  # fmt: skip
        self._tensors.append(tensor)
        return tensor


def _ids(src: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(ABSENT if t is None else t.id for t in src)


def _four(n: Sequence[int]) -> Dims:
    a, b, c, d = n
    return (a, b, c, d)


def _clip(name: str) -> str:
    return name.encode()[:NAME_LIMIT].decode(errors="ignore")


def _repeats(ne: Dims, to: Dims) -> bool:
    """True when a tensor of `ne` can be tiled to `to` (`ggml_can_repeat`)."""
    return all(n > 0 and m % n == 0 for n, m in zip(ne, to, strict=True))
