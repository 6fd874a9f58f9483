"""One graph, computed by our kernels and by ggml's CPU library, on the same bytes."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.graph.node import ABSENT, Graph, Tensor
from protocol.dtypes import DType
from protocol.errors import UsageError
from protocol.ops import VIEW_OPS, Op
from tests.conformance.real_ggml import SILENT, InitParams, TensorStruct, library_path
from workers.execute import Executor, ResolvedOp, build_table, encode_params
from workers.kernels.stage import Operand

Bytes = NDArray[np.uint8]
P = c.c_void_p
_STRUCT_ROOM = 512
_REPACKED = (DType.Q4_0, DType.Q4_K)
"""What ggml rearranges for x86 when weights are loaded; rows by eights."""
_REPACK_SYMBOL = "_Z35ggml_backend_cpu_repack_buffer_typev"


class Plan(c.Structure):
    """The front of `struct ggml_cplan`; what follows differs between versions and stays as ggml made it."""

    _fields_ = [("work_size", c.c_size_t), ("work_data", P), ("n_threads", c.c_int), ("rest", c.c_uint64 * 8)]


def room(nbytes: int) -> Bytes:
    """Zeroed bytes from a multiple of 64 on."""
    memory = np.zeros(nbytes + 64, np.uint8)
    skip = -memory.ctypes.data % 64
    return memory[skip : skip + nbytes]


def memory_of(graph: Graph, given: Mapping[str, Bytes]) -> dict[int, Bytes]:
    """Memory for each tensor that is no view, by id; leafs take the bytes that are given under their name."""
    out: dict[int, Bytes] = {}
    for t in graph.tensors:
        if t.view_src is None:
            out[t.id] = room(t.nbytes)
            if t.name in given:
                data = given[t.name].reshape(-1).view(np.uint8)
                assert len(data) == t.nbytes, (t.name, len(data), t.nbytes)
                out[t.id][:] = data
    return out


def address_of(memory: Mapping[int, Bytes], t: Tensor) -> int:
    """Where a tensor or view begins."""
    root = t.id if t.view_src is None else t.view_src
    return int(memory[root].ctypes.data) + t.view_offs


class Ours:
    """The graph as a table of our kernels on a team of threads."""

    def __init__(self, graph: Graph, memory: Mapping[int, Bytes], threads: int) -> None:
        self.memory, self.executor = memory, Executor(threads)

        def bound(ident: int) -> tuple[int, Operand] | None:
            if ident == ABSENT:
                return None
            t = graph.tensors[ident]
            return address_of(memory, t), Operand(t.dtype, t.ne, t.nb)

        ops = []
        for ident in graph.nodes:
            t = graph.tensors[ident]
            if t.op not in VIEW_OPS:
                dst = bound(ident)
                assert dst is not None
                ops.append(ResolvedOp(t.op, t.params, dst, tuple(map(bound, t.src))))
        self.table = build_table(ops, threads)

    def run(self) -> None:
        """Compute all of it."""
        self.executor.run(self.table)

    def close(self) -> None:
        """End the threads."""
        self.executor.close()


@cache
def libraries(folder: str = "") -> tuple[c.CDLL, c.CDLL]:
    """ggml's base and CPU libraries from `folder`, or those of the package libggml-python.

    A process can hold one version only. Raises UsageError when there is none.
    """
    path = Path(folder) / "libggml-base.so" if folder else library_path()
    if path is None or not path.is_file():
        raise UsageError(f"no libggml-base.so in {folder or 'libggml-python'}: see benchmarks/requirements.txt")
    base = c.CDLL(str(path), c.RTLD_GLOBAL)
    cpu = c.CDLL(str(path.with_name("libggml-cpu.so")), c.RTLD_GLOBAL)
    for name in ("ggml_init", "ggml_new_tensor", "ggml_new_graph_custom", "ggml_backend_buft_alloc_buffer",
                 "ggml_backend_buffer_get_base"):  # fmt: skip
        getattr(base, name).restype = P
    base.ggml_init.argtypes = [InitParams]
    base.ggml_version.restype = c.c_char_p
    base.ggml_backend_tensor_alloc.argtypes = [P, P, P]
    base.ggml_backend_tensor_set.argtypes = [P, P, c.c_size_t, c.c_size_t]
    base.ggml_backend_buffer_free.argtypes = [P]
    base.ggml_free.argtypes = [P]
    cpu.ggml_graph_plan.restype, cpu.ggml_graph_plan.argtypes = Plan, [P, c.c_int, P]
    cpu.ggml_graph_compute.argtypes = [P, P]
    base.ggml_log_set(SILENT, None)
    cpu.ggml_cpu_init()
    return base, cpu


def ggml_name(folder: str = "") -> str:
    """`ggml 0.20.2 (avx2 fma)`: version, and which instructions the library was compiled for."""
    base, cpu = libraries(folder)
    has = [n for n in ("avx2", "avx512", "avx512_vnni", "avx_vnni") if getattr(cpu, f"ggml_cpu_has_{n}")()]
    return f"ggml {base.ggml_version().decode()} ({' '.join(has)})"


class Ggml:
    """The graph as ggml's CPU backend computes it; `repack` puts weights into its rearranged form first."""

    def __init__(
        self, graph: Graph, memory: Mapping[int, Bytes], threads: int, *, folder: str = "", repack: bool = False
    ) -> None:
        self.base, self.cpu = libraries(folder)
        self.graph, self.memory, self.repack = graph, memory, repack
        nbytes = 2 * len(graph.tensors) * _STRUCT_ROOM + (8 << 20)
        self.context = self.base.ggml_init(InitParams(nbytes, None, True))
        self.made: dict[int, int] = {}
        self.factors = {graph.tensors[i].src[0] for i in graph.nodes if graph.tensors[i].op is Op.MUL_MAT}
        self.buffers: list[int] = []
        for t in graph.tensors:
            self._struct(t)
        for t in graph.tensors:
            self._connect(t)
        self.cgraph = self.base.ggml_new_graph_custom(P(self.context), c.c_size_t(4096), c.c_bool(False))
        for ident in graph.expand:
            self.base.ggml_build_forward_expand(P(self.cgraph), P(self.made[ident]))
        self.plan = self.cpu.ggml_graph_plan(P(self.cgraph), threads, None)
        self.work = room(int(self.plan.work_size) + 64)
        self.plan.work_data = self.work.ctypes.data

    def _struct(self, t: Tensor) -> None:
        made = int(
            self.base.ggml_new_tensor(P(self.context), c.c_int(int(t.dtype)), c.c_int(4), (c.c_int64 * 4)(*t.ne))
        )
        struct = TensorStruct.from_address(made)
        struct.nb = (c.c_size_t * 4)(*t.nb)
        self.made[t.id] = made
        known = t.buffer is not None and t.dtype in _REPACKED and t.ne[1] % 8 == 0
        if self.repack and known and t.id in self.factors:
            self._rearrange(t, made)
        else:
            struct.data = address_of(self.memory, t)

    def _rearrange(self, t: Tensor, made: int) -> None:
        kind = getattr(self.cpu, _REPACK_SYMBOL)
        kind.restype = P
        buffer = int(self.base.ggml_backend_buft_alloc_buffer(P(kind()), c.c_size_t(t.nbytes)))
        self.buffers.append(buffer)
        self.base.ggml_backend_tensor_alloc(buffer, made, self.base.ggml_backend_buffer_get_base(P(buffer)))
        self.base.ggml_backend_tensor_set(made, self.memory[t.id].ctypes.data, 0, t.nbytes)

    def _connect(self, t: Tensor) -> None:
        struct = TensorStruct.from_address(self.made[t.id])
        struct.op = int(t.op)
        struct.op_params = (c.c_int32 * 16)(*encode_params(t.op, t.params))
        for i, source in enumerate(t.src):
            struct.src[i] = None if source == ABSENT else self.made[source]
        if t.view_src is not None:
            struct.view_src, struct.view_offs = self.made[t.view_src], t.view_offs

    def run(self) -> None:
        """Compute all of it."""
        status = self.cpu.ggml_graph_compute(self.cgraph, c.byref(self.plan))
        assert status == 0, status

    def close(self) -> None:
        """Give the memory back."""
        for buffer in self.buffers:
            self.base.ggml_backend_buffer_free(buffer)
        self.base.ggml_free(self.context)


def check_close(
    graph: Graph, memory: Mapping[int, Bytes], ours: Ours, theirs: Mapping[str, Ggml], tolerance: float
) -> None:
    """Both must have computed the same thing, or the times mean nothing: relative to the largest value."""
    output = graph.tensors[graph.expand[-1]]
    if output.op in (Op.SET_ROWS, Op.CPY) or output.dtype != DType.F32:
        return
    values: dict[str, Any] = {}
    runs: dict[str, Callable[[], None]] = {"ours": ours.run} | {k: v.run for k, v in theirs.items()}
    for name, run in runs.items():
        memory[output.id][:] = 0
        run()
        values[name] = memory[output.id].view(np.float32).copy()
    scale = max(float(np.abs(value).max()) for value in values.values())
    for name, value in values.items():
        off = float(np.abs(value - values["ours"]).max()) / scale
        assert off <= tolerance, f"{output.name}: {name} is {off:.2g} away from ours"
