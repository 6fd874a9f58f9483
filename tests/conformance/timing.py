"""Planning time of a llama-like graph, ours against ggml's C: `python -m tests.conformance.timing`."""

from __future__ import annotations

import ctypes as c
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from numba import cfunc, types

from coordinator.schedule import allocate, assign, split
from coordinator.schedule.arrays import GraphArrays
from coordinator.schedule.document import load_document
from coordinator.schedule.scheduler import Scheduler
from coordinator.schedule.tasks import Tasks, arrange
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


def time_ggml(lib: c.CDLL, doc: Json, repeat: int) -> tuple[list[float], list[float]]:
    """Seconds of reset + alloc_graph: with a reservation each time (another graph lies between), and without."""
    small = llama_graph(1, 1)
    scheduler = RealScheduler(lib, doc)
    answer_natively(scheduler)
    anew, again = [], []
    for _ in range(repeat):
        for entry, samples in ((small, None), (doc["graphs"][0], anew), (doc["graphs"][0], again)):
            graph = RealGraph(scheduler.world, entry)
            start = time.perf_counter()
            lib.ggml_backend_sched_reset(scheduler.sched)
            assert lib.ggml_backend_sched_alloc_graph(scheduler.sched, graph.graph)
            if samples is not None:
                samples.append(time.perf_counter() - start)
            scheduler.graphs.append(graph)
    scheduler.close()
    return anew, again


def time_ours(doc: Json, repeat: int) -> dict[str, list[float]]:
    """Seconds of the passes alone, as above, and of whole calls from the graph to the plan."""
    document = load_document(doc)
    graph = document.entries[0].graph
    small = load_document(doc | {"graphs": [llama_graph(1, 1)]}).entries[0].graph
    scheduler = Scheduler(document.devices)
    known = scheduler._devices
    out: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        out[name].append(time.perf_counter() - start)
        return result

    for _ in range(repeat):
        scheduler.allocate(small)
        arrays = scheduler._arrays(graph)

        def passes(arrays: GraphArrays = arrays) -> Tasks:
            backend, _cause = assign.assign(graph, arrays, known, False)
            parts = split.split(graph, arrays, known.table, backend, scheduler._capacity, 1, 0, 0)
            return arrange(arrays, known.table, backend, parts, 0)

        def with_reservation(arrays: GraphArrays = arrays) -> tuple[Tasks, allocate.Places]:
            tasks = passes()
            return tasks, allocate.reserve(arrays, known.table, tasks, known.n_compute)[0]

        old, reserved = timed("assign + split + allocate, reservation", with_reservation)
        timed("assign + split + allocate, places reused", lambda: allocate.fits(passes(), old, reserved))  # noqa: B023
        timed("graph to plan, reservation", lambda: scheduler.allocate(graph))
        timed("same graph again", lambda: scheduler.allocate(graph))
        twin = load_document(doc).entries[0].graph
        timed("equal graph again", lambda: scheduler.allocate(twin))  # noqa: B023
    return out


def main() -> None:
    """Print the figures."""
    devices = [{"name": "GPU0", "type": "gpu"}, {"name": "CPU", "type": "cpu"}]
    doc = {"devices": devices, "parallel": False, "op_offload": False, "graphs": [llama_graph(36, 24)]}
    graph = load_document(doc).entries[0].graph
    print(f"{len(graph.nodes)} nodes, {len(graph.leafs)} leafs, 2 devices")
    path = real_ggml.library_path()
    if path is not None:
        anew, again = time_ggml(real_ggml.load(path), doc, 40)
        print(f"ggml  reset + alloc_graph, reservation         {_microseconds(anew)}")
        print(f"ggml  reset + alloc_graph, places reused       {_microseconds(again)}")
    for name, samples in time_ours(doc, 40).items():
        print(f"ours  {name:42} {_microseconds(samples)}")


if __name__ == "__main__":
    main()
