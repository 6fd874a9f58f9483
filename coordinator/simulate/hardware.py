"""Models of devices: how long a piece of work takes on hardware that is described by a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from protocol.dtypes import DType

KINDS: Final = ("matvec", "matmat", "attention", "elementwise", "copy")
"""Kinds of work: a matrix times a few columns or many, attention over a KV cache, one value at a time, a copy."""

CLASSES: Final = ("nvidia", "nvidia-old", "amd", "apple", "intel", "cpu")
FAMILIES: Final = ("f32", "f16", "quant")
"""Families of weight types that matrix rates are given for; BF16 counts as F16."""

PLAIN: Final = ("COPY", "OUTPUT", "DIGEST")
"""What has a cost as ops have, but is none: a copy between tensors, a result on its way into a reply, or its hash."""

GEMM_ROWS: Final = 16
"""From this many columns on a product is computed as matrix times matrix; below, column by column."""


def _none() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Work:
    """What one op asks of a device.

    `dtype` is that of the weights or of the KV cache, `op` ggml's name where the kind does not say it;
    `weight_nbytes` and `n_weights` the matrix that is read once; `read_nbytes` and `write_nbytes` everything else that
    is read and written; `flops` counts a multiplication and its addition as two; `rows` are the columns of the
    right-hand side, tokens in a language model.

    Three more that measured costs count and laws do not: `hidden_nbytes` of activations that are read while a device
    computes, `lines` of values that are worked on one after the other (of matrix times matrix: every result is one),
    `exps`: exponentials, sines, cosines.
    """

    kind: str
    dtype: DType
    weight_nbytes: int = 0
    n_weights: int = 0
    read_nbytes: int = 0
    write_nbytes: int = 0
    flops: int = 0
    rows: int = 1
    op: str = ""
    hidden_nbytes: int = 0
    lines: int = 0
    exps: int = 0

    @property
    def key(self) -> str:
        """What measured costs are looked up by: KIND.TYPE of products and attention, else OP.TYPE."""
        kind = self.kind
        if kind == "attention":
            kind = "prompt-attention" if self.rows >= GEMM_ROWS else "attention"
        return f"{self.op if kind in ('elementwise', 'copy') else kind}.{self.dtype.label}"


@dataclass(frozen=True, slots=True)
class Cost:
    """What an op was measured to cost: seconds per op, byte of weights, other byte, FLOP, line of values and
    exponential, all of which add up.

    `weight_s` is for weights that lie in the cache, `missed_s` for those that have to come from memory, and
    `missed_op_s` what an op costs more then, however many they are.
    """

    op_s: float = 0.0
    weight_s: float = 0.0
    missed_s: float = 0.0
    byte_s: float = 0.0
    flop_s: float = 0.0
    missed_op_s: float = 0.0
    line_s: float = 0.0
    exp_s: float = 0.0

    def seconds(self, work: Work, missed: float = 0.0) -> float:
        """How long `work` takes when this share of its weights is not in the cache."""
        weight_s = self.weight_s + missed * max(0.0, self.missed_s - self.weight_s)
        moved = work.read_nbytes + work.write_nbytes + work.hidden_nbytes
        op_s = self.op_s + missed * self.missed_op_s + work.lines * self.line_s + work.exps * self.exp_s
        return op_s + work.weight_nbytes * weight_s + moved * self.byte_s + work.flops * self.flop_s


CACHES_SWEPT: Final = 3
"""So many caches' bytes, read by others, leave nothing of what was in the cache, nor of where to find it."""


@dataclass(frozen=True, slots=True)
class Toll:
    """What something costs each time, in seconds; how much more at most when weights have driven everything else out of
    the cache, and, of a worker's run of ops, when other workers read CACHES_SWEPT caches' bytes in a step."""

    base_s: float = 0.0
    missed_s: float = 0.0
    others_s: float = 0.0

    def seconds(self, missed: float, others: float = 0.0) -> float:
        """With this share of the weights not in the cache, and that share of CACHES_SWEPT caches read by others."""
        return self.base_s + missed * self.missed_s + others * self.others_s


FREE: Final = Toll()
"""Costs nothing."""


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """A device. Times in seconds, sizes in bytes, rates per second.

    - `bandwidth`: of its memory, as specified. `efficiency`: the share of it that each kind of work reaches, by kind
      or by `kind.type` (`matvec.q2_K`) where a weight type stands apart; 1 where nothing is said.
    - `rates`: FLOP/s of matrix times matrix by family of weight type (FAMILIES) or by type, as reached, not as
      specified.
    - `weights_per_s`: weights unpacked and multiplied with one column, as far as reading does not hide it, by type or
      family; a type that is not there is read at full speed.
    - `attention_rate`: FLOP/s of attention over many rows, 0: as `rates` of f16.
    - `launch_s`: overhead of an op, `step_s` of a graph evaluation.
    - `memory_nbytes` and `max_buffer_nbytes`: 0, no limit. `alignment` of tensors in its buffers.
    - `async_copies`: copies from and to it overlap with its computing.
    - `sources`: where each number comes from, by the name it has in a file.
    - `costs`: measured ops (crossdock calibrate) by `Work.key`, or by what is before its dot; they replace the law.
    - `cache_nbytes`: the last-level cache, which all devices that have one share (workers on one chip).
    - `first` and `split`: overhead of an evaluation's first run of ops and of each later one, as measured; `mixed`: of
      each op that has a measured cost and comes after ops of other kinds. `step_missed_s`: how much more an evaluation
      costs the host when weights drove everything else out of the cache.
    - `accelerator`: the scheduler takes a device of class cpu for one, as it does crossdock's own workers.
    """

    name: str
    cls: str
    memory_nbytes: int
    bandwidth: float
    rates: Mapping[str, float]
    efficiency: Mapping[str, float] = field(default_factory=_none)
    weights_per_s: Mapping[str, float] = field(default_factory=_none)
    attention_rate: float = 0.0
    launch_s: float = 0.0
    step_s: float = 0.0
    alignment: int = 128
    max_buffer_nbytes: int = 0
    unsupported_ops: tuple[str, ...] = ()
    unsupported_types: tuple[str, ...] = ()
    async_copies: bool = False
    arch: str = ""
    sources: Mapping[str, str] = field(default_factory=_none)
    costs: Mapping[str, Cost] = field(default_factory=_none)
    cache_nbytes: int = 0
    step_missed_s: float = 0.0
    first: Toll = FREE
    split: Toll = FREE
    mixed: Toll = FREE
    accelerator: bool = False

    def seconds(self, work: Work, missed: float = 0.0) -> float:
        """How long `work` takes, its launch included; `missed` is the share of its weights that the cache lost."""
        cost = self.costs.get(work.key) or self.costs.get(work.key.partition(".")[0])
        if cost is not None:
            return cost.seconds(work, missed) + (self.mixed.seconds(missed) if work.op not in PLAIN else 0.0)
        return self.launch_s + self.busy_s(work)

    def missed(self, nbytes: int) -> float:
        """The share of its weights that an evaluation over `nbytes` of them finds in memory only: 0 to 1.

        Misses begin before the cache is full; the square is what one machine showed.
        """
        return min(1.0, nbytes / self.cache_nbytes) ** 2 if self.cache_nbytes else 0.0

    def lost(self, nbytes: int) -> float:
        """How much a worker's run of ops has lost of what it left, when others read so many bytes in a step: 0 to 1."""
        return min(1.0, nbytes / (CACHES_SWEPT * self.cache_nbytes)) if self.cache_nbytes else 0.0

    def busy_s(self, work: Work) -> float:
        """How long `work` takes once it has been launched."""
        assert work.kind in KINDS, work.kind
        moved = (work.read_nbytes + work.write_nbytes) / self._bandwidth("elementwise", work.dtype)
        if work.kind == "matvec":
            read = work.weight_nbytes / self._bandwidth("matvec", work.dtype)
            return read + work.rows * work.n_weights * self._unpack_s(work.dtype) + moved
        if work.kind == "matmat":
            read = work.weight_nbytes / self._bandwidth("matmat", work.dtype)
            return read + work.flops / self.rate(work.dtype) + moved  # tiles are read before they are used
        if work.kind == "attention":
            read = (work.read_nbytes + work.weight_nbytes) / self._bandwidth("attention", work.dtype)
            rate = self.attention_rate or self.rate(DType.F16)
            return max(read, work.flops / rate) if work.rows >= GEMM_ROWS else read
        if work.kind == "copy":
            return (work.read_nbytes + work.write_nbytes) / self._bandwidth("copy", work.dtype)
        return moved

    def rate(self, dtype: DType) -> float:
        """FLOP/s of matrix times matrix with weights of this type."""
        found = self.rates.get(dtype.label) or self.rates.get(family_of(dtype))
        return found or self.rates.get("f16") or self.rates["f32"]

    def _unpack_s(self, dtype: DType) -> float:
        rate = self.weights_per_s.get(dtype.label) or self.weights_per_s.get(family_of(dtype))
        return 1.0 / rate if rate else 0.0

    def _bandwidth(self, kind: str, dtype: DType) -> float:
        share = self.efficiency.get(f"{kind}.{dtype.label}") or self.efficiency.get(kind, 1.0)
        return self.bandwidth * share


def family_of(dtype: DType) -> str:
    """Which of FAMILIES a type of weights belongs to."""
    if dtype.quantised:
        return "quant"
    return "f16" if dtype in (DType.F16, DType.BF16) else "f32"


@dataclass(frozen=True, slots=True)
class LinkModel:
    """A link in one direction.

    `latency_s` of each message, `bandwidth` in bytes/s, `duplex`: both directions at full speed at once. Links of one
    `segment` share its bandwidth (a switch, a PCIe root, a network card); "" is a segment of its own. `jitter` is a
    fraction of the time, `fixed_s_per_token` what a remote device costs each graph evaluation (RPC), `further_s` what
    it costs one to go on from one accelerator to a further one. `pageable` bytes/s are reached out of a mapped file; 0:
    `bandwidth`. As measured between processes: `wake` once for everything that a device receives at a split, `each` for
    every transfer of it, and `fixed_missed_s` besides `fixed_s_per_token` when weights have emptied the cache.
    """

    name: str
    latency_s: float
    bandwidth: float
    duplex: bool = True
    segment: str = ""
    jitter: float = 0.0
    fixed_s_per_token: float = 0.0
    further_s: float = 0.0
    pageable: float = 0.0
    wake: Toll = FREE
    each: Toll = FREE
    fixed_missed_s: float = 0.0
    sources: Mapping[str, str] = field(default_factory=_none)

    def seconds(self, nbytes: int) -> float:
        """How long `nbytes` take when nobody else uses the link."""
        return self.latency_s + nbytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers on one machine: so many `processors` compute for all of them, 1.5 of them where two get half as much more
    done than one, and its `memory` delivers so many bytes/s to all; 0: as many as they ask for."""

    processors: float
    workers: frozenset[int]
    memory: float = 0.0


@dataclass(frozen=True, slots=True)
class System:
    """Devices in priority order, as in a topology file, and what those of class cpu share; None: each has processors
    and memory of its own."""

    devices: tuple[DeviceModel, ...]
    pool: Pool | None = None

    def device(self, name: str) -> DeviceModel:
        """The device called `name`; KeyError if there is none."""
        return {device.name: device for device in self.devices}[name]
