"""Hyper-parameters of the supported architectures, as typed facts."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.dtypes import DType


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """One tensor of a model file: `offset` is in bytes from the start of the file `file` (0: the only one)."""

    name: str
    dtype: DType
    ne: tuple[int, int, int, int]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RopeParams:
    """Rotary embedding. `mode` 0 rotates pairs (2i, 2i+1), 2 (NeoX) pairs (i, i + n_dims/2)."""

    n_dims: int
    mode: int
    freq_base: float
    freq_scale: float = 1.0
    n_ctx_orig: int = 0
    has_factors: bool = False  # the file holds rope_freqs.weight [n_dims/2]


@dataclass(frozen=True, slots=True)
class TextParams:
    """The language model. Layers in `cross_layers` are cross-attention layers (mllama), all others self-attention."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    rope: RopeParams
    cross_layers: tuple[int, ...] = ()
    tied_output: bool = False  # no output.weight: token_embd.weight is used


@dataclass(frozen=True, slots=True)
class VisionParams:
    """The mllama vision tower. `image_size` is a tile's side in pixels, `intermediate` the kept local layer inputs."""

    n_layer: int
    n_global: int
    n_embd: int
    n_ff: int
    n_head: int
    eps: float
    image_size: int
    patch_size: int
    max_tiles: int
    channels: int
    intermediate: tuple[int, ...]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    gates_after_tanh: bool

    @property
    def n_patches(self) -> int:
        """Patches per tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def n_tile_tokens(self) -> int:
        """Tokens per tile: the class token and the patches (`N` in the facts)."""
        return self.n_patches + 1

    @property
    def n_tile_padded(self) -> int:
        """Tokens per tile padded to a multiple of 8 (`N'`)."""
        return -(-self.n_tile_tokens // 8) * 8

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """Canvases as (rows, columns) of tiles, in the order of aspect ratio ids: the first has id 1, 0 is no image."""
        sides = range(1, self.max_tiles + 1)
        return tuple((rows, cols) for rows in sides for cols in sides if rows * cols <= self.max_tiles)


@dataclass(frozen=True, slots=True)
class ModelParams:
    """Everything the graph builders need to know about a model."""

    arch: str  # mllama | llama
    name: str
    text: TextParams
    vision: VisionParams | None
    image_token: int | None  # id of <|image|>
