from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.model.gguf_file import ModelFile
from coordinator.model.hparams import WeightInfo
from coordinator.model.params import read_params
from coordinator.model.weights import expected_weights
from protocol.dtypes import DType
from protocol.errors import ModelError


def with_key(model: ModelFile, key: str, value: Any) -> ModelFile:
    metadata = {name: item for name, item in model.metadata.items() if name != key}
    return replace(model, metadata=metadata if value is None else {**metadata, key: value})


def with_weight(model: ModelFile, name: str, change: Callable[[WeightInfo], WeightInfo] | None) -> ModelFile:
    weights = dict(model.weights)
    if change is None:
        del weights[name]
    else:
        weights[name] = change(weights.get(name, weights["v.class_embd"]))
    return replace(model, weights=weights)


BAD_KEYS = {
    "general.architecture": ("qwen2vl", "general.architecture is 'qwen2vl': supported are llama, mllama"),
    "mllama.block_count": ("six", "mllama.block_count is 'six': expected an integer from 1 to 4,096"),
    "mllama.embedding_length": (None, "mllama.embedding_length is missing"),
    "mllama.attention.head_count": ([4] * 6, r"head_count is \[4, 4, 4, 4, 4, 4\]"),
    "mllama.attention.head_count_kv": (3, "4 attention heads are no multiple of 3"),
    "mllama.attention.layer_norm_rms_epsilon": (float("nan"), "epsilon is nan: expected a positive number"),
    "mllama.rope.freq_base": (-1.0, "freq_base is -1.0"),
    "mllama.rope.dimension_count": (15, "expected an even number"),
    "mllama.rope.scaling.type": ("yarn", "'yarn': supported are none, linear, llama3"),
    "mllama.attention.cross_attention_layers": ([0, 4], "ascending layers from 1 to 5"),
    "mllama.vision.intermediate_layers_indices": ([3, 1], "ascending layers from 0 to 3"),
    "mllama.vision.patch_size": (15, "image_size 56 is no multiple of patch_size 15"),
    "mllama.vision.max_num_tiles": (1 << 40, "max_num_tiles is 1099511627776"),
    "mllama.vision.num_channels": (1, "num_channels is 1"),
    "mllama.vision.attention.head_count": (7, "no multiple of 7 heads"),
    "mllama.vocab_size": (None, "vocab_size is missing"),
    "mllama.expert_count": (8, "mixtures of experts"),
    "crossdock.vision.gates_after_tanh": (1, "expected true or false"),
    "crossdock.vision.image_std": ([0.5, 0.0, 0.5], "expected three numbers"),
    "crossdock.image_token_id": (308, "image token 308 has no row"),
}


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_key(key: str, ref_model: ModelFile) -> None:
    value, pattern = BAD_KEYS[key]
    with pytest.raises(ModelError, match=pattern) as caught:
        read_params(with_key(ref_model, key, value))
    assert str(caught.value).startswith("ref_mllama.gguf: ")


def test_defaults_of_files_by_others(ref_model: ModelFile) -> None:
    """Ollama's files have none of our keys, and their gates are stored after tanh."""
    model = ref_model
    for key in ("gates_after_tanh", "image_mean", "image_std"):
        model = with_key(model, f"crossdock.vision.{key}", None)
    model = with_key(model, "crossdock.image_token_id", None)
    assert read_params(model) == read_params(ref_model)
    without = with_key(model, "tokenizer.ggml.tokens", None)
    assert read_params(without).image_token == 300
    assert read_params(with_key(model, "general.name", None)).name == "ref_mllama"


def test_raw_gates(ref_model: ModelFile) -> None:
    vision = read_params(with_key(ref_model, "crossdock.vision.gates_after_tanh", False)).vision
    assert vision is not None
    assert not vision.gates_after_tanh


def test_missing_tensor(ref_model: ModelFile) -> None:
    with pytest.raises(ModelError, match=r"tensor blk.3.ffn_down.weight \[128, 64\] is missing"):
        read_params(with_weight(ref_model, "blk.3.ffn_down.weight", None))


def test_wrong_shape(ref_model: ModelFile) -> None:
    model = with_weight(ref_model, "blk.3.ffn_down.weight", lambda info: replace(info, ne=(64, 128, 1, 1)))
    with pytest.raises(ModelError) as caught:
        read_params(model)
    expected = "tensor blk.3.ffn_down.weight has the shape [64, 128]: expected [128, 64]"
    assert str(caught.value) == f"ref_mllama.gguf: {expected}"


def test_embedding_may_have_more_rows_but_not_fewer(ref_model: ModelFile) -> None:
    read_params(with_weight(ref_model, "token_embd.weight", lambda info: replace(info, ne=(64, 400, 1, 1))))
    for rows, pattern in ((299, r"\[64, 299\]: expected \[64, 300\]"), (300, "image token 300 has no row")):
        with pytest.raises(ModelError, match=pattern):
            read_params(
                with_weight(ref_model, "token_embd.weight", lambda info, rows=rows: replace(info, ne=(64, rows, 1, 1)))
            )


def test_types_that_cannot_be_computed_with(ref_model: ModelFile) -> None:
    half = with_weight(ref_model, "blk.0.attn_norm.weight", lambda info: replace(info, dtype=DType.F16))
    with pytest.raises(ModelError, match=r"attn_norm.weight has the type F16: expected F32"):
        read_params(half)
    patch = with_weight(ref_model, "v.patch_embd.weight", lambda info: replace(info, dtype=DType.BF16))
    with pytest.raises(ModelError, match="type BF16: expected F32 or F16"):
        read_params(patch)


def test_unknown_tensor(ref_model: ModelFile) -> None:
    model = with_weight(ref_model, "blk.0.attn_q.bias", lambda info: replace(info, name="blk.0.attn_q.bias"))
    with pytest.raises(ModelError, match=r"blk.0.attn_q.bias is none that a mllama model"):
        read_params(model)


def test_layer_count_beyond_the_file(ref_model: ModelFile) -> None:
    with pytest.raises(ModelError, match="layers announced but the file has only 158 tensors"):
        read_params(with_key(ref_model, "mllama.block_count", 4000))


def test_tied_output(ref_model: ModelFile) -> None:
    params = read_params(with_weight(ref_model, "output.weight", None))
    assert params.text.tied_output
    assert "output.weight" not in expected_weights(params)


def test_full_size_names_and_shapes() -> None:
    """The 11B model's tensors: 907 names, 10.67 billion parameters."""
    from coordinator.model.hparams import ModelParams, RopeParams, TextParams, VisionParams

    text = TextParams(
        40, 4096, 14336, 32, 8, 128, 128256, 131072, 1e-5, RopeParams(128, 0, 5e5, has_factors=True),
        tuple(range(3, 40, 5)),
    )  # fmt: skip
    vision = VisionParams(
        32, 8, 1280, 5120, 16, 1e-5, 560, 14, 4, 3, (3, 7, 15, 23, 30), (0.0,) * 3, (1.0,) * 3, True,
    )  # fmt: skip
    shapes = expected_weights(ModelParams("mllama", "11B", text, vision, 128256))
    assert shapes["v.tile_position_embd.weight"] == (8_197_120, 9)
    assert shapes["mm.0.weight"] == (7680, 4096)
    total = 0
    for shape in shapes.values():
        count = 1
        for extent in shape:
            count *= extent
        total += count
    # 8 embedding rows more than here; 64 rope factors and the tile gate are ours.
    assert total + 8 * 4096 - 64 - 1 == 10_670_220_835
    assert len(shapes) == 908  # 907 of a single file and rope_freqs
