"""The reference model of tests/data/ref_mllama for graph tests: parameters, weights under GGUF names, inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from coordinator.graph.build import dims
from coordinator.graph.node import BufferRef
from coordinator.model.hparams import ModelParams, RopeParams, TextParams, VisionParams, WeightInfo
from protocol.dtypes import DType
from protocol.ops import Usage

Array = np.ndarray[Any, Any]
DATA = Path(__file__).parents[1] / "data" / "ref_mllama"
CASES = ("square_2x2", "wide_1x3", "small_1x1", "text_only")


def case(name: str) -> dict[str, Array]:
    with np.load(DATA / f"{name}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def place(name: str) -> BufferRef:
    return BufferRef("CPU", Usage.WEIGHTS)


def read_params(*, gates_after_tanh: bool = True) -> ModelParams:
    config = json.loads((DATA / "config.json").read_text())
    t, v = config["text_config"], config["vision_config"]
    head_dim = t["hidden_size"] // t["num_attention_heads"]
    text = TextParams(
        n_layer=t["num_hidden_layers"], n_embd=t["hidden_size"], n_ff=t["intermediate_size"],
        n_head=t["num_attention_heads"], n_head_kv=t["num_key_value_heads"], head_dim=head_dim,
        n_vocab=t["vocab_size"], n_ctx_train=t["max_position_embeddings"], rms_eps=t["rms_norm_eps"],
        rope=RopeParams(n_dims=head_dim, mode=0, freq_base=t["rope_theta"], has_factors=True),
        cross_layers=tuple(t["cross_attention_layers"]),
    )  # fmt: skip
    vision = VisionParams(
        n_layer=v["num_hidden_layers"], n_global=v["num_global_layers"], n_embd=v["hidden_size"],
        n_ff=v["intermediate_size"], n_head=v["attention_heads"], eps=v["norm_eps"], image_size=v["image_size"],
        patch_size=v["patch_size"], max_tiles=v["max_num_tiles"], channels=v["num_channels"],
        intermediate=tuple(v["intermediate_layers_indices"]), image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0),
        gates_after_tanh=gates_after_tanh,
    )  # fmt: skip
    return ModelParams("mllama", "ref_mllama", text, vision, config["image_token_index"])


def rope_factors(params: ModelParams) -> Array:
    """What each frequency is divided by, by the rule of Llama 3 (facts: low, between, high wave lengths)."""
    rope = json.loads((DATA / "config.json").read_text())["text_config"]["rope_scaling"]
    n, base = params.text.rope.n_dims, params.text.rope.freq_base
    wave = 2 * np.pi * base ** (2 * np.arange(n // 2) / n)
    length, low, high, factor = (
        rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    )
    smooth = np.clip((length / wave - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def read_weights(params: ModelParams) -> dict[str, Array]:
    """All weights under GGUF names, in the conventions of `params` (gates, interleaved rope)."""
    raw = load_file(DATA / "model.safetensors")
    out = {"rope_freqs.weight": rope_factors(params)}
    for name, value in raw.items():
        for gguf_name, converted in _convert(name, value, params):
            out[gguf_name] = converted
    return out


def infos(weights: dict[str, Array]) -> dict[str, WeightInfo]:
    return {
        name: WeightInfo(name, DType.F32, dims(*reversed(w.shape)), 0, w.nbytes) for name, w in weights.items()
    }  # fmt: skip


TEXT = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "cross_attn.q_proj": "cross_attn_q_proj",
    "cross_attn.k_proj": "cross_attn_k_proj", "cross_attn.v_proj": "cross_attn_v_proj",
    "cross_attn.o_proj": "cross_attn_o_proj", "cross_attn.q_norm": "cross_attn_q_norm",
    "cross_attn.k_norm": "cross_attn_k_norm", "cross_attn_attn_gate": "cross_attn_attn_gate",
    "cross_attn_mlp_gate": "cross_attn_mlp_gate",
}  # fmt: skip
VISION = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "gate_attn": "attn_gate", "gate_ffn": "ffn_gate",
}  # fmt: skip
WHOLE = {
    "language_model.model.embed_tokens.weight": "token_embd.weight",
    "language_model.model.norm.weight": "output_norm.weight",
    "language_model.lm_head.weight": "output.weight",
    "multi_modal_projector.weight": "mm.0.weight",
    "multi_modal_projector.bias": "mm.0.bias",
    "vision_model.patch_embedding.weight": "v.patch_embd.weight",
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.gated_positional_embedding.embedding": "v.position_embd.weight",
    "vision_model.gated_positional_embedding.tile_embedding.weight": "v.tile_position_embd.weight",
    "vision_model.pre_tile_positional_embedding.embedding.weight": "v.pre_tile_position_embd.weight",
    "vision_model.post_tile_positional_embedding.embedding.weight": "v.post_tile_position_embd.weight",
    "vision_model.pre_tile_positional_embedding.gate": "v.pre_tile_position_embd.gate",
    "vision_model.post_tile_positional_embedding.gate": "v.post_tile_position_embd.gate",
    "vision_model.layernorm_pre.weight": "v.pre_ln.weight",
    "vision_model.layernorm_pre.bias": "v.pre_ln.bias",
    "vision_model.layernorm_post.weight": "v.post_ln.weight",
    "vision_model.layernorm_post.bias": "v.post_ln.bias",
}
LAYERS = (
    ("language_model.model.layers.", "blk", TEXT),
    ("vision_model.transformer.layers.", "v.blk", VISION),
    ("vision_model.global_transformer.layers.", "v.global.blk", VISION),
)


def _convert(name: str, value: Array, params: ModelParams) -> list[tuple[str, Array]]:
    assert params.vision is not None
    after_tanh = params.vision.gates_after_tanh
    if name == "vision_model.gated_positional_embedding.gate":
        gates = (1 - np.tanh(value), np.tanh(value)) if after_tanh else (value, value)
        return [("v.position_embd.gate", gates[0]), ("v.tile_position_embd.gate", gates[1])]
    target = WHOLE.get(name) or _layer_name(name)
    if target.startswith("v.") and target.endswith("gate") and after_tanh:
        value = np.tanh(value)
    if target.startswith("blk.") and target.endswith(("attn_q.weight", "attn_k.weight")) and "cross" not in target:
        value = interleave_rows(value, params.text.head_dim)
    return [(target, value)]


def interleave_rows(w: Array, head_dim: int) -> Array:
    """Rows of each head from (first half, second half) to pairs: what rope of mode 0 expects."""
    heads = w.reshape(-1, 2, head_dim // 2, w.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(w.shape)


def _layer_name(name: str) -> str:
    for prefix, ours, table in LAYERS:
        if name.startswith(prefix):
            il, rest = name.removeprefix(prefix).split(".", 1)
            stem, dot, kind = rest.rpartition(".")
            if rest in table:
                return f"{ours}.{il}.{table[rest]}"
            return f"{ours}.{il}.{table[stem]}{dot}{kind}"
    raise KeyError(name)


def raw_gates(params: ModelParams) -> ModelParams:
    assert params.vision is not None
    return replace(params, vision=replace(params.vision, gates_after_tanh=False))
