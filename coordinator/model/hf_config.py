"""Read the configuration of a Hugging Face model folder into our hyper-parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from coordinator.model.hparams import ModelParams, RopeParams, TextParams, VisionParams
from coordinator.model.params import CLIP_MEAN, CLIP_STD
from coordinator.model.safetensors_file import read_json
from protocol.errors import ModelError

MODEL_TYPES: Final = {"mllama": "mllama", "llama": "llama"}
_MAX: Final = 1 << 30
_MAX_LAYERS: Final = 4096
_MAX_HEAD: Final = 1 << 14


@dataclass(frozen=True, slots=True)
class HfModel:
    """A folder's configuration; `factors` are the divisors of llama3's rope frequencies [head_dim/2], F32."""

    params: ModelParams
    factors: npt.NDArray[np.float32] | None
    linear_factor: float | None  # of linear rope scaling


@dataclass(frozen=True, slots=True)
class _Config:
    where: str
    values: dict[str, Any]

    def fail(self, key: str, expected: str) -> ModelError:
        got = repr(self.values[key])[:60] if key in self.values else "missing"
        return ModelError(f"{self.where}: {key} is {got}: expected {expected}")

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = _MAX) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"an integer from {low} to {high}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
            raise self.fail(key, "a positive number")
        return float(value)  # type: ignore[arg-type]

    def only(self, key: str, *allowed: object) -> None:
        """Refuse a value that changes what the model computes; a missing one is the class's default."""
        if key in self.values and self.values[key] not in allowed:
            raise self.fail(key, " or ".join(map(repr, allowed)))

    def indices(self, key: str, first: int, count: int) -> tuple[int, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or any(type(item) is not int or not first <= item < count for item in value):
            raise self.fail(key, f"layers from {first} to {count - 1}")
        if len(set(value)) != len(value):
            raise self.fail(key, "each layer once")
        return tuple(sorted(value))

    def section(self, key: str) -> _Config:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return _Config(f"{self.where}: {key}", value)


def read_config(folder: Path, has_output: bool, file: str = "config.json") -> HfModel:
    """Hyper-parameters from the folder's configuration `file` and preprocessor_config.json.

    `has_output` says whether the checkpoint has an output matrix of its own. Raises ModelError for a model type or
    an option that is not supported, and for values that are missing or impossible.
    """
    root = _Config(str(folder / file), read_json(folder / file))
    kind = root.values.get("model_type")
    if kind not in MODEL_TYPES:
        raise root.fail("model_type", " or ".join(MODEL_TYPES))
    name = folder.resolve().name.encode("utf-8", "replace").decode()
    if kind == "llama":
        text, factors, linear = _text(root, tied=not has_output)
        if text.tied_output and not root.values.get("tie_word_embeddings"):
            raise ModelError(f"{folder}: lm_head.weight is missing though tie_word_embeddings is not set")
        return HfModel(ModelParams("llama", name, text, None, None), factors, linear)
    if not has_output:
        raise ModelError(f"{folder}: lm_head.weight is missing: mllama models with a tied output are not supported")
    text, factors, linear = _text(root.section("text_config"), tied=False)
    if not text.cross_layers:
        raise ModelError(f"{folder / file}: cross_attention_layers is empty: mllama needs at least one")
    vision = _vision(root.section("vision_config"), folder)
    params = ModelParams("mllama", name, text, vision, root.integer("image_token_index", text.n_vocab))
    return HfModel(params, factors, linear)


def _text(config: _Config, tied: bool) -> tuple[TextParams, npt.NDArray[np.float32] | None, float | None]:
    config.only("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias"):
        config.only(key, False, None)
    n_layer, n_embd = config.integer("num_hidden_layers", high=_MAX_LAYERS), config.integer("hidden_size")
    n_head = config.integer("num_attention_heads")
    n_head_kv = config.integer("num_key_value_heads", n_head)
    if n_head % n_head_kv:
        raise config.fail("num_attention_heads", f"a multiple of {n_head_kv} key-value heads")
    head_dim = config.integer("head_dim", n_embd // n_head)
    if head_dim % 2 or not 0 < head_dim <= _MAX_HEAD or ("head_dim" not in config.values and n_embd % n_head):
        raise config.fail("hidden_size", f"{n_head} heads of an even size up to {_MAX_HEAD}")
    config.only("partial_rotary_factor", 1.0, None)
    base, factors, linear = _rope(config, head_dim)
    n_ctx = config.integer("max_position_embeddings")
    cross = config.indices("cross_attention_layers", 1, n_layer) if "cross_attention_layers" in config.values else ()
    text = TextParams(
        n_layer=n_layer, n_embd=n_embd, n_ff=config.integer("intermediate_size"), n_head=n_head, n_head_kv=n_head_kv,
        head_dim=head_dim, n_vocab=config.integer("vocab_size"), n_ctx_train=n_ctx, rms_eps=config.real("rms_norm_eps"),
        rope=RopeParams(head_dim, 0, base, 1.0 / (linear or 1.0), n_ctx, factors is not None),
        cross_layers=cross, tied_output=tied,
    )  # fmt: skip
    return text, factors, linear


def _rope(config: _Config, head_dim: int) -> tuple[float, npt.NDArray[np.float32] | None, float | None]:
    """Base frequency, llama3's divisors, linear factor; from rope_parameters or from rope_theta and rope_scaling."""
    values = dict(config.values.get("rope_scaling") or {})
    new = config.values.get("rope_parameters")
    if new is not None and not isinstance(new, dict):
        raise config.fail("rope_parameters", "an object")
    values.update(new or {})
    values.setdefault("rope_theta", config.values.get("rope_theta"))
    rope = _Config(f"{config.where}: rope", values)
    base = rope.real("rope_theta", 500000.0 if "cross_attention_layers" in config.values else 10000.0)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return base, None, None
    if kind == "linear":
        return base, None, rope.real("factor")
    if kind != "llama3":
        raise ModelError(f"{rope.where}: rope_type is {kind!r}: supported are default, linear, llama3")
    return base, llama3_factors(
        head_dim, base, rope.real("factor"), rope.real("low_freq_factor"), rope.real("high_freq_factor"),
        rope.integer("original_max_position_embeddings", low=1),
    ), None  # fmt: skip


def llama3_factors(
    head_dim: int, base: float, factor: float, low: float, high: float, n_ctx_orig: int
) -> npt.NDArray[np.float32]:
    """Divisors of the rope frequencies [head_dim/2] that llama3's scaling amounts to, computed in float64."""
    if high <= low:
        raise ModelError(f"rope: high_freq_factor {high} is not above low_freq_factor {low}")
    result = np.empty(head_dim // 2, np.float64)
    for index in range(head_dim // 2):
        wavelength = 2.0 * math.pi * base ** (2.0 * index / head_dim)
        if wavelength < n_ctx_orig / high:
            result[index] = 1.0
        elif wavelength > n_ctx_orig / low:
            result[index] = factor
        else:
            smooth = (n_ctx_orig / wavelength - low) / (high - low)
            result[index] = 1.0 / ((1.0 - smooth) / factor + smooth)
    return result.astype(np.float32)


def _vision(config: _Config, folder: Path) -> VisionParams:
    config.only("hidden_act", "gelu")
    config.only("num_channels", 3)
    n_layer = config.integer("num_hidden_layers", high=_MAX_LAYERS)
    mean, std = _preprocessor(folder, config)
    vision = VisionParams(
        n_layer=n_layer,
        n_global=config.integer("num_global_layers", high=_MAX_LAYERS),
        n_embd=config.integer("hidden_size"),
        n_ff=config.integer("intermediate_size"),
        n_head=config.integer("attention_heads"),
        eps=config.real("norm_eps", 1e-5),
        image_size=config.integer("image_size"),
        patch_size=config.integer("patch_size"),
        max_tiles=config.integer("max_num_tiles", 4),
        channels=3,
        intermediate=config.indices("intermediate_layers_indices", 0, n_layer),
        image_mean=mean,
        image_std=std,
        gates_after_tanh=True,
    )
    if not vision.intermediate or vision.max_tiles > 64 or vision.image_size % vision.patch_size:
        raise ModelError(f"{config.where}: no kept layer, over 64 tiles, or image_size no multiple of patch_size")
    config.only("supported_aspect_ratios", [list(canvas) for canvas in vision.canvases], None)
    config.only("vision_output_dim", vision.n_embd * (1 + len(vision.intermediate)))
    return vision


def _preprocessor(folder: Path, vision: _Config) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation; refuses preprocessing other than the one we do."""
    path = folder / "preprocessor_config.json"
    config = _Config(str(path), read_json(path, optional=True))
    side = vision.integer("image_size")
    config.only("size", {"height": side, "width": side})
    config.only("max_image_tiles", vision.integer("max_num_tiles", 4))
    config.only("resample", 2)
    for key in ("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize"):
        config.only(key, True)
    if "rescale_factor" in config.values and abs(config.real("rescale_factor") * 255 - 1) > 1e-12:
        raise config.fail("rescale_factor", "1/255")
    return _rgb(config, "image_mean", CLIP_MEAN), _rgb(config, "image_std", CLIP_STD)


def _rgb(config: _Config, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = config.values.get(key, default)
    if len(value) != 3 or any(type(item) not in (int, float) for item in value):
        raise config.fail(key, "three numbers")
    red, green, blue = (float(item) for item in value)
    return red, green, blue
