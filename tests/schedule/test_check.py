from copy import copy
from dataclasses import replace

import pytest

from coordinator.graph.node import Graph
from coordinator.schedule.check import check_plan
from coordinator.schedule.plan import Place, Plan, Split
from coordinator.schedule.scheduler import Scheduler
from protocol.errors import PlanError
from protocol.ops import Flag, Op, Usage
from tests.schedule.small import CPU, GPU, GPU1, Maker


def graph() -> Graph:
    m = Maker()
    m.input("x")
    m.weight("w", "GPU0")
    m.add("a", Op.MUL, ["w", "x"])
    m.add("v", Op.VIEW, ["a"], view="a")
    m.add("b", Op.CONT, ["v"])
    m.add("c", Op.ADD, ["b", "a"], flags=Flag.OUTPUT)
    m.add("d", Op.CONT, ["c"])
    return m.graph("d")


def plan() -> Plan:
    return Scheduler([GPU, CPU]).allocate(graph())


def changed(plan: Plan, **views: object) -> Plan:
    """The plan with other decisions than the passes made."""
    decisions = copy(plan.decisions)
    vars(decisions).update(views)
    return replace(plan, decisions=decisions)


def moved(plan: Plan, name: str, offset: int) -> Plan:
    ident = plan.graph.by_name[name]
    places = list(plan.places)
    places[ident] = Place("GPU0", 0, offset)
    return changed(plan, places=tuple(places))


def at(plan: Plan, name: str) -> int:
    place = plan.places[plan.graph.by_name[name]]
    assert place is not None
    assert place.offset is not None
    return place.offset


def test_a_good_plan() -> None:
    check_plan(plan())


def test_overlapping_live_tensors() -> None:
    good = plan()
    with pytest.raises(PlanError, match=r"'c' \(ADD\).* reads 'a' .*expected .*'a' \(MUL\).*found .*'b' \(CONT\)"):
        check_plan(moved(good, "b", at(good, "a")))


def test_an_output_that_is_overwritten() -> None:
    good = plan()
    with pytest.raises(PlanError, match=r"after the last node, the output 'c'"):
        check_plan(moved(good, "d", at(good, "c")))


def test_a_view_that_lies_elsewhere() -> None:
    good = plan()
    with pytest.raises(PlanError, match="reads 'v'"):
        check_plan(moved(good, "v", at(good, "a") + 32))


def test_a_tensor_behind_the_end() -> None:
    with pytest.raises(PlanError, match="ends at byte 4128 of GPU0 chunk 0"):
        check_plan(moved(plan(), "d", 4096))


def test_splits_must_cover_all_nodes() -> None:
    good = plan()
    first = good.splits[0]
    with pytest.raises(PlanError, match="splits end at node 4"):
        check_plan(changed(good, splits=(replace(first, end=4),)))
    with pytest.raises(PlanError, match="expected from 0"):
        check_plan(changed(good, splits=(replace(first, start=1),)))
    with pytest.raises(PlanError, match="belongs to GPU0"):
        check_plan(changed(good, splits=(Split(1, 0, 5, first.inputs, ""),)))


def test_a_copy_that_is_never_made() -> None:
    good = plan()
    with pytest.raises(PlanError, match="before it has been made"):
        check_plan(changed(good, splits=(replace(good.splits[0], inputs=()),)))


def test_a_copy_left_out() -> None:
    good = plan()
    sources = ((1, 0), *good.sources[1:])
    with pytest.raises(PlanError, match="reads a copy"):
        check_plan(changed(good, sources=sources))
    with pytest.raises(PlanError, match="which its device cannot use"):
        check_plan(changed(good, sources=sources, splits=(replace(good.splits[0], inputs=()),)))


def test_a_source_that_is_another() -> None:
    good = plan()
    sources = (*good.sources[:-1], (good.graph.by_name["b"],))
    with pytest.raises(PlanError, match="source 0 is 'b', expected 'c'"):
        check_plan(changed(good, sources=sources))


def test_a_result_in_another_devices_view() -> None:
    """H17: an op writes into a view of a tensor of another backend, and results are never copied back."""
    m = Maker()
    m.input("x")
    m.weight("w", "GPU0")
    m.weight("cache", "GPU1", usage=Usage.ANY)
    m.add("a", Op.MUL, ["w", "x"])
    m.add("b", Op.CPY, ["a", "cache"], view="cache")
    found = Scheduler([GPU, GPU1, CPU]).allocate(m.graph("b", pins=[("b", "GPU0")]))
    with pytest.raises(PlanError, match=r"'b' \(CPY\) .*writes its result in GPU1"):
        check_plan(found)


def test_a_copy_that_is_older_than_its_source() -> None:
    """One copy per tensor and device: a write into the source after the copy does not reach later readers."""
    m = Maker()
    m.input("x")
    m.weight("w", "GPU0")
    m.weight("cache", "CPU", usage=Usage.ANY)
    m.add("a", Op.MUL, ["w", "cache"])
    m.add("b", Op.CPY, ["a", "cache"], view="cache")
    m.add("c", Op.MUL, ["w", "cache"])
    found = Scheduler([GPU, CPU]).allocate(m.graph("a", "b", "c"))
    with pytest.raises(PlanError, match=r"reads GPU0#cache#0, which was made before .*'b' \(CPY\)"):
        check_plan(found)


def test_an_output_view_does_not_protect_its_root() -> None:
    """H14: OUTPUT on a view alone; ggml_set_output marks the root as well."""

    def build(root: Flag) -> Plan:
        m = Maker()
        m.input("x")
        m.add("a", Op.CONT, ["x"], flags=root)
        m.add("v", Op.VIEW, ["a"], view="a", flags=Flag.OUTPUT)
        m.add("b", Op.CONT, ["v"])
        m.add("c", Op.CONT, ["b"])
        return Scheduler([CPU]).allocate(m.graph("c"))

    check_plan(build(Flag.OUTPUT))
    with pytest.raises(PlanError, match="the output 'v'"):
        check_plan(build(Flag(0)))


def test_stale_reuse_by_position() -> None:
    """H11: the next graph has the same counts and sizes, but another lifetime: the old places do not fit it."""

    def build(late: str) -> Graph:
        m = Maker()
        m.input("x")
        m.add("a", Op.CONT, ["x"])
        m.add("b", Op.CONT, ["a"])
        m.add("c", Op.CONT, ["b"])
        m.add("d", Op.CLAMP, [late])
        return m.graph("c", "d")

    scheduler = Scheduler([CPU])
    check_plan(scheduler.allocate(build("c")))
    stale = scheduler.allocate(build("a"))
    assert not stale.reallocated
    with pytest.raises(PlanError, match="reads 'a'"):
        check_plan(stale)
