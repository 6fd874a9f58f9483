"""Documents, models and lowered programs: hazards found without running, and what hides them checked by planning it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.cli.parser import parse
from coordinator.ownership import check
from coordinator.ownership.facts import Finding, Kind
from coordinator.ownership.loans import check_loans, check_lowered
from coordinator.ownership.sequence import Sequence
from coordinator.ownership.tenancy import difference
from coordinator.report.story import story
from coordinator.schedule.lower import Lowered, lower
from coordinator.schedule.scheduler import Scheduler
from protocol.errors import CrossdockError, Exit
from protocol.ops import Flag
from protocol.program import Kind as Does
from tests.schedule.test_lower import DEVICES, Homes, forks, ladder

SHORT = ("-ub", "8", "-c", "64")


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = parse(list(arguments))()
    return int(status), capsys.readouterr().out


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    status, out = command(capsys, "check", "--json", *arguments)
    found: list[dict[str, Any]] = json.loads(out)["findings"]
    assert status == (Exit.FOUND if found else Exit.OK)
    return found


def test_the_bundled_model_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "check", *SHORT) == (Exit.OK, "3 graphs, no hazard found\n")
    assert findings(capsys, "--ownership", "faithful", "--no-share-scheduler", *SHORT) == []


def test_the_bug_of_discussion_10780(capsys: pytest.CaptureFixture[str]) -> None:
    faithful = ("--ownership", "faithful", *SHORT)
    (found,) = findings(capsys, *faithful, "-ngl", "3")
    assert (found["kind"], found["tensor"], found["latent"]) == ("stale-read", "vision.vision_output", False)
    assert found["writer"]["graph"] == "vision"
    assert found["reader"]["graph"] == "prompt"
    hidden = found["hidden_by"]
    assert any(label.startswith("inp_raw_copy") for label in hidden)
    layers = {int(label.split()[1].rstrip(":")) for label in hidden if label.startswith("n-gpu-layers")}
    assert layers
    for n in range(7):  # the report says of each number what a check of that number says
        (other,) = findings(capsys, *faithful, "-ngl", str(n), "--no-alternatives")
        assert other["latent"] == (n in layers), n
    (moved,) = findings(capsys, *faithful, "-ngl", "3", "--debug-tensor", "inp_raw_copy", "--no-alternatives")
    assert moved["latent"]


def test_the_story_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = command(capsys, "scenario", "s1")
    assert status == Exit.OK
    assert "stale read   language graph, split 1 (copy vision_output) on GPU0\n" in out
    assert "  wants      vision_output, written by the vision graph, split 0, node 0 (MUL_MAT vision_output)" in out
    assert "  finds      inp_embd [64, 128), written in epoch 2 by the language graph" in out
    assert "  hidden by  inp_raw_copy (+64 B): then at [128, 192)" in out
    assert "faithful   wrong  language.result is 10, right 11" in out


def test_all_scenarios_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = command(capsys, "scenario", "all", "--ownership", "strict")
    assert status == Exit.OK
    assert "0 false alarms" in out
    assert "not as documented" not in out


def test_a_scenario_that_lies_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "examples" / "scenarios" / "s1.toml"
    (tmp_path / "lie.toml").write_text(file.read_text().replace('faithful = "wrong"', 'faithful = "right"'))
    status, out = command(capsys, "scenario", str(tmp_path / "lie.toml"), "--json")
    assert status == Exit.FOUND
    assert json.loads(out)[0]["as_documented"] is False


def test_what_shows_comes_before_what_is_hidden_and_costs_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, shown = Finding(Kind.NEEDLESS_REALLOC, "a", ""), Finding(Kind.OVERLAP, "a.y", "")
    hidden, twice = (Finding(Kind.STALE_READ, name, "", latent=True) for name in ("a.x", "a.z"))
    found = [cost, hidden, shown, twice, replace(twice, latent=False)]
    monkeypatch.setattr(check, "walk", lambda sequence: SimpleNamespace(findings=found, plans=[]))
    assert check.check_sequence(Sequence((), {}, ())) == (shown, replace(twice, latent=False), hidden, cost)


def test_every_story_can_be_told() -> None:
    for kind in Kind:
        assert story(Finding(kind, "g.x", "because"))[0].startswith(str(kind).replace("-", " "))


DOCUMENT: dict[str, Any] = {
    "devices": [{"name": "CPU", "type": "cpu"}],
    "graphs": [
        {
            "name": "a",
            "tensors": [
                {"id": 0, "name": "x", "ne": [16], "flags": ["input"]},
                {"id": 1, "name": "w", "ne": [16], "buffer": {"buft": "CPU", "usage": "weights"}},
                {"id": 2, "name": "y", "ne": [16], "op": "MUL_MAT", "src": [1, 0], "flags": ["output"]},
            ],
            "expand": [2],
        },
        {
            "name": "b",
            "tensors": [
                {"id": 0, "name": "z", "ne": [16], "flags": ["input"]},
                {"id": 1, "name": "y", "ne": [16], "buffer": {"buft": "CPU", "usage": "compute"}},
                {"id": 2, "name": "w", "ne": [16], "buffer": {"buft": "CPU", "usage": "weights"}},
                {"id": 3, "name": "a", "ne": [16], "op": "MUL_MAT", "src": [2, 0]},
                {"id": 4, "name": "b", "ne": [16], "op": "MUL_MAT", "src": [3, 1], "flags": ["output"]},
            ],
            "expand": [4],
        },
    ],
}


def write(tmp_path: Path, document: object) -> str:
    (tmp_path / "g.json").write_text(json.dumps(document))
    return str(tmp_path / "g.json")


def test_a_document_whose_second_graph_reads_the_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (found,) = findings(capsys, "--graph", write(tmp_path, DOCUMENT))
    assert (found["kind"], found["tensor"], found["reader"]["graph"]) == ("stale-read", "a.y", "b")
    clean = {**DOCUMENT, "graphs": DOCUMENT["graphs"][:1]}
    assert findings(capsys, "--graph", write(tmp_path, clean)) == []
    third = {**DOCUMENT, "graphs": [*DOCUMENT["graphs"], {**DOCUMENT["graphs"][1], "name": "c"}]}
    told = findings(capsys, "--graph", write(tmp_path, third))
    assert [(f["tensor"], f["reader"]["graph"]) for f in told] == [("a.y", "b"), ("a.y", "c")]


def test_a_document_with_an_unwritten_leaf(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tensors = [{**DOCUMENT["graphs"][0]["tensors"][0], "flags": []}, *DOCUMENT["graphs"][0]["tensors"][1:]]
    document = {**DOCUMENT, "graphs": [{**DOCUMENT["graphs"][0], "tensors": tensors}]}
    (found,) = findings(capsys, "--graph", write(tmp_path, document))
    assert (found["kind"], found["tensor"]) == ("unwritten-read", "a.x")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("check", "--graph", "nowhere.json"), "nowhere.json: No such file"),
        (("check", "model.gguf", "--graph", "g.json"), "do not go together"),
        (("scenario", "s99"), "unknown scenario 's99'"),
        (("scenario", "nowhere.toml"), "nowhere.toml: No such file"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(CrossdockError, match=says):
        parse(list(arguments))()


def test_the_difference_of_two_graphs_is_named() -> None:
    """Weights of another name are other weights; a result of another name is the same result."""
    first, other = ladder(2), ladder(2)
    weights = next(t for t in first.tensors if t.buffer is not None)
    tensors = [replace(t, name="else") if t.id == weights.id or t.flags & Flag.OUTPUT else t for t in other.tensors]
    assert difference("g", replace(other, tensors=tuple(tensors)), first) == "g.else"
    renamed = [replace(t, name="else") if t.flags & Flag.OUTPUT else t for t in other.tensors]
    assert difference("g", replace(other, tensors=tuple(renamed)), first) == "g"


def lowered(steps: int = 6, *, forked: bool = False) -> Lowered:
    graph = forks(steps) if forked else ladder(steps)
    return lower(Scheduler(DEVICES).allocate(graph), Homes())


@pytest.mark.parametrize("forked", [False, True])
def test_lowered_programs_wait_for_their_loans(forked: bool) -> None:
    good = lowered(forked=forked)
    assert check_lowered(good) == ()
    assert check_loans(good.plan) == ()


def without(good: Lowered, worker: int, gone: tuple[int, ...]) -> Lowered:
    """A worker does not wait for these transfers."""
    program = good.programs[worker]
    kept = tuple(i for i in program.instructions if i.kind is not Does.WAIT or i.transfer not in gone)
    programs = list(good.programs)
    programs[worker] = replace(program, instructions=kept)
    return replace(good, programs=tuple(programs))


def test_a_missing_wait_is_found() -> None:
    """But for the two that are needless: the peer takes transfer 5 before 6, which is waited for; and transfer 1, which
    is received before anything is overwritten, was sent after 0 had been taken."""
    good = lowered(forked=True)
    waits = [(w, i.transfer) for w, p in enumerate(good.programs) for i in p.instructions if i.kind is Does.WAIT]
    for worker, transfer in waits:
        found = check_lowered(without(good, worker, (transfer,)))
        assert [f.kind for f in found] == [Kind.OVERWRITTEN_IN_FLIGHT] * ((worker, transfer) not in {(0, 5), (1, 0)})
        assert {f.tensor for f in found} <= {good.transfers[transfer].name}
    assert len(waits) == 7
    lent = {f.tensor: f.overwriter for f in check_lowered(without(good, 0, (4, 5, 6)))}
    assert set(lent) == {good.transfers[t].name for t in (4, 5, 6)}
    assert [who is None for who in lent.values()] == [False, True, True]


def test_a_missing_send_is_found() -> None:
    good = lowered()
    worker = good.transfers[0].source
    program = good.programs[worker]
    kept = tuple(i for i in program.instructions if i.kind is not Does.SEND or i.transfer != 0)
    programs = list(good.programs)
    programs[worker] = replace(program, instructions=kept)
    assert Kind.READ_TOO_EARLY in {f.kind for f in check_lowered(replace(good, programs=tuple(programs)))}


def test_a_missing_receive_is_found() -> None:
    good = lowered()
    worker = good.transfers[0].target
    program = good.programs[worker]
    kept = tuple(i for i in program.instructions if i.kind is not Does.RECV or i.transfer != 0)
    programs = list(good.programs)
    programs[worker] = replace(program, instructions=kept)
    found = check_lowered(replace(good, programs=tuple(programs)))
    assert {f.kind for f in found} == {Kind.CANNOT_RUN}
    assert "is never received" in " ".join(f.why for f in found)


def test_the_documented_output_is_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "hazards.md").read_text("utf-8")
    shown = text.split("```\n$ crossdock ")[1].split("```")[0]
    line, _, expected = shown.partition("\n")
    assert command(capsys, *line.split()) == (Exit.FOUND, expected)
