"""Computes one op with the real ggml's CPU code, through ctypes, on the same bytes that a kernel gets."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from opcheck import Array, Raw, resolve

from protocol.ops import Op
from tests.conformance.real_ggml import InitParams, TensorStruct, library_path
from workers.execute import encode_params

_ROOM = 64 << 20


@cache
def libraries(folder: str = "") -> tuple[c.CDLL, c.CDLL]:
    """ggml's base and CPU libraries: those of the package libggml-python, or of a folder."""
    path = Path(folder) / "libggml-base.so" if folder else library_path()
    assert path is not None, "libggml-python is part of the test extra"
    base, cpu = (c.CDLL(str(path.with_name(name))) for name in ("libggml-base.so", "libggml-cpu.so"))
    cpu.ggml_cpu_init()  # its tables of half precision
    base.ggml_init.restype, base.ggml_init.argtypes = c.c_void_p, [InitParams]
    base.ggml_new_tensor.restype = base.ggml_new_graph_custom.restype = c.c_void_p
    return base, cpu


def compute(
    op: Op,
    sources: Sequence[Array | Raw | None],
    dst: Array,
    params: Sequence[int | float] = (),
    threads: int = 1,
    folder: str = "",
) -> Array:
    """Compute into `dst` (four axes; may be a source) and return it."""
    base, cpu = libraries(folder)
    context = c.c_void_p(base.ggml_init(InitParams(_ROOM, None, False)))

    def tensor(x: Array | Raw) -> int:
        address, operand = resolve(x)
        made = base.ggml_new_tensor(context, c.c_int(0), c.c_int(4), (c.c_int64 * 4)(1, 1, 1, 1))
        struct = TensorStruct.from_address(made)
        struct.type, struct.data = int(operand.dtype), address
        struct.ne, struct.nb = (c.c_int64 * 4)(*operand.ne), (c.c_size_t * 4)(*operand.nb)
        return int(made)

    result = tensor(dst)
    struct = TensorStruct.from_address(result)
    struct.op = int(op)
    struct.op_params = (c.c_int32 * 16)(*encode_params(op, params))
    for i, source in enumerate(sources):
        struct.src[i] = None if source is None else tensor(source)
    graph = c.c_void_p(base.ggml_new_graph_custom(context, c.c_size_t(16), c.c_bool(False)))
    base.ggml_build_forward_expand(graph, c.c_void_p(result))
    assert cpu.ggml_graph_compute_with_ctx(context, graph, c.c_int(threads)) == 0
    base.ggml_free(context)
    return dst


def same_bits(ours: Array, theirs: Array) -> None:
    """Equal bit for bit; says how many and how far when not."""
    a, b = (np.ascontiguousarray(x).view(np.int32) for x in (ours, theirs))
    wrong = int((a != b).sum())
    assert wrong == 0, f"{wrong} of {a.size} differ, by up to {np.nanmax(np.abs(ours - theirs))}"
