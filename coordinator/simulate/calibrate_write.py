"""A calibrated machine as TOML: what `load_system` and `load_network` read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.simulate.hardware import Cost, Toll


@dataclass(frozen=True, slots=True)
class Link:
    """How workers hand over bytes: `wake` of a worker that waited, `each` transfer, seconds per byte, and `further` of
    each worker that takes part in a step besides the host."""

    name: str
    wake: Toll
    each: Toll
    byte_s: float
    further: Toll


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that was measured of one machine. `about` are lines for people; `copy_rate` in bytes/s, `flops` the
    fastest product's FLOP/s. `step` is what a step takes, `first` and `split` its first run of ops on a worker and each
    later one, `mixed` an operation among others. `processors` compute for so many workers at once, and `memory` is the
    bytes/s that all of them get of weights, 0.0 where no limit was seen."""

    about: tuple[str, ...]
    costs: Mapping[str, Cost]
    step: Toll
    first: Toll
    split: Toll
    mixed: Toll
    cache_nbytes: int
    copy_rate: float
    flops: float
    processors: float
    memory: float


def system_text(found: Calibration, workers: Sequence[tuple[str, bool, int, int]]) -> str:
    """The machine with these devices: name, whether an accelerator, alignment, bytes of memory (0: no limit)."""
    lines = [*(f"# {text}" for text in found.about), "schema = 1", f"processors = {found.processors:g}"]
    lines += [f"memory_gbs = {found.memory / 1e9:.4g}"] if found.memory else []
    for name, accelerator, alignment, memory in workers:
        lines += ["", "[[device]]", f'name = "{name}"', 'class = "cpu"']
        lines += ["accelerator = true"] if accelerator else []
        lines += [f"memory = {memory}"] if memory else []
        lines += [
            f"alignment = {alignment}", f"bandwidth_gbs = {found.copy_rate / 1e9:.4g}",
            f"fp16_tflops = {found.flops / 1e12:.4g}", f"rates_tflops = {_inline(_rates(found))}",
            f"launch_us = {_least_us(found.costs):.4g}", *_toll("step", found.step), *_toll("first", found.first),
            *_toll("split", found.split), *_toll("mixed", found.mixed),
            f"cache = {found.cache_nbytes}",
            "async_copies = true",
            'source = { costs = "measured" }', "", "[device.costs]",
        ]  # fmt: skip
        lines += [f'"{key}" = {_inline(_numbers(cost))}' for key, cost in sorted(found.costs.items())]
    return "\n".join(lines) + "\n"


def network_text(about: Sequence[str], link: Link) -> str:
    """One kind of link between any two workers. Memory is shared: transfers do not disturb each other."""
    return "\n".join(
        [
            *(f"# {text}" for text in about),
            "schema = 1",
            "",
            "[[link]]",
            f'name = "{link.name}"',
            "latency_us = 0",
            *_toll("wake", link.wake),
            *_toll("each", link.each),
            f"bandwidth_gbs = {1e-9 / link.byte_s:.4g}",
            f"fixed_ms_per_token = {link.further.base_s * 1e3:.4g}",
            f"fixed_missed_us = {link.further.missed_s * 1e6:.4g}",
            'source = { latency_us = "in wake_us", bandwidth_gbs = "measured", wake_us = "measured" }',
            "",
        ]
    )


def _toll(name: str, toll: Toll) -> Iterator[str]:
    yield f"{name}_us = {toll.base_s * 1e6:.4g}"
    yield f"{name}_missed_us = {toll.missed_s * 1e6:.4g}"
    if toll.others_s:
        yield f"{name}_others_us = {toll.others_s * 1e6:.4g}"


def _rates(found: Calibration) -> dict[str, float]:
    """TFLOP/s by family, for products of types that were not measured."""
    rates = {"f32": found.flops / 1e12, "f16": found.flops / 1e12, "quant": found.flops / 1e12}
    for family, key in (("f32", "matmat.f32"), ("f16", "matmat.f16"), ("quant", "matmat.q8_0")):
        cost = found.costs.get(key)
        if cost is not None and cost.flop_s:
            rates[family] = 1e-12 / cost.flop_s
    return rates


def _least_us(costs: Mapping[str, Cost]) -> float:
    """The cheapest op's overhead: for ops that were not measured."""
    return min((cost.op_s for cost in costs.values() if cost.op_s > 0.0), default=0.0) * 1e6


def _numbers(cost: Cost) -> Iterator[tuple[str, float]]:
    yield "us", cost.op_s * 1e6
    if cost.missed_op_s > 0.0:
        yield "missed_us", cost.missed_op_s * 1e6
    for key, per in (
        ("weights_gbs", cost.weight_s), ("missed_gbs", cost.missed_s), ("gbs", cost.byte_s), ("gflops", cost.flop_s)
    ):  # fmt: skip
        if per > 0.0:
            yield key, 1e-9 / per
    for key, each in (("line_ns", cost.line_s), ("exp_ns", cost.exp_s)):
        if each > 0.0:
            yield key, each * 1e9


def _inline(values: Mapping[str, float] | Iterator[tuple[str, float]]) -> str:
    pairs = values.items() if isinstance(values, Mapping) else values
    return "{ " + ", ".join(f"{key} = {value:.5g}" for key, value in pairs) + " }"
