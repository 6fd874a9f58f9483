"""Convert a Hugging Face folder (mllama or llama) to one GGUF file."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from coordinator.model.gguf_file import open_model
from coordinator.model.gguf_metadata import add_metadata
from coordinator.model.hf_config import HfModel, read_config
from coordinator.model.hf_names import Source, canonical_name, ignored, source_of
from coordinator.model.hf_tokenizer import HfVocabulary, read_vocabulary
from coordinator.model.hparams import ModelParams
from coordinator.model.params import read_params
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
        kinds = [target.dtype for target in targets if len(target.shape) > 1]
        add_metadata(writer, model, vocabulary, kinds)
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


@contextlib.contextmanager
def _fresh_file(out_path: Path) -> Iterator[Path]:
    """A temporary file beside `out_path` that takes its name when the body ends well and vanishes otherwise.

    It replaces files only: a device, a pipe or a folder of that name is refused, a link's target is what is replaced.
    """
    if out_path.exists() and not out_path.is_file():
        raise ModelError(f"{out_path}: cannot be written: not a regular file")
    out_path = out_path.resolve()
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out_path.name}.", suffix=".part", dir=out_path.parent)
    except OSError as error:
        raise ModelError(f"{out_path}: cannot be written: {error.strerror}") from None
    temporary = Path(name)
    try:
        os.close(handle)
        temporary.chmod(0o644)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(out_path)
    except OSError as error:
        raise ModelError(f"{out_path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
