"""`--fit` agrees with trying everything; `--diff` with two plans made on their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from plan_command import TINY, plan, plan_json

from coordinator.model.presets import Blueprint, open_blueprint
from coordinator.schedule.diff import diff
from coordinator.schedule.fit import fit
from coordinator.schedule.outline import Outline, Setting, plan_model
from coordinator.schedule.placement import PlacementOptions
from coordinator.schedule.plan import Device
from protocol.errors import CapacityError, UsageError
from protocol.ops import Op

ALL_OPS = frozenset(Op.__members__)
CPU = Device("CPU", "cpu", "CPU", 32, is_host=True)


@cache
def tiny() -> Blueprint:
    return open_blueprint(TINY)


def setting(limits: tuple[int | None, ...], **changes: object) -> Setting:
    gpus = (
        Device("gpu0", "gpu", "gpu0", 128, offload_ops=ALL_OPS, offload_min_batch=32),
        Device("gpu1", "gpu", "gpu1", 128),
    )
    devices = (*gpus[: len(limits) - 1], CPU)
    return replace(Setting(devices, limits, n_tokens=40, n_ctx=256), **changes)  # type: ignore[arg-type]


def splits(number: int, devices: int) -> Iterator[tuple[int, ...]]:
    if devices == 1:
        yield (number,)
        return
    for first in range(number + 1):
        for rest in splits(number - first, devices - 1):
            yield (first, *rest)


@cache
def every_plan(devices: int, **changes: object) -> list[tuple[int, tuple[int, ...], Outline]]:
    """All numbers of layers with all splits, the largest first."""
    plans = []
    for number in range(7, -1, -1):
        for counts in splits(number, devices):
            options = PlacementOptions(number, tuple(map(float, counts)) if number else ())
            free = setting((None,) * (devices + 1), placement=options, **changes)
            plans.append((number, counts, plan_model(tiny(), free)))
            if not number:
                break
    return plans


def fits(outline: Outline, limits: tuple[int | None, ...]) -> bool:
    return all(limit is None or memory.total <= limit for memory, limit in zip(outline.memory, limits, strict=True))


@pytest.mark.parametrize("host", [None, 2_000_000])
@pytest.mark.parametrize("limit", range(100_000, 1_900_000, 170_000))
def test_one_device_agrees_with_brute_force(limit: int, host: int | None) -> None:
    limits = (limit, host)
    best = next((number for number, _, outline in every_plan(1) if fits(outline, limits)), None)
    if best is None:
        with pytest.raises(CapacityError, match=r"--fit: no number of layers fits"):
            fit(tiny(), setting(limits))
        return
    found = fit(tiny(), setting(limits))
    assert (found.n_gpu_layers, found.exhaustive) == (best, True)
    assert fits(found.outline, limits)


@pytest.mark.slow
@pytest.mark.parametrize("first", [480_000, 650_000, 850_000, 1_120_000, None])
@pytest.mark.parametrize("second", [100_000, 300_000, 520_000, 980_000])
def test_two_devices_agree_with_brute_force(first: int | None, second: int) -> None:
    limits = (first, second, None)
    best = next((number for number, _, outline in every_plan(2) if fits(outline, limits)), None)
    assert best is not None
    found = fit(tiny(), setting(limits))
    assert (found.n_gpu_layers, found.exhaustive) == (best, True)
    assert sum(found.tensor_split) == best
    assert fits(found.outline, limits)
    again = plan_model(tiny(), setting(limits, placement=PlacementOptions(best, tuple(map(float, found.tensor_split)))))
    assert again.memory == found.outline.memory, "the options that it tells give the plan that it tells"


def test_given_split_and_number_are_kept() -> None:
    limits = (1_500_000, 1_500_000, None)
    found = fit(tiny(), setting(limits, placement=PlacementOptions(None, (3.0, 1.0))))
    assert found.tensor_split == ()
    free = setting((None,) * 3, placement=PlacementOptions(found.n_gpu_layers, (3.0, 1.0)))
    assert plan_model(tiny(), free).placement == found.outline.placement
    assert fit(tiny(), setting(limits, placement=PlacementOptions(2))).n_gpu_layers == 2
    with pytest.raises(CapacityError, match=r"--n-gpu-layers 7 does not fit"):
        fit(tiny(), setting((300_000, None), placement=PlacementOptions(7)))


def test_without_limits() -> None:
    with pytest.raises(UsageError, match="give one its memory"):
        fit(tiny(), setting((None, None)))


def test_large_model_on_many_devices() -> None:
    arguments = ("llama-3.2-90b-vision", "--fit", *(f"--device=gpu{i}:14GiB" for i in range(4)))
    found = plan_json(*arguments)
    assert 90 <= found["n_gpu_layers"] <= 101
    assert all(memory["short"] == 0 for memory in found["memory"])


def test_diff_is_the_difference() -> None:
    def planned(number: int) -> Outline:
        return plan_model(tiny(), setting((None, None), placement=PlacementOptions(number)))

    before, after = planned(2), planned(4)
    found = diff(before, after)
    assert {(m.purpose, m.source, m.target) for m in found.moved} == {
        ("weights", "CPU", "gpu0"), ("KV", "CPU", "gpu0"),
    }  # fmt: skip
    names = {name for m in found.moved for name in m.names}
    assert {"blk.2.attn_q.weight", "blk.3.ffn_up.weight", "v.blk.3.ffn_up.weight", "cache_k_l2"} <= names
    assert not any("blk.4." in name or "blk.1." in name for name in names)
    assert found.memory["gpu0"]["weights"] == (before.memory[0].parts["weights"], after.memory[0].parts["weights"])
    for old, new, graph in zip(before.graphs, after.graphs, found.graphs, strict=True):
        assert graph.n_splits == (old.n_splits, new.n_splits)
    token = found.graphs[-1]
    assert token.moved[("CPU", "gpu0")] > 30
    back = diff(after, before)
    assert back.graphs[-1].moved == {("gpu0", "CPU"): token.moved[("CPU", "gpu0")]}


def test_no_difference() -> None:
    text = plan(TINY, "-ngl", "3", "--device", "gpu0", "--diff", "-ngl", "3")
    assert "no weight, cache or kept tensor moves" in text
    document = plan_json(TINY, "-ngl", "3", "--device", "gpu0", "--diff", "-ngl", "all", "--outputs", "all")
    assert document["moved"][0]["from"] == "CPU"
