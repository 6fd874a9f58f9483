import pytest

from coordinator.schedule.check import check_plan
from coordinator.schedule.plan import Device, Plan
from coordinator.schedule.scheduler import Scheduler
from protocol.errors import PlanError
from protocol.ops import Op, Usage
from tests.schedule.small import CPU, GPU, GPU1, Maker, backends, causes


def planned(maker: Maker, *expand: str, devices: tuple[Device, ...] = (GPU, CPU), **kw: object) -> Plan:
    pins = kw.pop("pins", ())
    plan = Scheduler(devices, **kw).allocate(maker.graph(*expand, pins=pins))
    check_plan(plan)
    return plan


def test_inputs_go_last_and_weights_decide() -> None:
    m = Maker()
    m.input("x")
    m.weight("w", "GPU0")
    m.add("y", Op.MUL, ["w", "x"])
    plan = planned(m, "y")
    assert backends(plan) == {"x": "CPU", "w": "GPU0", "y": "GPU0"}
    assert causes(plan) == {"x": "1.inp", "w": "1.dst", "y": "1.wgt0"}


def test_the_first_weight_decides() -> None:
    m = Maker()
    m.weight("a", "CPU")
    m.weight("b", "GPU0")
    m.add("y", Op.MUL, ["a", "b"])
    plan = planned(m, "y")
    assert backends(plan)["y"] == "CPU"
    assert causes(plan)["y"] == "1.wgt0"


@pytest.mark.parametrize("op", [Op.ROPE, Op.FLASH_ATTN_EXT])
def test_small_extra_weights_do_not_decide(op: Op) -> None:
    m = Maker()
    m.input("x")
    m.weight("factors", "GPU0")
    m.add("y", op, ["x", "factors"])
    assert causes(planned(m, "y"))["y"] == "3.best"


def test_a_cache_is_no_weight() -> None:
    m = Maker()
    m.input("x")
    m.weight("cache", "GPU0", usage=Usage.ANY)
    m.add("y", Op.MUL, ["x", "cache"])
    assert causes(planned(m, "y"))["y"] == "3.best"


def test_a_pin_wins() -> None:
    m = Maker()
    m.input("x")
    m.weight("w", "GPU0")
    m.add("y", Op.MUL, ["w", "x"])
    plan = planned(m, "y", pins=[("y", "CPU")])
    assert backends(plan)["y"] == "CPU"
    assert causes(plan)["y"] == "usr"


def test_assignments_spread_to_neighbours() -> None:
    m = Maker()
    m.input("x")
    m.weight("w", "GPU0")
    m.add("a", Op.SCALE, ["x"])
    m.add("b", Op.MUL, ["w", "a"])
    m.add("c", Op.SCALE, ["b"])
    plan = planned(m, "c")
    assert {backends(plan)[t] for t in "abc"} == {"GPU0"}
    assert causes(plan)["a"] == causes(plan)["c"] == "2.sup"


def test_the_last_device_stops_a_sweep() -> None:
    m = Maker()
    m.weight("w0", "GPU0")
    m.weight("w1", "CPU")
    m.input("x")
    m.add("a", Op.MUL, ["w0", "x"])
    m.add("b", Op.MUL, ["w1", "a"])
    m.add("c", Op.SCALE, ["b"])
    plan = planned(m, "c")
    assert backends(plan)["c"] == "CPU"


def test_unsupported_ops_stay_off_a_device() -> None:
    m = Maker()
    m.input("x")
    m.weight("w", "GPU0")
    m.add("a", Op.MUL, ["w", "x"])
    m.add("b", Op.SOFT_MAX, ["a"])
    gpu = Device("GPU0", unsupported_ops=frozenset({"SOFT_MAX"}))
    plan = planned(m, "b", devices=(gpu, CPU))
    assert backends(plan)["b"] == "CPU"


def test_same_buffer_type_upgrades() -> None:
    m = Maker()
    m.weight("w", "shared")
    m.add("a", Op.MUL, ["w", "w"])
    first = Device("A", buft="shared", unsupported_ops=frozenset({"NONE"}))
    plan = planned(m, "a", devices=(first, Device("B", buft="shared"), CPU), pins=[("w", "B")])
    assert backends(plan)["a"] == "A"
    plan = planned(m, "a", devices=(first, Device("B", buft="shared"), CPU), pins=[("a", "B")])
    assert causes(plan)["a"] == "3.upg"


def test_views_follow_their_root() -> None:
    m = Maker()
    m.weight("w", "GPU1")
    m.input("x")
    m.add("a", Op.MUL, ["w", "x"])
    m.add("v", Op.VIEW, ["a"], view="a")
    m.add("b", Op.SCALE, ["v"])
    plan = planned(m, "b", devices=(GPU, GPU1, CPU))
    assert backends(plan)["v"] == "GPU1"
    assert causes(plan)["v"] == "4.vsrc"


def test_a_view_of_a_weight_is_placed_by_its_root() -> None:
    m = Maker()
    m.weight("w", "GPU0")
    m.add("v", Op.VIEW, ["w"], view="w")
    m.add("b", Op.SCALE, ["v"])
    plan = planned(m, "b")
    assert causes(plan)["v"] == "1.vsrc"


def test_offload_takes_host_weights() -> None:
    m = Maker()
    m.input("x", 8, 32)
    m.weight("w", "CPU", 8, 8)
    m.add("y", Op.MUL_MAT, ["w", "x"], ne=(8, 32))
    gpu = Device("GPU0", offload_ops=frozenset({"MUL_MAT"}), offload_min_batch=32)
    assert causes(planned(m, "y", devices=(gpu, CPU), op_offload=True))["y"] == "1.off"
    assert causes(planned(m, "y", devices=(gpu, CPU)))["y"] == "1.wgt0"
    few = Device("GPU0", offload_ops=frozenset({"MUL_MAT"}), offload_min_batch=33)
    assert causes(planned(m, "y", devices=(few, CPU), op_offload=True))["y"] == "1.wgt0"


@pytest.mark.parametrize(
    ("op", "ne", "batch"),
    [(Op.GET_ROWS, (8, 4), 0), (Op.MUL_MAT, (8, 4, 2), 4), (Op.MUL_MAT_ID, (8, 4, 2), 2), (Op.ADD, (8, 4, 2, 3), 24)],
)
def test_the_batch_of_an_op(op: Op, ne: tuple[int, ...], batch: int) -> None:
    for limit, cause in ((batch, "1.off"), (batch + 1, "1.wgt0")):
        m = Maker()
        m.weight("w", "CPU", 8, 8)
        m.add("y", op, ["w"], ne=ne)
        gpu = Device("GPU0", offload_ops=frozenset({op.name}), offload_min_batch=limit)
        assert causes(planned(m, "y", devices=(gpu, CPU), op_offload=True))["y"] == cause


def test_a_weight_where_its_op_cannot_run() -> None:
    m = Maker()
    m.weight("w", "GPU0")
    m.add("y", Op.CPY, ["w"], view="w")
    gpu = Device("GPU0", unsupported_ops=frozenset({"CPY"}))
    message = r"pre-allocated tensor \(y\) in a buffer \(GPU0\) that cannot run the operation \(CPY\)"
    with pytest.raises(PlanError, match=message):
        planned(m, "y", devices=(gpu, CPU))


def test_an_op_that_nobody_supports() -> None:
    m = Maker()
    m.input("x")
    m.add("y", Op.ROLL, ["x"])
    none = frozenset({"ROLL"})
    with pytest.raises(PlanError, match="node 'y': no device supports ROLL"):
        planned(m, "y", devices=(Device("GPU0", unsupported_ops=none), Device("CPU", "cpu", unsupported_ops=none)))


def test_a_leaf_that_only_views_read_has_no_device() -> None:
    m = Maker()
    m.add("x")
    m.add("v", Op.VIEW, ["x"], view="x")
    m.add("y", Op.SCALE, ["v"])
    with pytest.raises(PlanError, match="leaf 'x' lies in no buffer"):
        planned(m, "y")


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], "no devices"),
        ([GPU], "last device 'GPU0' is of type 'gpu': expected 'cpu'"),
        ([GPU, GPU, CPU], "listed twice"),
        ([Device("GPU0", alignment=48), CPU], "alignment 48, expected a power of two"),
        ([Device("GPU0", "tpu"), CPU], "type 'tpu'"),
        ([Device("GPU0", max_size=0), CPU], "max_size 0"),
        ([Device("GPU0", unsupported_ops=frozenset({"FROB"})), CPU], "unknown op 'FROB'"),
        ([Device(f"GPU{k}") for k in range(16)] + [CPU], "17 devices: expected at most 16"),
    ],
)
def test_impossible_devices(devices: list[Device], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Scheduler(devices)
