"""After an interrupt in the middle of a request no later one is answered with what was left over: the run has ended."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coordinator.cli.options import DEMO_MODEL
from coordinator.runtime import signals
from coordinator.runtime.session import Session, SessionOptions
from coordinator.schedule.placement import PlacementOptions
from protocol.errors import WorkerError
from tests.integration.describing import fleet_of, load


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Signals as the command has them, for one interrupt."""
    before = signal.getsignal(signal.SIGINT)
    for name in ("seen", "depth"):
        monkeypatch.setattr(signals._State, name, 0)
    signal.signal(signal.SIGINT, signals._arrived)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(real: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Ctrl-C just before call number `count`."""
    calls = iter(range(1_000_000))

    def call(*args: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    return call


@pytest.mark.usefixtures("signalled")
@pytest.mark.parametrize(("method", "count"), [("send", 1), ("_receive", 0), ("_receive", 1)])
def test_next_request_after_an_interrupt(method: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load(DEMO_MODEL)
    with fleet_of("cpu:1,accel:1") as fleet:
        session = Session(demo.model, demo.params, fleet.topology, SessionOptions(PlacementOptions(3)))
        session.open(fleet)
        session.evaluate([5, 6, 7])
        with monkeypatch.context() as patch:
            patch.setattr(fleet, method, interrupting(getattr(fleet, method), count))
            with pytest.raises(KeyboardInterrupt):
                session.evaluate([8, 9, 10])
        with pytest.raises(WorkerError, match="interrupted during the language graph"):
            session.evaluate([8, 9, 10])
