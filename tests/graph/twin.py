"""Builds every tensor twice, with our builder and with the real ggml, and lets both compute it."""

from __future__ import annotations

import ctypes as c
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ref_mllama as ref
from evaluate import Evaluation, run

from coordinator.graph.build import Builder, dims
from coordinator.graph.node import Graph, Tensor
from protocol.dtypes import DType
from protocol.ops import GluOp, Op, UnaryOp
from workers.kernels.reference import numpy_type

Array = np.ndarray[Any, Any]
P, I32, I64, SIZE, F32 = c.c_void_p, c.c_int, c.c_int64, c.c_size_t, c.c_float


class TensorStruct(c.Structure):
    """`struct ggml_tensor` of the public header."""

    _fields_ = [
        ("type", I32), ("buffer", P), ("ne", I64 * 4), ("nb", SIZE * 4), ("op", I32), ("op_params", c.c_int32 * 16),
        ("flags", c.c_int32), ("src", P * 10), ("view_src", P), ("view_offs", SIZE), ("data", P),
        ("name", c.c_char * 64), ("extra", P), ("padding", c.c_char * 8),
    ]  # fmt: skip


class InitParams(c.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", SIZE), ("mem_buffer", P), ("no_alloc", c.c_bool)]


Call = Callable[..., tuple[str, list[tuple[Any, Any]]]]


def _plain(name: str, *kinds: Any) -> Call:
    """The C function of that name, whose arguments are ours in the same order."""
    return lambda *args: (name, list(zip(kinds, args, strict=True)))


def _sized(prefix: str) -> Call:
    """Functions named by the number of extents: ggml_reshape_3d."""
    return lambda a, *ne: (f"{prefix}_{len(ne)}d", [(P, a), *((I64, n) for n in ne)])


def _view(a: Tensor, ne: tuple[int, ...], nb: tuple[int, ...] = (), offset: int = 0) -> tuple[str, list[Any]]:
    sizes = [(I64, n) for n in ne] + [(SIZE, n) for n in nb]
    return f"ggml_view_{len(ne)}d", [(P, a), *sizes, (SIZE, offset)]


def _four(n: tuple[int, ...], fill: int) -> list[tuple[Any, int]]:
    return [(I32, m) for m in (*n, *[fill] * 4)[:4]]


INPLACE: dict[str, Call] = {
    "add": _plain("ggml_add_inplace", P, P),
    "mul": _plain("ggml_mul_inplace", P, P),
    "scale": _plain("ggml_scale_inplace", P, F32),
    "soft_max": lambda a, mask: ("ggml_soft_max_inplace", [(P, a)]),
    "unary": lambda a, op: ("ggml_unary_inplace", [(P, a), (I32, int(op))]),
    "acc": lambda a, b, nb, offset: ("ggml_acc_inplace", [(P, a), (P, b), *((SIZE, n) for n in nb), (SIZE, offset)]),
}
CALLS: dict[str, Call] = {
    "add": _plain("ggml_add", P, P),
    "sub": _plain("ggml_sub", P, P),
    "mul": _plain("ggml_mul", P, P),
    "div": _plain("ggml_div", P, P),
    "mul_mat": _plain("ggml_mul_mat", P, P),
    "get_rows": _plain("ggml_get_rows", P, P),
    "set_rows": _plain("ggml_set_rows", P, P, P),
    "cpy": _plain("ggml_cpy", P, P),
    "rms_norm": _plain("ggml_rms_norm", P, F32),
    "norm": _plain("ggml_norm", P, F32),
    "transpose": _plain("ggml_transpose", P),
    "concat": _plain("ggml_concat", P, P, I32),
    "reshape": _sized("ggml_reshape"),
    "view": _view,
    "cont": lambda a, *ne: _sized("ggml_cont")(a, *ne) if ne else ("ggml_cont", [(P, a)]),
    "permute": lambda a, *axes: ("ggml_permute", [(P, a), *_four(axes, 0)]),
    "pad": lambda a, *right: ("ggml_pad", [(P, a), *_four(right, 0)]),
    "repeat": lambda a, *ne: ("ggml_repeat_4d", [(P, a), *((I64, n) for n in dims(*ne))]),
    "scale": lambda a, factor, bias=0.0: ("ggml_scale_bias", [(P, a), (F32, factor), (F32, bias)]),
    "unary": lambda a, op: ("ggml_unary", [(P, a), (I32, int(UnaryOp(op)))]),
    "glu": lambda gate, up, op: ("ggml_glu_split", [(P, gate), (P, up), (I32, int(GluOp(op)))]),
    "soft_max": lambda a, mask, scale=1.0: ("ggml_soft_max_ext", [(P, a), (P, mask), (F32, scale), (F32, 0.0)]),
    "acc": lambda a, b, nb, offset: ("ggml_acc", [(P, a), (P, b), *((SIZE, n) for n in nb), (SIZE, offset)]),
    "im2col": lambda kernel, image, stride, dtype: (
        "ggml_im2col",
        [(P, kernel), (P, image), *((I32, n) for n in (stride, stride, 0, 0, 1, 1)), (c.c_bool, True), (I32, dtype)],
    ),
    "flash_attn_ext": lambda q, k, v, mask, scale: (
        "ggml_flash_attn_ext",
        [(P, q), (P, k), (P, v), (P, mask), (F32, scale), (F32, 0.0), (F32, 0.0)],
    ),
    "rope": lambda a, positions, factors, p: (
        "ggml_rope_ext",
        [(P, a), (P, positions), (P, factors), (I32, p[1]), (I32, p[2]), (I32, p[4]), *((F32, x) for x in p[5:])],
    ),
}


def libraries() -> tuple[c.CDLL, c.CDLL] | None:
    """The real ggml's base and CPU libraries, or None when the package is not installed."""
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).glob("lib*/libggml-base.so"))
    if not found:
        return None
    return c.CDLL(str(found[0]), c.RTLD_GLOBAL), c.CDLL(str(found[0].with_name("libggml-cpu.so")), c.RTLD_GLOBAL)


class Twin:
    """A `Builder` whose every operation is also done by ggml: `twin.op("add", a, b)`."""

    def __init__(self, base: c.CDLL, cpu: c.CDLL) -> None:
        self.base, self.cpu = base, cpu
        base.ggml_init.restype, base.ggml_init.argtypes = P, [InitParams]
        base.ggml_free.restype, base.ggml_free.argtypes = None, [P]
        self.context = base.ggml_init(InitParams(64 << 20, None, False))
        self.b = Builder({}, ref.place)
        self.pointers: list[int] = []
        self.values: dict[str, Array] = {}

    def close(self) -> None:
        self.base.ggml_free(self.context)

    def leaf(self, name: str, value: Array) -> Tensor:
        """A leaf that holds `value`, in both worlds."""
        kinds = {numpy_type(d): d for d in (DType.F32, DType.F16, DType.I32, DType.I64)}
        dtype = kinds[value.dtype.type]
        tensor = self.b.leaf(name, dtype, *reversed(value.shape))
        self._call("ggml_new_tensor_4d", [(I32, int(dtype)), *((I64, n) for n in tensor.ne)])
        self.base.ggml_set_name.restype = P
        self.base.ggml_set_name(P(self.pointers[-1]), name.encode())
        if value.size:
            data = np.ascontiguousarray(value)
            c.memmove(self.struct(tensor.id).data, data.ctypes.data, data.nbytes)
        self.values[name] = value.copy()
        return tensor

    def op(self, method: str, *args: Any, inplace: bool = False) -> Tensor:
        """One operation of the builder and its counterpart."""
        tensor: Tensor = getattr(self.b, method)(*args, **({"inplace": True} if inplace else {}))
        name, arguments = (INPLACE if inplace else CALLS)[method](*args)
        self._call(name, arguments)
        if method == "flash_attn_ext":
            self.base.ggml_flash_attn_ext_set_prec(P(self.pointers[-1]), I32(10))
        return tensor

    def _call(self, name: str, arguments: list[tuple[Any, Any]]) -> None:
        function = getattr(self.base, name)
        function.restype = P
        values = [kind(self.pointers[a.id] if isinstance(a, Tensor) else a) for kind, a in arguments]
        self.pointers.append(function(P(self.context), *values))

    def struct(self, ident: int) -> TensorStruct:
        """ggml's own tensor of that id."""
        return TensorStruct.from_address(self.pointers[ident])

    def check(self, *outputs: Tensor, atol: float = 0.0, rtol: float = 0.0) -> None:
        """Both worlds made the same tensors, visit them in the same order and compute the same from them."""
        for tensor in outputs:
            self.b.expand(tensor)
        graph = self.b.graph("twin")
        self.base.ggml_new_graph_custom.restype = P
        real = P(self.base.ggml_new_graph_custom(P(self.context), SIZE(1024), c.c_bool(False)))
        for tensor in outputs:
            self.base.ggml_build_forward_expand(real, P(self.pointers[tensor.id]))
        self.base.ggml_graph_node.restype = P
        order = [self.base.ggml_graph_node(real, I32(i)) for i in range(self.base.ggml_graph_n_nodes(real))]
        assert [self.pointers[i] for i in graph.nodes] == order
        for ident in (*graph.nodes, *graph.leafs):
            self._check_tensor(graph, ident)
        values = run(graph, self.values)
        assert self.cpu.ggml_graph_compute_with_ctx(P(self.context), real, I32(1)) == 0
        for tensor in outputs:
            np.testing.assert_allclose(values.read(tensor.id), self._real_value(values, tensor.id), rtol, atol)

    def _real_value(self, values: Evaluation, ident: int) -> Array:
        """ggml's result, read with our tensor's layout (which has been compared)."""
        t, struct = values.graph.tensors[ident], self.struct(ident)
        kind = numpy_type(t.dtype)
        buffer = (c.c_char * t.nbytes).from_address(struct.data)
        return np.ndarray(t.ne[::-1], kind, buffer, strides=t.nb[::-1]).copy()

    def _check_tensor(self, graph: Graph, ident: int) -> None:
        t, real = graph.tensors[ident], self.struct(ident)
        got = (t.name, t.dtype, t.ne, t.nb, t.op, t.view_offs)
        assert got == (real.name.decode(), real.type, tuple(real.ne), tuple(real.nb), real.op, real.view_offs)
        assert [self.pointers[s] for s in t.src] == [s for s in real.src if s]
        assert (None if t.view_src is None else self.pointers[t.view_src]) == real.view_src
        if t.op not in (Op.VIEW, Op.PERMUTE, Op.NONE):
            words = b"".join((np.float32 if isinstance(p, float) else np.int32)(p).tobytes() for p in t.params)
            assert words == bytes(real.op_params)[: len(words)], (t.op, t.params, list(real.op_params))


def leafs(twin: Twin, rng: np.random.Generator, **shapes: tuple[int, ...]) -> Mapping[str, Tensor]:
    """Random F32 leafs, shapes innermost first."""
    return {
        name: twin.leaf(name, rng.standard_normal(shape[::-1]).astype(np.float32)) for name, shape in shapes.items()
    }
