"""What is promised of predictions, for which rows, and which rows count for nothing by rules said in advance."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from coordinator.simulate.cases import Case


@dataclass(frozen=True, slots=True)
class Promise:
    """The mean absolute error that a group of rows is held to, as a fraction."""

    group: str
    limit: float
    about: str


PROMISES: Final = (
    Promise("decode nvidia", 0.10, "one NVIDIA device, CUDA, dense models"),
    Promise("decode apple", 0.10, "one Apple device, Metal"),
    Promise("decode amd", 0.15, "one AMD device"),
    Promise("decode cpu", 0.12, "one CPU, calibrated by one other row of the same machine"),
    Promise("prompt nvidia", 0.15, "one NVIDIA device, CUDA, dense models"),
    Promise("prompt apple", 0.12, "one Apple device, Metal"),
    Promise("decode layers", 0.10, "layers over several GPUs"),
    Promise("prompt layers", 0.20, "layers over several GPUs"),
    Promise("decode offload", 0.10, "a part of the layers on the CPU, calibrated by two other rows of the machine"),
    Promise("decode rpc", 0.15, "devices behind RPC, one device and model measured without it"),
)

FAULTS: Final = re.compile(r"\bbug\b|bug case|known bad|other engine")

NO_CLAIM: Final = {
    "vulkan": "Vulkan: a few rows of as many devices",
    "old nvidia": "NVIDIA before Volta: no tensor cores, another law, few devices",
    "intel": "Intel GPUs: five devices, one row each",
    "prompt amd": "prompts on AMD: 36 % and more, kernels differ from chip to chip",
    "prompt cpu": "prompts on CPUs: threads, repacking and instruction sets are not in the rows",
    "experts": "mixtures of experts: overhead for each expert is set, not fitted",
    "rows": "row split: three rows",
    "small batch": "micro-batches below 512: kernels change, rates are not even monotone",
    "slow host": "a Raspberry Pi as the host",
    "prompt offload": "prompts with weights on the host: only calibrated machines",
    "prompt rpc": "prompts over RPC",
    "wifi": "Wi-Fi: 16 devices collapsed",
    "unmeasured": "a CPU, a divided machine or a model behind RPC of which no other row was there to calibrate by",
}
"""Kinds of rows that are predicted, but for which nothing is promised."""


def fault_of(case: Case) -> str:
    """Why a row cannot be a fair measurement, or "". Rules, not errors of prediction, decide."""
    row = case.row
    if FAULTS.search(row.notes.lower()):
        return "its source calls it a fault or another engine"
    bandwidth = sum(spec.bandwidth for spec in case.specs)
    if case.mode == "one" and case.test.kind == "decode" and row.tps * case.load.read_nbytes > bandwidth:
        return "faster than its memory: tokens/s x bytes of weights is more than the bandwidth"
    return ""


def group_of(case: Case) -> str:
    """The promise's group a row belongs to, or the key of NO_CLAIM."""
    kind, mode, row = case.test.kind, case.mode, case.row
    if mode == "rpc":
        return "prompt rpc" if kind == "prompt" else "wifi" if "wi-fi" in row.link.lower() else "decode rpc"
    if mode == "offload":
        return "decode offload" if kind == "decode" and not case.load.experts else "prompt offload"
    if mode == "rows":
        return "rows"
    special = _special(case)
    if special:
        return special
    if mode == "layers":
        return f"{kind} layers"
    return _single(case)


def _special(case: Case) -> str:
    row = case.row
    if row.group == "vulkan" or row.cls.endswith("vk"):
        return "vulkan"
    if row.group == "pihost":
        return "slow host"
    if case.load.experts:
        return "experts"
    if case.test.kind == "prompt" and case.test.ubatch < 512 and case.test.n >= case.test.ubatch:
        return "small batch"
    return ""


def _single(case: Case) -> str:
    cls, kind = case.specs[0].cls, case.test.kind
    if cls == "nvidia-old":
        return "old nvidia"
    if cls == "intel":
        return "intel"
    return f"{kind} {cls}"
