from coordinator.schedule.check import check_plan
from coordinator.schedule.plan import Device, Plan
from coordinator.schedule.scheduler import Scheduler
from protocol.ops import Op
from tests.schedule.small import CPU, GPU, GPU1, Maker, names


def there_and_back() -> Maker:
    """GPU0, CPU, GPU0: x is used on GPU0 twice."""
    m = Maker()
    m.input("x")
    m.weight("w0", "GPU0")
    m.weight("w1", "CPU")
    m.add("a", Op.MUL, ["w0", "x"])
    m.add("b", Op.MUL, ["w1", "a"])
    m.add("c", Op.MUL, ["w0", "b"])
    m.add("d", Op.ADD, ["c", "x"])
    return m


def shape(plan: Plan) -> list[tuple[str, list[str], list[str], str]]:
    nodes = plan.graph.nodes
    return [
        (plan.devices[s.backend].name, names(plan, nodes[s.start : s.end]), names(plan, s.inputs), s.cause)
        for s in plan.splits
    ]


def test_a_split_per_change_of_device() -> None:
    plan = Scheduler([GPU, CPU]).allocate(there_and_back().graph("d"))
    check_plan(plan)
    assert shape(plan) == [
        ("GPU0", ["a"], ["x"], "5.first"),
        ("CPU", ["b"], ["a"], "5.backend"),
        ("GPU0", ["c", "d"], ["b"], "5.backend"),
    ]
    assert [c.name for c in plan.copies] == ["GPU0#x#0", "CPU#a#0", "GPU0#b#0"]
    assert [names(plan, row) for row in plan.sources] == [
        ["w0", "GPU0#x#0"], ["w1", "CPU#a#0"], ["w0", "GPU0#b#0"], ["c", "GPU0#x#0"],
    ]  # fmt: skip


def test_shared_buffers_need_no_copy() -> None:
    gpu = Device("GPU0", extra_bufts=("CPU",))
    plan = Scheduler([gpu, CPU]).allocate(there_and_back().graph("d"))
    check_plan(plan)
    assert shape(plan) == [("GPU0", ["a", "b", "c", "d"], [], "5.first")]


def test_views_start_no_split() -> None:
    m = there_and_back()
    m.add("v", Op.RESHAPE, ["b"], view="b")
    m.add("e", Op.SCALE, ["v"])
    plan = Scheduler([GPU, CPU]).allocate(m.graph("e"))
    check_plan(plan)
    assert len(plan.splits) == 2
    assert [names(plan, s.inputs) for s in plan.splits] == [["x"], ["a"]]


def test_an_offloaded_weight_starts_a_split() -> None:
    m = Maker()
    m.input("x")
    for k in range(3):
        m.weight(f"w{k}", "CPU")
    m.add("a", Op.MUL, ["w0", "x"])
    m.add("b", Op.MUL, ["w1", "a"])
    m.add("c", Op.MUL, ["w2", "b"])
    gpu = Device("GPU0", offload_ops=frozenset({"MUL"}))
    plan = Scheduler([gpu, CPU], op_offload=True).allocate(m.graph("c"))
    check_plan(plan)
    assert shape(plan) == [
        ("GPU0", ["a"], ["w0", "x"], "5.first"),
        ("GPU0", ["b"], ["w1"], "5.weight"),
        ("GPU0", ["c"], ["w2"], "5.weight"),
    ]


def many_inputs(n: int) -> Maker:
    m = Maker()
    m.weight("w", "GPU0")
    last = "w"
    for k in range(n):
        m.input(f"x{k}")
        last = m.add(f"y{k}", Op.MUL if k == 0 else Op.ADD, [last, f"x{k}"])
    return m


def test_a_full_list_of_inputs_starts_a_split() -> None:
    m = many_inputs(31)
    plan = Scheduler([GPU, CPU]).allocate(m.graph("y30"))
    check_plan(plan)
    assert [(s.end - s.start, len(s.inputs), s.cause) for s in plan.splits] == [(30, 30, "5.first"), (1, 1, "5.full")]


def test_a_list_of_inputs_that_grew_stays_long() -> None:
    m = many_inputs(29)
    m.input("p")
    m.input("q")
    m.add("z", Op.CONCAT, ["y28", "p", "q"])
    m.input("r")
    m.add("end", Op.ADD, ["z", "r"])
    scheduler = Scheduler([GPU, CPU])
    first = scheduler.allocate(m.graph("end"))
    assert [len(s.inputs) for s in first.splits] == [32]
    longer = Scheduler([GPU, CPU])
    longer.allocate(m.graph("end"))
    again = longer.allocate(many_inputs(31).graph("y30"))
    assert [len(s.inputs) for s in again.splits] == [31]


def test_parallel_makes_four_copies_of_inputs() -> None:
    m = Maker()
    m.input("x")
    m.weight("w0", "GPU0")
    m.weight("w1", "GPU1")
    m.add("a", Op.MUL, ["w0", "x"])
    m.add("b", Op.MUL, ["w1", "a"])
    scheduler = Scheduler([GPU, GPU1, CPU], parallel=True)
    graph = m.graph("b")
    plan = scheduler.allocate(graph)
    check_plan(plan)
    own = [f"CPU#x#{c}" for c in (1, 2, 3)]
    assert [c.name for c in plan.copies] == [
        *own,
        *(f"GPU0#x#{c}" for c in range(4)),
        *(f"GPU1#a#{c}" for c in range(4)),
    ]
    assert names(plan, plan.sources[0]) == ["w0", "GPU0#x#0"]
    second = scheduler.allocate(graph)
    check_plan(second)
    assert names(second, second.sources[0]) == ["w0", "GPU0#x#1"]
    assert "CPU#x#0" in [c.name for c in second.copies]


def test_names_of_copies_are_cut_and_numbered() -> None:
    m = Maker()
    m.input("n" * 70)
    m.add("", flags=m.tensors[0].flags)
    m.weight("w", "GPU0")
    m.add("y", Op.CONCAT, ["w", "n" * 70, ""])
    plan = Scheduler([GPU, CPU]).allocate(m.graph("y", pins=[("y", "GPU0")]))
    assert [c.name for c in plan.copies] == ["GPU0#" + "n" * 58, "GPU0#leaf_2#0"]


def test_a_graph_of_views_keeps_the_last_device() -> None:
    m = there_and_back()
    scheduler = Scheduler([GPU, CPU])
    scheduler.allocate(m.graph("d"))
    n = Maker()
    n.input("x")
    n.add("v", Op.VIEW, ["x"], view="x")
    graph = n.graph("v")
    assert scheduler.allocate(graph).splits[0].backend == 0
    assert len(scheduler.allocate(graph).splits) == 1
