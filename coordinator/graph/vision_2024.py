"""The vision tower as it was built in December 2024: no mask, explicit scores, tanh-approximated GELU.

The published full-size memory figures come from this graph. Its answer differs from the model's own: padding and
absent tiles take part in all attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from coordinator.graph.build import Builder, Place
from coordinator.graph.debug import add_debug_inputs
from coordinator.graph.node import Graph, Tensor
from coordinator.graph.vision import Gates
from coordinator.model.hparams import VisionParams, WeightInfo
from protocol.dtypes import DType
from protocol.ops import UnaryOp


def build_vision_2024(
    params: VisionParams,
    n_embd_out: int,
    weights: Mapping[str, WeightInfo],
    place: Place,
    *,
    debug: Sequence[str] = (),
) -> Graph:
    """The graph of one image of M tiles, N tokens each, padded to N'.

    Inputs: `inp_raw` f32 [S, S, channels, M], `aspect_ratios` i32 [1], `embeddings` f32 [D, N, M] (zeros),
    `positions` i32 [N] (0, 1, ...). Output: `vision_output` f32 [n_embd_out, N, M]. Raises ModelError for a weight
    that is missing or misshapen, UsageError for an unknown debug name.
    """
    b = Builder(weights, place)
    tower = Tower2024(b, params)
    image = b.input("inp_raw", DType.F32, params.image_size, params.image_size, params.channels, params.max_tiles)
    ratio = b.input("aspect_ratios", DType.I32, 1)

    x = b.add(tower.patches(image), tower.tile_vectors("pre", ratio, inplace=True))
    x = tower.positions(tower.class_tokens(x), ratio)
    x = b.name(tower.layer_norm(x, "v.pre_ln"), "pre layernorm")
    x = tower.padded(x)
    kept: dict[int, Tensor] = {}
    for il in range(params.n_layer):
        kept[il] = x
        x = tower.layer(x, f"v.blk.{il}", il)
    x = b.name(tower.layer_norm(x, "v.post_ln"), "post layernorm")
    x = tower.split_tiles(x)
    x = b.add(x, tower.tile_vectors("post", ratio, inplace=False))
    x = b.reshape(x, params.n_embd, params.max_tiles * params.n_tile_padded)
    for il in range(params.n_global):
        x = tower.layer(x, f"v.global.blk.{il}", il, gated=True)
    x = tower.features(x, [kept[il] for il in params.intermediate])
    x = b.mul_mat(b.weight("mm.0.weight", x.ne[0], n_embd_out), x)
    x = b.name(b.add(x, b.vector("mm.0.bias", n_embd_out)), "vision_output")
    b.expand(b.output(x))
    return add_debug_inputs(b.graph("vision"), debug)


class Tower2024:
    """The stages of the tower; D is the width, N the tokens of a tile, N' the padded ones, M the tiles."""

    def __init__(self, b: Builder, params: VisionParams) -> None:
        self.b, self.params, self.gates = b, params, Gates(b, params.gates_after_tanh)

    def patches(self, image: Tensor) -> Tensor:
        """The image's patches [D, N-1, M], by way of [N-1, D, M]."""
        b, p, side = self.b, self.params, self.params.image_size // self.params.patch_size
        kernel = b.weight("v.patch_embd.weight", p.patch_size, p.patch_size, p.channels, p.n_embd)
        columns = b.im2col(kernel, image, p.patch_size, kernel.dtype)
        n = columns.ne[0]
        x = b.mul_mat(b.reshape(columns, n, p.n_patches * p.max_tiles), b.reshape(kernel, n, p.n_embd))
        x = b.cont(b.permute(b.reshape(x, side, side, p.max_tiles, p.n_embd), 0, 1, 3, 2))
        return b.cont(b.permute(b.reshape(x, p.n_patches, p.n_embd, p.max_tiles), 1, 0, 2, 3))

    def tile_vectors(self, which: str, ratio: Tensor, *, inplace: bool) -> Tensor:
        """One gated vector per tile: [D, 1, M]."""
        b, p, name = self.b, self.params, f"{which}_tile_position_embd"
        rows = b.name(b.get_rows(b.weight(f"v.{name}.weight", p.n_embd * p.max_tiles, 0), ratio), name)
        return b.mul(b.reshape(rows, p.n_embd, 1, p.max_tiles), self.gates.gate(f"v.{name}.gate"), inplace=inplace)

    def class_tokens(self, x: Tensor) -> Tensor:
        """The class token and the patches added, in place, to the zeros of the input `embeddings`: [D, N, M]."""
        b, p = self.b, self.params
        out = b.input("embeddings", DType.F32, p.n_embd, p.n_tile_tokens, p.max_tiles)
        nb = (out.nb[1], out.nb[2], out.nb[3])
        token = b.vector("v.class_embd", p.n_embd)
        for tile in range(p.max_tiles):
            out = b.acc(out, token, nb, tile * nb[1], inplace=True)
        return b.acc(out, x, nb, token.nb[1], inplace=True)

    def positions(self, x: Tensor, ratio: Tensor) -> Tensor:
        """Plus the position of a token in its tile and that of the tile in the image."""
        b, p, n = self.b, self.params, self.params.n_tile_tokens
        ids = b.input("positions", DType.I32, n)
        rows = b.get_rows(b.weight("v.position_embd.weight", p.n_embd, n), ids)
        x = b.add(x, b.mul(rows, self.gates.complement("v.position_embd.gate"), inplace=True))
        tiles = b.get_rows(b.weight("v.tile_position_embd.weight", p.n_embd * n * p.max_tiles, 0), ratio)
        tiles = b.reshape(b.name(tiles, "tile_position_embd"), p.n_embd, n, p.max_tiles)
        return b.add(x, b.mul(tiles, self.gates.gate("v.tile_position_embd.gate"), inplace=True))

    def padded(self, x: Tensor) -> Tensor:
        """[D, N, M] -> [D, M*N'], a view of the padded tensor."""
        b, p = self.b, self.params
        x = b.pad(x, 0, p.n_tile_padded - p.n_tile_tokens)
        return b.view(x, (p.n_embd, p.n_tile_padded * p.max_tiles, 1), (x.nb[1], x.nb[3]))

    def split_tiles(self, x: Tensor) -> Tensor:
        """[D, M*N'] -> [D, N', M]."""
        return self.b.reshape(x, self.params.n_embd, self.params.n_tile_padded, self.params.max_tiles)

    def layer_norm(self, x: Tensor, prefix: str) -> Tensor:
        """LayerNorm with weight and bias; every one has the file's epsilon."""
        b, n = self.b, x.ne[0]
        x = b.mul(b.norm(x, self.params.eps), b.vector(f"{prefix}.weight", n))
        return b.add(x, b.vector(f"{prefix}.bias", n))

    def layer(self, x: Tensor, prefix: str, il: int, *, gated: bool = False) -> Tensor:
        """One pre-norm layer over [D, M*N']; the global ones weight what they add by a gate."""
        b = self.b
        y = self._attention(self.layer_norm(x, f"{prefix}.attn_norm"), prefix, il)
        y = b.mul(y, self.gates.gate(f"{prefix}.attn_gate"), inplace=True) if gated else y
        x = b.name(b.add(y, x), f"{il} residual")
        y = self._mlp(self.layer_norm(x, f"{prefix}.ffn_norm"), prefix, il)
        y = b.mul(y, self.gates.gate(f"{prefix}.ffn_gate"), inplace=True) if gated else y
        return b.name(b.add(y, x), f"{il} residual")

    def _heads(self, x: Tensor, weight: str, axes: tuple[int, ...]) -> Tensor:
        b, p = self.b, self.params
        x = b.mul_mat(b.weight(f"{weight}.weight", p.n_embd, p.n_embd), x)
        return b.cont(b.permute(b.reshape(x, p.n_embd // p.n_head, p.n_head, x.ne[1]), *axes))

    def _attention(self, x: Tensor, prefix: str, il: int) -> Tensor:
        b, p, head_dim = self.b, self.params, self.params.n_embd // self.params.n_head
        q = b.name(self._heads(x, f"{prefix}.attn_q", (0, 2, 1, 3)), f"{il} query")
        k = b.name(self._heads(x, f"{prefix}.attn_k", (0, 2, 1, 3)), f"{il} key")
        v = b.name(self._heads(x, f"{prefix}.attn_v", (1, 2, 0, 3)), f"{il} value")
        scores = b.scale(b.mul_mat(k, q), 1.0 / math.sqrt(head_dim), inplace=True)
        scores = b.name(b.soft_max(scores, None, inplace=True), f"{il} KQ")
        x = b.mul_mat(v, scores)
        x = b.permute(b.reshape(x, head_dim, x.ne[1], p.n_head), 0, 2, 1, 3)
        x = b.name(b.cont(x, p.n_embd, x.ne[2]), f"{il} KQV")
        x = b.mul_mat(b.weight(f"{prefix}.attn_output.weight", p.n_embd, p.n_embd), x)
        return b.name(x, f"{il} self attention")

    def _mlp(self, x: Tensor, prefix: str, il: int) -> Tensor:
        b, p = self.b, self.params
        x = b.mul_mat(b.weight(f"{prefix}.ffn_up.weight", p.n_embd, p.n_ff), x)
        x = b.unary(b.add(x, b.vector(f"{prefix}.ffn_up.bias", p.n_ff)), UnaryOp.GELU, inplace=True)
        x = b.mul_mat(b.weight(f"{prefix}.ffn_down.weight", p.n_ff, p.n_embd), x)
        return b.name(b.add(x, b.vector(f"{prefix}.ffn_down.bias", p.n_embd)), f"{il} feed forward")

    def features(self, x: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """The unpadded final state (D rows), then the K kept ones interleaved (row h*K + k): [D*(1 + K), N, M]."""
        b, p, drop = self.b, self.params, self.params.n_tile_padded - self.params.n_tile_tokens
        stacked = b.leaf("stacked0", DType.F32, 0, p.n_embd, p.n_tile_padded * p.max_tiles)
        for tensor in kept:
            stacked = b.concat(stacked, b.reshape(tensor, 1, tensor.ne[0], tensor.ne[1]), 0)
        stacked = b.reshape(stacked, len(kept) * p.n_embd, p.n_tile_padded, p.max_tiles)
        stacked = b.unpad(stacked, 0, drop)
        return b.concat(b.unpad(self.split_tiles(x), 0, drop), stacked, 0)
