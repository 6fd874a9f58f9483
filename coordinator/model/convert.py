"""Convert a Hugging Face folder (mllama or llama) to one GGUF file."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from coordinator.model.gguf_file import open_model
from coordinator.model.hf_config import HfModel, read_config
from coordinator.model.hf_names import Source, canonical_name, ignored, source_of
from coordinator.model.hf_tokenizer import HfVocabulary, read_vocabulary
from coordinator.model.hparams import ModelParams
from coordinator.model.params import KEY_GATES, KEY_IMAGE_TOKEN, KEY_MEAN, KEY_STD, read_params
from coordinator.model.quantize import ENCODABLE, quantize
from coordinator.model.safetensors_file import SourceTensor, open_checkpoint, read_tensor
from coordinator.model.tokens import Tokenizer
from coordinator.model.weights import expected_weights
from protocol.dtypes import DType
from protocol.errors import ModelError

F32 = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]
"""Called with tensors done, tensors in all, and the name of the next one."""

_OUTPUT: Final = "language_model.lm_head.weight"
_KEEP_PLAIN: Final = re.compile(
    r"v\.(patch_embd|position_embd|tile_position_embd|(pre|post)_tile_position_embd)\.weight"
)
_FILE_TYPES: Final = {
    DType.F32: 0, DType.F16: 1, DType.Q4_0: 2, DType.Q4_1: 3, DType.Q8_0: 7, DType.Q5_0: 8, DType.Q5_1: 9,
    DType.BF16: 32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written: `by_type` counts tensors, `nbytes` is the size of the file."""

    arch: str
    n_tensors: int
    n_params: int
    nbytes: int
    by_type: dict[DType, int]


@dataclass(frozen=True, slots=True)
class _Target:
    """One tensor to write: where it comes from and what it becomes. `shape` is outermost first."""

    name: str
    source: Source | None  # None: rope_freqs.weight, which is computed
    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        return self.dtype.row_nbytes(int(np.prod(self.shape, dtype=np.int64)))


def convert(folder: Path, out_path: Path, dtype: DType, progress: Progress | None = None) -> Summary:
    """Write `out_path` from the folder's config.json, safetensors, tokenizer and preprocessor files.

    Matrices become `dtype`; vectors stay F32; positions, the patch embedding and rows that do not divide into blocks
    become F16 (F32 with F32). Self-attention's q and k rows of the text model are reordered for interleaved rope.
    The file appears under its name only when it is complete. Raises ModelError for what is missing, damaged or not
    supported.
    """
    if dtype not in ENCODABLE:
        raise ModelError(f"type {dtype.label} cannot be written: one of {', '.join(kind.label for kind in ENCODABLE)}")
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    tensors = _by_canonical_name(open_checkpoint(folder))
    try:
        model = read_config(folder, _OUTPUT in tensors)
        vocabulary = read_vocabulary(folder, _n_tokens(model.params))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        # JSON of another form than ours: which of the many places it was does not help anybody.
        raise ModelError(f"{folder}: config.json or tokenizer.json has an unexpected form ({error})") from None
    params = model.params
    targets = _plan(params, tensors, dtype)
    report = progress or (lambda done, total, name: None)
    with _fresh_file(out_path) as temporary:
        _write(temporary, model, vocabulary, targets, tensors, report)
        written = open_model(temporary)
        read_params(written)
        Tokenizer.from_metadata(written.metadata, str(folder / "tokenizer.json"))
        nbytes = temporary.stat().st_size
    kinds = [target.dtype for target in targets]
    n_params = sum(int(np.prod(target.shape, dtype=np.int64)) for target in targets)
    return Summary(
        params.arch, len(targets), n_params, nbytes, {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    )


def _n_tokens(params: ModelParams) -> int:
    return max(params.text.n_vocab, (params.image_token or 0) + 1)


def _by_canonical_name(tensors: dict[str, SourceTensor]) -> dict[str, SourceTensor]:
    result: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        plain = canonical_name(name)
        if ignored(plain):
            continue
        if plain in result:
            raise ModelError(f"{tensor.file}: tensors {name} and {result[plain].name} are the same one")
        result[plain] = tensor
    return result


def _plan(params: ModelParams, tensors: dict[str, SourceTensor], dtype: DType) -> list[_Target]:
    """Each tensor of the file, its source checked; every source tensor must be used."""
    targets, used = [], set()
    for name, ne in expected_weights(params).items():
        shape = tuple(reversed(ne))
        source = source_of(name)
        if source is not None:
            used.add(source.name)
            shape = _checked_shape(params, tensors, source, name, shape)
        targets.append(_Target(name, source, shape, _target_type(name, shape, dtype)))
    for name, tensor in tensors.items():
        if name not in used:
            raise ModelError(f"{tensor.file}: tensor {tensor.name} is not part of a {params.arch} model as known here")
    return targets


def _checked_shape(
    params: ModelParams, tensors: dict[str, SourceTensor], source: Source, name: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
    tensor = tensors.get(source.name)
    if tensor is None:
        raise ModelError(f"tensor {source.name} (for {name}) is missing from the checkpoint")
    actual = tensor.shape
    if name == "token_embd.weight" and params.vision is not None and actual[1:] == shape[1:]:
        least = max(shape[0], (params.image_token or 0) + 1)
        if actual[0] >= least:
            return actual
        shape = (least, *shape[1:])
    if actual != shape and not (shape == (1,) and actual == ()):
        raise ModelError(f"{tensor.file}: tensor {tensor.name} has the shape {list(actual)}: expected {list(shape)}")
    return shape


def _target_type(name: str, shape: tuple[int, ...], dtype: DType) -> DType:
    if len(shape) == 1 or dtype == DType.F32:
        return DType.F32
    if _KEEP_PLAIN.fullmatch(name) or shape[-1] % dtype.block:
        return DType.F16
    return dtype


def _write(
    path: Path, model: HfModel, vocabulary: HfVocabulary, targets: list[_Target],
    tensors: dict[str, SourceTensor], report: Progress,
) -> None:  # fmt: skip
    writer = GGUFWriter(path, model.params.arch)
    try:
        _add_metadata(writer, model, vocabulary, targets)
        for target in targets:
            writer.add_tensor_info(
                target.name, target.shape, np.dtype(np.float32), target.nbytes, GGMLQuantizationType(target.dtype)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for index, target in enumerate(targets):
            report(index, len(targets), target.name)
            values = _values(model, target, tensors)
            writer.write_tensor_data(quantize(values, target.dtype, target.name))
        report(len(targets), len(targets), "")
    except OSError as error:
        raise ModelError(f"{path.parent}: cannot be written: {error.strerror}") from None
    finally:
        writer.close()


def _values(model: HfModel, target: _Target, tensors: dict[str, SourceTensor]) -> F32:
    if target.source is None:
        assert model.factors is not None
        return model.factors
    values = read_tensor(tensors[target.source.name]).reshape(target.shape)
    text = model.params.text
    if target.source.change == "permute_q":
        return interleave_rope(values, text.n_head)
    if target.source.change == "permute_k":
        return interleave_rope(values, text.n_head_kv)
    if target.source.change == "tanh":
        return np.tanh(values.astype(np.float64)).astype(np.float32)
    if target.source.change == "one_minus_tanh":
        return (1.0 - np.tanh(values.astype(np.float64))).astype(np.float32)
    return values


def interleave_rope(rows: F32, n_head: int) -> F32:
    """Reorder each head's rows [n_head * d, n] from halves (i, i + d/2) to neighbours (2i, 2i + 1)."""
    halves = rows.reshape(n_head, 2, rows.shape[0] // n_head // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _add_metadata(writer: GGUFWriter, model: HfModel, vocabulary: HfVocabulary, targets: list[_Target]) -> None:
    for key, value, kind in _metadata(model, vocabulary, targets):
        if isinstance(value, (list, tuple)):
            if value:  # an empty array cannot be written, and a missing one means the same
                writer.add_key_value(key, list(value), GGUFValueType.ARRAY, kind)
        elif value is not None:
            writer.add_key_value(key, value, kind)


def _metadata(
    model: HfModel, vocabulary: HfVocabulary, targets: list[_Target]
) -> Iterator[tuple[str, Any, GGUFValueType]]:
    u32, f32, text = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
    params, arch = model.params, model.params.arch
    kinds = [target.dtype for target in targets if len(target.shape) > 1]
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


@contextlib.contextmanager
def _fresh_file(out_path: Path) -> Iterator[Path]:
    """A temporary file beside `out_path` that takes its name when the body ends well and vanishes otherwise."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out_path.name}.", suffix=".part", dir=out_path.parent)
    except OSError as error:
        raise ModelError(f"{out_path}: cannot be written: {error.strerror}") from None
    temporary = Path(name)
    try:
        os.fchmod(handle, 0o644)
        os.close(handle)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(out_path)
    except OSError as error:
        raise ModelError(f"{out_path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
