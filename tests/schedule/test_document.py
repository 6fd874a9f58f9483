import copy
import json
from typing import Any

import pytest

from coordinator.schedule.document import dump_document, load_document, plan_document
from protocol.errors import PlanError
from protocol.ops import Op
from tests.schedule.small import CPU, GPU, Maker

Json = dict[str, Any]


def tensor(ident: int, **facts: Any) -> Json:
    return {"id": ident, "name": f"t{ident}", "type": "f32", "ne": [8, 1, 1, 1], "nb": [4, 32, 32, 32], "op": "NONE",
            "flags": [], "src": [], "view_src": None, "view_offs": 0, "buffer": None} | facts  # fmt: skip


def document() -> Json:
    return {
        "devices": [{"name": "GPU0", "type": "gpu"}, {"name": "CPU", "type": "cpu"}],
        "parallel": False,
        "op_offload": False,
        "graphs": [{
            "reserve": False,
            "reset": True,
            "tensors": [
                tensor(10, flags=["input"]),
                tensor(20, buffer={"buft": "GPU0", "usage": "weights"}),
                tensor(30, op="MUL", src=[20, 10]),
                tensor(40, op="SCALE", src=[30], flags=["output"]),
            ],
            "expand": [40],
            "pinned": {},
        }],
    }  # fmt: skip


def test_deep_nesting_is_told() -> None:
    with pytest.raises(PlanError, match="document: not JSON"):
        load_document("[" * 100_000)


def test_a_plan_as_json() -> None:
    [result] = plan_document(json.dumps(document()))
    json.dumps(result)
    assert result == {
        "n_splits": 1,
        "splits": [{"backend": "GPU0", "start": 0, "end": 2, "inputs": [10], "cause": "5.first"}],
        "nodes": [30, 40],
        "leafs": [20, 10],
        "backend": {"10": 1, "20": 0, "30": 0, "40": 0},
        "cause": {"10": "1.inp", "20": "1.dst", "30": "1.wgt0", "40": "2.sup"},
        "offsets": {"10": ["CPU", 0, 0], "20": ["GPU0", None, None], "30": ["GPU0", 0, 0], "40": ["GPU0", 0, 0]},
        "copies": {"GPU0#t10#0": ["GPU0", 0, 0]},
        "buffer_sizes": {"GPU0": 32, "CPU": 32},
        "reallocated": True,
    }


def test_reserve_tells_sizes_only() -> None:
    doc = document()
    doc["graphs"] = [doc["graphs"][0] | {"reserve": True}, doc["graphs"][0] | {"reset": False}]
    first, second = plan_document(doc)
    assert first == {"n_splits": 1, "buffer_sizes": {"GPU0": 32, "CPU": 32}}
    assert second["reallocated"] is False


def test_tensors_in_any_order() -> None:
    doc = document()
    expected = plan_document(doc)
    doc["graphs"][0]["tensors"].reverse()
    assert plan_document(doc) == expected


def test_defaults() -> None:
    doc = document()
    for t in doc["graphs"][0]["tensors"]:
        for key in ("flags", "src", "view_src", "view_offs", "buffer", "nb"):
            if not t[key] or key == "nb":
                del t[key]
    del doc["parallel"], doc["op_offload"], doc["graphs"][0]["reset"], doc["graphs"][0]["reserve"]
    del doc["graphs"][0]["pinned"]
    assert plan_document(doc) == plan_document(document())


def test_pins_and_absent_sources() -> None:
    doc = document()
    doc["graphs"][0]["pinned"] = {"30": 1}
    doc["graphs"][0]["tensors"][2]["src"] = [20, None, 10]
    [result] = plan_document(doc)
    assert result["backend"]["30"] == 1
    assert result["cause"]["30"] == "usr"
    doc["graphs"][0]["pinned"] = {"30": "CPU"}
    assert plan_document(doc) == [result]


def test_out_and_in_again() -> None:
    m = Maker()
    m.input("x")
    m.weight("w", "GPU0")
    m.add("a", Op.MUL, ["w", None, "x"])
    m.add("v", Op.VIEW, ["a"], view="a")
    m.add("b", Op.SCALE, ["v"])
    graph = m.graph("b", pins=[("b", "CPU")])
    doc = dump_document([GPU, CPU], [graph], op_offload=True)
    read = load_document(json.dumps(doc))
    assert [(d.name, d.kind, d.alignment, d.is_host) for d in read.devices] == [
        (d.name, d.kind, d.alignment, d.is_host) for d in (GPU, CPU)
    ]
    assert (read.op_offload, read.parallel) == (True, False)
    assert read.entries[0].graph.tensors == graph.tensors
    assert (read.entries[0].graph.nodes, read.entries[0].graph.pins) == (graph.nodes, graph.pins)
    assert dump_document(read.devices, [read.entries[0].graph], op_offload=True) == doc


def broken(path: list[Any], value: Any) -> Json:
    doc = copy.deepcopy(document())
    target: Any = doc
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return doc


G = ["graphs", 0]
T = [*G, "tensors"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["devices"], ..., "'devices' is missing, expected a list"),
        (["devices", 1, "type"], "gpu", "last device 'CPU' is of type 'gpu': expected 'cpu'"),
        (["devices", 0, "alignment"], 3, "alignment 3, expected a power of two"),
        (["devices", 0, "max_size"], "big", "'max_size' is 'big', expected an integer"),
        (["devices", 0, "unsupported_ops"], ["FOO"], "unknown op 'FOO'"),
        (["parallel"], 1, "'parallel' is 1, expected true or false"),
        (["graphs"], {}, "'graphs' is {}, expected a list"),
        ([*T, 3, "src"], [99], "tensor 40 ('t40') names tensor 99, which does not exist"),
        ([*T, 2, "src"], [20, 40], "depends on itself (cycle)"),
        ([*T, 2, "src"], [20] * 11, "11 sources, expected at most 10"),
        ([*T, 3, "id"], 30, "two tensors have id 30"),
        ([*T, 3, "id"], "a", "'id' is 'a', expected an integer"),
        ([*T, 3, "op"], "FROB", "unknown op 'FROB'"),
        ([*T, 3, "type"], "f99", "unknown tensor type 'f99'"),
        ([*T, 3, "ne"], [8, -1, 1, 1], "'ne' is -1, expected an integer"),
        ([*T, 3, "ne"], ..., "'ne' is missing"),
        ([*T, 3, "nb"], [4, 32], None),
        ([*T, 3, "flags"], ["outptu"], "unknown flag 'outptu'"),
        ([*T, 1, "buffer"], {"buft": "GPU0", "usage": "weight"}, "buffer usage 'weight'"),
        ([*T, 1, "buffer"], {"usage": "any"}, "'buft' is missing"),
        ([*T, 3, "op"], "VIEW", "VIEW without a view_src"),
        ([*T, 3], tensor(40, op="VIEW", src=[30], view_src=30, view_offs=4), "ends at byte 36, expected at most 32"),
        ([*T, 3], tensor(40, op="VIEW", src=[30], view_src=99), "names tensor 99"),
        ([*G, "expand"], [41], "'expand' names tensor 41, which does not exist"),
        ([*G, "pinned"], {"30": 2}, "expected an integer from 0 to 1"),
        ([*G, "pinned"], {"31": 0}, "'pinned' names tensor 31"),
    ],
)
def test_bad_documents(path: list[Any], value: Any, message: str | None) -> None:
    if message is None:
        plan_document(broken(path, value))
        return
    with pytest.raises(PlanError) as error:
        plan_document(broken(path, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", b"\xff", '{"devices": 3}'])
def test_what_is_no_document(text: str | bytes) -> None:
    with pytest.raises(PlanError):
        load_document(text)


def test_a_view_of_a_view() -> None:
    doc = broken([*T, 3], tensor(40, op="VIEW", src=[30], view_src=30))
    doc["graphs"][0]["tensors"].append(tensor(50, op="VIEW", src=[40], view_src=40))
    with pytest.raises(PlanError, match="view_src 't40' is a view itself"):
        load_document(doc)


def test_an_op_that_nobody_supports() -> None:
    doc = broken(["devices", 0, "unsupported_ops"], ["SCALE"])
    doc["devices"][1]["unsupported_ops"] = ["SCALE"]
    with pytest.raises(PlanError, match="no device supports SCALE"):
        plan_document(doc)
