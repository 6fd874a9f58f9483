"""A real ggml scheduler: runs the graphs of a document and reads back everything it decided."""

from __future__ import annotations

import ctypes as c
from typing import Any

from tests.conformance.real_ggml import (
    GRAPH_SIZE,
    RealGraph,
    TensorStruct,
    World,
    buft_of,
    int32,
    word,
    words,
)

# Where `struct ggml_backend_sched` of 0.20.2 keeps things.
GALLOC, CUR_COPY = 0x108, 0x1CC
ALLOC_N_NODES, ALLOC_N_LEAFS, ALLOC_NODES, ALLOC_LEAFS = 0x15C, 0x160, 0x168, 0x180
SPLITS, N_SPLITS, N_COPIES, GRAPH_INPUTS, N_GRAPH_INPUTS = 0x1B8, 0x1C0, 0x1C8, 0x3D8, 0x3E0
SPLIT_NBYTES, SPLIT_START, SPLIT_END, SPLIT_INPUTS, SPLIT_N_INPUTS = 128, 4, 8, 16, 24
# `struct ggml_gallocr`, `struct ggml_backend_buffer`, and `struct ggml_cgraph`.
GALLOC_BUFFERS, MAX_CHUNKS, BUFFER_BUFT, BUFFER_BASE, BUFFER_SIZE = 8, 16, 0x58, 0x60, 0x68
GRAPH_N_NODES, GRAPH_N_LEAFS, GRAPH_NODES, GRAPH_LEAFS = 4, 8, 16, 40


class RealScheduler:
    """`ggml_backend_sched` over faked devices."""

    def __init__(self, lib: c.CDLL, doc: dict[str, Any]) -> None:
        self.lib, self.doc = lib, doc
        self.world = World(lib, doc["devices"])
        n = len(self.world.backends)
        self.backends = (c.c_void_p * n)(*self.world.backends)
        bufts = (c.c_void_p * n)(*(self.world.bufts[buft_of(d)] for d in doc["devices"]))
        self.sched = lib.ggml_backend_sched_new(
            self.backends, bufts, n, GRAPH_SIZE, doc.get("parallel", False), doc.get("op_offload", False)
        )
        self.graphs: list[RealGraph] = []

    def run(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Reserve or allocate one graph of the document."""
        lib = self.lib
        graph = RealGraph(self.world, entry)
        self.graphs.append(graph)
        if entry.get("reset", True):
            lib.ggml_backend_sched_reset(self.sched)
        for ident, device in entry.get("pinned", {}).items():
            address = graph.address[int(ident)]
            lib.ggml_backend_sched_set_tensor_backend(self.sched, address, self.world.backends[device])
        if entry.get("reserve", False):
            assert lib.ggml_backend_sched_reserve(self.sched, graph.graph)
            return {"n_splits": int32(self.sched + N_SPLITS), "chunks": self.chunks()}
        self.world.syncs = 0
        assert lib.ggml_backend_sched_alloc_graph(self.sched, graph.graph)
        return self._read(graph)

    def close(self) -> None:
        """Free everything."""
        self.lib.ggml_backend_sched_free(self.sched)
        for graph in self.graphs:
            graph.free()
        assert not self.world.bases, "buffers left"

    def chunks(self) -> dict[str, list[int]]:
        """Sizes of the chunks of each buffer type."""
        out: dict[str, list[int]] = {}
        buffers = word(word(self.sched + GALLOC) + GALLOC_BUFFERS)
        for k, device in enumerate(self.doc["devices"]):
            vbuffer = word(buffers + 8 * k)
            chunks = [b for b in words(vbuffer, MAX_CHUNKS) if b] if vbuffer else []
            out.setdefault(buft_of(device), [word(b + BUFFER_SIZE) for b in chunks])
        return out

    def _chunk_places(self) -> dict[int, tuple[str, int]]:
        """Buffer type and number of each chunk, by its buffer."""
        buffers = word(word(self.sched + GALLOC) + GALLOC_BUFFERS)
        found: dict[int, tuple[str, int]] = {}
        for k, device in enumerate(self.doc["devices"]):
            vbuffer = word(buffers + 8 * k)
            for number, buffer in enumerate(words(vbuffer, MAX_CHUNKS) if vbuffer else ()):
                if buffer:
                    found.setdefault(buffer, (buft_of(device), number))
        return found

    def _place(self, tensor: TensorStruct, chunks: dict[int, tuple[str, int]]) -> list[Any] | None:
        if not tensor.buffer:
            return None
        found = chunks.get(tensor.buffer)
        if found is None:
            name = next(n for n, b in self.world.bufts.items() if b == word(tensor.buffer + BUFFER_BUFT))
            return [name, None, None]
        buft, chunk = found
        return [buft, chunk, (tensor.data or 0) - word(tensor.buffer + BUFFER_BASE)]

    def _read(self, graph: RealGraph) -> dict[str, Any]:
        sched = self.sched
        known = {a: i for i, a in enumerate(self.world.backends)}
        chunks = self._chunk_places()
        copies: dict[str, list[Any] | None] = {}

        def label(address: int) -> Any:
            """A tensor's id, or a copy's name."""
            if address in graph.ident:
                return graph.ident[address]
            tensor = TensorStruct.from_address(address)
            name = tensor.name.decode()
            copies[name] = self._place(tensor, chunks)
            return name

        backend = {}
        for ident, address in graph.address.items():
            handle = self.lib.ggml_backend_sched_get_tensor_backend(sched, address)
            if handle is not None:
                backend[str(ident)] = known[handle]
        n_nodes, n_leafs = int32(graph.graph + GRAPH_N_NODES), int32(graph.graph + GRAPH_N_LEAFS)
        nodes = words(word(graph.graph + GRAPH_NODES), n_nodes)
        leafs = words(word(graph.graph + GRAPH_LEAFS), n_leafs)
        alloc_nodes = words(word(sched + ALLOC_NODES), int32(sched + ALLOC_N_NODES))
        splits = [self._split(graph, word(sched + SPLITS) + SPLIT_NBYTES * k) for k in range(int32(sched + N_SPLITS))]
        is_dep = [n for n in alloc_nodes if n not in graph.ident and TensorStruct.from_address(n).view_src]
        return {
            "n_splits": len(splits),
            "splits": splits,
            "nodes": [graph.ident[n] for n in nodes],
            "leafs": [graph.ident[n] for n in leafs],
            "backend": backend,
            "sources": [
                [label(s) if s else None for s in TensorStruct.from_address(n).src][: self._n_src(graph, n)]
                for n in nodes
            ],
            "alloc_nodes": ["hold" if n in is_dep else label(n) for n in alloc_nodes],
            "alloc_leafs": [label(n) for n in words(word(sched + ALLOC_LEAFS), int32(sched + ALLOC_N_LEAFS))],
            "offsets": {
                str(i): self._place(struct, chunks) for i, struct in zip(graph.ids, graph.structs, strict=False)
            },
            "copies": copies,
            "chunks": self.chunks(),
            "reallocated": self.world.syncs > 0,
            "current": int32(sched + CUR_COPY),
        }

    def _n_src(self, graph: RealGraph, address: int) -> int:
        return max((k + 1 for k, s in enumerate(TensorStruct.from_address(address).src) if s), default=0)

    def _split(self, graph: RealGraph, address: int) -> dict[str, Any]:
        inputs = words(word(address + SPLIT_INPUTS), int32(address + SPLIT_N_INPUTS))
        return {
            "backend": self.doc["devices"][int32(address)]["name"],
            "start": int32(address + SPLIT_START),
            "end": int32(address + SPLIT_END),
            "inputs": [graph.ident[i] for i in inputs],
        }


def plan_real(lib: c.CDLL, doc: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything that real ggml decides about the graphs of a document."""
    scheduler = RealScheduler(lib, doc)
    try:
        return [scheduler.run(entry) for entry in doc["graphs"]]
    finally:
        scheduler.close()
