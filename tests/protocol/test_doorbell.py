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
        self.words = np.array([team.LEAST_SPINS, 0, 1], np.int32)
        self.address = int(self.words.ctypes.data)

    @property
    def polls(self) -> int:
        return int(self.words[0])

    def slept(self, ns: int) -> None:
        team.slept(self.address, ns)

    def helped(self, n: int) -> None:
        assert n == 0, "it cannot be told when the word changes"
        assert team.poll(self.address + 8, 0, self.address)


Waiter = Patience | Compiled


@pytest.fixture(params=[Patience, Compiled])
def waiter(request: pytest.FixtureRequest) -> Waiter:
    made: Callable[[], Waiter] = request.param
    return made()


def tries(waiter: Waiter) -> list[int]:
    """Polls before each short sleep in a row until it gives polling up."""
    found = [waiter.polls]
    while True:
        waiter.slept(SHORT_NS)
        if waiter.polls <= found[-1]:
            return found
        found.append(waiter.polls)


def test_short_sleeps_are_polled_away(waiter: Waiter) -> None:
    least = waiter.polls
    found = tries(waiter)
    assert 4 <= len(found) <= 6
    assert found[-1] >= 100 * least
    assert waiter.polls == least


def test_what_does_not_help_is_not_tried_at_once_again(waiter: Waiter) -> None:
    least = waiter.polls
    tries(waiter)
    sleeps = 0
    while waiter.polls == least:
        waiter.slept(SHORT_NS)
        sleeps += 1
        assert sleeps < 10_000
    assert sleeps > 50


def test_long_sleeps_are_not_polled_for(waiter: Waiter) -> None:
    least = waiter.polls
    for _ in range(3):
        waiter.slept(SHORT_NS)
    assert waiter.polls > 10 * least
    for _ in range(10):
        waiter.slept(LONG_NS)
    assert waiter.polls == least


def test_polls_that_come_early_make_it_less_patient(waiter: Waiter) -> None:
    least = waiter.polls
    for _ in range(3):
        waiter.slept(SHORT_NS)
    for _ in range(200):
        waiter.helped(0)
    assert waiter.polls == least


def test_patience_is_twice_what_it_took() -> None:
    patience = Patience()
    patience.helped(300)
    assert patience.polls == 600
    patience.helped(10**6)
    assert 600 < patience.polls < 10**6


@pytest.mark.skipif(not has("futex"), reason="needs a futex")
def test_who_loses_the_processor_while_polling_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    from protocol import doorbell

    bells = doorbell.Doorbells(np.zeros(4, np.uint32))
    now, patience = [0], Patience()
    for _ in range(3):
        patience.slept(SHORT_NS)
    monkeypatch.setattr(doorbell, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(os, "sched_yield", lambda: now.__setitem__(0, now[0] + LONG_NS))
    assert not bells.wait(0, 0, patience, 0.001)
    assert now == [LONG_NS]
    assert patience.polls == Patience().polls
