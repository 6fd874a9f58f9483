"""Searches, sweeps and scaling: small enough to know the answer."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from machines import GIB, PCIE, gpu, host, machine

from coordinator.model.presets import Blueprint, make_weights, open_blueprint
from coordinator.schedule.placement import PlacementOptions
from coordinator.simulate.hardware import LinkModel
from coordinator.simulate.machine import Machine, make_machine
from coordinator.simulate.predict import predict
from coordinator.simulate.scale import run_pipelines, scaling
from coordinator.simulate.search import reorder, search
from coordinator.simulate.series import Load, Options, make_series
from coordinator.simulate.sweep import parse_sweep, sweep
from protocol.dtypes import DType
from protocol.errors import CapacityError, UsageError

LOAD = Load(n_prompt=64, n_predict=4, n_images=0)
MIB = 1 << 20


TINY = str(Path(__file__).parents[1] / "data" / "ref_mllama" / "config.json")
"""A small mllama: 6 text layers (cross 1 and 4)."""


@pytest.fixture(scope="module")
def tiny() -> Blueprint:
    """Widened, so that reading weights is what takes the time."""
    blueprint = open_blueprint(TINY)
    text = replace(blueprint.params.text, n_embd=2048, n_ff=8192, n_head=16, n_head_kv=4, head_dim=128)
    params = replace(blueprint.params, text=text, vision=None)
    return Blueprint(params, make_weights(params, lambda name, shape: DType.F32 if len(shape) == 1 else DType.Q8_0))


def test_what_fits_on_the_fast_card_lies_there(tiny: Blueprint) -> None:
    """Two cards, the second one twice as fast: for one request at a time all layers belong on it."""
    cards = machine(gpu("slow", bandwidth=500e9), gpu("fast"))
    found = search(tiny, cards, Options(), LOAD)
    counts = dict(zip(found.order, found.counts, strict=True))
    assert counts == {"slow": 0, "fast": 7}
    assert found.limits == ()


def test_the_order_of_the_cards_is_searched(tiny: Blueprint) -> None:
    """Neither card holds everything, and only one way between them is fast."""

    def one_way(source: str, target: str) -> LinkModel:
        return replace(PCIE, bandwidth=1e6) if (source, target) == ("gpu0", "gpu1") else PCIE

    models = [gpu("gpu0", memory=200 * MIB), gpu("gpu1", memory=200 * MIB), host()]
    found = search(tiny, make_machine(models, one_way), Options(), replace(LOAD, n_predict=1))
    assert found.order == ("gpu1", "gpu0")
    assert min(found.counts) > 0
    assert sum(found.counts) == 7


def test_memory_is_what_limits(tiny: Blueprint) -> None:
    """A card for a part of the layers: as many as fit, no fewer; one more would be faster and does not fit."""
    cards = machine(gpu("gpu0", memory=160 * MIB))
    found = search(tiny, cards, Options(), LOAD)
    (count,) = found.counts
    assert 0 < count < 7
    assert found.prediction.fits
    (limit,) = found.limits
    assert limit.device == "gpu0"
    assert limit.needed > limit.free
    more = Options(PlacementOptions(n_gpu_layers=count + 1))
    assert predict(make_series(tiny, cards, more, LOAD)).series.short


def test_searches_that_find_nothing(tiny: Blueprint) -> None:
    with pytest.raises(UsageError, match="no device but the host"):
        search(tiny, machine(), Options(), LOAD)


def test_nothing_fits(tiny: Blueprint) -> None:
    crowded = make_machine([gpu("gpu0", memory=1 * MIB), host(memory=8 * MIB)], lambda a, b: PCIE)
    with pytest.raises(CapacityError, match=r"nothing fits: at best (gpu0|cpu) is .* bytes short"):
        search(tiny, crowded, Options(), LOAD)


def test_reordered_machines_keep_their_links() -> None:
    cards = machine(gpu("gpu0"), gpu("gpu1", bandwidth=1))
    other = reorder(cards, (1, 0))
    assert other.names == ("gpu1", "gpu0", "cpu")
    assert other.fabric.between(0, 2).name == cards.fabric.between(1, 2).name
    assert other.devices[0].name == "gpu1"


def test_sweeps_go_through_every_combination(tiny: Blueprint) -> None:
    values = parse_sweep("n-gpu-layers=0..6:3,batch=1,4")
    assert values == {"n-gpu-layers": (0, 3, 6), "batch": (1, 4)}
    points = list(sweep(tiny, machine(gpu("gpu0", memory=GIB)), Options(), LOAD, values))
    assert [tuple(p.values.values()) for p in points] == [(0, 1), (0, 4), (3, 1), (3, 4), (6, 1), (6, 4)]
    assert points[0].decode_rate < points[2].decode_rate < points[4].decode_rate
    assert all(a.decode_rate < b.decode_rate for a, b in zip(points[::2], points[1::2], strict=True))
    alone = predict(make_series(tiny, machine(gpu("gpu0", memory=GIB)), Options(PlacementOptions(3)), LOAD))
    assert points[2].decode_rate == alone.decode_rate


@pytest.mark.parametrize(
    "text",
    ["0..40", "layers=1", "batch=0", "batch=1..x", "batch=", "batch=1,batch=2", "n-gpu-layers=0..4000", "batch=4..1",
     "batch=1..9:0"],
)  # fmt: skip
def test_sweeps_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(UsageError, match="--sweep"):
        parse_sweep(text)


def test_strong_and_weak_scaling(tiny: Blueprint) -> None:
    """Eight requests over more and more cards end earlier and earlier, but less than in proportion: a pipeline pays its
    hops. With requests in proportion to the cards the rate grows further."""
    load, overlapped = Load(n_prompt=64, n_predict=16, n_images=0, n_requests=8), Options(parallel=True)

    def cards(n: int) -> Machine:
        return machine(*(gpu(f"gpu{k}") for k in range(n)))

    strong = scaling(tiny, cards, overlapped, load, [1, 2, 4, 8])
    assert [p.pipelines for p in strong] == [1, 1, 1, 2]
    assert strong[0].efficiency == 1.0
    assert strong[-1].end_s < strong[-2].end_s < strong[0].end_s
    weak = scaling(tiny, cards, overlapped, load, [1, 8], mode="weak")
    assert weak[1].requests == 64
    assert weak[1].tokens_per_s > 2 * weak[0].tokens_per_s
    with pytest.raises(UsageError, match="6 workers"):
        scaling(tiny, cards, overlapped, load, [6])


def test_one_pipeline_of_many_is_as_fast_as_alone(tiny: Blueprint) -> None:
    series = make_series(tiny, machine(gpu("gpu0"), gpu("gpu1")), Options(), LOAD)
    alone, many = run_pipelines(series, 1, 1, check=True), run_pipelines(series, 3, 1, check=True)
    assert many.end_s == alone.end_s == predict(series).end_s


def test_each_pipeline_does_what_one_does_and_the_host_all_of_it(tiny: Blueprint) -> None:
    placement = PlacementOptions(n_gpu_layers=4)  # the host computes the other layers
    series = make_series(tiny, machine(gpu("gpu0"), gpu("gpu1")), Options(placement), LOAD)
    alone, three = run_pipelines(series, 1, 1), run_pipelines(series, 3, 3)
    *stages, cpu = [worker.busy_s for worker in alone.workers]
    assert min(*stages, cpu) > 0.0
    assert [worker.busy_s for worker in three.workers] == pytest.approx([*stages * 3, 3 * cpu])
    assert three.route_nbytes == alone.route_nbytes * 3
    assert three.fabric.between(4, 6).name == f"{alone.fabric.between(0, 2).name} (2)"


def test_a_thousand_workers(tiny: Blueprint) -> None:
    """1,000 cards in 250 pipelines around one host; the simulation's memory does not grow with the events."""
    series = make_series(tiny, machine(*(gpu(f"gpu{k}") for k in range(4))), Options(), LOAD)
    timeline = run_pipelines(series, 250, 500)
    assert len(timeline.workers) == 1001
    assert sum(tally.n for tally in timeline.tallies.values()) == 500 * 5
    assert not timeline.jobs
    assert not timeline.slices


def test_memory_does_not_grow_with_the_time_simulated(tiny: Blueprint) -> None:
    """Ten times the tokens on 20 cards: ten times the events, and a peak that is no higher."""
    series = make_series(tiny, machine(gpu("gpu0")), Options(), LOAD)
    token = series.jobs[-1]
    peaks, events = [], []
    for n in (10, 10, 100):
        tracemalloc.start()
        timeline = run_pipelines(replace(series, jobs=(token,) * n), 20, 20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        events.append(timeline.n_events)
        assert timeline.span("token") == timeline.end_s
    assert events[2] >= 9.9 * events[1]
    assert peaks[2] < 1.02 * peaks[1] + 4096, peaks
