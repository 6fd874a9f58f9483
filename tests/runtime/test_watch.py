"""Who gets on and who does not; time in which nobody could look counts for nobody."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.runtime import watch as module
from coordinator.runtime.process import Vitals
from coordinator.runtime.watch import Watch
from protocol.board import Board, State


class Clock:
    """Seconds that pass when we say so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board.create(str(tmp_path))


def asleep() -> Any:
    """A worker that takes no processor time, and waits for no disk."""
    return SimpleNamespace(vitals=lambda: Vitals("S", 1.0))


def ask(watch: Watch, clock: Clock, seconds: float) -> float:
    """As the fleet does, every 20 ms for so long; the last answer."""
    for _ in range(round(seconds * 50)):
        clock.now += 0.02
        watch.idle_s()
    return watch.idle_s()


def test_time_without_a_sign_is_counted_until_there_is_one(clock: Clock, board: Board) -> None:
    watch = Watch(board, [asleep()], [0])
    assert 9.5 < ask(watch, clock, 10.0) <= 10.0
    board.show(0, 1, 2, 3, State.BUSY)
    assert ask(watch, clock, 0.3) < 0.3
    assert 9.5 < ask(watch, clock, 10.0) <= 10.3


def test_time_in_which_we_were_halted_does_not_count(clock: Clock, board: Board) -> None:
    """With the workers, as when a container is paused: none of them can have got on meanwhile."""
    watch = Watch(board, [asleep()], [0])
    before = ask(watch, clock, 5.0)
    clock.now += 300.0
    assert before <= watch.idle_s() <= before + 1.0
    assert before + 9.0 < ask(watch, clock, 10.0) <= before + 11.0


def test_somebody_who_is_always_late_notices_all_the_same(clock: Clock, board: Board) -> None:
    watch = Watch(board, [asleep()], [0])
    for _ in range(20):
        clock.now += 5.0
        watch.idle_s()
    assert watch.idle_s() > 15.0
