from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folder import llama_config, llama_weights, write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from coordinator.model.convert import convert, interleave_rope
from coordinator.model.gguf_file import ModelFile, open_model, weight_bytes
from coordinator.model.hf_config import llama3_factors, read_config
from coordinator.model.hf_names import source_of
from coordinator.model.hf_tokenizer import read_vocabulary
from coordinator.model.params import read_params
from coordinator.model.quantize import ENCODABLE, dequantize
from protocol.dtypes import DType
from protocol.errors import CrossdockError, ModelError

REFERENCE = Path(__file__).parent.parent / "data" / "ref_mllama"
# Largest error in units of the largest value: half a step of the type (the whole last step where its range is lopsided)
# and the rounding of the block's F16 scale and minimum.
STEP = {
    DType.F32: 0.0, DType.F16: 2**-11, DType.BF16: 2**-8, DType.Q8_0: 0.5 / 127 + 2**-11, DType.Q5_0: 1 / 16 + 2**-11,
    DType.Q5_1: 1 / 31 + 2**-9, DType.Q4_0: 1 / 8 + 2**-11, DType.Q4_1: 1 / 15 + 2**-9,
}  # fmt: skip


def read(model: ModelFile, name: str) -> np.ndarray:
    info = model.weights[name]
    return dequantize(weight_bytes(model, name), info.dtype, info.ne)


def undo_interleave(rows: np.ndarray, n_head: int) -> np.ndarray:
    pairs = rows.reshape(n_head, rows.shape[0] // n_head // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("dtype", ENCODABLE, ids=lambda dtype: dtype.label)
def test_every_tensor_of_the_reference(dtype: DType, tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "model.gguf"
    seen: list[tuple[int, int, str]] = []
    summary = convert(reference, path, dtype, lambda *report: seen.append(report))
    model = open_model(path)
    source = load_file(reference / "model.safetensors")
    used = set()
    for name, info in model.weights.items():
        actual, origin = read(model, name), source_of(name)
        if origin is None:
            continue
        used.add(origin.name)
        expected = source[origin.name].astype(np.float64)
        if origin.change == "permute_q":
            actual = undo_interleave(actual, 4)
        elif origin.change == "permute_k":
            actual = undo_interleave(actual, 2)
        elif origin.change == "tanh":
            expected = np.tanh(expected)
        elif origin.change == "one_minus_tanh":
            expected = 1 - np.tanh(expected)
        error = np.abs(actual.reshape(expected.shape) - expected).max()
        assert error <= STEP[info.dtype] * np.abs(expected).max() + 1e-7, name
        if dtype == DType.F32:
            assert info.dtype == DType.F32
        if expected.ndim == 1 or expected.shape == (1,):
            assert info.dtype == DType.F32, name
    assert used == set(source)
    assert summary.n_tensors == len(model.weights) == 158
    assert summary.nbytes == model.nbytes == path.stat().st_size
    assert seen[0][:2] == (0, 158)
    assert seen[-1] == (158, 158, "")
    if dtype.quantised:
        kinds = {name: info.dtype for name, info in model.weights.items()}
        assert kinds["blk.0.attn_q.weight"] == kinds["mm.0.weight"] == kinds["token_embd.weight"] == dtype
        for name in ("v.patch_embd.weight", "v.position_embd.weight", "v.tile_position_embd.weight"):
            assert kinds[name] == DType.F16
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_parameters_of_the_reference(ref_model: ModelFile) -> None:
    params = read_params(ref_model)
    text, vision = params.text, params.vision
    assert (params.arch, params.image_token) == ("mllama", 300)
    assert (text.n_layer, text.n_embd, text.n_ff, text.n_head, text.n_head_kv, text.head_dim) == (6, 64, 128, 4, 2, 16)
    assert (text.n_vocab, text.n_ctx_train, text.cross_layers, text.tied_output) == (300, 512, (1, 4), False)
    assert (text.rope.n_dims, text.rope.mode, text.rope.freq_base, text.rope.has_factors) == (16, 0, 500000.0, True)
    assert vision is not None
    assert (vision.n_layer, vision.n_global, vision.n_embd, vision.n_ff, vision.n_head) == (4, 2, 64, 128, 4)
    assert (vision.image_size, vision.patch_size, vision.max_tiles, vision.intermediate) == (56, 14, 4, (1, 3))
    assert (vision.n_patches, vision.n_tile_tokens, vision.n_tile_padded) == (16, 17, 24)
    assert vision.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert vision.gates_after_tanh
    assert ref_model.weights["v.patch_embd.weight"].ne == (14, 14, 3, 64)
    assert ref_model.weights["token_embd.weight"].ne == (64, 308, 1, 1)


def test_position_gates_come_from_one(ref_model: ModelFile) -> None:
    keep, add = read(ref_model, "v.position_embd.gate"), read(ref_model, "v.tile_position_embd.gate")
    assert abs(float(keep[0]) + float(add[0]) - 1) < 1e-7


def test_interleaving_turns_one_rope_into_the_other() -> None:
    """Rotating halves and then reordering equals reordering and then rotating neighbours."""
    rng = np.random.default_rng(3)
    heads, dim, width = 3, 8, 5
    weight = rng.standard_normal((heads * dim, width)).astype(np.float32)
    x, angle = rng.standard_normal(width), rng.uniform(0, 6, dim // 2)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = np.split((weight @ x).reshape(heads, dim), 2, axis=1)
    halves = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=1).reshape(-1, 1)
    even, odd = np.moveaxis((interleave_rope(weight, heads) @ x).reshape(heads, dim // 2, 2), 2, 0)
    neighbours = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=2).reshape(-1)
    assert np.allclose(interleave_rope(halves.astype(np.float32), heads).ravel(), neighbours, atol=1e-5)
    assert np.array_equal(undo_interleave(interleave_rope(weight, heads), heads), weight)


def test_llama3_factors(ref_model: ModelFile) -> None:
    factors = llama3_factors(128, 500000.0, 8.0, 1.0, 4.0, 8192)
    assert factors.dtype == np.float32
    assert (factors[:29] == 1).all()
    assert (factors[-20:] == 8).all()
    assert (np.diff(factors) >= 0).all()
    frequency = 500000.0 ** (-2 * 33 / 128)
    smooth = (8192 * frequency / (2 * np.pi) - 1) / 3
    assert abs(frequency / float(factors[33]) - ((1 - smooth) * frequency / 8 + smooth * frequency)) < 1e-9
    assert np.array_equal(read(ref_model, "rope_freqs.weight"), llama3_factors(16, 500000.0, 8.0, 1.0, 4.0, 64))
    with pytest.raises(ModelError, match="high_freq_factor"):
        llama3_factors(16, 1e4, 8.0, 4.0, 4.0, 64)


def test_llama(tmp_path: Path) -> None:
    config = llama_config()
    weights = llama_weights(config)
    folder = write_llama(tmp_path / "hf", config, weights)
    path = tmp_path / "llama.gguf"
    convert(folder, path, DType.F32)
    model = open_model(path)
    params = read_params(model)
    assert (params.arch, params.vision, params.image_token) == ("llama", None, None)
    assert not params.text.tied_output
    assert not params.text.rope.has_factors
    assert params.text.rms_eps == float(np.float32(1e-6))
    q = undo_interleave(read(model, "blk.1.attn_q.weight"), 4)
    assert np.array_equal(q, weights["model.layers.1.self_attn.q_proj.weight"])
    assert np.array_equal(read(model, "output.weight"), weights["lm_head.weight"])
    assert len(model.metadata["tokenizer.ggml.tokens"]) == 420  # type: ignore[arg-type]
    assert model.metadata["tokenizer.ggml.tokens"][-1] == "[PAD419]"  # type: ignore[index]


def test_tied_llama_and_rope_variants(tmp_path: Path) -> None:
    config = llama_config(tie_word_embeddings=True, rope_scaling={"type": "linear", "factor": 4.0})
    folder = write_llama(tmp_path / "hf", config, llama_weights(config, tied=True))
    convert(folder, tmp_path / "a.gguf", DType.Q8_0)
    params = read_params(open_model(tmp_path / "a.gguf"))
    assert params.text.tied_output
    assert params.text.rope.freq_scale == 0.25
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_parameters"] = {**scaling, "original_max_position_embeddings": 64, "rope_theta": 7777.0}
    del config["rope_scaling"], config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "a.gguf", DType.Q8_0)
    params = read_params(open_model(tmp_path / "a.gguf"))
    assert (params.text.rope.freq_base, params.text.rope.has_factors) == (7777.0, True)
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lm_head.weight is missing"):
        convert(folder, tmp_path / "b.gguf", DType.F16)
    assert not (tmp_path / "b.gguf").exists()


def copy_reference(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    shutil.copytree(REFERENCE, folder, ignore=shutil.ignore_patterns("*.npz", "images"))
    return folder


def test_names_of_newer_transformers_and_shards(tmp_path: Path, ref_gguf: Path) -> None:
    folder = copy_reference(tmp_path)
    source = load_file(folder / "model.safetensors")
    renamed = {}
    for name, value in source.items():
        if name == "language_model.lm_head.weight":
            renamed["lm_head.weight"] = value
        elif name.startswith("language_model.model."):
            renamed["model.language_model." + name.removeprefix("language_model.model.")] = value
        else:
            renamed["model." + name] = value
    names = sorted(renamed)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: renamed[name] for name in members}, folder / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "model.gguf", DType.F32)
    ours, first = open_model(tmp_path / "model.gguf"), open_model(ref_gguf)
    for name in first.weights:
        assert weight_bytes(ours, name) == weight_bytes(first, name), name


def test_conversion_is_reproducible(tmp_path: Path, ref_gguf: Path, reference: Path) -> None:
    convert(reference, tmp_path / "again.gguf", DType.F32)
    assert (tmp_path / "again.gguf").read_bytes() == ref_gguf.read_bytes()


def edit(folder: Path, file: str, path: str, value: Any) -> None:
    document = json.loads((folder / file).read_text())
    *parents, last = path.split("/")
    node = document
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    (folder / file).write_text(json.dumps(document))


REFUSED = {
    "model type": ("config.json", "model_type", "qwen2", "model_type is 'qwen2'"),
    "activation": ("config.json", "text_config/hidden_act", "gelu", "hidden_act is 'gelu'"),
    "vision activation": ("config.json", "vision_config/hidden_act", "quick_gelu", "hidden_act is 'quick_gelu'"),
    "heads": ("config.json", "text_config/num_attention_heads", 3, "num_attention_heads|hidden_size"),
    "layers": ("config.json", "text_config/num_hidden_layers", 1 << 40, "num_hidden_layers"),
    "no layers": ("config.json", "text_config/num_hidden_layers", None, "num_hidden_layers is missing"),
    "more layers": ("config.json", "text_config/num_hidden_layers", 7, "layers.6.* is missing from the checkpoint"),
    "fewer layers": ("config.json", "text_config/num_hidden_layers", 5, "is not part of a mllama model"),
    "cross layer 0": ("config.json", "text_config/cross_attention_layers", [0], "layers from 1 to 5"),
    "no cross layer": ("config.json", "text_config/cross_attention_layers", [], "at least one"),
    "width": ("config.json", "text_config/intermediate_size", 256, r"has the shape \[.*expected \["),
    "rope": ("config.json", "text_config/rope_scaling/rope_type", "yarn", "rope_type is 'yarn'"),
    "kept layers": ("config.json", "vision_config/intermediate_layers_indices", [4], "layers from 0 to 3"),
    "kept twice": ("config.json", "vision_config/intermediate_layers_indices", [1, 1], "each layer once"),
    "canvases": ("config.json", "vision_config/supported_aspect_ratios", [[1, 1]], "supported_aspect_ratios"),
    "tile side": ("preprocessor_config.json", "size", {"height": 48, "width": 48}, "size is"),
    "resampling": ("preprocessor_config.json", "resample", 3, "resample is 3"),
    "rescaling": ("preprocessor_config.json", "rescale_factor", 0.5, "rescale_factor is 0.5"),
    "stop id": ("generation_config.json", "eos_token_id", [999], "eos_token_id"),
    "tokenizer kind": ("tokenizer.json", "model/type", "Unigram", "byte-level BPE"),
    "normalizer": ("tokenizer.json", "normalizer", {"type": "NFC"}, "normalizer"),
    "pre-tokeniser": ("tokenizer.json", "pre_tokenizer", {"type": "Whitespace"}, "pre-tokeniser"),
    "ignore_merges": ("tokenizer.json", "model/ignore_merges", False, "ignore_merges"),
    "merge": ("tokenizer.json", "model/merges", [["zz", "yy"]], "'zz yy' joins tokens"),
    "same id": ("tokenizer.json", "model/vocab", {"a": 1, "b": 1}, "share the id 1"),
    "huge id": ("tokenizer.json", "model/vocab", {"a": 1 << 40}, "has the id"),
    "odd form": ("tokenizer.json", "added_tokens", ["text"], "unexpected form"),
    "missing vocabulary": ("tokenizer.json", "model/vocab", None, "wrong form"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_folder(name: str, tmp_path: Path) -> None:
    file, path, value, pattern = REFUSED[name]
    folder = copy_reference(tmp_path)
    edit(folder, file, path, value)
    out = tmp_path / "out.gguf"
    with pytest.raises(ModelError, match=pattern) as caught:
        convert(folder, out, DType.F32)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [folder]


def test_refused_checkpoints(tmp_path: Path) -> None:
    folder = copy_reference(tmp_path)
    source = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    changes: list[tuple[dict[str, np.ndarray], str]] = [
        ({key: value for key, value in source.items() if key != name}, f"{name} .* is missing"),
        ({**source, "model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}, "is not part of"),
        ({**source, "model.vision_model.class_embedding": np.zeros(64, np.float32)}, "are the same one"),
        ({**source, name: np.full_like(source[name], np.nan)}, "blk.0.ffn_up.weight holds NaN"),
        ({key: value for key, value in source.items() if "lm_head" not in key}, "tied output are not supported"),
        ({**source, name: source[name].astype(np.int32)}, "has the type 'I32'"),
    ]
    for tensors, pattern in changes:
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ModelError, match=pattern):
            convert(folder, tmp_path / "out.gguf", DType.F32)
    assert list(tmp_path.iterdir()) == [folder]


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="q4_K cannot be written"):
        convert(REFERENCE, tmp_path / "a.gguf", DType.Q4_K)
    with pytest.raises(ModelError, match="no such folder"):
        convert(tmp_path / "none", tmp_path / "a.gguf", DType.F32)
    with pytest.raises(ModelError, match="cannot be written: No such file"):
        convert(REFERENCE, tmp_path / "none" / "a.gguf", DType.F32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither model.safetensors"):
        convert(tmp_path / "empty", tmp_path / "a.gguf", DType.F32)


def test_only_files_are_replaced(tmp_path: Path, reference: Path) -> None:
    pipe, target, link = tmp_path / "pipe", tmp_path / "target.gguf", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(target)
    for path in (pipe, tmp_path):
        with pytest.raises(ModelError, match=f"{path}: cannot be written: not a regular file"):
            convert(reference, path, DType.F32)
    convert(reference, link, DType.F32)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert open_model(target).weights
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target.gguf"]


def test_a_broken_progress_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(REFERENCE, tmp_path / "a.gguf", DType.F32, stop)
    assert not list(tmp_path.iterdir())


JSON_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
ODD = st.sampled_from([None, -1, 0, 1 << 70, 0.5, float("nan"), "x", [], [None], {}, {"a": None}, True, [1, 2, 3]])


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to the nodes of a document, not deep into long lists."""
    children = node.items() if isinstance(node, dict) else enumerate(node[:3]) if isinstance(node, list) else ()
    return [at] * bool(at) + [path for key, child in list(children)[:40] for path in places(child, (*at, key))]


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_odd_json_values(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any node of any JSON file replaced by anything: reading ends well or with one of our errors."""
    folder = tmp_path_factory.getbasetemp() / "odd"
    if not folder.exists():
        shutil.copytree(REFERENCE, folder, ignore=shutil.ignore_patterns("*.npz", "images"))
    file = data.draw(st.sampled_from(JSON_FILES))
    original = (REFERENCE / file).read_text()
    document = json.loads(original)
    *parents, last = data.draw(st.sampled_from(places(document)))
    node = document
    for key in parents:
        node = node[key]
    node[last] = data.draw(ODD)
    try:
        (folder / file).write_text(json.dumps(document))
        convert(folder, folder / "out.gguf", DType.F32)
    except CrossdockError:
        pass
    finally:
        (folder / file).write_text(original)


def test_named_chat_templates(tmp_path: Path) -> None:
    folder = copy_reference(tmp_path)
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    edit(folder, "tokenizer_config.json", "chat_template", templates)
    assert read_vocabulary(folder, 301).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert read_vocabulary(folder, 301).chat_template == "J"


def test_stop_ids_and_begin(tmp_path: Path) -> None:
    folder = copy_reference(tmp_path)
    edit(folder, "generation_config.json", "eos_token_id", [285, 292, 293])
    vocabulary = read_vocabulary(folder, 301)
    assert vocabulary.stop == (293, 285, 292)  # the tokenizer's own eos first
    assert (vocabulary.bos, vocabulary.eos, vocabulary.eot, vocabulary.eom, vocabulary.pad) == (284, 293, 293, 292, 288)
    assert vocabulary.add_bos
    assert read_config(folder, True).params.image_token == 300
