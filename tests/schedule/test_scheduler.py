import pytest

from coordinator.graph.node import Graph
from coordinator.schedule import assign
from coordinator.schedule.check import check_plan
from coordinator.schedule.scheduler import Scheduler
from protocol.errors import PlanError
from protocol.ops import Flag, Op, Usage
from tests.schedule.small import CPU, GPU, Maker, offset


def batch(n: int, op: Op = Op.SOFT_MAX, view_at: int = 0, name: str = "x") -> Graph:
    """A graph whose sizes grow with `n` and whose topology does not."""
    m = Maker()
    m.input(name, 8, n)
    m.weight("w", "GPU0", 8, 8)
    m.weight("cache", "GPU0", 8, 64, usage=Usage.ANY)
    m.add("v", Op.VIEW, ["cache"], ne=(8, 1), view="cache", offs=32 * view_at)
    m.add("a", Op.MUL_MAT, ["w", name], ne=(8, n))
    m.add("b", op, ["a", "v"], ne=(8, n))
    m.add("u", Op.VIEW, ["b"], ne=(8, 1), view="b", offs=32 * min(view_at, n - 1))
    m.add("c", Op.CONT, ["u"], flags=Flag.OUTPUT)
    return m.graph("c")


def test_only_growth_reallocates() -> None:
    scheduler = Scheduler([GPU, CPU])
    plans = [scheduler.allocate(batch(n)) for n in (2, 8, 3, 8, 9)]
    assert [p.reallocated for p in plans] == [True, True, False, False, True]
    assert [p.epoch for p in plans] == [1, 2, 3, 4, 5]
    assert plans[1].places[0] == plans[2].places[0]
    for plan in plans:
        check_plan(plan)


def test_another_topology_reallocates_but_does_not_shrink() -> None:
    scheduler = Scheduler([GPU, CPU])
    scheduler.allocate(batch(64))
    sizes = scheduler.buffer_sizes
    m = Maker()
    m.input("x")
    m.add("a", Op.CONT, ["x"])
    plan = scheduler.allocate(m.graph("a"))
    assert plan.reallocated
    assert scheduler.buffer_sizes == plan.buffer_sizes == sizes


def test_reserve_sizes_for_the_worst_case() -> None:
    scheduler = Scheduler([GPU, CPU])
    sizes = scheduler.reserve(batch(64))
    assert scheduler.epoch == 1
    plan = scheduler.allocate(batch(5), reset=False)
    assert not plan.reallocated
    assert plan.buffer_sizes == sizes
    assert scheduler.reserve(batch(3)) == sizes
    assert scheduler.epoch == 2
    assert scheduler.allocate(batch(64)).reallocated


def test_an_allocated_graph_has_to_be_let_go() -> None:
    scheduler = Scheduler([GPU, CPU])
    scheduler.allocate(batch(1), reset=False)
    with pytest.raises(PlanError, match="still allocated"):
        scheduler.allocate(batch(1), reset=False)
    scheduler.reset()
    scheduler.allocate(batch(1), reset=False)


@pytest.mark.parametrize("same_object", [True, False])
def test_a_repeated_graph_is_not_planned_again(monkeypatch: pytest.MonkeyPatch, same_object: bool) -> None:
    scheduler = Scheduler([GPU, CPU])
    graph = batch(4)
    first = scheduler.allocate(graph)
    monkeypatch.setattr(assign, "assign", None)
    again = graph if same_object else batch(4)
    second = scheduler.allocate(again)
    assert second.graph is again
    assert (second.reallocated, second.epoch) == (False, 2)
    assert (second.places, second.splits, second.copies) == (first.places, first.splits, first.copies)
    assert scheduler.allocate(graph).epoch == 3


def test_what_makes_graphs_different() -> None:
    one = batch(4, view_at=1)
    for other in (batch(4, Op.ADD, 1), batch(4, view_at=2), batch(3, view_at=1), batch(4, view_at=1, name="y")):
        scheduler = Scheduler([GPU, CPU])
        scheduler.allocate(one)
        plan = scheduler.allocate(other)
        fresh = Scheduler([GPU, CPU])
        fresh.reserve(one)
        expected = fresh.allocate(other)
        assert (plan.places, plan.copies, plan.cause) == (expected.places, expected.copies, expected.cause)
        check_plan(plan)


def test_views_move_with_their_offset() -> None:
    scheduler = Scheduler([GPU, CPU])
    at = [offset(scheduler.allocate(batch(4, view_at=k)), "u") for k in (0, 1, 3)]
    assert [a - at[0] for a in at if a is not None and at[0] is not None] == [0, 32, 96]


def test_a_leaf_without_a_place_is_rescued() -> None:
    """ggml compares nodes and sources by position, never leafs: it would read before its tables."""

    def graph(first: bool) -> Graph:
        m = Maker()
        m.input("x")
        m.weight("w", "CPU")
        m.add("a", Op.CONT, ["x"])
        m.add("b", Op.CONT, ["w"])
        m.add("c", Op.ADD, ["a", "b"])
        return m.graph(*(("x", "w") if first else ("w", "x")), "c")

    scheduler = Scheduler([CPU])
    scheduler.allocate(graph(True))
    plan = scheduler.allocate(graph(False))
    check_plan(plan)
    assert scheduler.rescues == 1
    assert plan.reallocated


def test_bad_pins() -> None:
    m = Maker()
    m.input("x")
    m.add("a", Op.CONT, ["x"])
    with pytest.raises(PlanError, match="unknown device 'TPU'"):
        Scheduler([CPU]).allocate(m.graph("a", pins=[("a", "TPU")]))
