"""Which tensors a model needs, with their shapes; and the check of a file against that list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from coordinator.model.gguf_file import ModelFile
from coordinator.model.hparams import ModelParams, TextParams, VisionParams
from protocol.dtypes import DType
from protocol.errors import ModelError

Shape = tuple[int, ...]
"""Extents, innermost first, without trailing ones."""

_PLAIN: Final = (DType.F32, DType.F16)


def expected_weights(params: ModelParams) -> dict[str, Shape]:
    """Every tensor that a file of these parameters must hold, and all that it may.

    The rows of mllama's `token_embd.weight` are a least number: HF models have 8 more than the output has.
    """
    shapes = dict(_text(params))
    if params.vision is not None:
        shapes.update(_vision(params.vision, params.text.n_embd))
    return shapes


def check_weights(model: ModelFile, params: ModelParams) -> None:
    """Compare a file's tensors with what its parameters call for.

    Raises ModelError on the first tensor that is missing, has another shape or a type that cannot be used there, or
    that this architecture does not know (a bias, an expert), since leaving it out would change the answer.
    """
    file = model.path.name
    needed = len(params.text.cross_layers) + params.text.n_layer + (params.vision.n_layer if params.vision else 0)
    if needed > len(model.weights):
        raise ModelError(f"{file}: {needed:,} layers announced but the file has only {len(model.weights):,} tensors")
    expected = expected_weights(params)
    for name, shape in expected.items():
        info = model.weights.get(name)
        if info is None:
            raise ModelError(f"{file}: tensor {name} {_show(shape)} is missing")
        actual = info.ne
        wanted = (*shape, 1, 1, 1)[:4]
        if name == "token_embd.weight" and params.vision is not None and actual[1] > wanted[1]:
            wanted = (wanted[0], actual[1], 1, 1)
        if actual != wanted:
            raise ModelError(f"{file}: tensor {name} has the shape {_show(actual)}: expected {_show(wanted)}")
        _check_type(file, name, info.dtype, shape)
    for name in model.weights:
        if name not in expected:
            raise ModelError(f"{file}: tensor {name} is none that a {params.arch} model of this kind has")
    _check_image_token(model, params)


def _check_type(file: str, name: str, dtype: DType, shape: Shape) -> None:
    """ggml adds and multiplies with F32 vectors only, and unfolds images for F32 and F16 kernels only."""
    allowed = (DType.F32,) if len(shape) == 1 else _PLAIN if name == "v.patch_embd.weight" else None
    if allowed and dtype not in allowed:
        names = " or ".join(kind.name for kind in allowed)
        raise ModelError(f"{file}: tensor {name} has the type {dtype.name}: expected {names}")


def _check_image_token(model: ModelFile, params: ModelParams) -> None:
    rows = model.weights["token_embd.weight"].ne[1]
    if params.image_token is not None and params.image_token >= rows:
        raise ModelError(
            f"{model.path.name}: image token {params.image_token} has no row: token_embd.weight has {rows:,}"
        )


def _text(params: ModelParams) -> Iterator[tuple[str, Shape]]:
    text = params.text
    yield "token_embd.weight", (text.n_embd, text.n_vocab)
    yield "output_norm.weight", (text.n_embd,)
    if not text.tied_output:
        yield "output.weight", (text.n_embd, text.n_vocab)
    if text.rope.has_factors:
        yield "rope_freqs.weight", (text.rope.n_dims // 2,)
    cross = frozenset(text.cross_layers)
    for layer in range(text.n_layer):
        yield from _cross_layer(text, f"blk.{layer}") if layer in cross else _self_layer(text, f"blk.{layer}")
        yield f"blk.{layer}.attn_norm.weight", (text.n_embd,)
        yield f"blk.{layer}.ffn_norm.weight", (text.n_embd,)
        yield f"blk.{layer}.ffn_gate.weight", (text.n_embd, text.n_ff)
        yield f"blk.{layer}.ffn_up.weight", (text.n_embd, text.n_ff)
        yield f"blk.{layer}.ffn_down.weight", (text.n_ff, text.n_embd)


def _self_layer(text: TextParams, prefix: str) -> Iterator[tuple[str, Shape]]:
    q, kv = text.n_head * text.head_dim, text.n_head_kv * text.head_dim
    yield f"{prefix}.attn_q.weight", (text.n_embd, q)
    yield f"{prefix}.attn_k.weight", (text.n_embd, kv)
    yield f"{prefix}.attn_v.weight", (text.n_embd, kv)
    yield f"{prefix}.attn_output.weight", (q, text.n_embd)


def _cross_layer(text: TextParams, prefix: str) -> Iterator[tuple[str, Shape]]:
    q, kv = text.n_head * text.head_dim, text.n_head_kv * text.head_dim
    yield f"{prefix}.cross_attn_q_proj.weight", (text.n_embd, q)
    yield f"{prefix}.cross_attn_k_proj.weight", (text.n_embd, kv)
    yield f"{prefix}.cross_attn_v_proj.weight", (text.n_embd, kv)
    yield f"{prefix}.cross_attn_o_proj.weight", (q, text.n_embd)
    yield f"{prefix}.cross_attn_q_norm.weight", (text.head_dim,)
    yield f"{prefix}.cross_attn_k_norm.weight", (text.head_dim,)
    yield f"{prefix}.cross_attn_attn_gate", (1,)
    yield f"{prefix}.cross_attn_mlp_gate", (1,)


def _vision(vision: VisionParams, n_embd_text: int) -> Iterator[tuple[str, Shape]]:
    width, tiles, ratios = vision.n_embd, vision.max_tiles, len(vision.canvases) + 1
    yield "v.patch_embd.weight", (vision.patch_size, vision.patch_size, vision.channels, width)
    yield "v.class_embd", (width,)
    yield "v.position_embd.weight", (width, vision.n_tile_tokens)
    yield "v.position_embd.gate", (1,)
    yield "v.tile_position_embd.weight", (tiles * vision.n_tile_tokens * width, ratios)
    yield "v.tile_position_embd.gate", (1,)
    for place in ("pre", "post"):
        yield f"v.{place}_tile_position_embd.weight", (tiles * width, ratios)
        yield f"v.{place}_tile_position_embd.gate", (1,)
        yield f"v.{place}_ln.weight", (width,)
        yield f"v.{place}_ln.bias", (width,)
    for layer in range(vision.n_layer):
        yield from _vision_layer(vision, f"v.blk.{layer}")
    for layer in range(vision.n_global):
        yield from _vision_layer(vision, f"v.global.blk.{layer}")
        yield f"v.global.blk.{layer}.attn_gate", (1,)
        yield f"v.global.blk.{layer}.ffn_gate", (1,)
    yield "mm.0.weight", (width * (1 + len(vision.intermediate)), n_embd_text)
    yield "mm.0.bias", (n_embd_text,)


def _vision_layer(vision: VisionParams, prefix: str) -> Iterator[tuple[str, Shape]]:
    width, n_ff = vision.n_embd, vision.n_ff
    for norm in ("attn_norm", "ffn_norm"):
        yield f"{prefix}.{norm}.weight", (width,)
        yield f"{prefix}.{norm}.bias", (width,)
    for matrix in ("attn_q", "attn_k", "attn_v", "attn_output"):
        yield f"{prefix}.{matrix}.weight", (width, width)
    yield f"{prefix}.ffn_up.weight", (width, n_ff)
    yield f"{prefix}.ffn_up.bias", (n_ff,)
    yield f"{prefix}.ffn_down.weight", (n_ff, width)
    yield f"{prefix}.ffn_down.bias", (width,)


def _show(shape: tuple[int, ...]) -> str:
    """`[4096, 128256]`, trailing ones left out."""
    kept = list(shape)
    while len(kept) > 1 and kept[-1] == 1:
        kept.pop()
    return "[" + ", ".join(f"{extent}" for extent in kept) + "]"
