"""The mllama vision tower and projector: a correct graph, with the attention mask of the model's training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.graph.build import Builder, Place
from coordinator.graph.debug import add_debug_inputs
from coordinator.graph.node import Graph, Tensor
from coordinator.model.hparams import VisionParams, WeightInfo
from protocol.dtypes import DType
from protocol.ops import UnaryOp

LN_EPS = 1e-5
"""Epsilon of the layer norms before and after the local layers: fixed, not the file's."""


def build_vision(
    params: VisionParams,
    n_embd_out: int,
    weights: Mapping[str, WeightInfo],
    place: Place,
    *,
    debug: Sequence[str] = (),
) -> Graph:
    """The graph of one image of M tiles, N tokens each, padded to N' (Hugging Face's maths).

    Inputs: `inp_raw` f32 [S, S, channels, M], `aspect_ratio_id` i32 [1], `kq_mask` f16 [M*N', M*N'] (-inf only where
    query and key are both padding or of an absent tile, else 0). Output: `vision_output` f32 [n_embd_out, M*N].
    Raises ModelError for a weight that is missing or misshapen, UsageError for an unknown debug name.
    """
    b = Builder(weights, place)
    tower = Tower(b, params, Gates(b, params.gates_after_tanh))
    tokens, tiles = params.max_tiles * params.n_tile_padded, params.max_tiles
    image = b.input("inp_raw", DType.F32, params.image_size, params.image_size, params.channels, tiles)
    ratio = b.input("aspect_ratio_id", DType.I32, 1)
    mask = b.input("kq_mask", DType.F16, tokens, tokens)

    x = tower.positions(tower.class_token(tower.pre_tile(tower.patches(image), ratio)), ratio)
    x = b.name(tower.layer_norm(x, "v.pre_ln", LN_EPS), "v.pre_ln")
    x = b.name(b.pad(x, 0, params.n_tile_padded - params.n_tile_tokens), "v.padded")
    x = b.reshape(x, params.n_embd, tokens)
    kept: dict[int, Tensor] = {}
    for il in range(params.n_layer):
        kept[il] = x
        x = tower.layer(x, mask, f"v.blk.{il}")
    x = b.name(tower.layer_norm(x, "v.post_ln", LN_EPS), "v.post_ln")
    x = tower.post_tile(x, ratio)
    for il in range(params.n_global):
        x = tower.layer(x, mask, f"v.global.blk.{il}", gated=True)
    features = tower.features(x, [kept[il] for il in params.intermediate])
    x = b.mul_mat(b.weight("mm.0.weight", features.ne[0], n_embd_out), features)
    x = b.name(b.add(x, b.vector("mm.0.bias", n_embd_out)), "vision_output")
    b.expand(b.output(x))
    return add_debug_inputs(b.graph("vision"), debug)


@dataclass(frozen=True, slots=True)
class Gates:
    """The scalar gates as factors: stored after tanh, or raw and then put through it in the graph."""

    b: Builder
    after_tanh: bool

    def gate(self, name: str) -> Tensor:
        """tanh(g) of the gate `name`."""
        stored = self.b.vector(name, 1)
        return stored if self.after_tanh else self.b.name(self.b.unary(stored, UnaryOp.TANH), f"{name}_tanh")

    def complement(self, name: str) -> Tensor:
        """1 - tanh(g), which is what files of gates after tanh store for the position embedding."""
        stored = self.b.vector(name, 1)
        if self.after_tanh:
            return stored
        tanh = self.b.unary(stored, UnaryOp.TANH)
        return self.b.name(self.b.scale(tanh, -1.0, 1.0), f"{name}_complement")


@dataclass(frozen=True, slots=True)
class Tower:
    """The stages of the tower; D is the width, N the tokens of a tile, N' the padded ones, M the tiles."""

    b: Builder
    params: VisionParams
    gates: Gates

    def patches(self, image: Tensor) -> Tensor:
        """The image's patches [D, N-1, M], row-major within each tile: a convolution without bias."""
        b, p = self.b, self.params
        kernel = b.weight("v.patch_embd.weight", p.patch_size, p.patch_size, p.channels, p.n_embd)
        columns = b.im2col(kernel, image, p.patch_size, DType.F32)
        columns = b.reshape(columns, columns.ne[0], p.n_patches * p.max_tiles)
        x = b.mul_mat(b.reshape(kernel, columns.ne[0], p.n_embd), columns)
        return b.name(b.reshape(x, p.n_embd, p.n_patches, p.max_tiles), "v.patch_embd")

    def pre_tile(self, x: Tensor, ratio: Tensor) -> Tensor:
        """Plus one vector per tile, before the class token exists."""
        return self.b.name(self.b.add(x, self._tile_vectors("pre", ratio)), "v.pre_tile")

    def class_token(self, x: Tensor) -> Tensor:
        """The class token in front of every tile's patches: [D, N, M]."""
        b, p = self.b, self.params
        token = b.repeat(b.vector("v.class_embd", p.n_embd), p.n_embd, 1, p.max_tiles)
        return b.name(b.concat(token, x, 1), "v.with_class")

    def positions(self, x: Tensor, ratio: Tensor) -> Tensor:
        """Plus the position of a token in its tile and that of the tile in the image, class token included."""
        b, p, n = self.b, self.params, self.params.n_tile_tokens
        table = b.vector("v.position_embd.weight", p.n_embd, n)
        x = b.add(x, b.mul(table, self.gates.complement("v.position_embd.gate")))
        tiles = b.get_rows(b.weight("v.tile_position_embd.weight", p.n_embd * n * p.max_tiles, 0), ratio)
        tiles = b.mul(b.reshape(tiles, p.n_embd, n, p.max_tiles), self.gates.gate("v.tile_position_embd.gate"))
        return b.name(b.add(x, tiles), "v.positions")

    def post_tile(self, x: Tensor, ratio: Tensor) -> Tensor:
        """Plus one vector per tile, for class and padding tokens too: [D, M*N'] as it came."""
        b, p = self.b, self.params
        x = b.reshape(x, p.n_embd, p.n_tile_padded, p.max_tiles)
        x = b.name(b.add(x, self._tile_vectors("post", ratio)), "v.post_tile")
        return b.reshape(x, p.n_embd, p.n_tile_padded * p.max_tiles)

    def _tile_vectors(self, which: str, ratio: Tensor) -> Tensor:
        b, p, prefix = self.b, self.params, f"v.{which}_tile_position_embd"
        rows = b.get_rows(b.weight(f"{prefix}.weight", p.n_embd * p.max_tiles, 0), ratio)
        return b.mul(b.reshape(rows, p.n_embd, 1, p.max_tiles), self.gates.gate(f"{prefix}.gate"))

    def layer_norm(self, x: Tensor, prefix: str, eps: float) -> Tensor:
        """LayerNorm with weight and bias."""
        b, n = self.b, x.ne[0]
        return b.add(b.mul(b.norm(x, eps), b.vector(f"{prefix}.weight", n)), b.vector(f"{prefix}.bias", n))

    def layer(self, x: Tensor, mask: Tensor, prefix: str, *, gated: bool = False) -> Tensor:
        """One pre-norm layer over [D, M*N']; the global ones weight what they add by a gate."""
        b, p = self.b, self.params
        y = self._attention(self.layer_norm(x, f"{prefix}.attn_norm", p.eps), mask, prefix)
        y = b.mul(y, self.gates.gate(f"{prefix}.attn_gate")) if gated else y
        x = b.name(b.add(y, x), f"{prefix}.ffn_inp")
        y = self._mlp(self.layer_norm(x, f"{prefix}.ffn_norm", p.eps), prefix)
        y = b.mul(y, self.gates.gate(f"{prefix}.ffn_gate")) if gated else y
        return b.name(b.add(y, x), f"{prefix}.out")

    def _heads(self, x: Tensor, name: str) -> Tensor:
        """A projection [head_dim, rows, heads] of `x`."""
        b, p = self.b, self.params
        x = b.name(b.mul_mat(b.weight(f"{name}.weight", p.n_embd, p.n_embd), x), name)
        return b.permute(b.reshape(x, p.n_embd // p.n_head, p.n_head, x.ne[1]), 0, 2, 1, 3)

    def _attention(self, x: Tensor, mask: Tensor, prefix: str) -> Tensor:
        b, p = self.b, self.params
        q, k, v = (self._heads(x, f"{prefix}.attn_{which}") for which in "qkv")
        x = b.name(b.flash_attn_ext(q, k, v, mask, 1.0 / math.sqrt(q.ne[0])), f"{prefix}.attn")
        x = b.reshape(x, p.n_embd, x.ne[2])
        return b.name(b.mul_mat(b.weight(f"{prefix}.attn_output.weight", p.n_embd, p.n_embd), x), f"{prefix}.attn_out")

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        b, p = self.b, self.params
        x = b.mul_mat(b.weight(f"{prefix}.ffn_up.weight", p.n_embd, p.n_ff), x)
        x = b.unary(b.add(x, b.vector(f"{prefix}.ffn_up.bias", p.n_ff)), UnaryOp.GELU_ERF)
        x = b.mul_mat(b.weight(f"{prefix}.ffn_down.weight", p.n_ff, p.n_embd), b.name(x, f"{prefix}.ffn_gelu"))
        return b.name(b.add(x, b.vector(f"{prefix}.ffn_down.bias", p.n_embd)), f"{prefix}.ffn_out")

    def features(self, x: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """The unpadded final state (D rows), then the K kept ones interleaved (row h*K + k): [D*(1 + K), M*N]."""
        b, p = self.b, self.params
        rows = p.n_tile_tokens * p.max_tiles
        final = b.reshape(self._unpadded(x), p.n_embd, rows)
        if not kept:
            return final
        stacked, *rest = (b.reshape(self._unpadded(t), 1, p.n_embd, rows) for t in kept)
        for tensor in rest:
            stacked = b.concat(stacked, tensor, 0)
        stacked = b.reshape(stacked, len(kept) * p.n_embd, rows)
        return b.name(b.concat(final, stacked, 0), "v.features")

    def _unpadded(self, x: Tensor) -> Tensor:
        """[D, M*N'] -> [D, N, M], contiguous."""
        b, p = self.b, self.params
        shape = (p.n_embd, p.n_tile_tokens, p.max_tiles)
        return b.cont(b.view(x, shape, (x.nb[1], x.nb[1] * p.n_tile_padded)))
