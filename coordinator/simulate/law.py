"""From what is specified of a device, and the constants of its class, to its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from coordinator.simulate.hardware import DeviceModel, Work
from protocol.dtypes import DType

NOW: Final = 2026.0
"""The year whose builds are meant where nothing else is said."""

OPS_PER_LAYER: Final = 21
"""Ops of a llama layer that are computed; the overhead of a layer is spread over them."""

FLASH_GAIN: Final = 3.0
"""Flash attention over a prompt computes about this much faster (assumed; five rows show it), and no faster than
products of f16."""

CLOCK_GHZ: Final = 2.0
"""The clock at which NVIDIA's overhead of a layer is given: it goes with the length of a cycle."""

SCORES: Final = 16 / (4 * 128)
"""Bytes of scores for each FLOP of attention over a prompt, without flash attention: f32 written by one product, read
and written by the softmax, read by the next product; heads 128 wide, as those of nearly all language models."""

BETWEEN: Final = 4.5 / 4096
"""Bytes that ops between the products of a llama layer move for each FLOP of these products: norms, additions, products
by value, writing the cache.

With E values in a layer's width, H in all query heads, K in all key heads and F in the MLP these are, by token,
56 E + 8 H + 20 K + 12 F bytes and 2 E (2 H + 2 K + 3 F) FLOPs: 4.8 / E in llama 7B and 4.3 / E in llama 3 8B, which
are 4096 wide and most of what the constants were fitted to. A backend that fuses these ops, or keeps what they move in
a cache, is faster at all of it; the rates of whole layers say how fast."""

MOST_BETWEEN: Final = 0.5
"""Of a product's time by its class's rate, at most so much was theirs."""

_KINDS_OF_Q: Final = (DType.Q2_K, DType.Q3_K, DType.Q4_K, DType.Q5_K, DType.Q6_K)


def _none() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Spec:
    """A device as specified. Bandwidth in bytes/s, `flops` the peak of f16 in FLOP/s, `sm` multiprocessors
    at `ghz` (a CPU: cores).

    `tags` say what sets it apart within its class: its architecture, `narrow` (64 lanes to a multiprocessor),
    `wide` (twice the tensor cores), `ultra` (two dies). `watts` is the power limit. `k_decode` and `k_prompt` are how
    much faster than its class's law it has been measured, 1 where nobody measured. 0: not known.
    """

    name: str
    cls: str
    bandwidth: float
    flops: float = 0.0
    sm: float = 0.0
    ghz: float = 0.0
    watts: float = 0.0
    memory_nbytes: int = 0
    tags: tuple[str, ...] = ()
    k_decode: float = 1.0
    k_prompt: float = 1.0
    sources: Mapping[str, str] = field(default_factory=_none)

    @property
    def units(self) -> float:
        """What rates are proportional to: multiprocessors x GHz (NVIDIA), else the peak in TFLOP/s."""
        if self.cls in ("nvidia", "nvidia-old"):
            return self.sm * self.ghz if self.sm else self.flops / (2.048e12 if "wide" in self.tags else 1.024e12)
        return self.flops / 1e12


@dataclass(frozen=True, slots=True)
class LawModel(DeviceModel):
    """A device by the law of its class, which whole models were measured for: `rates` are those of whole layers.

    A product that is an op of a plan (its `Work.op` says so) is faster than that: the ops between products, whose bytes
    moved while layers were measured, stand beside it and take their own time. In a layer of 4096 values the sum is the
    law's; in narrower ones, such as those of image encoders, bytes weigh more.
    """

    def busy_s(self, work: Work) -> float:
        """How long `work` takes once it has been launched."""
        seconds = DeviceModel.busy_s(self, work)
        if work.kind != "matmat" or not work.op:
            return seconds
        products = work.flops / self.rate(work.dtype)
        others = work.flops * BETWEEN / (self.bandwidth * self.efficiency["elementwise"])
        return seconds - min(others, MOST_BETWEEN * products)


@dataclass(frozen=True, slots=True)
class Constants:
    """The constants of a class by name. `name@tag` multiplies `name` for devices with that tag, `name~year` for builds
    up to that year (and after the one before)."""

    values: Mapping[str, float]

    def value(self, name: str, tags: tuple[str, ...], year: float) -> float:
        """The constant for these tags in builds of `year`; 0 if the class has none."""
        value = self.values.get(name, 0.0)
        for tag in tags:
            value *= self.values.get(f"{name}@{tag}", 1.0)
        return value * self._era(name, year)

    def _era(self, name: str, year: float) -> float:
        for until, text in _years(tuple(self.values), name):
            if year <= until:
                return self.values[f"{name}~{text}"]
        return 1.0


@lru_cache(maxsize=1024)
def _years(names: tuple[str, ...], name: str) -> tuple[tuple[float, str], ...]:
    start = f"{name}~"
    return tuple(sorted((float(n[len(start) :]), n[len(start) :]) for n in names if n.startswith(start)))


def device_of(spec: Spec, constants: Constants, year: float = NOW, *, flash: bool = False) -> DeviceModel:
    """The model of a device of a class.

    Decode: W / (eb bandwidth) + weights / (q units) for quantised types + KV / (ekv bandwidth + kvu units) + c per
    layer (for a CPU: and its threads meet after every op, c_us_core for each core). Prompt: W / (0.8 bandwidth) +
    FLOPs / (pp units power^a) + attention FLOPs / (ppa units) + scores / (eb bandwidth) + c per layer; FLOPs stand for
    all that goes on in a layer, and flash attention has no scores in memory.
    """

    def c(name: str, *more: str) -> float:
        return constants.value(name, (*spec.tags, *more), year)

    k, units = spec.k_decode, spec.units
    eb = c("eb")
    rates = _rates(spec, constants, year)
    kv = c("ekv") * spec.bandwidth + c("kvu") * 1e9 * units
    efficiency = {
        "matvec": eb * k,
        "matmat": 0.8 * spec.k_prompt,
        "attention": kv * k / spec.bandwidth,
        "elementwise": eb,
        "copy": eb,
    }
    return LawModel(
        name=spec.name,
        cls=spec.cls,
        memory_nbytes=spec.memory_nbytes,
        bandwidth=spec.bandwidth,
        rates=rates,
        efficiency=efficiency,
        weights_per_s={key: rate * k for key, rate in _unpacking(spec, constants, year).items()},
        attention_rate=_attention(spec, c("ppa"), eb, rates["f16"], flash),
        launch_s=_overhead_s(spec, c("c_us"), c("c_us_core")),
        async_copies=spec.cls in ("nvidia", "nvidia-old", "amd"),
        arch=spec.tags[0] if spec.tags else "",
        sources=spec.sources,
    )


def _attention(spec: Spec, ppa: float, eb: float, f16: float, flash: bool) -> float:
    """FLOP/s of attention over a prompt, 0 for a class without such a rate; `f16` is that of products."""
    rate = ppa * 1e12 * spec.units * spec.k_prompt
    if flash or not rate:
        return min(FLASH_GAIN * rate, f16)
    return 1.0 / (1.0 / rate + SCORES / (eb * spec.bandwidth * spec.k_prompt))


def _overhead_s(spec: Spec, c_us: float, c_us_core: float) -> float:
    """Seconds of an op besides what it computes and moves."""
    cycles = CLOCK_GHZ / spec.ghz if spec.ghz and spec.cls in ("nvidia", "nvidia-old") else 1.0
    return (c_us * cycles + c_us_core * spec.sm) * 1e-6 / OPS_PER_LAYER / spec.k_decode


def _unpacking(spec: Spec, constants: Constants, year: float) -> dict[str, float]:
    """Weights per second by type; nothing where the class's law has no such term."""
    found = {}
    for key, more in [("quant", ()), *((dtype.label, (dtype.label, "K")) for dtype in _KINDS_OF_Q)]:
        rate = constants.value("q", (*spec.tags, *more), year) * 1e9 * spec.units
        if "q" not in constants.values and "K" in more:
            rate = constants.value("qk", spec.tags, year) * 1e9 * spec.units
        if rate:
            found[key] = rate
    return found


def _rates(spec: Spec, constants: Constants, year: float) -> dict[str, float]:
    """FLOP/s of matrix times matrix by family."""
    power = 1.0
    if spec.watts and "watts" in constants.values and spec.units:
        typical = constants.value("watts", spec.tags, NOW)
        power = (spec.watts / spec.units / typical) ** constants.values.get("power", 0.0)
    scale = 1e12 * spec.units * power * spec.k_prompt
    rates = {"f32": 0.0}
    for family in ("f16", "quant"):
        rates[family] = constants.value(f"pp_{family}", spec.tags, year) * scale
    if "pp_quant@K" in constants.values:
        rates |= {t.label: constants.value("pp_quant", (*spec.tags, "K"), year) * scale for t in _KINDS_OF_Q}
    rates["f32"] = rates["f16"] / 2
    return rates
