"""What `crossdock plan` says, draws and refuses."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from plan_command import ROOT, TINY, plan, plan_json, run_plan

from coordinator.model.gguf_file import open_model
from coordinator.model.presets import PRESETS, open_blueprint
from coordinator.schedule.document import load_document
from coordinator.schedule.outline import plan_entries
from protocol.dtypes import DType
from protocol.errors import CrossdockError, Exit, ModelError, PlanError

DEMO = ROOT / "examples" / "crossdock-demo.gguf"
OFFLOAD = (TINY, "-ngl", "2", "--device", "gpu0:unsupported=PAD", "-ub", "40", "-c", "64")


def document() -> dict[str, object]:
    """x [4, 8] times two weights, the second one on the cpu; names that drawings have to escape."""

    def tensor(ident: int, name: str, op: str = "NONE", **more: object) -> dict[str, object]:
        return {"id": ident, "name": name, "type": "f32", "ne": [4, 8, 1, 1], "op": op, "flags": [], "src": [], **more}

    weight = {"ne": [4, 4, 1, 1]}
    return {
        "devices": [{"name": 'g"<0>', "type": "gpu"}, {"name": "[CPU]", "type": "cpu"}],
        "graphs": [
            {
                "tensors": [
                    tensor(7, "x", flags=["input"]),
                    tensor(1, "[w]", buffer={"buft": 'g"<0>', "usage": "weights"}, **weight),
                    tensor(2, 'v"', buffer={"buft": "[CPU]", "usage": "weights"}, **weight),
                    tensor(3, "y", "MUL_MAT", src=[1, 7]),
                    tensor(4, "z", "MUL_MAT", src=[2, 3], flags=["output"]),
                ],
                "expand": [4],
            }
        ],
    }


@pytest.fixture
def graph_file(tmp_path: Path) -> str:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(document()))
    return str(path)


def test_causes_are_told_by_name() -> None:
    text = plan(*OFFLOAD, "--why")
    assert "token_embd.weight lies on CPU (1.wgt0)" in text
    assert "blk.0.attn_q.weight is host memory, batch 40 >= 32: offloaded (1.off)" in text
    assert "works on a copy of blk.0.attn_q.weight (5.weight)" in text
    assert "PAD does not run on gpu0 (3.best)" in text
    text = plan("smollm2-135m", "--device", "gpu0", "-ngl", "30", "--phase", "token")
    assert "norm-0 is bound to gpu0 (usr)" in text


@pytest.mark.parametrize("arguments", [
    OFFLOAD, (*OFFLOAD, "--parallel"), (*OFFLOAD, "--no-share-scheduler"), (*OFFLOAD, "--no-op-offload"),
    (*OFFLOAD, "--dialect", "2024", "--phase", "prompt,token"), (*OFFLOAD, "--dialect", "2024", "--no-op-offload"),
    (TINY, "--workers", "cpu:1,accel:3", "-nkvo"), (TINY, "-ot", "ffn=accel1", "--debug-tensor", "vision_output_copy"),
    pytest.param(("llama-3.2-11b-vision", "-ngl", "30", "--device", "gpu0"), marks=pytest.mark.slow),
], ids=" ".join)  # fmt: skip
def test_plans_are_proved(arguments: tuple[str, ...]) -> None:
    assert run_plan(*arguments, "--check", "-q")[0] == Exit.OK


def test_a_plan_that_computes_something_else_is_found() -> None:
    with pytest.raises(PlanError, match=r"embeddings \(view\).*gpu0 writes its result in CPU"):
        plan(*OFFLOAD, "--dialect", "2024", "--phase", "vision", "--check")


def test_every_split_is_told_when_asked() -> None:
    splits = [graph["n_splits"] for graph in plan_json(*OFFLOAD)["graphs"]]
    rows = re.findall(r"^ *\d+  (?:gpu0|CPU) ", plan(*OFFLOAD, "--why"), re.M)
    assert len(rows) == sum(splits)
    assert len(re.findall(r"more splits: --why shows all", plan(*OFFLOAD))) == sum(n > 12 for n in splits)
    assert not re.search(r"^ *\d+  gpu0 ", plan(*OFFLOAD, "-q"), re.M)


def test_json_has_the_same_facts() -> None:
    facts = plan_json(*OFFLOAD)
    for graph in facts["graphs"]:
        assert sum(split["bytes"] for split in graph["splits"]) == sum(link["bytes"] for link in graph["links"])
        assert graph["allocator_nodes"] == graph["nodes"] + 2 * sum(len(s["inputs"]) for s in graph["splits"])
    for memory in facts["memory"]:
        assert memory["total"] == sum(memory.get(part, 0) for part in ("weights", "KV", "kept", "compute"))
    assert facts["layers"] == {"CPU": [0, 1, 2, 3, "output"], "gpu0": [4, 5]}


def test_too_small_a_device_is_told() -> None:
    status, text = run_plan(TINY, "--device", "gpu0:100KiB", "-c", "64")
    assert status == Exit.CAPACITY
    assert re.search(r"does not fit: gpu0 is \d+\.\d MiB short", text)


def test_document_plans(graph_file: str) -> None:
    (result,) = plan_json("--graph", graph_file)
    assert [(s["backend"], s["inputs"]) for s in result["splits"]] == [('g"<0>', [7]), ("[CPU]", [3])]
    assert result["nodes"] == [3, 4]
    text = plan("--graph", graph_file)
    assert "graph 0: 2 nodes, 6 for the allocator, 3 leafs, 2 splits" in text
    assert '[w] lies on g"<0> (1.wgt0)' in text
    assert plan("--graph", graph_file, "--check", "--dump", "assign").startswith('[{"nodes": [')


def test_a_dumped_graph_gives_the_same_plan(tmp_path: Path) -> None:
    path = tmp_path / "dump.json"
    path.write_text(plan(*OFFLOAD, "--dump", "graph"))
    again, first = plan_json("--graph", str(path)), json.loads(plan(*OFFLOAD, "--dump", "plan"))
    assert again == first


def test_reserved_graphs_have_sizes_only(tmp_path: Path) -> None:
    content = document()
    content["graphs"] = [{**content["graphs"][0], "reserve": True}, *content["graphs"]]  # type: ignore[index, misc]
    outline = plan_entries(load_document(json.dumps(content)))
    assert [graph.plan is None for graph in outline.graphs] == [True, False]
    path = tmp_path / "two.json"
    path.write_text(json.dumps(content))
    reserved, planned = plan_json("--graph", str(path))
    assert set(reserved) == {"n_splits", "buffer_sizes"}
    assert planned["buffer_sizes"] == reserved["buffer_sizes"]


MERMAID = re.compile(
    r'flowchart TB|  subgraph \w+\["[^"]*"\]|    \w+(\["[^"]*"\]|\(\["[^"]*"\]\)):::device\d+'
    r'|    (\w+) (-->\|"[^"]*"\||-\.->) (\w+)|  end|  classDef device\d+ fill:#[0-9a-f]{6},color:#000'
)
DOT = re.compile(
    r'digraph plan \{|  (rankdir|node) ?.*;|  subgraph cluster_\d+ \{|    label="([^"\\]|\\.)*";'
    r'|    \w+ \[label="([^"\\]|\\.)*", fillcolor="#[0-9a-f]{6}"(, shape=ellipse)?\];'
    r'|    \w+ -> \w+ \[(label="([^"\\]|\\.)*"|style="dashed")\];|  ?\}|\}'
)


@pytest.mark.parametrize(("kind", "grammar", "arrow"), [
    ("mermaid", MERMAID, r"    (\w+) (?:-->\|.*\||-\.->) (\w+)"), ("dot", DOT, r"    (\w+) -> (\w+)"),
])  # fmt: skip
def test_drawings_are_well_formed(graph_file: str, kind: str, grammar: re.Pattern[str], arrow: str) -> None:
    for arguments in (OFFLOAD, ("--graph", graph_file)):
        lines = plan(*arguments, "--format", kind).splitlines()
        assert [line for line in lines if not grammar.fullmatch(line)] == []
        boxes = {m[1] for line in lines if (m := re.match(r"    (\w+)(?: \[label|\[|\()", line))}
        ends = {end for line in lines if (m := re.match(arrow, line)) for end in m.groups()}
        assert ends
        assert ends <= boxes
        opened = sum(line.lstrip().startswith("subgraph") for line in lines)
        assert opened == sum(line in ("  end", "  }") for line in lines)


def test_preset_is_the_published_model() -> None:
    by_name = open_blueprint("Llama-3.2-11B-Vision")
    count = sum(i.ne[0] * i.ne[1] * i.ne[2] * i.ne[3] for i in by_name.weights.values())
    # the file has two things of its own: the rope factors, and the tile gate twice
    assert count == 10_670_220_835 + 64 + 1
    names = {name: i.dtype for name, i in open_blueprint("smollm2-135m", ["q4_K"]).weights.items()}
    assert names["blk.0.attn_q.weight"] == DType.F16, "576 is no multiple of 256"
    assert names["blk.0.ffn_down.weight"] == DType.Q4_K
    sizes = {name: sum(i.nbytes for i in open_blueprint(name).weights.values()) for name in PRESETS}
    assert 5.5 < sizes["llama-3.2-11b-vision"] / 2**30 < 5.8
    assert 46 < sizes["llama-3.2-90b-vision"] / 2**30 < 47


def test_types_by_part() -> None:
    types = ("q4_0", "vision=f32", "embd=q8_0", r"v\.patch=f32")
    weights = open_blueprint("llama-3.2-11b-vision", types).weights
    got = {name: weights[name].dtype.label for name in (
        "blk.0.attn_q.weight", "token_embd.weight", "v.blk.0.attn_q.weight", "v.patch_embd.weight", "mm.0.weight",
        "v.tile_position_embd.weight", "v.blk.0.attn_norm.weight",
    )}  # fmt: skip
    assert list(got.values()) == ["q4_0", "q8_0", "f32", "f32", "f32", "f32", "f32"]
    plain = open_blueprint("llama-3.2-11b-vision", ["q8_0"]).weights
    assert {plain[n].dtype for n in ("v.patch_embd.weight", "v.tile_position_embd.weight")} == {DType.F16}


def test_header_alone_is_enough(tmp_path: Path) -> None:
    whole, size = open_blueprint(str(DEMO)), open_model(DEMO).header_nbytes
    path = tmp_path / "header.gguf"
    path.write_bytes(DEMO.read_bytes()[:size])
    assert open_blueprint(str(path)).weights == whole.weights
    path.write_bytes(DEMO.read_bytes()[: size - 30])
    with pytest.raises(ModelError, match=r"header\.gguf: the header goes on at byte"):
        open_blueprint(str(path))
    for end in range(24, size, 997):
        path.write_bytes(DEMO.read_bytes()[:end])
        with pytest.raises(ModelError):
            open_blueprint(str(path))
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be opened"):
        open_blueprint(str(path))


BAD = {
    ("nosuch",): "no such file, and no preset",
    ("smollm2-135m", "--weights-type", "q9"): "unknown tensor type 'q9'",
    ("smollm2-135m", "--weights-type", "i32"): "no weights have the type i32",
    ("smollm2-135m", "--weights-type", "(=q8_0"): "not a regular expression",
    (str(DEMO), "--weights-type", "q8_0"): "has types of its own",
    ("smollm2-135m", "--phase", "vision"): "there is no image",
    ("smollm2-135m", "--phase", "image"): "'image' is no phase",
    ("smollm2-135m", "-ngl", "99"): "expected 0 to 31",
    ("smollm2-135m", "-c", "9000"): "trained for at most 8192",
    ("smollm2-135m", "--kv", "5000"): "the context has 4096",
    ("smollm2-135m", "--device", "0gpu"): "expected a letter",
    ("smollm2-135m", "--device", "g:much"): "'much' is no size",
    ("smollm2-135m", "--device", "g:1GiB:colour=red"): "with KEY one of type, align",
    ("smollm2-135m", "--device", "g:align=x"): "align=x: expected a number",
    ("smollm2-135m", "--device", "g:align=48"): "expected a power of two",
    ("smollm2-135m", "--device", "g:type=cpu"): "described by --host",
    ("smollm2-135m", "--device", "g:unsupported=MUL_MATT"): "'MUL_MATT' is no op",
    ("smollm2-135m", "--device", "g", "--device", "g"): "the same name",
    ("smollm2-135m", "--device", "g", "--workers", "cpu:1"): "--device goes without",
    ("smollm2-135m", "--debug-tensor", "foo"): "unknown debug tensor 'foo'",
    ("smollm2-135m", "--device", "g", "--fit"): "no device has a limit",
    ("smollm2-135m", "--diff"): "name what is different",
    ("smollm2-135m", "--diff", "--colour"): "unrecognized arguments",
    ("smollm2-135m", "--diff", "--dump", "plan"): "expected options of a plan",
    ("smollm2-135m", "--json", "--format", "dot"): "two answers",
    ("smollm2-135m", "--fit", "--dump", "plan"): "two answers",
    ("smollm2-135m", "--fit", "--format", "dot"): "has no drawing",
    ("smollm2-135m", "--why", "-q"): "two answers",
    ("smollm2-135m", "--graph", "x.json"): "do not go together",
    ("--graph", "/nonexistent.json"): "No such file",
    ("--graph", str(ROOT / "README.md")): "README.md: not JSON",
    (str(ROOT / "tests"),): "no config.json in this folder",
    (str(ROOT / "README.md"),): "not a GGUF file",
}


@pytest.mark.parametrize("arguments", BAD, ids=lambda a: " ".join(Path(part).name for part in a))
def test_one_clear_line(arguments: tuple[str, ...]) -> None:
    with pytest.raises(CrossdockError) as caught:
        run_plan(*arguments)
    assert BAD[arguments] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "words"), [
    (lambda d: d["graphs"][0]["tensors"][3].update(src=[1, 99]), "names tensor 99"),
    (lambda d: d["graphs"][0]["tensors"][3].update(src=[1, 4]), "cycle"),
    (lambda d: d["graphs"][0]["tensors"][3].update(op="MUL_MATT"), "unknown op"),
    (lambda d: d["graphs"][0]["tensors"][3].update(type="f31"), "f31"),
    (lambda d: d["devices"].pop(), "expected 'cpu'"),
    (lambda d: d.pop("graphs"), "'graphs' is missing"),
])  # fmt: skip
def test_bad_documents_name_the_file(tmp_path: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    content = document()
    change(content)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=re.escape(str(path))) as caught:
        plan("--graph", str(path))
    assert words in str(caught.value)


def test_document_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(document()).encode())))
    assert plan_json("--graph", "-")[0]["n_splits"] == 2


@pytest.mark.parametrize("text", ["[1]", '{"model_type": "bert"}', '{"model_type": "mllama"}', "{", "[]"])
def test_bad_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_blueprint(str(path))
