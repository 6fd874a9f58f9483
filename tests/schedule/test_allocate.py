import pytest

from coordinator.graph.node import NO_FLAGS
from coordinator.schedule.allocate import INPLACE_OPS
from coordinator.schedule.check import check_plan
from coordinator.schedule.plan import Device, Plan
from coordinator.schedule.scheduler import Scheduler
from protocol.errors import CapacityError
from protocol.ops import Flag, Op, Usage
from tests.schedule.small import CPU, Maker, offset


def on_cpu(m: Maker, *expand: str, device: Device = CPU) -> Plan:
    plan = Scheduler([device]).allocate(m.graph(*expand))
    check_plan(plan)
    return plan


def chain(op: Op, flags: Flag = NO_FLAGS) -> Maker:
    m = Maker()
    m.input("x")
    m.add("a", Op.CONT, ["x"], flags=flags)
    m.add("b", op, ["a"])
    return m


def test_in_place() -> None:
    plan = on_cpu(chain(Op.SCALE), "b")
    assert offset(plan, "a") == offset(plan, "b") == 32


def test_not_in_place_of_an_output() -> None:
    plan = on_cpu(chain(Op.SCALE, Flag.OUTPUT), "b")
    assert (offset(plan, "a"), offset(plan, "b")) == (32, 0)


@pytest.mark.parametrize("op", [Op.CLAMP, Op.CONT, Op.MUL_MAT, Op.GLU])
def test_ops_that_are_not_in_place(op: Op) -> None:
    assert op not in INPLACE_OPS
    plan = on_cpu(chain(op), "b")
    assert offset(plan, "a") != offset(plan, "b")


def test_not_in_place_of_a_view() -> None:
    m = Maker()
    m.input("x")
    m.add("a", Op.CONT, ["x"])
    m.add("v", Op.RESHAPE, ["a"], view="a")
    m.add("b", Op.SCALE, ["v"])
    plan = on_cpu(m, "b")
    assert (offset(plan, "a"), offset(plan, "v"), offset(plan, "b")) == (32, 32, 0)


def test_an_input_is_overwritten_at_its_last_use() -> None:
    m = Maker()
    m.input("x")
    m.add("a", Op.SCALE, ["x"])
    plan = on_cpu(m, "a")
    assert offset(plan, "a") == offset(plan, "x") == 0


def test_an_unused_input_keeps_its_memory() -> None:
    m = Maker()
    m.input("unused", 64)
    m.input("x")
    m.add("a", Op.CONT, ["x"])
    m.add("b", Op.CONT, ["a"])
    plan = on_cpu(m, "unused", "b")
    assert [offset(plan, t) for t in ("unused", "x", "a", "b")] == [0, 256, 288, 256]


def test_views_keep_their_root_alive() -> None:
    m = Maker()
    m.input("x")
    m.add("a", Op.CONT, ["x"], ne=(16,))
    m.add("v", Op.VIEW, ["a"], view="a", offs=32)
    m.add("b", Op.CONT, ["a"])
    m.add("c", Op.CONT, ["b"])
    m.add("d", Op.ADD, ["c", "v"])
    plan = on_cpu(m, "v", "d")
    assert offset(plan, "v") == (offset(plan, "a") or 0) + 32


def test_best_fit_takes_the_smallest_hole() -> None:
    m = Maker()
    for name, n in (("big", 64), ("k0", 8), ("small", 16), ("k1", 8)):
        m.input(name, n)
    m.add("a", Op.SUM, ["big"], ne=(1,))
    m.add("b", Op.SUM, ["small"], ne=(1,))
    m.add("c", Op.CONCAT, ["a", "b"], ne=(16,))
    m.add("d", Op.CONCAT, ["c", "k0", "k1"])
    plan = on_cpu(m, "big", "k0", "small", "k1", "d")
    assert [offset(plan, t) for t in ("big", "k0", "small", "k1")] == [0, 256, 288, 352]
    assert (offset(plan, "a"), offset(plan, "b"), offset(plan, "c")) == (384, 0, 288)


def test_sizes_are_padded() -> None:
    m = Maker()
    m.input("x", 3)
    m.input("y", 3)
    m.add("a", Op.ADD, ["x", "y"], ne=(3,))
    plan = on_cpu(m, "a", device=Device("CPU", "cpu", alignment=128))
    assert offset(plan, "y") == 128
    assert plan.buffer_sizes == {"CPU": (256,)}


def test_chunks() -> None:
    m = Maker()
    for k in range(3):
        m.input(f"x{k}", 16)
    m.input("huge", 1000)
    m.add("a", Op.CONCAT, ["x0", "x1", "x2", "huge"])
    plan = on_cpu(m, "a", device=Device("CPU", "cpu", alignment=32, max_size=128))
    places = [plan.places[t] for t in range(4)]
    assert [(p.chunk, p.offset) for p in places if p] == [(0, 0), (0, 64), (1, 0), (2, 0)]
    assert plan.buffer_sizes["CPU"][2] == 4000


def test_the_sixteenth_chunk_is_unlimited() -> None:
    m = Maker()
    for k in range(20):
        m.input(f"x{k}", 32)
    plan = on_cpu(m, *(f"x{k}" for k in range(20)), device=Device("CPU", "cpu", alignment=32, max_size=128))
    assert plan.buffer_sizes["CPU"] == (128,) * 15 + (128 * 5,)


def test_too_many_holes() -> None:
    m = Maker()
    for k in range(600):
        m.input(f"x{k}")
    for k in range(0, 600, 2):
        m.add(f"y{k}", Op.SUM, [f"x{k}"], ne=(1000,), flags=Flag.OUTPUT)
    with pytest.raises(CapacityError, match="more than 256 free blocks"):
        on_cpu(m, *(f"x{k}" for k in range(600)), *(f"y{k}" for k in range(0, 600, 2)))


def test_pre_allocated_tensors_have_no_offset() -> None:
    m = Maker()
    m.input("x")
    m.weight("cache", "CPU", 64, usage=Usage.ANY)
    m.add("v", Op.VIEW, ["cache"], view="cache", offs=32)
    m.add("w", Op.CPY, ["x", "v"], view="cache", offs=32)
    plan = on_cpu(m, "w")
    for t in ("cache", "v", "w"):
        assert offset(plan, t) is None
        assert plan.places[m.ids[t]] is not None


def test_devices_that_share_a_buffer_type_share_memory() -> None:
    m = Maker()
    m.input("x")
    m.add("a", Op.CONT, ["x"])
    m.add("b", Op.ROLL, ["a"])
    gpu = Device("GPU0", buft="CPU", alignment=32, unsupported_ops=frozenset({"ROLL"}))
    plan = Scheduler([gpu, CPU]).allocate(m.graph("b"))
    check_plan(plan)
    assert plan.copies == ()
    assert list(plan.buffer_sizes) == ["CPU"]
