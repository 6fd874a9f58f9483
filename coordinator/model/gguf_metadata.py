"""The metadata that the converter writes into a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from gguf import GGUFValueType, GGUFWriter

from coordinator.model.hf_config import HfModel
from coordinator.model.hf_tokenizer import HfVocabulary
from coordinator.model.hparams import ModelParams
from coordinator.model.params import KEY_GATES, KEY_IMAGE_TOKEN, KEY_MEAN, KEY_STD
from protocol.dtypes import DType

_FILE_TYPES: Final = {
    DType.F32: 0, DType.F16: 1, DType.Q4_0: 2, DType.Q4_1: 3, DType.Q8_0: 7, DType.Q5_0: 8, DType.Q5_1: 9,
    DType.BF16: 32,
}  # fmt: skip


def add_metadata(writer: GGUFWriter, model: HfModel, vocabulary: HfVocabulary, kinds: Sequence[DType]) -> None:
    """Give the writer every key of a converted model; `kinds` are the types of its matrices."""
    for key, value, kind in _metadata(model, vocabulary, kinds):
        if isinstance(value, (list, tuple)):
            if value:  # an empty array cannot be written, and a missing one means the same
                writer.add_key_value(key, list(value), GGUFValueType.ARRAY, kind)
        elif value is not None:
            writer.add_key_value(key, value, kind)


def _metadata(
    model: HfModel, vocabulary: HfVocabulary, kinds: Sequence[DType]
) -> Iterator[tuple[str, Any, GGUFValueType]]:
    u32, f32, text = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
    params, arch = model.params, model.params.arch
    main = max(sorted(set(kinds)), key=kinds.count)
    yield "general.type", "model", text
    yield "general.name", params.name, text
    yield "general.file_type", _FILE_TYPES[main], u32
    if any(kind.quantised for kind in kinds):
        yield "general.quantization_version", 2, u32
    t = params.text
    yield f"{arch}.block_count", t.n_layer, u32
    yield f"{arch}.context_length", t.n_ctx_train, u32
    yield f"{arch}.embedding_length", t.n_embd, u32
    yield f"{arch}.feed_forward_length", t.n_ff, u32
    yield f"{arch}.attention.head_count", t.n_head, u32
    yield f"{arch}.attention.head_count_kv", t.n_head_kv, u32
    if t.head_dim * t.n_head != t.n_embd:
        yield f"{arch}.attention.key_length", t.head_dim, u32
        yield f"{arch}.attention.value_length", t.head_dim, u32
    yield f"{arch}.attention.layer_norm_rms_epsilon", t.rms_eps, f32
    yield f"{arch}.rope.freq_base", t.rope.freq_base, f32
    yield f"{arch}.rope.dimension_count", t.rope.n_dims, u32
    if model.linear_factor is not None:
        yield f"{arch}.rope.scaling.type", "linear", text
        yield f"{arch}.rope.scaling.factor", model.linear_factor, f32
    yield f"{arch}.vocab_size", t.n_vocab, u32
    if params.vision is not None:
        yield from _vision_metadata(params)
    yield from tokenizer_metadata(vocabulary)


def _vision_metadata(params: ModelParams) -> Iterator[tuple[str, Any, GGUFValueType]]:
    u32, f32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32
    v = params.vision
    assert v is not None
    yield "mllama.attention.cross_attention_layers", params.text.cross_layers, u32
    yield "mllama.vision.block_count", v.n_layer, u32
    yield "mllama.vision.global.block_count", v.n_global, u32
    yield "mllama.vision.intermediate_layers_indices", v.intermediate, u32
    yield "mllama.vision.embedding_length", v.n_embd, u32
    yield "mllama.vision.feed_forward_length", v.n_ff, u32
    yield "mllama.vision.attention.head_count", v.n_head, u32
    yield "mllama.vision.attention.layer_norm_epsilon", v.eps, f32
    yield "mllama.vision.image_size", v.image_size, u32
    yield "mllama.vision.patch_size", v.patch_size, u32
    yield "mllama.vision.max_num_tiles", v.max_tiles, u32
    yield "mllama.vision.num_channels", v.channels, u32
    yield KEY_GATES, v.gates_after_tanh, GGUFValueType.BOOL
    yield KEY_MEAN, v.image_mean, GGUFValueType.FLOAT64
    yield KEY_STD, v.image_std, GGUFValueType.FLOAT64
    yield KEY_IMAGE_TOKEN, params.image_token, u32


def tokenizer_metadata(vocabulary: HfVocabulary) -> Iterator[tuple[str, Any, GGUFValueType]]:
    """Keys, values and (element) types of the tokenizer; None stands for a key that is left out."""
    u32, text = GGUFValueType.UINT32, GGUFValueType.STRING
    yield "tokenizer.ggml.model", "gpt2", text
    yield "tokenizer.ggml.pre", vocabulary.pre, text
    yield "tokenizer.ggml.tokens", vocabulary.tokens, text
    yield "tokenizer.ggml.token_type", vocabulary.types, GGUFValueType.INT32
    yield "tokenizer.ggml.merges", vocabulary.merges, text
    yield "tokenizer.ggml.bos_token_id", vocabulary.bos, u32
    yield "tokenizer.ggml.eos_token_id", vocabulary.eos, u32
    yield "tokenizer.ggml.eot_token_id", vocabulary.eot, u32
    yield "tokenizer.ggml.eom_token_id", vocabulary.eom, u32
    yield "tokenizer.ggml.padding_token_id", vocabulary.pad, u32
    yield "tokenizer.ggml.add_bos_token", vocabulary.add_bos, GGUFValueType.BOOL
    yield "crossdock.stop_token_ids", vocabulary.stop, u32
    yield "tokenizer.chat_template", vocabulary.chat_template, text
