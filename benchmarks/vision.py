"""Vision encoders as whole graphs against ggml: the bundled model's, and one layer of Llama 3.2 11B Vision's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from benchmarks import models
from benchmarks.measure import Row, call_timer, compare, interleave
from benchmarks.ops import builder, filled
from benchmarks.twins import Bytes, Ggml, Ours, check_close, ggml_name, memory_of
from coordinator.cli.options import DEMO_IMAGE
from coordinator.graph.node import BufferRef, Graph, Tensor
from coordinator.graph.vision import Gates, Tower, build_vision
from coordinator.model.gguf_file import open_model, weight_bytes
from coordinator.model.hparams import VisionParams
from coordinator.model.image import load_image, preprocess
from coordinator.model.params import read_params
from coordinator.model.presets import PRESETS
from coordinator.runtime.inputs import vision_inputs, vision_mask
from protocol.dtypes import DType
from protocol.ops import Usage

TOLERANCE = 0.05
"""Relative to the largest value: 8-bit activations in both, added up differently."""


def demo() -> tuple[Graph, dict[str, Bytes]]:
    """The vision graph of the bundled model, its weights and the bundled image."""
    model = open_model(models.model_file("demo"))
    params = read_params(model)
    assert params.vision is not None
    graph = build_vision(params.vision, params.text.n_embd, model.weights, lambda _: BufferRef("CPU", Usage.WEIGHTS))
    tiles = preprocess(load_image(DEMO_IMAGE), params.vision)
    given = {
        k: np.ascontiguousarray(v).reshape(-1).view(np.uint8) for k, v in vision_inputs(params.vision, tiles).items()
    }
    for ident in graph.leafs:
        name = graph.tensors[ident].name
        if name in model.weights:
            given[name] = np.frombuffer(weight_bytes(model, name), np.uint8)
    return graph, given


def full_size(tiles: int) -> VisionParams:
    """The vision tower of Llama 3.2 11B Vision, for so many tiles of 1608 tokens."""
    params = PRESETS["llama-3.2-11b-vision"][0].vision
    assert params is not None
    return VisionParams(**{f: getattr(params, f) for f in params.__slots__} | {"max_tiles": tiles})


def layer(params: VisionParams, dtype: DType, fused: bool) -> tuple[Graph, dict[str, Bytes]]:
    """One local layer over all tiles, random weights; not `fused`: attention as products and a softmax."""
    d, f = params.n_embd, params.n_ff
    matrices = {
        "attn_q": (d, d),
        "attn_k": (d, d),
        "attn_v": (d, d),
        "attn_output": (d, d),
        "ffn_up": (d, f),
        "ffn_down": (f, d),
    }
    vectors = {"attn_norm.weight": d, "attn_norm.bias": d, "ffn_norm.weight": d, "ffn_norm.bias": d,
               "ffn_up.bias": f, "ffn_down.bias": d}  # fmt: skip
    b = builder(
        *((f"v.blk.0.{name}.weight", dtype, ne) for name, ne in matrices.items()),
        *((f"v.blk.0.{name}", DType.F32, (n,)) for name, n in vectors.items()),
    )
    tower = (Tower if fused else Unfused)(b, params, Gates(b, True))
    tokens = params.max_tiles * params.n_tile_padded
    x, mask = b.input("x", DType.F32, d, tokens), b.input("kq_mask", DType.F16, tokens, tokens)
    graph, given = filled(b, tower.layer(x, mask, "v.blk.0"))
    given["kq_mask"] = vision_mask(params, params.max_tiles).reshape(-1).view(np.uint8)
    return graph, given


class Unfused(Tower):
    """The tower with the whole matrix of scores in memory, as clip's graphs in llama.cpp have been."""

    __slots__ = ()

    def _attention(self, x: Tensor, mask: Tensor, prefix: str) -> Tensor:
        b, p = self.b, self.params
        q, k, v = (self._heads(x, f"{prefix}.attn_{which}") for which in "qkv")
        scores = b.soft_max(b.mul_mat(k, q), mask, 1.0 / math.sqrt(q.ne[0]))
        mixed = b.mul_mat(b.cont(b.transpose(v)), scores)
        x = b.cont(b.permute(mixed, 0, 2, 1, 3), p.n_embd, x.ne[1])
        return b.mul_mat(b.weight(f"{prefix}.attn_output.weight", p.n_embd, p.n_embd), x)


def race(
    name: str, graph: Graph, given: dict[str, Bytes], folder: str, rounds: int, unfused: Graph | None = None
) -> Row:
    """Ours and ggml on one thread, in turn; ggml's unfused graph as a third where it is given."""
    memory = memory_of(graph, given)
    ours, theirs = Ours(graph, memory, 1), {"the same graph": Ggml(graph, memory, 1, folder=folder)}
    check_close(graph, memory, ours, theirs, TOLERANCE)
    if unfused is not None:
        theirs["unfused"] = Ggml(unfused, memory_of(unfused, given), 1, folder=folder)
    rivals = {key: call_timer(rival.run, 1) for key, rival in ({"ours": ours} | theirs).items()}
    samples = interleave(rivals, rounds, 60.0)
    ours.close()
    for peer in theirs.values():
        peer.close()
    return compare("vision", name, samples, "ms", lambda s: s * 1e3, ggml_name(folder), "the same graph")


def rows(quick: bool, folder: str) -> Iterator[Row]:
    """The bundled model's tower, and the full-size layer in two types."""
    graph, given = demo()
    yield race("vision encode, bundled model, 1 thread", graph, given, folder, 9 if quick else 41)
    for tiles in (1,) if quick else (1, 4):
        for dtype in (DType.F16, DType.Q8_0):
            params = full_size(tiles)
            graph, given = layer(params, dtype, fused=True)
            unfused, _ = layer(params, dtype, fused=False)
            label = f"one 11B vision layer {dtype.label}, {tiles * params.n_tile_padded} tokens, 1 thread"
            yield race(label, graph, given, folder, 3 if quick else 7, unfused)
