"""Devices of a modelled machine from a file: presets, specifications with a class's constants, or bare numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from coordinator.simulate.hardware import CLASSES, FAMILIES, KINDS, Cost, DeviceModel, Pool, System
from coordinator.simulate.known import constants, find_spec, specs
from coordinator.simulate.law import NOW, Spec, device_of
from coordinator.simulate.machine import Machine
from coordinator.simulate.tables import Table, only_keys, read_toml, tables_of
from coordinator.simulate.work import DIGEST, OUTPUT
from protocol.dtypes import DType
from protocol.errors import UsageError
from protocol.limits import MAX_WORKERS
from protocol.ops import Op

MAX_DEVICES: Final = max(MAX_WORKERS, 4096)
_LABELS: Final = tuple(dtype.label for dtype in DType)
_NAMES: Final = "|".join(("matvec", "matmat", "attention", "prompt-attention", "COPY", OUTPUT, DIGEST, *Op.__members__))
COST_NAME: Final = re.compile(rf"({_NAMES})(\.({'|'.join(_LABELS)}))?")
"""Names of measured costs."""


def presets(year: float = NOW) -> Mapping[str, DeviceModel]:
    """The model of every device that is known by name, for builds of `year`."""
    return {name: device_of(spec, constants(spec.cls), year) for name, spec in specs().items()}


def load_system(path: Path) -> System:
    """A machine from TOML: `schema = 1` and `[[device]]` tables in priority order, the host's CPU last.

    `processors` and `memory_gbs` are shared by all devices of class cpu, workers on one machine (`Pool`).
    A device has a `name` (and `count`, which numbers it from 0) and either a `preset`, a known device's name, or a
    `class` with what is specified of it (bandwidth_gbs, fp16_tflops, sm, ghz, watts, tags). `year` chooses the era of
    the builds, `flash_attention` whether it is used. Everything that follows from the class can be said instead:
    memory, bandwidth_gbs, rates_tflops by family, efficiency by kind or kind.type, gweights_per_s by type or family,
    attention_tflops, launch_us, step_us, alignment, max_buffer, unsupported_ops, unsupported_types, async_copies; and
    what `crossdock calibrate` writes: costs, cache, accelerator, step_missed_us and, each with a
    _missed_us besides, first_us, split_us, mixed_us, with a first_others_us and split_others_us. `source` says where
    numbers come from.
    Raises UsageError naming file, table, key, what was expected and found.
    """
    document = read_toml(path)
    only_keys(document, ("device", "year", "flash_attention", "processors", "memory_gbs"), str(path))
    top = Table(document, str(path))
    pool = _read_pool(top)
    year = top.number("year", NOW, low=2023, high=2100)
    flash = top.flag("flash_attention", True)
    devices: list[DeviceModel] = []
    for where, table in tables_of(document, "device", str(path)):
        name = table.text("name")
        count = int(table.number("count", 1, low=1, high=MAX_DEVICES))
        numbered = "count" in table
        device = _read_device(name, table, where, year, flash)
        devices += [replace(device, name=f"{name}{i}" if numbered else name) for i in range(count)]
        if len(devices) > MAX_DEVICES:
            raise UsageError(f"{path}: {len(devices)} devices, at most {MAX_DEVICES} are possible")
    if not devices:
        raise UsageError(f"{path}: no [[device]] table")
    names = [device.name for device in devices]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise UsageError(f"{path}: two devices are called {twice!r}")
    return System(tuple(devices), pool)


def _read_pool(top: Table) -> Pool | None:
    if "processors" not in top:
        if "memory_gbs" in top:
            raise UsageError(f"{top.where}: memory_gbs: expected processors with it")
        return None
    processors = top.number("processors", low=0.01, high=MAX_DEVICES)
    memory = top.number("memory_gbs", low=1e-3, high=1e6) * 1e9 if "memory_gbs" in top else 0.0
    return Pool(processors, frozenset(), memory)


def on_one_machine(machine: Machine, pool: Pool | None) -> Machine:
    """The machine whose devices of class cpu share what is in the pool."""
    workers = frozenset(k for k, model in enumerate(machine.models) if model.cls == "cpu")
    pools = (replace(pool, workers=workers),) if pool is not None else ()
    return replace(machine, fabric=replace(machine.fabric, pools=pools))


def _read_device(name: str, table: Table, where: str, year: float, flash: bool) -> DeviceModel:
    spec = _read_spec(name, table, where)
    base = device_of(spec, constants(spec.cls), year, flash=flash)
    sources = table.texts("source")
    device = replace(
        base,
        memory_nbytes=table.size("memory", base.memory_nbytes),
        rates=dict(base.rates) | _scaled(table, "rates_tflops", FAMILIES, 1e12, where),
        efficiency=dict(base.efficiency) | _efficiency(table, where),
        weights_per_s=dict(base.weights_per_s) | _scaled(table, "gweights_per_s", (*FAMILIES, *_LABELS), 1e9, where),
        attention_rate=table.number("attention_tflops", base.attention_rate / 1e12, high=1e6) * 1e12,
        launch_s=table.number("launch_us", base.launch_s * 1e6, high=1e9) * 1e-6,
        step_s=table.number("step_us", base.step_s * 1e6, high=1e9) * 1e-6,
        alignment=int(table.number("alignment", base.alignment, low=1, high=1 << 20)),
        max_buffer_nbytes=table.size("max_buffer", base.max_buffer_nbytes),
        unsupported_ops=_known_names(table, "unsupported_ops", tuple(Op.__members__), where),
        unsupported_types=_known_names(table, "unsupported_types", _LABELS, where),
        async_copies=table.flag("async_copies", base.async_copies),
        sources=dict(base.sources) | sources,
        costs=_costs(table, where),
        cache_nbytes=table.size("cache", base.cache_nbytes),
        step_missed_s=table.number("step_missed_us", base.step_missed_s * 1e6, high=1e9) * 1e-6,
        first=table.toll("first", base.first, others=True),
        split=table.toll("split", base.split, others=True),
        mixed=table.toll("mixed", base.mixed),
        accelerator=table.flag("accelerator", base.accelerator),
    )
    table.end()
    if not any(device.rates.values()):
        raise UsageError(f"{where}: rates_tflops or fp16_tflops is missing: prompts would take forever")
    return device


def _read_spec(name: str, table: Table, where: str) -> Spec:
    """What is specified, from a preset or by the table's own numbers."""
    if "preset" in table:
        preset = table.text("preset")
        known = find_spec(preset)
        if known is None:
            raise UsageError(f"{where}: preset is {preset!r}: no such device (crossdock devices lists them)")
        base = replace(known, name=name)
    else:
        base = Spec(name, table.text("class", choices=CLASSES), 0.0)
    numbers: dict[str, Any] = {
        "flops": table.number("fp16_tflops", base.flops / 1e12, high=1e6) * 1e12,
        "sm": table.number("sm", base.sm, high=1e5),
        "ghz": table.number("ghz", base.ghz, high=100),
        "watts": table.number("watts", base.watts, high=1e5),
        "bandwidth": table.number("bandwidth_gbs", base.bandwidth / 1e9 or None, low=1e-3, high=1e6) * 1e9,
    }
    return replace(base, tags=table.names("tags") or base.tags, **numbers)


def _scaled(table: Table, key: str, known: tuple[str, ...], unit: float, where: str) -> dict[str, float]:
    found = table.numbers(key, low=1e-9)
    only_keys(found, known, f"{where}: {key}")
    return {name: value * unit for name, value in found.items()}


def _efficiency(table: Table, where: str) -> dict[str, float]:
    found = table.numbers("efficiency", low=1e-6, high=10.0)
    for name in found:
        kind, _, label = name.partition(".")
        if kind not in KINDS or (label and label not in _LABELS):
            raise UsageError(f"{where}: efficiency: {name!r}: expected KIND or KIND.TYPE of {', '.join(KINDS)}")
    return found


def _costs(table: Table, where: str) -> dict[str, Cost]:
    """Measured costs of ops: `us` and `missed_us` of each, `weights_gbs`, `missed_gbs` and `gbs`, `gflops`, `line_ns`
    of each line of values and `exp_ns` of each exponential; none where not said."""
    found = {}
    for name, inner in table.tables("costs"):
        if not COST_NAME.fullmatch(name):
            raise UsageError(f"{where}: costs: {name!r}: expected KIND.TYPE or OP, such as matvec.q8_0 or RMS_NORM")
        rates = {key: inner.number(key, 0.0, high=1e9) for key in ("weights_gbs", "missed_gbs", "gbs", "gflops")}
        per = {key: 1e-9 / rate if rate else 0.0 for key, rate in rates.items()}
        op_s = inner.number("us", 0.0, high=1e12) * 1e-6
        missed = per["missed_gbs"] or per["weights_gbs"]
        missed_op_s = inner.number("missed_us", 0.0, high=1e12) * 1e-6
        line_s, exp_s = (inner.number(key, 0.0, high=1e12) * 1e-9 for key in ("line_ns", "exp_ns"))
        found[name] = Cost(op_s, per["weights_gbs"], missed, per["gbs"], per["gflops"], missed_op_s, line_s, exp_s)
        inner.end()
    return found


def _known_names(table: Table, key: str, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    for name in (names := table.names(key)):
        if name not in known:
            raise UsageError(f"{where}: {key}: {name!r} is not known: expected for example {known[2]}")
    return names
