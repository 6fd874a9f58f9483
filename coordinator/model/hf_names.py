"""Tensor names: where each tensor of a GGUF file is found in a Hugging Face checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint by its canonical name; `change` is what is done to it on the way.

    Changes: "" | permute_q | permute_k (rows of heads, for interleaved rope) | tanh | one_minus_tanh.
    """

    name: str
    change: str = ""


_ALIASES: Final = (
    ("model.language_model.", "language_model.model."),  # in memory since transformers 4.52
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.", "language_model.model."),  # a plain Llama
    ("lm_head.", "language_model.lm_head."),
)

_TEXT: Final = "language_model.model"
_VISION: Final = "vision_model"
_WHOLE: Final = {
    "token_embd.weight": Source(f"{_TEXT}.embed_tokens.weight"),
    "output_norm.weight": Source(f"{_TEXT}.norm.weight"),
    "output.weight": Source("language_model.lm_head.weight"),
    "v.patch_embd.weight": Source(f"{_VISION}.patch_embedding.weight"),
    "v.class_embd": Source(f"{_VISION}.class_embedding"),
    "v.position_embd.weight": Source(f"{_VISION}.gated_positional_embedding.embedding"),
    "v.position_embd.gate": Source(f"{_VISION}.gated_positional_embedding.gate", "one_minus_tanh"),
    "v.tile_position_embd.weight": Source(f"{_VISION}.gated_positional_embedding.tile_embedding.weight"),
    "v.tile_position_embd.gate": Source(f"{_VISION}.gated_positional_embedding.gate", "tanh"),
    "v.pre_tile_position_embd.weight": Source(f"{_VISION}.pre_tile_positional_embedding.embedding.weight"),
    "v.pre_tile_position_embd.gate": Source(f"{_VISION}.pre_tile_positional_embedding.gate", "tanh"),
    "v.post_tile_position_embd.weight": Source(f"{_VISION}.post_tile_positional_embedding.embedding.weight"),
    "v.post_tile_position_embd.gate": Source(f"{_VISION}.post_tile_positional_embedding.gate", "tanh"),
    "v.pre_ln.weight": Source(f"{_VISION}.layernorm_pre.weight"),
    "v.pre_ln.bias": Source(f"{_VISION}.layernorm_pre.bias"),
    "v.post_ln.weight": Source(f"{_VISION}.layernorm_post.weight"),
    "v.post_ln.bias": Source(f"{_VISION}.layernorm_post.bias"),
    "mm.0.weight": Source("multi_modal_projector.weight"),
    "mm.0.bias": Source("multi_modal_projector.bias"),
}
_TEXT_LAYER: Final = {
    "attn_norm.weight": Source("input_layernorm.weight"),
    "ffn_norm.weight": Source("post_attention_layernorm.weight"),
    "attn_q.weight": Source("self_attn.q_proj.weight", "permute_q"),
    "attn_k.weight": Source("self_attn.k_proj.weight", "permute_k"),
    "attn_v.weight": Source("self_attn.v_proj.weight"),
    "attn_output.weight": Source("self_attn.o_proj.weight"),
    "ffn_gate.weight": Source("mlp.gate_proj.weight"),
    "ffn_up.weight": Source("mlp.up_proj.weight"),
    "ffn_down.weight": Source("mlp.down_proj.weight"),
    **{f"cross_attn_{part}_proj.weight": Source(f"cross_attn.{part}_proj.weight") for part in "qkvo"},
    "cross_attn_q_norm.weight": Source("cross_attn.q_norm.weight"),
    "cross_attn_k_norm.weight": Source("cross_attn.k_norm.weight"),
    "cross_attn_attn_gate": Source("cross_attn_attn_gate"),
    "cross_attn_mlp_gate": Source("cross_attn_mlp_gate"),
}
_VISION_LAYER: Final = {
    **{f"attn_norm.{kind}": Source(f"input_layernorm.{kind}") for kind in ("weight", "bias")},
    **{f"ffn_norm.{kind}": Source(f"post_attention_layernorm.{kind}") for kind in ("weight", "bias")},
    **{f"ffn_up.{kind}": Source(f"mlp.fc1.{kind}") for kind in ("weight", "bias")},
    **{f"ffn_down.{kind}": Source(f"mlp.fc2.{kind}") for kind in ("weight", "bias")},
    **{f"attn_{part}.weight": Source(f"self_attn.{part}_proj.weight") for part in "qkv"},
    "attn_output.weight": Source("self_attn.o_proj.weight"),
    "attn_gate": Source("gate_attn", "tanh"),
    "ffn_gate": Source("gate_ffn", "tanh"),
}
_STACKS: Final = (
    (re.compile(r"blk\.(\d+)\.(.+)"), f"{_TEXT}.layers", _TEXT_LAYER),
    (re.compile(r"v\.blk\.(\d+)\.(.+)"), f"{_VISION}.transformer.layers", _VISION_LAYER),
    (re.compile(r"v\.global\.blk\.(\d+)\.(.+)"), f"{_VISION}.global_transformer.layers", _VISION_LAYER),
)
_IGNORED: Final = re.compile(r".*\.rotary_emb\.inv_freq")


def canonical_name(name: str) -> str:
    """The hub's name of a tensor, whatever version of transformers wrote it; a Llama's gains `language_model.`."""
    for prefix, replacement in _ALIASES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def ignored(name: str) -> bool:
    """True for tensors of old checkpoints that are computed from the configuration instead."""
    return _IGNORED.fullmatch(name) is not None


def source_of(name: str) -> Source | None:
    """Where a GGUF tensor comes from; None for `rope_freqs.weight`, which is computed. Raises KeyError for others."""
    if name == "rope_freqs.weight":
        return None
    if name in _WHOLE:
        return _WHOLE[name]
    for pattern, prefix, names in _STACKS:
        if match := pattern.fullmatch(name):
            source = names[match[2]]
            return Source(f"{prefix}.{match[1]}.{source.name}", source.change)
    raise KeyError(name)
