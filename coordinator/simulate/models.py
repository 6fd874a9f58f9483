"""What a published row says of its language model, and what its family adds: layers, KV cache, active weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from coordinator.simulate.tables import only_keys, read_toml, tables_of
from protocol.dtypes import DType
from protocol.errors import InputError

_BITS: Final[tuple[tuple[str, float, DType], ...]] = (
    ("F32", 32.0, DType.F32), ("BF16", 16.0, DType.BF16), ("MXFP4", 4.25, DType.Q4_0), ("F16", 16.0, DType.F16),
    ("Q8", 8.5, DType.Q8_0), ("Q6_K", 6.56, DType.Q6_K), ("Q5_K", 5.7, DType.Q5_K), ("Q5_1", 6.0, DType.Q5_1),
    ("Q5", 5.5, DType.Q5_0), ("IQ4", 4.4, DType.Q4_K), ("Q4_K", 4.85, DType.Q4_K), ("Q4_1", 5.0, DType.Q4_1),
    ("Q4", 4.55, DType.Q4_0), ("IQ3", 3.6, DType.Q3_K), ("Q3", 3.9, DType.Q3_K), ("IQ2", 2.6, DType.Q2_K),
    ("Q2", 3.2, DType.Q2_K), ("IQ1", 1.9, DType.Q2_K),
)  # fmt: skip
"""Bits per weight of whole files by the name's beginning, as far as files of known models show; and the main type."""

_EMBEDDING_BITS: Final = {DType.F32: 32.0, DType.F16: 16.0, DType.BF16: 16.0, DType.Q8_0: 8.5}


@dataclass(frozen=True, slots=True)
class Family:
    """A model's dimensions. `params` and `active` weights, `kv` values of K per token and layer."""

    params: float
    active: float
    layers: int
    embd: int
    kv: int
    heads: int
    vocab: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Workload:
    """A model in a file as one evaluation meets it.

    `read_nbytes` and `weights`: read and multiplied for each token (the active experts; no token embedding unless
    it is the output too); `file_nbytes`: all experts; `kv_nbytes` per token of depth in an f16
    cache; `guessed`: dimensions by size alone.
    """

    dtype: DType
    layers: int
    read_nbytes: float
    weights: float
    kv_nbytes: float
    file_nbytes: float
    heads: int
    vocab: int
    embd: int
    experts: bool
    guessed: bool


def workload_of(model: str, params: float, file_nbytes: float, quant: str) -> Workload:
    """The workload of a row: `params` weights, `file_nbytes`; 0 where the row does not say. Raises InputError."""
    bits, dtype = _type_of(quant)
    family = _known(re.sub(r"[\s_]+", "-", model.strip().lower()))
    guessed = family is None
    if family is None:
        family = _by_size(params or _named_size(model) or file_nbytes * 8 / bits, model)
    embedding = 0.0 if family.tied else float(family.vocab * family.embd)
    nbytes = file_nbytes or (params or family.params) * bits / 8
    nbytes -= embedding * _EMBEDDING_BITS.get(dtype, dtype.block_nbytes * 8 / dtype.block) / 8
    if nbytes <= 0:
        raise InputError(f"model {model!r}: file_gib or params_b says too little: its token embedding alone is larger")
    share = family.active / family.params
    experts = family.active < family.params
    weights = family.active if experts else family.params - embedding
    kv = 2.0 * 2 * family.kv * family.layers
    return Workload(dtype, family.layers, nbytes * share, weights, kv, nbytes, family.heads, family.vocab, family.embd,
                    experts, guessed)  # fmt: skip


def _type_of(quant: str) -> tuple[float, DType]:
    """The larger half of a name such as F16/MXFP4 decides."""
    text = quant.upper().replace("UD-", "")
    name = next((part for part in text.split("/") if part.startswith("MXFP4")), text)
    for start, bits, dtype in _BITS:
        if name.startswith(start):
            return bits, dtype
    raise InputError(f"quant {quant!r} is not known: expected for example Q4_0, Q4_K_M, Q8_0 or F16")


def _known(name: str) -> Family | None:
    return next((family for pattern, family in _families() if pattern.fullmatch(name)), None)


def _named_size(model: str) -> float:
    """Weights as a name such as phi-5-14b tells them, or 0."""
    sizes = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)b(?![a-z])", model.lower())
    return float(sizes[0]) * 1e9 if sizes else 0.0


def _by_size(params: float, model: str) -> Family:
    """Dimensions of a dense model of this size, as its neighbours have them."""
    if params <= 0:
        raise InputError(f"model {model!r} is not known, and the row has neither params_b nor file_gib")
    active = re.search(r"-a(\d+(?:\.\d+)?)b", model.lower())
    alike = [family for _, family in _families() if (family.active < family.params) == (active is not None)]
    near = min(alike, key=lambda family: max(family.params / params, params / family.params))
    return Family(params, min(float(active[1]) * 1e9, params) if active else params, near.layers, near.embd, near.kv,
                  near.heads, near.vocab, near.tied)  # fmt: skip


@cache
def _families() -> tuple[tuple[re.Pattern[str], Family], ...]:
    path = Path(str(resources.files("coordinator.simulate") / "presets" / "models.toml"))
    document = read_toml(path)
    only_keys(document, ("model",), str(path))
    found = []
    for _, table in tables_of(document, "model", str(path)):
        params = table.number("params", low=1e-3) * 1e9
        layers, embd, kv, heads, vocab = (
            int(table.number(key, low=1)) for key in ("layers", "embd", "kv", "heads", "vocab")
        )
        active = table.number("active", params / 1e9) * 1e9
        family = Family(params, active, layers, embd, kv, heads, vocab, table.flag("tied", False))
        found.append((re.compile(table.text("names")), family))
        table.end()
    return tuple(found)
