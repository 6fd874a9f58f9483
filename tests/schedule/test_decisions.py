import pickle
from dataclasses import replace
from typing import Any

import pytest

from coordinator.graph.node import BufferRef, Graph
from coordinator.schedule.decisions import Decisions
from coordinator.schedule.scheduler import Scheduler
from protocol.dtypes import DType
from protocol.ops import Flag, Op, Usage
from tests.schedule.small import CPU, GPU, Maker

VIEWS = ("backend", "cause", "splits", "copies", "sources", "places")


def graph(name: str = "w") -> Graph:
    m = Maker()
    m.input("x", 8, 2)
    m.weight(name, "GPU0", 8, 8)
    m.add("a", Op.MUL_MAT, [name, "x"], ne=(8, 2))
    m.add("v", Op.VIEW, ["a"], view="a", offs=32)
    m.add("b", Op.ADD, ["a", "v"], ne=(8, 2), flags=Flag.OUTPUT)
    return m.graph("b")


def changed(graph: Graph, ident: int, **facts: Any) -> Graph:
    tensors = [*graph.tensors]
    tensors[ident] = replace(tensors[ident], **facts)
    return replace(graph, tensors=tuple(tensors))


def test_nothing_is_read_before_it_is_asked_for() -> None:
    plan = Scheduler([GPU, CPU]).allocate(graph())
    assert not set(VIEWS) & set(vars(plan.decisions))
    assert len(plan.splits) == 1
    assert set(VIEWS) & set(vars(plan.decisions)) == {"splits"}
    assert plan.splits is plan.splits


def test_a_repeated_graph_shares_what_was_read() -> None:
    scheduler = Scheduler([GPU, CPU])
    first = scheduler.allocate(graph())
    places = first.places
    assert scheduler.allocate(graph()).places is places


def test_later_plans_do_not_change_earlier_ones() -> None:
    scheduler = Scheduler([GPU, CPU])
    late, early = (scheduler.allocate(graph()), Scheduler([GPU, CPU]).allocate(graph()))
    expected = [getattr(early, view) for view in VIEWS]
    m = Maker()
    m.input("x", 64)
    m.add("a", Op.CONT, ["x"], ne=(64,))
    for _ in range(3):
        scheduler.allocate(m.graph("a"))
        scheduler.reserve(graph("another"))
    assert [getattr(late, view) for view in VIEWS] == expected


def test_plans_are_equal_by_what_they_say() -> None:
    one, same, other = (Scheduler([GPU, CPU]).allocate(graph(name)) for name in ("w", "w", "u"))
    assert one == same
    assert one.decisions == same.decisions
    assert one != other
    pinned = Scheduler([GPU, CPU]).allocate(replace(graph(), pins=((4, "CPU"),)))
    assert pinned.decisions != one.decisions
    assert one.decisions != 0


def test_plans_survive_pickling() -> None:
    plan = Scheduler([GPU, CPU]).allocate(graph())
    again = pickle.loads(pickle.dumps(plan))
    assert isinstance(again.decisions, Decisions)
    assert again == plan


@pytest.mark.parametrize(
    ("ident", "facts"),
    [
        (0, {"name": "y"}),
        (0, {"dtype": DType.F16}),
        (0, {"ne": (8, 3, 1, 1)}),
        (0, {"nb": (4, 64, 128, 128)}),
        (0, {"flags": Flag.INPUT | Flag.OUTPUT}),
        (1, {"buffer": BufferRef("CPU", Usage.WEIGHTS)}),
        (1, {"buffer": BufferRef("GPU0", Usage.ANY)}),
        (1, {"buffer": None}),
        (2, {"op": Op.ADD}),
        (2, {"src": (0, 1)}),
        (3, {"view_offs": 0}),
        (4, {"src": (2,)}),
    ],
)
def test_every_fact_is_in_the_digest(ident: int, facts: dict[str, Any]) -> None:
    """Also: `replace` never leaves a graph the columns of another."""
    one = graph()
    assert one.columns.digest == graph().columns.digest
    assert changed(one, ident, **facts).columns.digest != one.columns.digest


def test_order_is_in_the_digest_and_names_cannot_run_together() -> None:
    one = graph()
    assert replace(one, leafs=one.leafs[::-1]).columns.digest != one.columns.digest
    left = changed(changed(one, 0, name='a", "b'), 1, name="c")
    right = changed(changed(one, 0, name="a"), 1, name='b", "c')
    assert left.columns.digest != right.columns.digest


def test_bytes_of_columns_are_those_of_tensors() -> None:
    one = changed(graph(), 0, ne=(8, 0, 1, 1))
    for found in (one, changed(one, 1, dtype=DType.Q4_0, ne=(64, 3, 1, 1), nb=(18, 36, 108, 108))):
        assert found.columns.nbytes.tolist() == [t.nbytes for t in found.tensors]
