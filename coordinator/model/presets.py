"""Models to plan without their weights: presets, Hugging Face configurations, GGUF headers."""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.model.gguf_file import ModelFile
from coordinator.model.gguf_header import read_header
from coordinator.model.hf_config import read_config
from coordinator.model.hparams import ModelParams, RopeParams, TextParams, VisionParams, WeightInfo
from coordinator.model.params import CLIP_MEAN, CLIP_STD, read_params
from coordinator.model.safetensors_file import read_json
from coordinator.model.weights import Shape, expected_weights
from protocol.dtypes import DType, dtype_of
from protocol.errors import ModelError, UsageError

EXTRA_TOKEN_ROWS: Final = 8
"""Rows of mllama's embed_tokens beyond the vocabulary (Hugging Face: vocab_size + 8)."""

PARTS: Final = {
    "text": r"(?!v\.|mm\.)",
    "vision": r"(v|mm)\.",
    "embd": r"token_embd\.",
    "output": r"output\.",
}
"""Names for parts of a model in `--weights-type`, as expressions over tensor names."""

TYPES: Final = (
    DType.F32, DType.F16, DType.BF16, DType.Q8_0, DType.Q6_K, DType.Q5_K, DType.Q5_1, DType.Q5_0, DType.Q4_K,
    DType.Q4_1, DType.Q4_0, DType.Q3_K, DType.Q2_K,
)  # fmt: skip
"""Types that weights are planned with; more than a run computes with."""

_POSITIONS: Final = re.compile(r"v\.(position_embd|tile_position_embd|(pre|post)_tile_position_embd)\.weight")
_PATCHES: Final = "v.patch_embd.weight"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model as far as a plan needs it: hyper-parameters, and each tensor's name, type and shape."""

    params: ModelParams
    weights: dict[str, WeightInfo]


# The vision tower of both Llama 3.2 Vision models, from the -Instruct config.json (tiles of 560 pixels): they share
# it, and differ in the language model and in the projector's width alone.
_TOWER: Final = VisionParams(
    n_layer=32, n_global=8, n_embd=1280, n_ff=5120, n_head=16, eps=1e-5, image_size=560, patch_size=14, max_tiles=4,
    channels=3, intermediate=(3, 7, 15, 23, 30), image_mean=CLIP_MEAN, image_std=CLIP_STD, gates_after_tanh=True,
)  # fmt: skip

# From the text_config of the published config.json files, which are those of Llama 3.1 8B and 70B (vocabulary,
# heads of 128, rope theta and llama3 scaling from 8192 to 131072 positions, epsilon) with cross-attention layers put
# in after every fourth one: 8B's 32 layers + 8 = 40, 70B's 80 layers + 20 = 100.
_LLAMA31_ROPE: Final = RopeParams(n_dims=128, mode=0, freq_base=500000.0, n_ctx_orig=131072, has_factors=True)


def _llama32_vision(size: str, n_layer: int, n_embd: int, n_ff: int, n_head: int) -> ModelParams:
    text = TextParams(
        n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head, n_head_kv=8, head_dim=128, n_vocab=128256,
        n_ctx_train=131072, rms_eps=1e-5, rope=_LLAMA31_ROPE, cross_layers=tuple(range(3, n_layer, 5)),
    )  # fmt: skip
    return ModelParams("mllama", f"Llama 3.2 {size} Vision", text, _TOWER, 128256)


# config.json of HuggingFaceTB/SmolLM2-135M-Instruct, and the metadata of its GGUF conversions.
_SMOLLM2: Final = ModelParams(
    arch="llama",
    name="SmolLM2 135M",
    text=TextParams(
        n_layer=30, n_embd=576, n_ff=1536, n_head=9, n_head_kv=3, head_dim=64, n_vocab=49152, n_ctx_train=8192,
        rms_eps=1e-5, rope=RopeParams(n_dims=64, mode=0, freq_base=100000.0, n_ctx_orig=8192), tied_output=True,
    ),
    vision=None,
    image_token=None,
)  # fmt: skip

PRESETS: Final[dict[str, tuple[ModelParams, DType]]] = {
    # 4096 wide, MLP 14336, 32 heads: Llama 3.1 8B
    "llama-3.2-11b-vision": (_llama32_vision("11B", 40, 4096, 14336, 32), DType.Q4_K),
    # 8192 wide, MLP 28672, 64 heads: Llama 3.1 70B
    "llama-3.2-90b-vision": (_llama32_vision("90B", 100, 8192, 28672, 64), DType.Q4_K),
    "smollm2-135m": (_SMOLLM2, DType.Q8_0),
}
"""Hyper-parameters by name, and the type of the matrices where none is asked for."""


def open_blueprint(source: str, types: Sequence[str] = ()) -> Blueprint:
    """The model `source`: a preset's name, a GGUF file (its header is enough), a config.json or its folder.

    `types` are weight types `TYPE` or `PART=TYPE` (PART a name of PARTS or a regular expression), the last match
    decides; a GGUF file has types of its own. Raises UsageError for a source that is none of them or a bad type,
    ModelError for a file that cannot be used.
    """
    if source.lower() in PRESETS:
        params, default = PRESETS[source.lower()]
        return Blueprint(params, _typed_weights(params, types, default))
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UsageError(f"{source}: no config.json in this folder")
    if not path.exists():
        raise UsageError(f"{source}: no such file, and no preset: expected one of {', '.join(PRESETS)}")
    if path.suffix == ".json":
        params = _read_config(path)
        return Blueprint(params, _typed_weights(params, types, DType.F16))
    model = open_header(path)
    if types:
        raise UsageError(f"--weights-type {types[0]}: {path.name} has types of its own")
    return Blueprint(read_params(model), model.weights)


def make_weights(params: ModelParams, choose: Callable[[str, Shape], DType]) -> dict[str, WeightInfo]:
    """The tensors that a file of this model holds; offsets are those of an unaligned file without a header."""
    weights: dict[str, WeightInfo] = {}
    offset = 0
    for name, shape in expected_weights(params).items():
        if name == "token_embd.weight" and params.vision is not None:
            shape = (shape[0], shape[1] + EXTRA_TOKEN_ROWS)
        dtype = choose(name, shape)
        ne = (*shape, 1, 1, 1)[:4]
        assert len(ne) == 4
        nbytes = dtype.row_nbytes(ne[0]) * ne[1] * ne[2] * ne[3]
        weights[name] = WeightInfo(name, dtype, ne, offset, nbytes)
        offset += nbytes
    return weights


def _typed_weights(params: ModelParams, types: Sequence[str], default: DType) -> dict[str, WeightInfo]:
    """`make_weights` with the types that were asked for. Raises UsageError for an expression that matches no weight."""
    weights = make_weights(params, _chooser(types, default))
    for text in types:
        part, _ = _rule(text)
        if part is not None and part not in PARTS and not any(re.match(part, name) for name in weights):
            names = list(weights)
            raise UsageError(
                f"--weights-type {text}: {part!r} begins none of the model's {len(names)} weights, which are named like"
                f" {', '.join(names[:: len(names) // 3 + 1])}, and is no part: expected one of {', '.join(PARTS)}"
            )
    return weights


def _chooser(types: Sequence[str], default: DType) -> Callable[[str, Shape], DType]:
    """Which type a tensor has. Vectors are F32; patches and positions stay plain unless an expression asks."""
    rules = [_rule(text) for text in types]

    def choose(name: str, shape: Shape) -> DType:
        if len(shape) == 1:
            return DType.F32
        dtype, pattern = default, None
        for part, asked in rules:
            if part is None or re.match(PARTS.get(part, part), name):
                dtype, pattern = asked, None if part in PARTS else part
        if pattern is None and (name == _PATCHES or (_POSITIONS.fullmatch(name) and dtype != DType.F32)):
            return DType.F16  # as in the files of all converters
        return DType.F16 if shape[0] % dtype.block else dtype

    return choose


def _rule(text: str) -> tuple[str | None, DType]:
    part, separator, label = text.rpartition("=")
    try:
        dtype = dtype_of(label)
        if dtype not in TYPES:
            raise ModelError(f"no weights have the type {dtype.label}: expected {', '.join(t.label for t in TYPES)}")
        re.compile(part)
    except ModelError as error:
        raise UsageError(f"--weights-type {text}: {error}") from None
    except re.error as error:
        raise UsageError(f"--weights-type {text}: not a regular expression: {error}") from None
    return (part if separator else None), dtype


def _read_config(path: Path) -> ModelParams:
    try:
        tied = bool(read_json(path).get("tie_word_embeddings", False))
        vision = read_json(path).get("model_type") == "mllama"
        return read_config(path.parent, vision or not tied, path.name).params
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ModelError(f"{path}: not a model's config.json as known here ({error})") from None


class _Cut:
    """The bytes of a file of which only the beginning may be there; all that is read must be."""

    def __init__(self, data: mmap.mmap, file: str) -> None:
        self.data, self.file = data, file

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, part: slice) -> bytes:
        if part.stop > len(self.data):
            raise ModelError(
                f"{self.file}: the header goes on at byte {part.stop:,} but the file has {len(self.data):,}"
            )
        return self.data[part]


def open_header(path: str | os.PathLike[str]) -> ModelFile:
    """A GGUF file of which nothing but the header is read, or even there; it has no fingerprint.

    Raises ModelError with one line when the header is not all there, damaged or of a kind that is not supported.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ModelError(f"{path.name}: not a regular file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = read_header(_Cut(data, path.name), path.name)  # type: ignore[arg-type]
                return ModelFile(path, len(data), header.metadata, header.weights, header.alignment, "", header.nbytes)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelError(f"{path}: cannot be opened: {reason}") from None
