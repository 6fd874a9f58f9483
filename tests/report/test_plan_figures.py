"""The published full-size figures, and those of llama.cpp on SmolLM2, each by one command."""

from __future__ import annotations

import pytest
from plan_command import plan_json

DECEMBER_2024 = (
    "llama-3.2-11b-vision", "--dialect", "2024", "-ngl", "30", "--device", "gpu0:unsupported=UNPAD",
    "--host", "CPU:align=128",
)  # fmt: skip
VISION = (*DECEMBER_2024, "--phase", "vision", "--weights-type", "vision=f32")


def in_mib(sizes: dict[str, int]) -> dict[str, float]:
    return {buft: round(nbytes / (1 << 20), 2) for buft, nbytes in sizes.items()}


def test_language() -> None:
    document = plan_json(*DECEMBER_2024, "--phase", "prompt", "--images", "0", "-c", "512", "--outputs", "all")
    (graph,) = document["graphs"]
    assert (graph["nodes"], graph["allocator_nodes"], graph["n_splits"]) == (1030, 1252, 93)


def test_vision() -> None:
    (graph,) = plan_json(*VISION)["graphs"]
    assert in_mib(graph["buffer_sizes"]) == {"gpu0": 2864.12, "CPU": 376.05}


def test_vision_with_the_debug_input() -> None:
    (graph,) = plan_json(*VISION, "--debug-tensor", "inp_raw_copy")["graphs"]
    assert graph["leafs"] == 518
    assert in_mib(graph["buffer_sizes"]) == {"gpu0": 2864.12, "CPU": 390.41}
    assert {"name": "inp_raw_copy", "bytes": 15_052_800} in graph["inputs"]
    assert graph["outputs"] == [{"name": "vision_output", "bytes": 104_923_136}]


def test_llama_cpp_on_smollm2() -> None:
    document = plan_json(
        "smollm2-135m", "--weights-type", "q4_1", "--weights-type", "embd=q8_0", "-ngl", "14", "-ot", "^output=RPC0",
        "--device", "RPC0:align=32:offload=none", "--phase", "prompt", "-c", "512", "--outputs", "all",
        "--debug-tensor", "embd_copy",
    )  # fmt: skip
    (graph,) = document["graphs"]
    assert (graph["nodes"], graph["n_splits"]) == (936, 2)
    assert graph["buffer_sizes"] == {
        "RPC0": pytest.approx(97.125 * 2**20, rel=1e-6),
        "CPU": pytest.approx(14.0137 * 2**20, rel=1e-5),
    }
    assert [memory["KV"] / 2**20 for memory in document["memory"]] == [5.25, 6.0]


def test_every_setting_matters() -> None:
    """None of the figures is there by itself: each setting that is left out changes one of them."""
    (graph,) = plan_json(*DECEMBER_2024, "--phase", "prompt", "--images", "0", "-c", "512")["graphs"]
    assert graph["n_splits"] == 92, "the last layer works on one row"
    (graph,) = plan_json(*VISION, "--no-op-offload")["graphs"]
    assert in_mib(graph["buffer_sizes"]) != {"gpu0": 2864.12, "CPU": 376.05}
    (graph,) = plan_json(*VISION[:-2])["graphs"]
    assert in_mib(graph["buffer_sizes"])["gpu0"] != 2864.12
