"""Weights: every accelerator copies its share from the file, all at the same time, and says how far it has got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.cli.options import DEMO_MODEL
from coordinator.runtime import memory
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.memory import Memory, cut
from coordinator.runtime.session import Session, SessionOptions
from coordinator.schedule.placement import PlacementOptions
from protocol import messages as m
from tests.integration.describing import fleet_of, load


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 12))
def test_parts_are_the_whole(sizes: list[int], n_parts: int) -> None:
    """Wherever it is cut, each byte is copied once, to its place."""
    ends = np.cumsum(sizes)
    pieces = np.stack([1000 - ends, 2 * ends, np.array(sizes)], 1)
    whole = [(source + k, target + k) for source, target, nbytes in pieces.tolist() for k in range(nbytes)]
    total, parts = sum(sizes), []
    for k in range(n_parts):
        part = cut(pieces, total * k // n_parts, total * (k + 1) // n_parts)
        assert (part[:, 2] > 0).all()
        parts += [(source + i, target + i) for source, target, nbytes in part.tolist() for i in range(nbytes)]
    assert parts == whole


class Watched:
    """A fleet that notes what is sent and awaited, in order."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.notes = fleet, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fleet, name)

    def send(self, worker: int, message: Any, buffers: Sequence[Any] = ()) -> None:
        self.notes.append((type(message), worker))
        self.fleet.send(worker, message, buffers)

    def gather(self, workers: Sequence[int]) -> Any:
        self.notes.append(("gather", *workers))
        return self.fleet.gather(workers)


@pytest.mark.parametrize(
    ("workers", "transport"), [("cpu:1,accel:2", "ipc"), ("cpu:1,accel:2", "tcp"), ("null:3", "ipc")]
)
@pytest.mark.parametrize("round_nbytes", [1 << 40, 50_000])
def test_each_share_is_copied_once(
    workers: str, transport: str, round_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ROUND_NBYTES", round_nbytes)
    demo = load(DEMO_MODEL)
    with fleet_of(workers, transport=transport) as fleet:
        options = SessionOptions(PlacementOptions(demo.params.text.n_layer // 2 + 1), n_ctx=64)
        session = Session(demo.model, demo.params, fleet.topology, options)
        watched, reports = Watched(fleet), []
        held = Memory(watched, fleet.topology, session.devices, demo.model)  # type: ignore[arg-type]
        held.load(session.residents, lambda done, total: reports.append((done, total)))
        loads = [note for note in watched.notes if note[0] is m.Load]
        sharing = sorted({worker for _, worker in loads})
        assert sharing == [0, 1]
        assert len(loads) == 2 * len(reports)
        at = watched.notes.index(loads[0])
        assert watched.notes[at : at + 3] == [*loads[:2], ("gather", 0, 1)]  # nobody is awaited before all are told
        copied = sum(demo.model.weights[name].nbytes for name, home in weights(session, held) if home.worker in sharing)
        assert reports[-1] == (copied, copied)
        assert reports == sorted(reports)
        assert (len(reports) == 1) == (round_nbytes > copied)
        for name, home in weights(session, held):
            if home.worker in sharing and workers != "null:3":
                weight = demo.model.weights[name]
                answer = fleet.request(home.worker, m.Read(home.arena, home.offset, weight.nbytes))
                expected = demo.model.path.read_bytes()[weight.offset : weight.offset + weight.nbytes]
                assert bytes(answer.buffers[0]) == expected, name


def weights(session: Session, held: Memory) -> list[tuple[str, Any]]:
    return [(key[0], held.resident[key]) for key in session.residents if key[0] in session.model.weights]
