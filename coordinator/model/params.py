"""Read hyper-parameters from a model file's metadata and check them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from coordinator.model.gguf_file import MetaValue, ModelFile
from coordinator.model.hparams import ModelParams, RopeParams, TextParams, VisionParams
from coordinator.model.weights import check_weights
from protocol.errors import ModelError

ARCHITECTURES: Final = ("llama", "mllama")
IMAGE_TOKEN: Final = "<|image|>"

KEY_GATES: Final = "crossdock.vision.gates_after_tanh"
KEY_MEAN: Final = "crossdock.vision.image_mean"
KEY_STD: Final = "crossdock.vision.image_std"
KEY_IMAGE_TOKEN: Final = "crossdock.image_token_id"

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)

_MAX_LAYERS: Final = 4096
_MAX_WIDTH: Final = 1 << 24
_MAX_CONTEXT: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class _Keys:
    """Metadata with checked look-ups; keys are given without the architecture's prefix."""

    file: str
    arch: str
    metadata: dict[str, MetaValue]

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.file}: {what}")

    def get(self, key: str) -> MetaValue | None:
        return self.metadata.get(f"{self.arch}.{key}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            got = "missing" if value is None else _short(value)
            raise self.fail(f"{self.arch}.{key} is {got}: expected an integer from {low:,} to {high:,}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(number := float(value)) or number <= 0:  # type: ignore[arg-type]
            got = "missing" if value is None else _short(value)
            raise self.fail(f"{self.arch}.{key} is {got}: expected a positive number")
        return number

    def layers(self, key: str, first: int, n_layer: int) -> tuple[int, ...]:
        """A strictly ascending array of layer indices."""
        value = self.get(key)
        if (
            not isinstance(value, list)
            or any(type(item) is not int or not first <= item < n_layer for item in value)
            or any(a >= b for a, b in pairwise(value))  # type: ignore[operator]
        ):
            got = "missing" if value is None else _short(value)
            raise self.fail(f"{self.arch}.{key} is {got}: expected ascending layers from {first} to {n_layer - 1}")
        return tuple(int(item) for item in value)


def read_params(model: ModelFile) -> ModelParams:
    """The hyper-parameters of a `mllama` or `llama` file, with every needed tensor's shape and type checked.

    Raises ModelError for an unknown architecture, a missing or impossible value, or a tensor that does not fit.
    """
    metadata, file = model.metadata, model.path.name
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        got = "missing" if arch is None else _short(arch)
        raise ModelError(f"{file}: general.architecture is {got}: supported are {', '.join(ARCHITECTURES)}")
    assert isinstance(arch, str)
    keys = _Keys(file, arch, metadata)
    name = metadata.get("general.name")
    vision = _vision(keys) if arch == "mllama" else None
    text = _text(keys, model)
    params = ModelParams(
        arch=arch,
        name=name if isinstance(name, str) and name else model.path.stem,
        text=text,
        vision=vision,
        image_token=_image_token(keys, text.n_vocab) if vision else None,
    )
    check_weights(model, params)
    return params


def _text(keys: _Keys, model: ModelFile) -> TextParams:
    if keys.integer("expert_count", 0, _MAX_LAYERS, 0):
        raise keys.fail(
            f"{keys.arch}.expert_count is {keys.get('expert_count')}: mixtures of experts are not supported"
        )
    n_layer = keys.integer("block_count", 1, _MAX_LAYERS)
    n_embd = keys.integer("embedding_length", 1, _MAX_WIDTH)
    n_head = keys.integer("attention.head_count", 1, n_embd)
    n_head_kv = keys.integer("attention.head_count_kv", 1, n_head, n_head)
    if n_head % n_head_kv:
        raise keys.fail(f"{n_head} attention heads are no multiple of {n_head_kv} key-value heads")
    if n_embd % n_head and keys.get("attention.key_length") is None:
        raise keys.fail(f"{keys.arch}.embedding_length {n_embd} is no multiple of {n_head} attention heads")
    head_dim = keys.integer("attention.key_length", 1, _MAX_WIDTH, n_embd // n_head)
    if keys.integer("attention.value_length", 1, _MAX_WIDTH, head_dim) != head_dim:
        raise keys.fail("attention.key_length and attention.value_length differ: not supported")
    n_ctx = keys.integer("context_length", 1, _MAX_CONTEXT)
    return TextParams(
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=keys.integer("feed_forward_length", 1, _MAX_WIDTH),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=_n_vocab(keys),
        n_ctx_train=n_ctx,
        rms_eps=keys.real("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, model, head_dim, n_ctx),
        cross_layers=keys.layers("attention.cross_attention_layers", 1, n_layer) if keys.arch == "mllama" else (),
        tied_output="output.weight" not in model.weights,
    )


def _n_vocab(keys: _Keys) -> int:
    """Rows of the output matrix: the key, or the length of the vocabulary (which mllama counts one image token in)."""
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    default = len(tokens) if isinstance(tokens, list) and tokens else None
    if default is not None and keys.arch == "mllama":
        default = None
    return keys.integer("vocab_size", 1, _MAX_WIDTH, default)


def _rope(keys: _Keys, model: ModelFile, head_dim: int, n_ctx: int) -> RopeParams:
    n_dims = keys.integer("rope.dimension_count", 2, head_dim, head_dim)
    if n_dims % 2:
        raise keys.fail(f"{keys.arch}.rope.dimension_count is {n_dims}: expected an even number")
    kind = keys.get("rope.scaling.type") or "none"
    if kind not in ("none", "linear", "llama3"):
        raise keys.fail(f"{keys.arch}.rope.scaling.type is {_short(kind)}: supported are none, linear, llama3")
    factor = keys.real("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    return RopeParams(
        n_dims=n_dims,
        mode=0,  # both converters permute q and k rows so that neighbours form a pair
        freq_base=keys.real("rope.freq_base", 10000.0),
        freq_scale=1.0 / factor,
        n_ctx_orig=keys.integer("rope.scaling.original_context_length", 1, _MAX_CONTEXT, n_ctx),
        has_factors="rope_freqs.weight" in model.weights,
    )


def _vision(keys: _Keys) -> VisionParams:
    n_layer = keys.integer("vision.block_count", 1, _MAX_LAYERS)
    n_embd = keys.integer("vision.embedding_length", 1, _MAX_WIDTH)
    n_head = keys.integer("vision.attention.head_count", 1, n_embd)
    image_size = keys.integer("vision.image_size", 1, 1 << 14)
    patch_size = keys.integer("vision.patch_size", 1, image_size)
    if n_embd % n_head:
        raise keys.fail(f"vision width {n_embd} is no multiple of {n_head} heads")
    if image_size % patch_size:
        raise keys.fail(f"vision image_size {image_size} is no multiple of patch_size {patch_size}")
    gates = keys.metadata.get(KEY_GATES, True)  # files without the key are Ollama's, which stores them so
    if type(gates) is not bool:
        raise keys.fail(f"{KEY_GATES} is {_short(gates)}: expected true or false")
    return VisionParams(
        n_layer=n_layer,
        n_global=keys.integer("vision.global.block_count", 1, _MAX_LAYERS),
        n_embd=n_embd,
        n_ff=keys.integer("vision.feed_forward_length", 1, _MAX_WIDTH),
        n_head=n_head,
        eps=keys.real("vision.attention.layer_norm_epsilon"),
        image_size=image_size,
        patch_size=patch_size,
        max_tiles=keys.integer("vision.max_num_tiles", 1, 64),
        channels=keys.integer("vision.num_channels", 3, 3, 3),
        intermediate=keys.layers("vision.intermediate_layers_indices", 0, n_layer),
        image_mean=_rgb(keys, KEY_MEAN, CLIP_MEAN, -1e3),
        image_std=_rgb(keys, KEY_STD, CLIP_STD, 1e-6),
        gates_after_tanh=gates,
    )


def _rgb(keys: _Keys, key: str, default: tuple[float, float, float], low: float) -> tuple[float, float, float]:
    value = keys.metadata.get(key)
    if value is None:
        return default
    if (
        not isinstance(value, list)
        or len(value) != 3
        or any(type(item) not in (int, float) or not low <= float(item) <= 1e3 for item in value)
    ):
        raise keys.fail(f"{key} is {_short(value)}: expected three numbers")
    red, green, blue = (float(item) for item in value)
    return red, green, blue


def _image_token(keys: _Keys, n_vocab: int) -> int:
    """The key's id, else the place of `<|image|>` in the vocabulary, else the first id behind the output's rows."""
    value = keys.metadata.get(KEY_IMAGE_TOKEN)
    if value is not None:
        if type(value) is not int or not 0 <= value < _MAX_WIDTH:
            raise keys.fail(f"{KEY_IMAGE_TOKEN} is {_short(value)}: expected a token id")
        return value
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and IMAGE_TOKEN in tokens:
        return tokens.index(IMAGE_TOKEN)  # type: ignore[arg-type]
    return n_vocab


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
