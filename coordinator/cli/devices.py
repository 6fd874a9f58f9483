"""`crossdock devices`: the models of devices and links, with where their numbers come from."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from coordinator.cli.simulate_model import network_of, system_path
from coordinator.report.rates import devices_table, links_table
from coordinator.report.simulate import pool_text
from coordinator.simulate.hardware import DeviceModel, LinkModel, Pool
from coordinator.simulate.known import specs
from coordinator.simulate.law import OPS_PER_LAYER
from coordinator.simulate.network import links
from coordinator.simulate.system import load_system, presets
from protocol.dtypes import DType
from protocol.errors import Exit

_LEGEND = (
    "spec: as its maker specifies it; table: as in the table of published rates; k: measured/law, from these rows. "
    "decode, prompt: as reached with Q4_0. E: evidenced, S: specified or assumed."
)


def devices(chosen: argparse.Namespace) -> int:
    """List the presets, or what files describe."""
    alone = chosen.system is not None or chosen.network is not None
    pool = None
    models: Iterable[DeviceModel] = [] if alone else presets().values()
    joined: Iterable[LinkModel] = [] if alone else links().values()
    if chosen.system is not None:
        system = load_system(system_path(chosen.system))
        models, pool = system.devices, system.pool
    if chosen.network is not None:
        joined = [rule.link for rule in network_of(chosen.network).rules]
    device_records = [_device(model) for model in models]
    link_records = [_link(link) for link in joined]
    if chosen.json:
        print(json.dumps({"devices": device_records, "links": link_records} | _shared(pool)))
        return Exit.OK
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    if device_records:
        console.print(devices_table(device_records))
    if pool is not None:
        console.print(f"\nall devices of class cpu share {pool_text(pool)}")
    if link_records:
        console.print()
        console.print(links_table(link_records))
    if not alone:
        console.print(f"\n{_LEGEND}")
    return Exit.OK


def _shared(pool: Pool | None) -> dict[str, float]:
    """What the system says of all devices of class cpu together, by its own keys."""
    if pool is None:
        return {}
    return {"processors": pool.processors} | ({"memory_gbs": pool.memory / 1e9} if pool.memory else {})


def _device(model: DeviceModel) -> dict[str, Any]:
    spec = specs().get(model.name)
    decode = _decode_bandwidth(model)
    return {
        "name": model.name, "class": model.cls, "arch": model.arch, "memory_gib": model.memory_nbytes / (1 << 30),
        "bandwidth_gbs": model.bandwidth / 1e9, "fp16_tflops": spec.flops / 1e12 if spec else 0.0,
        "decode_gbs": decode / 1e9, "prompt_tflops": model.rate(DType.Q4_0) / 1e12,
        "launch_us": model.launch_s * 1e6, "layer_us": model.launch_s * OPS_PER_LAYER * 1e6,
        "rates_tflops": {key: rate / 1e12 for key, rate in model.rates.items()},
        "efficiency": dict(model.efficiency), "alignment": model.alignment,
        "gweights_per_s": {key: rate / 1e9 for key, rate in model.weights_per_s.items()},
        "attention_tflops": model.attention_rate / 1e12, "async_copies": model.async_copies,
        "sources": dict(model.sources), "source": _source(model.sources),
    }  # fmt: skip


def _decode_bandwidth(model: DeviceModel) -> float:
    """Bytes/s of Q4_0 weights in a product with one column."""
    n = 1 << 24
    nbytes = DType.Q4_0.row_nbytes(n)
    seconds = nbytes / (model.bandwidth * model.efficiency.get("matvec", 1.0))
    if "quant" in model.weights_per_s:
        seconds += n / model.weights_per_s["quant"]
    return nbytes / seconds


def _source(sources: Mapping[str, str]) -> str:
    """All sources in one cell."""
    specified = sources.get("bandwidth_gbs", "")
    rows = sources.get("k", "")
    return f"{specified}; k: {rows}" if rows else specified


def _link(link: LinkModel) -> dict[str, Any]:
    return {
        "name": link.name, "latency_us": round(link.latency_s * 1e6, 6), "bandwidth_gbs": link.bandwidth / 1e9,
        "duplex": link.duplex, "segment": link.segment, "jitter": link.jitter,
        "fixed_ms_per_token": round(link.fixed_s_per_token * 1e3, 6),
        "further_us": round(link.further_s * 1e6, 6), "pageable_gbs": link.pageable / 1e9,
        "sources": dict(link.sources),
    }  # fmt: skip
