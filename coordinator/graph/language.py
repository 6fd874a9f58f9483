"""The language model's graph, architectures `llama` and `mllama`, node for node as llama.cpp of 2026 builds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.graph.build import Builder, Params, Place
from coordinator.graph.debug import add_debug_inputs
from coordinator.graph.node import Graph, Tensor
from coordinator.model.hparams import ModelParams, TextParams, WeightInfo
from protocol.dtypes import DType
from protocol.ops import GluOp, UnaryOp

PinNorm = Callable[[int], str | None]


@dataclass(frozen=True, slots=True)
class CrossState:
    """The image side of a language graph.

    `n_cross` rows of cross states (images x tiles x tokens). With `write` the graph computes the cross keys and
    values from the resident `cross_states` and stores them in the caches; without, it reads what an earlier graph
    has stored. With `mask_attention` a row that sees no tile gets no cross attention at all, as in Meta's code;
    otherwise only its MLP is dropped, as in Hugging Face's.
    """

    n_cross: int
    write: bool
    mask_attention: bool = False


@dataclass(frozen=True, slots=True)
class TextShape:
    """The sizes of one language graph: new tokens, cache positions read, rows of logits, positions of the cache."""

    n_tokens: int
    n_kv: int
    n_outputs: int
    n_ctx: int
    kv_dtype: DType


@dataclass(frozen=True, slots=True)
class TextInputs:
    """The tensors that all layers share; `cross` and `row` masks only with an image."""

    positions: Tensor
    k_rows: Tensor
    v_rows: Tensor
    mask: Tensor
    outputs: Tensor
    cross_mask: Tensor | None = None
    row_mask: Tensor | None = None
    cross_states: Tensor | None = None


def build_language(
    params: ModelParams,
    weights: Mapping[str, WeightInfo],
    place: Place,
    *,
    n_tokens: int,
    n_kv: int,
    n_outputs: int,
    n_ctx: int,
    kv_dtype: DType,
    cross: CrossState | None = None,
    debug: Sequence[str] = (),
    pin_norm: PinNorm | None = None,
) -> Graph:
    """The graph of one evaluation of `n_tokens` tokens; without `cross` the cross layers are left out.

    Inputs: `inp_tokens` i32 [T], `inp_pos` i32 [T], `attn_inp_k_idxs` and `attn_inp_v_idxs` i64 [T] (cache rows to
    write), `attn_inp_kq_mask` f16 [n_kv, T], `out_ids` i32 [n_outputs]; with an image `cross_mask` f16 [n_cross, T]
    and `row_mask` f32 [1, T]. Resident: `cache_k_l{i}`, `cache_v_l{i}` [n_embd_kv, n_ctx] of `kv_dtype`,
    `cross_k_l{i}`, `cross_v_l{i}` f32 [n_embd_kv, n_cross], `cross_states` f32 [n_embd, n_cross]. Output:
    `result_output` f32 [n_vocab, n_outputs]. `place` is also asked for the residents' names, and for `output.weight`
    even when the output is tied to `token_embd.weight`. `pin_norm` names the device that the `norm` nodes of a layer
    are bound to. Raises ModelError for a weight that is missing or misshapen, UsageError for an unknown debug name.
    """
    shape = TextShape(n_tokens, n_kv, n_outputs, n_ctx, kv_dtype)
    text = params.text
    b = Builder(weights, place)
    inputs = _inputs(b, text, shape, cross)
    tokens = b.input("inp_tokens", DType.I32, n_tokens)
    x = b.name(b.get_rows(b.weight("token_embd.weight", text.n_embd, 0), tokens), "embd")
    run = [il for il in range(text.n_layer) if cross is not None or il not in text.cross_layers]
    for il in run:
        last = il == run[-1]
        if il in text.cross_layers:
            assert cross is not None
            x = CrossLayer(b, text, shape, inputs, il, pin_norm, cross).build(x, last)
        else:
            x = SelfLayer(b, text, shape, inputs, il, pin_norm).build(x, last)
    x = b.name(b.rms_norm(x, text.rms_eps), "norm")
    x = b.name(b.mul(x, b.vector("output_norm.weight", text.n_embd)), "result_norm")
    head = "token_embd.weight" if text.tied_output else "output.weight"
    x = b.name(b.mul_mat(b.weight(head, text.n_embd, 0, near="output.weight"), x), "result_output")
    b.expand(b.output(x))
    return add_debug_inputs(b.graph("language"), debug)


def rope_params(text: TextParams) -> Params:
    """The parameters of ROPE, without YaRN."""
    rope = text.rope
    return (0, rope.n_dims, rope.mode, 0, rope.n_ctx_orig, rope.freq_base, rope.freq_scale, 0.0, 1.0, 32.0, 1.0)


def _inputs(b: Builder, text: TextParams, shape: TextShape, cross: CrossState | None) -> TextInputs:
    n = shape.n_tokens
    positions = b.input("inp_pos", DType.I32, n)
    k_rows = b.input("attn_inp_k_idxs", DType.I64, n)
    v_rows = b.input("attn_inp_v_idxs", DType.I64, n)
    mask = b.input("attn_inp_kq_mask", DType.F16, shape.n_kv, n)
    outputs = b.input("out_ids", DType.I32, shape.n_outputs)
    if cross is None or not text.cross_layers:
        return TextInputs(positions, k_rows, v_rows, mask, outputs)
    cross_mask = b.input("cross_mask", DType.F16, cross.n_cross, n)
    row_mask = b.input("row_mask", DType.F32, 1, n)
    states = b.resident("cross_states", DType.F32, text.n_embd, cross.n_cross) if cross.write else None
    return TextInputs(positions, k_rows, v_rows, mask, outputs, cross_mask, row_mask, states)


class Layer:
    """What both kinds of layers share: names with the layer's number, norms, projections and the MLP."""

    def __init__(
        self, b: Builder, text: TextParams, shape: TextShape, inputs: TextInputs, il: int, pin_norm: PinNorm | None
    ) -> None:
        self.b, self.text, self.shape, self.inputs, self.il, self.pin_norm = b, text, shape, inputs, il, pin_norm

    def cb(self, tensor: Tensor, name: str) -> Tensor:
        """The tensor named `NAME-LAYER`."""
        return self.b.name(tensor, f"{name}-{self.il}")

    def weight(self, name: str, *ne: int) -> Tensor:
        """The layer's weight `name`."""
        return self.b.weight(f"blk.{self.il}.{name}", *ne)

    def vector(self, name: str, *ne: int) -> Tensor:
        """The layer's weight `name`, as F32."""
        return self.b.vector(f"blk.{self.il}.{name}", *ne)

    def norm(self, x: Tensor, weight: str, name: str) -> Tensor:
        """RMS norm over axis 0, times the weight; the first of the two nodes is what llama.cpp binds to a device."""
        x = self.cb(self.b.rms_norm(x, self.text.rms_eps), "norm")
        device = self.pin_norm(self.il) if self.pin_norm is not None else None
        if device is not None:
            self.b.pin(x, device)
        return self.cb(self.b.mul(x, self.vector(weight, x.ne[0])), name)

    def heads(self, x: Tensor, weight: str, n_head: int, name: str) -> Tensor:
        """A projection [head_dim, n_head, rows] of `x`."""
        text = self.text
        x = self.cb(self.b.mul_mat(self.weight(weight, x.ne[0], text.head_dim * n_head), x), name)
        return self.cb(self.b.reshape(x, text.head_dim, n_head, x.ne[1]), name)

    def cached(self, cache: Tensor, n_rows: int) -> Tensor:
        """The first rows of a cache as [head_dim, n_rows, kv heads]."""
        text, nb = self.text, cache.dtype.row_nbytes(self.text.head_dim)
        ne = (text.head_dim, text.n_head_kv, n_rows, 1)
        return self.b.permute(self.b.view(cache, ne, (nb, cache.nb[1], cache.nb[2])), 0, 2, 1, 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weight: str) -> Tensor:
        """Attention of q [head_dim, heads, T] to the caches' rows, and the output projection."""
        b, text = self.b, self.text
        q = b.permute(b.view(q, q.ne, q.nb[1:]), 0, 2, 1, 3)
        n_rows = mask.ne[0]
        x = b.flash_attn_ext(q, self.cached(k, n_rows), self.cached(v, n_rows), mask, 1.0 / math.sqrt(text.head_dim))
        x = self.cb(b.reshape(x, x.ne[0] * x.ne[1], x.ne[2] * x.ne[3]), "kqv_out")
        return self.cb(b.mul_mat(self.weight(weight, x.ne[0], text.n_embd), x), "attn_out")

    def mlp(self, x: Tensor) -> Tensor:
        """The SiLU-gated MLP of the normalised `x`."""
        b, text = self.b, self.text
        up = self.cb(b.mul_mat(self.weight("ffn_up.weight", text.n_embd, text.n_ff), x), "ffn_up")
        gate = self.cb(b.mul_mat(self.weight("ffn_gate.weight", text.n_embd, text.n_ff), x), "ffn_gate")
        x = self.cb(b.glu(gate, up, GluOp.SWIGLU), "ffn_swiglu")
        return self.cb(b.mul_mat(self.weight("ffn_down.weight", text.n_ff, text.n_embd), x), "ffn_out")


class SelfLayer(Layer):
    """A plain Llama layer: causal self-attention over the KV cache, then the MLP."""

    def build(self, x: Tensor, last: bool) -> Tensor:
        """The layer's output; the last layer goes on with the rows of `out_ids` alone."""
        b = self.b
        attn = self._attention(self.norm(x, "attn_norm.weight", "attn_norm"))
        if last:
            attn, x = b.get_rows(attn, self.inputs.outputs), b.get_rows(x, self.inputs.outputs)
        x = self.cb(b.add(attn, x), "ffn_inp")
        y = self.mlp(self.norm(x, "ffn_norm.weight", "ffn_norm"))
        return self.cb(b.add(y, x), "l_out")

    def _attention(self, x: Tensor) -> Tensor:
        b, text, inputs = self.b, self.text, self.inputs
        q = self._rope(self.heads(x, "attn_q.weight", text.n_head, "Qcur"), "Qcur")
        k = self._rope(self.heads(x, "attn_k.weight", text.n_head_kv, "Kcur"), "Kcur")
        v = self.heads(x, "attn_v.weight", text.n_head_kv, "Vcur")
        for tensor in (q, v, k):
            b.expand(tensor)
        k_cache, v_cache = self._store(k, "cache_k", inputs.k_rows), self._store(v, "cache_v", inputs.v_rows)
        return self.attend(q, k_cache, v_cache, inputs.mask, "attn_output.weight")

    def _rope(self, x: Tensor, name: str) -> Tensor:
        text, factors = self.text, None
        if text.rope.has_factors:
            # one tensor for all layers, but one copy per device: it lies where the layer does
            near = f"blk.{self.il}.attn_norm.weight"
            factors = self.b.weight("rope_freqs.weight", text.rope.n_dims // 2, near=near)
        return self.cb(self.b.rope(x, self.inputs.positions, factors, rope_params(text)), name)

    def _store(self, x: Tensor, cache: str, rows: Tensor) -> Tensor:
        """Write `x` [head_dim, heads, T] to the rows of the layer's cache, and give the whole cache."""
        b, width = self.b, x.ne[0] * x.ne[1]
        whole = b.resident(f"{cache}_l{self.il}", self.shape.kv_dtype, width, self.shape.n_ctx)
        b.expand(b.set_rows(whole, b.view(x, (width, x.ne[2]), (x.nb[2],)), rows))
        return whole


class CrossLayer(Layer):
    """A gated cross-attention layer to the image's states: per-head norms of q and k, no rope, a mask per row."""

    def __init__(
        self, b: Builder, text: TextParams, shape: TextShape, inputs: TextInputs, il: int,
        pin_norm: PinNorm | None, cross: CrossState,
    ) -> None:  # fmt: skip
        super().__init__(b, text, shape, inputs, il, pin_norm)
        self.cross = cross

    def build(self, x: Tensor, last: bool) -> Tensor:
        """The layer's output; the last layer goes on with the rows of `out_ids` alone."""
        b, rows = self.b, self.inputs.row_mask
        assert rows is not None
        b.expand(x)  # or this layer's keys and values would be computed amid the previous layer
        attn = self._attention(self.norm(x, "attn_norm.weight", "attn_norm"))
        if last:
            ids = self.inputs.outputs
            attn, x, rows = b.get_rows(attn, ids), b.get_rows(x, ids), b.get_rows(rows, ids)
        if self.cross.mask_attention:
            attn = self.cb(b.mul(attn, rows), "attn_masked")
        x = self.cb(b.add(self._gated(attn, "cross_attn_attn_gate", "attn_gated"), x), "ffn_inp")
        y = self.mlp(self.norm(x, "ffn_norm.weight", "ffn_norm"))
        y = self.cb(b.mul(y, rows), "ffn_masked")
        return self.cb(b.add(self._gated(y, "cross_attn_mlp_gate", "ffn_gated"), x), "l_out")

    def _gated(self, x: Tensor, gate: str, name: str) -> Tensor:
        tanh = self.cb(self.b.unary(self.vector(gate, 1), UnaryOp.TANH), f"{name}_tanh")
        return self.cb(self.b.mul(x, tanh), name)

    def _attention(self, x: Tensor) -> Tensor:
        b, text, mask = self.b, self.text, self.inputs.cross_mask
        assert mask is not None
        width = text.head_dim * text.n_head_kv
        k = b.resident(f"cross_k_l{self.il}", DType.F32, width, self.cross.n_cross)
        v = b.resident(f"cross_v_l{self.il}", DType.F32, width, self.cross.n_cross)
        if self.cross.write:
            # the copies come before the reads in the order of expansion, which is all that orders them
            b.expand(b.cpy(self._keys(), k))
            b.expand(b.cpy(self._values(), v))
        q = self.heads(x, "cross_attn_q_proj.weight", text.n_head, "Qcur")
        q = self.norm(q, "cross_attn_q_norm.weight", "Qcur_normed")
        return self.attend(q, k, v, mask, "cross_attn_o_proj.weight")

    def _keys(self) -> Tensor:
        states = self.inputs.cross_states
        assert states is not None
        k = self.heads(states, "cross_attn_k_proj.weight", self.text.n_head_kv, "Kcross")
        k = self.norm(k, "cross_attn_k_norm.weight", "Kcross_normed")
        return self.b.reshape(k, k.ne[0] * k.ne[1], k.ne[2])

    def _values(self) -> Tensor:
        states, text = self.inputs.cross_states, self.text
        assert states is not None
        weight = self.weight("cross_attn_v_proj.weight", text.n_embd, text.head_dim * text.n_head_kv)
        return self.cb(self.b.mul_mat(weight, states), "Vcross")
