"""llama.cpp's placement rules."""

from __future__ import annotations

import pytest

from coordinator.schedule.placement import Placement, PlacementOptions, check_overrides, plan_placement
from coordinator.schedule.plan import Device
from protocol.errors import UsageError

HOST = Device("cpu0", kind="cpu", buft="cpu0", is_host=True)


def place(
    n_layer: int, accelerators: int, options: PlacementOptions, memory: list[int | None] | None = None
) -> Placement:
    devices = (*(Device(f"accel{i}", buft=f"accel{i}") for i in range(accelerators)), HOST)
    return plan_placement(devices, memory or [None] * len(devices), n_layer, options)


def test_the_last_layers_are_offloaded_first() -> None:
    assert place(4, 1, PlacementOptions(0)).layers == (1, 1, 1, 1, 1)
    assert place(4, 1, PlacementOptions(2)).layers == (1, 1, 0, 0, 1)
    assert place(4, 1, PlacementOptions(4)).layers == (0, 0, 0, 0, 1)
    assert place(4, 1, PlacementOptions(5)).layers == (0, 0, 0, 0, 0)
    assert place(4, 1, PlacementOptions()).layers == (0, 0, 0, 0, 0)


def test_split_is_even_by_proportion_or_by_memory() -> None:
    assert place(5, 2, PlacementOptions()).layers == (0, 0, 0, 1, 1, 1)
    assert place(5, 2, PlacementOptions(None, (2.0, 1.0))).layers == (0, 0, 0, 0, 1, 1)
    assert place(5, 2, PlacementOptions(), [1 << 20, 5 << 20, None]).layers == (0, 1, 1, 1, 1, 1)
    assert place(5, 2, PlacementOptions(None, (0.0, 1.0))).layers == (1, 1, 1, 1, 1, 1)


def test_names_find_their_layer() -> None:
    placement = place(4, 2, PlacementOptions(2))
    where = {
        "token_embd.weight": 2, "blk.1.attn_q.weight": 2, "blk.2.attn_q.weight": 0, "blk.3.ffn_up.weight": 1,
        "v.blk.2.attn_q.weight": 0, "v.blk.0.attn_q.weight": 2, "v.blk.9.attn_q.weight": 1,
        "v.global.blk.3.ffn_up.weight": 1,
        "cache_k_l2": 0, "cross_v_l3": 1, "cross_states": 2, "output.weight": 2, "mm.0.weight": 2,
    }  # fmt: skip
    assert {name: placement.device_of(name) for name in where} == where
    assert place(4, 2, PlacementOptions()).device_of("output_norm.weight") == 1


def test_cache_stays_on_the_host_without_kv_offload() -> None:
    placement = place(4, 1, PlacementOptions(kv_offload=False))
    assert placement.device_of("cache_k_l2") == 1
    assert placement.device_of("blk.2.attn_k.weight") == 0


def test_overrides_come_first() -> None:
    placement = place(4, 1, PlacementOptions(0, overrides=((r"ffn_(up|down)", "accel0"), (r"ffn", "cpu0"))))
    assert placement.device_of("blk.0.ffn_up.weight") == 0
    assert placement.device_of("blk.0.ffn_gate.weight") == 1


@pytest.mark.parametrize(
    ("accelerators", "options", "words"),
    [
        (1, PlacementOptions(6), "--n-gpu-layers 6: the model has 4 layers and an output: expected 0 to 5"),
        (0, PlacementOptions(1), "no accelerator"),
        (2, PlacementOptions(None, (1.0,)), "--tensor-split 1: expected 2 proportions"),
        (2, PlacementOptions(None, (0.0, 0.0)), "not all 0"),
        (1, PlacementOptions(0, overrides=(("ffn", "gpu7"),)), "unknown device 'gpu7': expected accel0, cpu0"),
        (1, PlacementOptions(0, overrides=(("(", "accel0"),)), "not a regular expression"),
    ],
)
def test_what_cannot_be_meant(accelerators: int, options: PlacementOptions, words: str) -> None:
    with pytest.raises(UsageError, match=r".*") as caught:
        place(4, accelerators, options)
    assert words in str(caught.value)


def test_an_override_has_to_match_a_weight() -> None:
    names = ["token_embd.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight", "output.weight"]
    check_overrides(PlacementOptions(overrides=(("ffn_(up|down)", "GPU0"), ("^output", "CPU"))), names)
    for pattern in ("ffn_upp", "^ffn", "cache_k"):
        options = PlacementOptions(overrides=(("ffn", "GPU0"), (pattern, "CPU")))
        with pytest.raises(UsageError, match=r"matches none of the model's 4 weights, .*like token_embd"):
            check_overrides(options, names)
