"""How long those who wait poll before they sleep: in Python and in compiled code by the same rule."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest

from protocol.doorbell import Patience
from protocol.features import has
from workers.kernels import team

SHORT_NS, LONG_NS = 40_000, 5_000_000


class Compiled:
    """What workers/kernels/team.py has learnt, with the interface of Patience."""

    def __init__(self) -> None:
        self.words = np.array([team.FIRST_NS, 0, 1], np.int32)
        self.address = int(self.words.ctypes.data)

    @property
    def ns(self) -> int:
        return int(self.words[0])

    @property
    def may_poll(self) -> bool:
        return not self.words[1] & 0xFFFF

    def slept(self, ns: int) -> None:
        team.slept(self.address, ns)

    def early(self) -> None:
        assert team.poll(self.address + 8, 0, self.address)

    def helped(self, ns: int) -> None:
        team.helped(self.address, ns)

    def lost(self) -> None:
        team.lost(self.address)


Waiter = Patience | Compiled


@pytest.fixture(params=[Patience, Compiled])
def waiter(request: pytest.FixtureRequest) -> Waiter:
    made: Callable[[], Waiter] = request.param
    return made()


def sleeps(waiter: Waiter) -> int:
    """How often it sleeps before it polls again."""
    found = 0
    while not waiter.may_poll:
        waiter.slept(SHORT_NS)
        found += 1
    return found


def test_short_sleeps_are_polled_away(waiter: Waiter) -> None:
    for _ in range(10):
        waiter.slept(LONG_NS)
    found = [waiter.ns]
    while waiter.ns < 250_000:
        waiter.slept(SHORT_NS)
        assert waiter.ns > 2 * found[-1] or waiter.ns > 250_000
        found.append(waiter.ns)
    assert 4 <= len(found) <= 7


def test_sleeps_that_polling_cannot_spare_are_slept(waiter: Waiter) -> None:
    first = waiter.ns
    for _ in range(20):
        waiter.slept(LONG_NS)
    assert waiter.ns <= first // 50
    for _ in range(20):
        waiter.slept(290_000)  # with what was polled before it is too long
    assert waiter.ns < 20_000


def test_polls_that_come_early_make_it_less_patient(waiter: Waiter) -> None:
    for _ in range(200):
        waiter.early()
    assert waiter.ns < 2_000


def test_patience_is_twice_what_it_took(waiter: Waiter) -> None:
    waiter.helped(100_000)
    assert waiter.ns == 200_000
    waiter.helped(10**6)
    assert 200_000 < waiter.ns < 10**6
    waiter.helped(0)
    assert waiter.ns > 200_000


def test_who_loses_the_processor_once_soon_polls_again(waiter: Waiter) -> None:
    patience = waiter.ns
    waiter.lost()
    assert not waiter.may_poll
    assert sleeps(waiter) <= 10
    assert waiter.ns == patience


def test_threads_that_lose_it_in_one_moment_have_lost_it_once() -> None:
    waiter = Compiled()
    for _ in range(6):
        waiter.lost()
    assert sleeps(waiter) <= 10


def test_who_loses_it_again_and_again_mostly_sleeps(waiter: Waiter) -> None:
    for _ in range(10):
        waiter.lost()
        many = sleeps(waiter)
    assert many > 1000
    for _ in range(3):
        waiter.helped(5_000)
    waiter.lost()
    assert sleeps(waiter) > 1000, "a few polls that helped prove little"
    for _ in range(10_000):
        waiter.helped(5_000)
    waiter.lost()
    assert sleeps(waiter) <= 10


@pytest.mark.skipif(not has("futex"), reason="needs a futex")
def test_a_yield_that_takes_a_slice_loses_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    from protocol import doorbell

    bells = doorbell.Doorbells(np.zeros(4, np.uint32))
    now, patience = [0], Patience()
    monkeypatch.setattr(doorbell, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(os, "sched_yield", lambda: now.__setitem__(0, now[0] + LONG_NS))
    assert not bells.wait(0, 0, patience, 0.001)
    assert now == [LONG_NS]
    assert not patience.may_poll
    assert not bells.wait(0, 0, patience, 0.001)
    assert now == [LONG_NS], "it did not yield"
