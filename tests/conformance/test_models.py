"""The graphs of real models, planned by us and by ggml, for every number of offloaded layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from coordinator.cli.options import DEMO_MODEL
from coordinator.model.presets import Blueprint, open_blueprint
from coordinator.schedule.document import dump_document
from coordinator.schedule.outline import Setting, plan_model
from coordinator.schedule.placement import PlacementOptions
from coordinator.schedule.plan import Device
from tests.conformance.long import compare

real_ggml = pytest.importorskip("tests.conformance.real_ggml", reason="libggml-python is not installed")
from tests.conformance.server import RealServer  # noqa: E402  (needs the library)


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    real = RealServer()
    yield real
    real.close()


def devices(number: int, dialect: str) -> tuple[Device, ...]:
    """Accelerators as llama.cpp's CUDA devices, and the host; only the host un-pads in the 2024 dialect."""
    accelerators = tuple(
        Device(f"gpu{i}", buft=f"gpu{i}", alignment=128, offload_ops=frozenset({"MUL_MAT", "ADD", "MUL"}),
               unsupported_ops=frozenset({"UNPAD"} if dialect == "2024" else ()))
        for i in range(number)
    )  # fmt: skip
    return (*accelerators, Device("CPU", kind="cpu", buft="CPU", is_host=True))


def document(blueprint: Blueprint, number: int, layers: int, **options: Any) -> dict[str, Any]:
    """The graphs of all phases as one document; ggml, which has no UNPAD, gets an op that it treats alike."""
    found = devices(number, options.get("dialect", "2026"))
    setting = Setting(found, (None,) * len(found), PlacementOptions(layers), **options)
    graphs = [planned.plan.graph for planned in plan_model(blueprint, setting).graphs if planned.plan is not None]
    assert graphs
    doc = dump_document(found, graphs, op_offload=setting.op_offload, parallel=setting.parallel)
    for device in doc["devices"]:
        device["unsupported_ops"] = ["ROLL" if op == "UNPAD" else op for op in device["unsupported_ops"]]
        device["offload_ops"] = ["ROLL" if op == "UNPAD" else op for op in device["offload_ops"]]
    for tensor in (tensor for graph in doc["graphs"] for tensor in graph["tensors"]):
        if tensor["op"] == "UNPAD":
            tensor["op"] = "ROLL"
    return doc


def check(server: RealServer, doc: dict[str, Any]) -> None:
    assert compare(server, doc) == ("same", [])


@pytest.mark.parametrize("dialect", ["2026", "2024"])
@pytest.mark.parametrize("layers", range(7))
def test_bundled_model(server: RealServer, layers: int, dialect: str) -> None:
    blueprint = open_blueprint(str(DEMO_MODEL))
    for number, op_offload in ((1, True), (2, False)):
        check(server, document(blueprint, number, layers, dialect=dialect, op_offload=op_offload, n_tokens=64))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["2026", "2024"])
@pytest.mark.parametrize("layers", range(42))
def test_llama_32_11b_vision(server: RealServer, layers: int, dialect: str) -> None:
    blueprint = open_blueprint("llama-3.2-11b-vision")
    check(server, document(blueprint, 1 + layers % 2, layers, dialect=dialect, op_offload=layers % 3 > 0))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_smollm2_over_devices(server: RealServer, number: int) -> None:
    blueprint = open_blueprint("smollm2-135m")
    for layers in range(32):
        parallel = layers == 31 and number > 1
        check(server, document(blueprint, number, layers, op_offload=layers % 2 > 0, parallel=parallel))
