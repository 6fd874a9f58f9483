"""The language model's graph as llama.cpp built it in December 2024: explicit scores, the cache written by CPY."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.graph.build import Builder, Place
from coordinator.graph.debug import add_debug_inputs
from coordinator.graph.language import PinNorm, rope_params
from coordinator.graph.node import Graph, Tensor
from coordinator.model.hparams import ModelParams, TextParams, WeightInfo
from protocol.dtypes import DType
from protocol.ops import UnaryOp

MASK_PAD = 32
"""Rows of KQ_mask are padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class Shape2024:
    """The sizes of one graph; `n_past` is where in the cache the new tokens go, which the graph itself contains."""

    n_tokens: int
    n_past: int
    n_kv: int
    n_outputs: int
    n_ctx: int
    kv_dtype: DType
    n_cross: int
    cross_write: bool


def build_language_2024(
    params: ModelParams,
    weights: Mapping[str, WeightInfo],
    place: Place,
    *,
    n_tokens: int,
    n_past: int,
    n_kv: int,
    n_outputs: int,
    n_ctx: int,
    kv_dtype: DType,
    n_cross: int = 0,
    cross_write: bool = False,
    debug: Sequence[str] = (),
    pin_norm: PinNorm | None = None,
) -> Graph:
    """The graph of one evaluation of `n_tokens` tokens after `n_past`; with `n_cross` 0 the cross layers are left out.

    Inputs: `inp_tokens` i32 [T], `inp_pos` i32 [T], `KQ_mask` f32 [n_kv, T padded to 32], `inp_out_ids` i32
    [n_outputs]. Resident: `cache_k_l{i}` and `cache_v_l{i}` [n_embd_kv * n_ctx] of `kv_dtype`, the values transposed;
    `cross_k_l{i}` f32 [n_embd_kv, n_cross], `cross_v_l{i}` f32 [n_cross, n_embd_kv], `cross_states` f32
    [n_embd, n_cross]. There are no masks for the image: every token sees every tile. Output: `result_output` f32
    [n_vocab, n_outputs]. Raises ModelError for a weight that is missing or misshapen, UsageError for an unknown
    debug name.
    """
    text = params.text
    shape = Shape2024(n_tokens, n_past, n_kv, n_outputs, n_ctx, kv_dtype, n_cross, cross_write)
    b = Builder(weights, place)
    layers = Layers2024(b, text, shape, pin_norm)
    tokens = b.input("inp_tokens", DType.I32, n_tokens)
    x = b.name(b.get_rows(b.weight("token_embd.weight", text.n_embd, 0), tokens), "inp_embd")
    run = [il for il in range(text.n_layer) if n_cross or il not in text.cross_layers]
    for il in run:
        x = layers.layer(x, il, il == run[-1])
    x = layers.norm(x, "output_norm.weight", "result_norm", None)
    head = "token_embd.weight" if text.tied_output else "output.weight"
    x = b.name(b.mul_mat(b.weight(head, text.n_embd, 0, near="output.weight"), x), "result_output")
    b.expand(b.output(x))
    return add_debug_inputs(b.graph("language"), debug)


class Layers2024:
    """The layers of one graph and the inputs they share."""

    def __init__(self, b: Builder, text: TextParams, shape: Shape2024, pin_norm: PinNorm | None) -> None:
        self.b, self.text, self.shape, self.pin_norm = b, text, shape, pin_norm
        self.width = text.head_dim * text.n_head_kv
        self.scale = 1.0 / math.sqrt(text.head_dim)
        self.positions = b.input("inp_pos", DType.I32, shape.n_tokens)
        self.mask = b.input("KQ_mask", DType.F32, shape.n_kv, -(-shape.n_tokens // MASK_PAD) * MASK_PAD)
        self.outputs = b.input("inp_out_ids", DType.I32, shape.n_outputs)

    def layer(self, x: Tensor, il: int, last: bool) -> Tensor:
        """The output of layer `il`; the last layer goes on with the rows of `inp_out_ids` alone."""
        b, cross = self.b, il in self.text.cross_layers
        y = self.norm(x, f"blk.{il}.attn_norm.weight", "attn_norm", il)
        y = self._cross_attention(y, x, il) if cross else self._self_attention(y, il)
        if last:
            y, x = b.get_rows(y, self.outputs), b.get_rows(x, self.outputs)
        y = self._gated(y, f"blk.{il}.cross_attn_attn_gate") if cross else y
        x = b.name(b.add(y, x), f"ffn_inp-{il}")
        y = self._mlp(self.norm(x, f"blk.{il}.ffn_norm.weight", "ffn_norm", il), il)
        y = self._gated(y, f"blk.{il}.cross_attn_mlp_gate") if cross else y
        return b.name(b.add(y, x), f"l_out-{il}")

    def norm(self, x: Tensor, weight: str, name: str, il: int | None) -> Tensor:
        """RMS norm over axis 0, times the weight; `il` None: the final one, which is bound to no device."""
        b, suffix = self.b, "" if il is None else f"-{il}"
        x = b.name(b.rms_norm(x, self.text.rms_eps), f"norm{suffix}")
        device = self.pin_norm(il) if self.pin_norm is not None and il is not None else None
        if device is not None:
            b.pin(x, device)
        return b.name(b.mul(x, b.vector(weight, x.ne[0])), f"{name}{suffix}")

    def _gated(self, x: Tensor, gate: str) -> Tensor:
        return self.b.mul(x, self.b.unary(self.b.vector(gate, 1), UnaryOp.TANH))

    def _project(self, x: Tensor, weight: str, n_head: int) -> Tensor:
        return self.b.mul_mat(self.b.weight(weight, self.text.n_embd, self.text.head_dim * n_head), x)

    def _roped(self, x: Tensor, weight: str, n_head: int, il: int, name: str) -> Tensor:
        b, text, factors = self.b, self.text, None
        if text.rope.has_factors:
            near = f"blk.{il}.attn_norm.weight"
            factors = b.weight("rope_freqs.weight", text.rope.n_dims // 2, near=near)
        x = b.name(self._project(x, weight, n_head), f"{name}-{il}")
        x = b.reshape(x, text.head_dim, n_head, x.ne[1])
        return b.name(b.rope(x, self.positions, factors, rope_params(text)), f"{name}-{il}")

    def _self_attention(self, x: Tensor, il: int) -> Tensor:
        b, text, shape = self.b, self.text, self.shape
        q = self._roped(x, f"blk.{il}.attn_q.weight", text.n_head, il, "Qcur")
        k = self._roped(x, f"blk.{il}.attn_k.weight", text.n_head_kv, il, "Kcur")
        v = b.name(self._project(x, f"blk.{il}.attn_v.weight", text.n_head_kv), f"Vcur-{il}")
        for tensor in (q, k, v):
            b.expand(tensor)
        k_cache = b.resident(f"cache_k_l{il}", shape.kv_dtype, self.width * shape.n_ctx)
        v_cache = b.resident(f"cache_v_l{il}", shape.kv_dtype, self.width * shape.n_ctx)
        self._store(k, v, k_cache, v_cache, il)
        size = shape.kv_dtype.block_nbytes
        row, head = self.width * size, text.head_dim * size
        q = b.name(b.permute(q, 0, 2, 1, 3), f"q-{il}")
        k = b.name(b.view(k_cache, (text.head_dim, shape.n_kv, text.n_head_kv), (row, head)), f"k-{il}")
        values = (shape.n_kv, text.head_dim, text.n_head_kv)
        v = b.name(b.view(v_cache, values, (shape.n_ctx * size, shape.n_ctx * head)), f"v-{il}")
        return self._attend(q, k, v, self.mask, f"blk.{il}.attn_output.weight", il)

    def _store(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, il: int) -> None:
        """Keys go row after row behind the `n_past` rows of the cache, values into columns of the transposed one."""
        b, shape, size = self.b, self.shape, self.shape.kv_dtype.block_nbytes
        rows = b.view(k_cache, (shape.n_tokens * self.width,), (), shape.n_past * self.width * size)
        b.expand(b.cpy(k, b.name(rows, f"k_cache_view-{il}")))
        columns = b.view(v_cache, (shape.n_tokens, self.width), (shape.n_ctx * size,), shape.n_past * size)
        b.expand(b.cpy(b.transpose(v), b.name(columns, f"v_cache_view-{il}")))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, weight: str, il: int) -> Tensor:
        """q [hd, T, heads], k [hd, n, kv heads], v [n, hd, kv heads] -> [n_embd, T]."""
        b, text = self.b, self.text
        scores = b.name(b.mul_mat(k, q), f"kq-{il}")
        scores = b.name(b.soft_max(scores, mask, self.scale), f"kq_soft_max_ext-{il}")
        x = b.name(b.mul_mat(v, scores), f"kqv-{il}")
        x = b.name(b.permute(x, 0, 2, 1, 3), f"kqv_merged-{il}")
        x = b.name(b.cont(x, text.head_dim * text.n_head, x.ne[2]), f"kqv_merged_cont-{il}")
        b.expand(x)
        return b.name(b.mul_mat(b.weight(weight, x.ne[0], text.n_embd), x), f"kqv_out-{il}")

    def _cross_attention(self, x: Tensor, before: Tensor, il: int) -> Tensor:
        b, text, n = self.b, self.text, self.shape.n_cross
        k_cache = b.resident(f"cross_k_l{il}", DType.F32, self.width, n)
        v_cache = b.resident(f"cross_v_l{il}", DType.F32, n, self.width)
        b.expand(before)
        if self.shape.cross_write:
            self._store_cross(k_cache, v_cache, il)
        q = self._project(x, f"blk.{il}.cross_attn_q_proj.weight", text.n_head)
        q = b.reshape(q, text.head_dim, text.n_head, q.ne[1])
        q = b.permute(self.norm(q, f"blk.{il}.cross_attn_q_norm.weight", "Qcur_normed", il), 0, 2, 1, 3)
        keys = (text.head_dim, n, text.n_head_kv)
        k = b.name(b.view(k_cache, keys, (k_cache.nb[1], text.head_dim * 4)), f"k-{il}")
        values = (n, text.head_dim, text.n_head_kv)
        v = b.name(b.view(v_cache, values, (v_cache.nb[1], v_cache.nb[1] * text.head_dim)), f"v-{il}")
        return self._attend(q, k, v, None, f"blk.{il}.cross_attn_o_proj.weight", il)

    def _store_cross(self, k_cache: Tensor, v_cache: Tensor, il: int) -> None:
        b, text, n = self.b, self.text, self.shape.n_cross
        states = b.resident("cross_states", DType.F32, text.n_embd, n)
        k = self._project(states, f"blk.{il}.cross_attn_k_proj.weight", text.n_head_kv)
        k = b.reshape(k, text.head_dim, text.n_head_kv, n)
        k = self.norm(k, f"blk.{il}.cross_attn_k_norm.weight", "Kcross_normed", il)
        b.expand(b.cpy(b.reshape(k, self.width, n), k_cache))
        v = self._project(states, f"blk.{il}.cross_attn_v_proj.weight", text.n_head_kv)
        b.expand(b.cpy(b.transpose(v), v_cache))

    def _mlp(self, x: Tensor, il: int) -> Tensor:
        b, text = self.b, self.text
        up = b.name(b.mul_mat(b.weight(f"blk.{il}.ffn_up.weight", text.n_embd, text.n_ff), x), f"ffn_up-{il}")
        gate = b.name(b.mul_mat(b.weight(f"blk.{il}.ffn_gate.weight", text.n_embd, text.n_ff), x), f"ffn_gate-{il}")
        gate = b.name(b.unary(gate, UnaryOp.SILU), f"ffn_silu-{il}")
        x = b.name(b.mul(gate, up), f"ffn_gate_par-{il}")
        return b.name(b.mul_mat(b.weight(f"blk.{il}.ffn_down.weight", text.n_ff, text.n_embd), x), f"ffn_out-{il}")
