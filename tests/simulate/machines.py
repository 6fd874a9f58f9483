"""Machines with round numbers, so that tests do not depend on what presets say."""

from __future__ import annotations

from coordinator.simulate.hardware import DeviceModel, LinkModel
from coordinator.simulate.machine import Machine, make_machine

GIB = 1 << 30


def gpu(name: str, memory: int = 24 * GIB, bandwidth: float = 1000e9) -> DeviceModel:
    return DeviceModel(
        name, "nvidia", memory, bandwidth,
        rates={"f32": 40e12, "f16": 150e12, "quant": 150e12},
        efficiency={"matvec": 0.875, "matmat": 0.8, "attention": 0.36, "elementwise": 0.875, "copy": 0.44},
        weights_per_s={"quant": 15.8e12}, attention_rate=60e12, launch_s=1.5e-6, async_copies=True,
    )  # fmt: skip


def host(memory: int = 64 * GIB) -> DeviceModel:
    return DeviceModel(
        "cpu", "cpu", memory, 60e9, rates={"f32": 0.4e12, "f16": 0.8e12, "quant": 0.8e12},
        efficiency={"matvec": 0.61, "matmat": 0.61}, launch_s=20e-6, alignment=32,
    )  # fmt: skip


PCIE = LinkModel("pcie4x16", 10e-6, 24e9, further_s=200e-6, pageable=4.8e9)
RPC = LinkModel("10gbe", 50e-6, 1.15e9, fixed_s_per_token=5.5e-3)


def machine(*models: DeviceModel, link: LinkModel = PCIE) -> Machine:
    """These devices and a host, with a link of their own between any two."""
    return make_machine((*models, host()), lambda source, target: link)
