"""Scaling in virtual time: what does not depend on how many there are must not, and what does is known beforehand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from machines import gpu, host, machine

from coordinator.model.presets import Blueprint, open_blueprint
from coordinator.simulate.hardware import Pool
from coordinator.simulate.machine import Machine
from coordinator.simulate.pool import demands_of
from coordinator.simulate.scale import ScalePoint, scaling
from coordinator.simulate.series import Load, Options, make_series
from coordinator.simulate.system import on_one_machine

TINY = str(Path(__file__).parents[1] / "data" / "ref_mllama" / "config.json")
LOAD = Load(n_prompt=64, n_predict=8, n_images=1, n_ubatch=32)


@pytest.fixture(scope="module")
def tiny() -> Blueprint:
    return open_blueprint(TINY)


def cards(n: int) -> Machine:
    return machine(*(gpu(f"gpu{k}") for k in range(n)))


def rates(point: ScalePoint) -> tuple[float, float]:
    return point.prompt_per_s, point.tokens_per_s


def test_one_worker_is_not_slowed_by_others_in_its_queue(tiny: Blueprint) -> None:
    """A device that is busy all the time has the same rates with one sequence and with eight: images of the others do
    not count as prompts, nor their prompts as tokens."""
    one, eight = (scaling(tiny, cards, Options(), replace(LOAD, n_requests=n), [1])[0] for n in (1, 8))
    assert all(1.0 <= many / alone < 1.3 for many, alone in zip(rates(eight), rates(one), strict=True))
    assert eight.requests == 8
    assert eight.end_s > 6 * one.end_s


def test_a_sequence_for_each_worker_scales_until_the_host_is_full(tiny: Blueprint) -> None:
    points = scaling(tiny, cards, Options(), LOAD, [1, 4, 16, 64, 256], mode="weak", stages=1)
    assert [p.pipelines for p in points] == [1, 4, 16, 64, 256]
    assert points[1].tokens_per_s == pytest.approx(4 * points[0].tokens_per_s, rel=0.1)
    assert [p.host_busy for p in points] == sorted(p.host_busy for p in points)
    assert points[-1].efficiency < 0.5 * points[1].efficiency
    assert points[-1].tokens_per_s < 1.2 * points[-2].tokens_per_s


def test_workers_of_one_machine_share_it(tiny: Blueprint) -> None:
    """Two processors do no more for eight workers than for two. With half of what it asks of the memory a worker takes
    twice as long."""
    worker = replace(host(), accelerator=True, cache_nbytes=1, async_copies=True)

    def here(pool: Pool | None, n: int) -> Machine:
        return on_one_machine(machine(*(replace(worker, name=f"accel{k}") for k in range(n))), pool)

    load = replace(LOAD, n_images=0)
    own, two = (
        scaling(tiny, partial(here, pool), Options(), load, [1, 2, 8], mode="weak", stages=1)
        for pool in (None, Pool(2.0, frozenset()))
    )
    assert rates(two[0]) == pytest.approx(rates(own[0]))
    assert two[1].tokens_per_s == pytest.approx(own[1].tokens_per_s, rel=0.1)
    assert two[2].tokens_per_s == pytest.approx(two[1].tokens_per_s, rel=0.1)
    assert own[2].tokens_per_s > 3 * two[2].tokens_per_s
    series = make_series(tiny, here(None, 1), Options(), load)
    (asked, _) = demands_of(series.lowered, series.programs, series.machine.models)[series.jobs[-1].program]
    (slow,) = scaling(
        tiny, partial(here, Pool(2.0, frozenset(), asked / 2)), Options(), load, [1], mode="weak", stages=1
    )
    assert slow.tokens_per_s == pytest.approx(own[0].tokens_per_s / 2, rel=0.05)


def test_events_are_as_many_at_any_size(tiny: Blueprint) -> None:
    """Events go with the sequences alone, however many workers share them."""
    few, many = scaling(tiny, cards, Options(), replace(LOAD, n_requests=64), [4, 256])
    assert few.n_events == many.n_events


def test_what_does_not_fit_is_said(tiny: Blueprint) -> None:
    small = replace(gpu("gpu0"), memory_nbytes=1 << 10)
    (point,) = scaling(tiny, lambda n: machine(small), Options(), LOAD, [1])
    assert not point.fits
    assert point.tokens_per_s > 0
