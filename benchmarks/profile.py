"""One step of a model, kind of operation by kind of operation, against ggml's CPU library: where a step's time goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from benchmarks import models
from benchmarks.measure import Row, call_timer, compare, interleave
from benchmarks.twins import Bytes, Ggml, Ours, ggml_name, memory_of
from coordinator.graph.language import build_language
from coordinator.graph.node import BufferRef, Graph, freeze
from coordinator.model.gguf_file import open_model, weight_bytes
from coordinator.model.params import read_params
from protocol.dtypes import DType
from protocol.ops import VIEW_OPS, Op, Usage

N_KV = 256


def step_graph(name: str, n_tokens: int) -> tuple[Graph, dict[int, Bytes]]:
    """The graph of one evaluation on an empty context of 256 cells, and memory for it; activations are random."""
    model = open_model(models.model_file(name))
    params = read_params(model)
    graph = build_language(
        params, model.weights, lambda _: BufferRef("CPU", Usage.WEIGHTS), n_tokens=n_tokens, n_kv=max(N_KV, n_tokens),
        n_outputs=1, n_ctx=max(N_KV, n_tokens), kv_dtype=DType.F16,
    )  # fmt: skip
    given = {
        t.name: np.frombuffer(weight_bytes(model, t.name), np.uint8) for t in graph.tensors if t.name in model.weights
    }
    memory = memory_of(graph, given)
    rng = np.random.default_rng(0)
    for ident in graph.nodes:
        t = graph.tensors[ident]
        if t.view_src is None and t.dtype == DType.F32:
            memory[t.id].view(np.float32)[:] = rng.standard_normal(t.nelements, np.float32)
    return graph, memory


def kinds(graph: Graph) -> dict[str, list[int]]:
    """Nodes by what they compute: operation, type of the first source, shape."""
    found: dict[str, list[int]] = {}
    for ident in graph.nodes:
        t = graph.tensors[ident]
        if t.op in VIEW_OPS or t.op is Op.NONE:
            continue
        first = graph.tensors[t.src[0]]
        shape = " x ".join(map(str, (first.ne[0], *t.ne[:2]) if t.op is Op.MUL_MAT else t.ne[:2]))
        label = f"{t.op.name} {first.dtype.label} {shape}"
        found.setdefault(label, []).append(ident)
    return found


def part(graph: Graph, nodes: list[int]) -> Graph:
    """These nodes alone; what they read is there already."""
    chosen = set(nodes)
    tensors = [t if t.id in chosen else replace(t, op=Op.NONE, src=()) for t in graph.tensors]
    return freeze("part", tensors, tuple(nodes), tuple(nodes), ())


def rows(quick: bool, names: tuple[str, ...], folder: str) -> Iterator[Row]:
    """Milliseconds of one thread per step and kind of operation: single tokens, then prompts of 128."""
    for name in names:
        for n_tokens in (1, 128):
            graph, memory = step_graph(name, n_tokens)
            for label, nodes in kinds(graph).items():
                some = part(graph, nodes)
                ours, theirs = Ours(some, memory, 1), {"native": Ggml(some, memory, 1, folder=folder)}
                repacked = Ggml(some, memory, 1, folder=folder, repack=True)
                if repacked.buffers:
                    theirs["repacked"] = repacked
                rivals = {key: call_timer(rival.run, 1) for key, rival in ({"ours": ours} | theirs).items()}
                samples = interleave(rivals, 7 if quick else 21, 10.0)
                ours.close()
                for peer in {*theirs.values(), repacked}:
                    peer.close()
                what = f"{name}, {n_tokens} token{'s' if n_tokens > 1 else ''}: {len(nodes)} {label}"
                yield compare("profile", what, samples, "ms", lambda s: s * 1e3, ggml_name(folder))
