"""Whole requests against the law of single devices and against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import GIB, PCIE, RPC, gpu, host, machine

from coordinator.model.presets import Blueprint, open_blueprint
from coordinator.schedule.placement import PlacementOptions
from coordinator.simulate.hardware import LinkModel
from coordinator.simulate.machine import Machine, make_machine
from coordinator.simulate.predict import Prediction, causes, predict
from coordinator.simulate.series import Load, Options, make_series
from protocol.errors import UsageError

TEXT = Load(n_prompt=512, n_predict=8, n_images=0)


@pytest.fixture(scope="module")
def model() -> Blueprint:
    return open_blueprint("llama-3.2-11b-vision")


@pytest.fixture(scope="module")
def small() -> Blueprint:
    return open_blueprint("smollm2-135m")


def run(blueprint: Blueprint, on: Machine, load: Load = TEXT, **options: object) -> Prediction:
    return predict(make_series(blueprint, on, Options(**options), load), check=True)  # type: ignore[arg-type]


def test_single_device_decode_follows_the_law(model: Blueprint) -> None:
    """t = W / (eb bandwidth) + weights / q + KV / (ekv bandwidth) + layers x c, within a few percent."""
    found = run(model, machine(gpu("gpu0")), Load(n_prompt=3840, n_predict=64, n_images=0, n_ubatch=3840))
    weights = sum(m.parts["weights"] for m in found.series.memory if m.device == "gpu0")
    law = weights / (0.875 * 1000e9) + 7.5e9 / 15.8e12
    law += 32 * 2 * 4096 * 1024 * 2 / (0.36 * 1000e9) + 32 * 19 * 1.5e-6
    assert 1 / found.decode_rate == pytest.approx(law, rel=0.03)


def test_phases_share_what_devices_computed(model: Blueprint) -> None:
    found = run(model, machine(gpu("gpu0")), Load(n_prompt=64, n_predict=2), placement=PlacementOptions(n_gpu_layers=9))
    assert {phase.tag for phase in found.phases} == {"vision", "prompt", "token"}
    computed = [sum(phase.busy[k] * phase.seconds for phase in found.phases) for k in range(2)]
    assert computed == pytest.approx([worker.busy_s for worker in found.timeline.workers])
    assert min(computed) > 0.0


def test_prompt_follows_the_law(model: Blueprint) -> None:
    """t = FLOPs / R + attention FLOPs / Ra + W / (0.8 bandwidth) + layers x c, and what is done value by value."""
    found = run(model, machine(gpu("gpu0")))
    weights = sum(m.parts["weights"] for m in found.series.memory if m.device == "gpu0")
    layers = 7.5e9 - 128256 * 4096  # logits are computed for the last token alone
    law = 2 * 512 * layers / 150e12 + weights / (0.8 * 1000e9)
    law += 32 * 4 * 512 * 512 * 4096 / 60e12 + 32 * 19 * 1.5e-6
    assert law < found.first_token_s < 1.15 * law


def test_a_second_card_costs_a_hop_and_saves_nothing_for_one_request(model: Blueprint) -> None:
    """Two alike cards by layers: the same time and 200 us, as published layer splits show."""
    one, two = run(model, machine(gpu("gpu0"))), run(model, machine(gpu("gpu0"), gpu("gpu1")))
    assert 1 / two.decode_rate - 1 / one.decode_rate == pytest.approx(200e-6 + 15e-6, abs=30e-6)
    both = run(model, machine(gpu("gpu0"), gpu("gpu1")), replace(TEXT, n_requests=2, n_predict=64))
    assert 1.7 < both.decode_rate / one.decode_rate < 2.0
    caches = [[memory.parts["KV"] for memory in found.series.memory[:2]] for found in (two, both)]
    assert caches[1] == [2 * nbytes for nbytes in caches[0]]  # each request has its own


def test_a_remote_costs_its_fixed_time_once_per_token(small: Blueprint) -> None:
    """One remote over RPC with everything: 5.5 ms per token, a latency each way, and the logits coming back."""
    near, far = run(small, machine(gpu("gpu0"))), run(small, machine(gpu("gpu0"), link=RPC))
    extra = 5.5e-3 + 2 * 50e-6 + 49152 * 4 / 1.15e9
    assert 1 / far.decode_rate - 1 / near.decode_rate == pytest.approx(extra, rel=0.02)
    phase = far.phases[-1]
    assert causes(phase.path)[0].kind == "fixed"
    for use in phase.links:  # busy while bytes move, not while they are under way
        assert use.busy == pytest.approx(use.nbytes * phase.n / 1.15e9 / phase.seconds)


def test_micro_batches_overlap_with_copies_of_the_inputs(small: Blueprint) -> None:
    load = Load(n_prompt=2048, n_predict=0, n_images=0, n_ubatch=256)
    cards = machine(gpu("gpu0"), gpu("gpu1"))
    plain, overlapped = run(small, cards, load), run(small, cards, load, parallel=True)
    assert 1.5 < plain.first_token_s / overlapped.first_token_s < 2.0


def test_weights_in_host_memory_stream_at_the_speed_of_pageable_memory(model: Blueprint) -> None:
    found = run(model, machine(gpu("gpu0")), placement=PlacementOptions(n_gpu_layers=0))
    prompt = next(phase for phase in found.phases if phase.tag == "prompt")
    (sent,) = [use for use in prompt.links if found.series.machine.fabric.routes[use.route].name.endswith("-> gpu0")]
    assert sent.nbytes > 3.5e9
    assert prompt.seconds > sent.nbytes / 4.9e9
    assert causes(prompt.path)[0].kind == "bytes"


def test_more_sequences_in_a_batch_share_the_weights(small: Blueprint) -> None:
    one = run(small, machine(gpu("gpu0")))
    four = run(small, machine(gpu("gpu0")), replace(TEXT, batch=4))
    assert 2.0 < four.decode_rate / one.decode_rate < 4.0
    assert four.first_token_s == pytest.approx(4 * one.first_token_s, rel=0.01)
    kv = [m.parts["KV"] for found in (one, four) for m in found.series.memory if m.device == "gpu0"]
    assert kv[1] == 4 * kv[0]


def test_a_prompt_in_pieces_and_tokens_at_their_depth(small: Blueprint) -> None:
    """The last piece is what is left; tokens look at their cache in steps of 256 positions."""
    load = Load(n_prompt=100, n_predict=160, n_images=0, n_ubatch=64)
    series = make_series(small, machine(gpu("gpu0")), Options(), load)
    names = ["prompt of 64 at depth 0", "prompt of 36 at depth 64", "token at depth 100", "token at depth 256"]
    assert [timed.name for timed in series.programs] == names
    assert [job.program for job in series.jobs] == [0, 1, *[2] * 156, *[3] * 4]


def test_depth_makes_tokens_slower(small: Blueprint) -> None:
    loads = [replace(TEXT, n_prompt=n, n_ubatch=n) for n in (128, 2048, 8000)]
    rates = [run(small, machine(gpu("gpu0")), load).decode_rate for load in loads]
    assert rates[0] > rates[1] > rates[2]


def test_an_image_is_encoded_once(model: Blueprint) -> None:
    found = run(model, machine(gpu("gpu0")), Load(n_prompt=64, n_predict=2, n_images=2))
    assert [job.tag for job in found.timeline.jobs] == ["vision", "vision", "prompt", "token", "token"]
    assert found.encode_s * 2 < found.first_token_s
    assert {phase.tag for phase in found.phases} == {"vision", "prompt", "token"}
    text = run(model, machine(gpu("gpu0")), Load(n_prompt=64, n_predict=2, n_images=0))
    assert text.encode_s == 0
    assert text.decode_rate > found.decode_rate  # no cross layers


def test_memory_short_of_a_limit_is_reported_and_simulated(model: Blueprint) -> None:
    found = run(model, machine(gpu("gpu0", memory=4 * GIB)))
    assert not found.fits
    assert [m.device for m in found.series.short] == ["gpu0"]
    assert found.decode_rate > 0


def test_results_depend_on_nothing_but_their_arguments(small: Blueprint) -> None:
    shaky = replace(RPC, jitter=0.3)
    ends = [
        predict(make_series(small, machine(gpu("gpu0"), link=shaky), Options(), TEXT), seed=seed).end_s
        for seed in (7, 7, 8)
    ]
    assert ends[0] == ends[1] != ends[2]


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        (Load(n_prompt=200_000), {}, "the model was trained for 131072"),
        (TEXT, {"n_ctx": 100}, "--ctx-size holds 100"),
        (TEXT, {"n_ctx": 200_000}, "trained for at most 131072"),
        (TEXT, {"placement": PlacementOptions(n_gpu_layers=99)}, "--n-gpu-layers 99"),
    ],
)
def test_requests_that_cannot_be_meant(
    model: Blueprint, load: Load, options: dict[str, object], message: str
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match=message):
        make_series(model, machine(gpu("gpu0")), Options(**options), load)  # type: ignore[arg-type]


def test_machines_that_cannot_be_meant(small: Blueprint) -> None:
    with pytest.raises(UsageError, match="expected the host"):
        make_machine([gpu("gpu0")], lambda a, b: PCIE)
    with pytest.raises(UsageError, match="two devices are called 'gpu0'"):
        make_machine([gpu("gpu0"), gpu("gpu0"), host()], lambda a, b: PCIE)

    def star(source: str, target: str) -> LinkModel | None:
        return PCIE if "cpu" in (source, target) else None

    apart = make_machine([gpu("gpu0"), gpu("gpu1"), host()], star)
    with pytest.raises(UsageError, match="no link from gpu0 to gpu1"):
        make_series(small, apart, Options(), TEXT)


def test_segments_are_shared() -> None:
    root = replace(PCIE, segment="root")
    cards = make_machine([gpu("gpu0"), gpu("gpu1"), host()], lambda a, b: root, {"root": 30e9})
    assert cards.fabric.capacity == (30e9,)
    assert all(route.media == (0,) for route in cards.fabric.routes)
    half = make_machine([gpu("gpu0"), host()], lambda a, b: replace(PCIE, duplex=False))
    assert [route.media for route in half.fabric.routes] == [(0,), (0,)]
