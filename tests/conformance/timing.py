"""Planning time of a llama-like graph, ours against ggml's C: `python -m tests.conformance.timing`."""

from __future__ import annotations

import ctypes as c
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numba import cfunc, types

from coordinator.graph.columns import make_columns
from coordinator.graph.node import Graph, freeze
from coordinator.schedule.document import load_document
from coordinator.schedule.plan import Plan
from coordinator.schedule.scheduler import Scheduler
from tests.conformance import real_ggml
from tests.conformance.documents import strides
from tests.conformance.real_ggml import DEVICE_SLOTS, RealGraph, buft_of
from tests.conformance.real_sched import RealScheduler

Json = dict[str, Any]


def llama_graph(n_layer: int, n_gpu_layers: int, n_embd: int = 512, n_kv: int = 256) -> Json:
    """A decode graph shaped like llama.cpp's: about 32 nodes a layer, the last layers' weights on GPU0."""
    tensors: list[Json] = []

    def add(op: str, ne: list[int], *src: int, view: int | None = None, **facts: Any) -> int:
        ident = len(tensors)
        t = {"id": ident, "name": f"t{ident}", "type": "f32", "ne": ne, "nb": strides("f32", ne), "op": op}
        tensors.append(t | {"flags": [], "src": list(src), "view_src": view, "view_offs": 0, "buffer": None} | facts)
        return ident

    def weight(device: str, *ne: int, usage: str = "weights") -> int:
        return add("NONE", [*ne, 1, 1], buffer={"buft": device, "usage": usage})

    n, m, k = [n_embd, 1, 1, 1], [n_embd, n_kv, 1, 1], [n_embd * 3, 1, 1, 1]
    ids, pos, mask, row = (
        add("NONE", ne, flags=["input"]) for ne in ([1, 1, 1, 1], [1, 1, 1, 1], [n_kv, 1, 1, 1], [1, 1, 1, 1])
    )
    x = add("GET_ROWS", n, weight("CPU", n_embd, 100), ids)
    expand = []
    for layer in range(n_layer):
        d = "GPU0" if layer >= n_layer - n_gpu_layers else "CPU"
        h = add("MUL", n, add("RMS_NORM", n, x), weight(d, n_embd, 1))
        q, key, value = (add("MUL_MAT", n, weight(d, n_embd, n_embd), h) for _ in range(3))
        q, key = (add("ROPE", n, add("RESHAPE", n, t, view=t), pos) for t in (q, key))
        value = add("RESHAPE", n, value, view=value)
        caches = [weight(d, n_embd, n_kv, usage="any") for _ in range(2)]
        for cache, new in zip(caches, (key, value), strict=True):
            flat = (
                add("VIEW", n, new, view=tensors[new]["view_src"] or new) if tensors[new]["view_src"] is None else new
            )
            expand.append(add("SET_ROWS", m, flat, row, cache, view=cache))
        past_k, past_v = (add("PERMUTE", m, add("VIEW", m, cache, view=cache), view=cache) for cache in caches)
        scores = add("MUL_MAT", [n_kv, 1, 1, 1], past_k, add("PERMUTE", n, q, view=q))
        mixed = add("MUL_MAT", n, past_v, add("SOFT_MAX", [n_kv, 1, 1, 1], scores, mask))
        mixed = add("CONT", n, add("PERMUTE", n, mixed, view=mixed))
        x = add("ADD", n, add("MUL_MAT", n, weight(d, n_embd, n_embd), mixed), x)
        h = add("MUL", n, add("RMS_NORM", n, x), weight(d, n_embd, 1))
        gate, up = (add("MUL_MAT", k, weight(d, n_embd, 3 * n_embd), h) for _ in range(2))
        h = add("MUL", k, add("UNARY", k, gate), up)
        x = add("ADD", n, add("MUL_MAT", n, weight(d, 3 * n_embd, n_embd), h), x)
        for _ in range(8):
            x = add("SCALE", n, x)
    h = add("MUL", n, add("RMS_NORM", n, x), weight("GPU0", n_embd, 1))
    expand.append(add("MUL_MAT", [100, 1, 1, 1], weight("GPU0", n_embd, 100), h, flags=["output"]))
    return {"tensors": tensors, "expand": expand, "reset": True, "reserve": False, "pinned": {}}


def answer_natively(scheduler: RealScheduler) -> None:
    """Put compiled functions where Python would be called, so that ggml alone is timed."""
    base = cfunc(types.uintp(types.CPointer(types.uintp)))(_base)
    world = scheduler.world
    world.keep.append(base)
    world.buffer_table.entries[1] = base.address
    always = cfunc(types.uint8(types.uintp, types.uintp))(_always)
    world.keep.append(always)
    for backend, device in zip(world.backends, scheduler.doc["devices"], strict=True):
        handle = c.c_uint64.from_address(backend + 8 * real_ggml.BACKEND_DEVICE).value
        own = world.bufts[buft_of(device)]
        is_own = _answer_equal(own)
        world.keep.append(is_own)
        table = (c.c_void_p * DEVICE_SLOTS).from_address(handle)
        table[9], table[10] = always.address, is_own.address


def _base(buffer):  # type: ignore[no-untyped-def]
    return buffer[12]


def _answer_equal(own: int) -> Any:
    return cfunc(types.uint8(types.uintp, types.uintp))(lambda _device, buft: buft == own)


def _always(_device, _op):  # type: ignore[no-untyped-def]
    return 1


def _microseconds(samples: list[float]) -> str:
    return f"median {statistics.median(samples) * 1e6:7.0f} us, least {min(samples) * 1e6:7.0f} us"


class Ggml:
    """ggml's scheduler over the document's graphs; seconds of reset + alloc_graph, which is all it does to plan."""

    def __init__(self, lib: c.CDLL, doc: Json) -> None:
        self.lib, self.scheduler = lib, RealScheduler(lib, doc)
        answer_natively(self.scheduler)

    def allocate(self, entry: Json) -> float:
        """Plan a graph, which is built before the clock starts."""
        graph = RealGraph(self.scheduler.world, entry)
        start = time.perf_counter()
        self.lib.ggml_backend_sched_reset(self.scheduler.sched)
        assert self.lib.ggml_backend_sched_alloc_graph(self.scheduler.sched, graph.graph)
        took = time.perf_counter() - start
        self.scheduler.graphs.append(graph)
        return took


def named_anew(graph: Graph) -> Graph:
    """The same graph to the allocator, but no repetition: a weight has another name."""
    tensor = next(t for t in graph.tensors if t.buffer is not None)
    tensors = [*graph.tensors]
    tensors[tensor.id] = replace(tensor, name="another")
    return freeze(graph.name, tensors, graph.expand, graph.nodes, graph.leafs)


def read_all(plan: Plan) -> Any:
    """Everything that a plan says, as Python values."""
    return plan.backend, plan.cause, plan.splits, plan.copies, plan.sources, plan.places


def measure(doc: Json, lib: c.CDLL | None, repeat: int) -> dict[str, list[float]]:
    """Seconds of whole calls, ours and ggml's in turns; every graph is built before its clock starts.

    Buffers are planned anew behind another graph, and a third graph finds places. Then, which ggml has no notion of,
    comes the same graph again, and an equal one.
    """
    small = llama_graph(1, 1)
    ggml = Ggml(lib, doc) if lib is not None else None
    document = load_document(doc)
    graph, little = document.entries[0].graph, load_document(doc | {"graphs": [small]}).entries[0].graph
    scheduler = Scheduler(document.devices)
    out: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        out[name].append(time.perf_counter() - start)
        return result

    for _ in range(repeat):
        if ggml is not None:
            ggml.allocate(small)
            out["ggml  new graph, buffers planned anew"].append(ggml.allocate(doc["graphs"][0]))
            out["ggml  new graph, places reused"].append(ggml.allocate(doc["graphs"][0]))
        scheduler.allocate(little)
        graph = freeze(graph.name, graph.tensors, graph.expand, graph.nodes, graph.leafs)
        plan = timed("ours  new graph, buffers planned anew", lambda: scheduler.allocate(graph))  # noqa: B023
        assert plan.reallocated
        other = named_anew(graph)
        assert not timed("ours  new graph, places reused", lambda: scheduler.allocate(other)).reallocated  # noqa: B023
        timed("ours  the same graph again", lambda: scheduler.allocate(other))  # noqa: B023
        equal = named_anew(graph)
        timed("ours  an equal graph again", lambda: scheduler.allocate(equal))  # noqa: B023
        timed("ours  beside it: a graph's columns, once", lambda: make_columns(graph.tensors, graph.nodes, graph.leafs))  # noqa: B023
        timed("ours  beside it: all of a plan as Python", lambda: read_all(plan))  # noqa: B023
    if ggml is not None:
        ggml.scheduler.close()
    return out


def main() -> None:
    """Print the figures."""
    devices = [{"name": "GPU0", "type": "gpu"}, {"name": "CPU", "type": "cpu"}]
    doc = {"devices": devices, "parallel": False, "op_offload": False, "graphs": [llama_graph(36, 24)]}
    graph = load_document(doc).entries[0].graph
    print(f"{len(graph.nodes)} nodes, {len(graph.leafs)} leafs, 2 devices; whole calls, in turns")
    path = real_ggml.library_path()
    found = measure(doc, None if path is None else real_ggml.load(path), 100)
    for name, samples in found.items():
        print(f"{name:42} {_microseconds(samples)}")
    for what in ("buffers planned anew", "places reused") if path is not None else ():
        turns = zip(found[f"ours  new graph, {what}"], found[f"ggml  new graph, {what}"], strict=True)
        print(f"ours / ggml, {what:29} median {statistics.median(a / b for a, b in turns):7.2f}")


if __name__ == "__main__":
    main()
