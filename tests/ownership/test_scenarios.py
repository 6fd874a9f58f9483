"""The corpus: hazards are wrong in faithful, named in strict and statically, right in safe; twins raise no alarm."""

from pathlib import Path

import pytest

from coordinator.ownership.facts import COSTS, Kind
from coordinator.ownership.host import walk
from coordinator.ownership.interpret import run
from coordinator.ownership.scenario import Scenario, load_scenario, parse_scenario, play
from protocol.errors import CrossdockError, InputError

FOLDER = Path(__file__).parents[2] / "examples" / "scenarios"
FILES = sorted(FOLDER.glob("*.toml"))
CORPUS = {s.ident: s for s in map(load_scenario, FILES)}
TWINS = [s for s in CORPUS.values() if s.twin_of]
HAZARDS = [s for s in CORPUS.values() if not s.twin_of]
ROWS = ["S1", "S2", "S3", "S4", "S5", "H05", "H06", "H07", "H08", "H09", "H10", "H11", "H12", "H13", "H14", "H15",
        "H16", "H17", "H19", "H21", "H22", "H24", "H26", "H27", "H28", "H31"]  # fmt: skip


def ident(scenario: Scenario) -> str:
    return scenario.ident


@pytest.mark.parametrize("scenario", CORPUS.values(), ids=ident)
def test_behaves_as_documented(scenario: Scenario) -> None:
    report = play(scenario)
    assert (report.static_result, *(o.result for o in report.outcomes)) == tuple(
        scenario.expect[mode] for mode in ("static", "faithful", "strict", "safe")
    )
    assert report.as_documented


def test_every_row_of_the_corpus_is_there() -> None:
    assert [row for row in ROWS if row not in CORPUS] == []
    assert {s.ident.lower() for s in CORPUS.values()} == {f.stem for f in FILES}


def test_every_hazard_is_found_before_it_runs_and_named_while_it_does() -> None:
    for s in HAZARDS:
        static = Kind(s.expect["static"])
        assert s.expect["strict"] == ("right" if static in COSTS else static), s.ident
        assert static in COSTS or s.expect["safe"] in ("right", static), s.ident


def test_twins_are_innocent() -> None:
    assert len(TWINS) >= 12
    assert all(s.twin_of in CORPUS for s in TWINS)
    for s in TWINS:
        assert set(s.expect.values()) == {"none", "right"}, s.ident


@pytest.mark.parametrize("scenario", TWINS, ids=ident)
def test_twins_are_right_whoever_is_late(scenario: Scenario) -> None:
    actions = walk(scenario.sequence).actions
    for late in (None, frozenset[str](), *(frozenset({q}) for q in scenario.sequence.queues)):
        assert run(actions, strict=True, late=late).is_right


def test_the_debug_tensor_hides_the_bug_and_safe_does_not_need_it() -> None:
    seen = {name: play(CORPUS[name], ("faithful", "safe")).outcomes for name in ("S1", "S1-hidden")}
    assert [o.result for o in seen["S1"]] == ["wrong", "right"]
    assert [o.result for o in seen["S1-hidden"]] == ["right", "right"]


MINIMAL = {
    "id": "x",
    "title": "x",
    "devices": [{"name": "CPU", "type": "cpu"}],
    "graphs": [{"name": "g", "tensors": [{"name": "a", "flags": ["input"]}]}],
    "steps": [{"do": "allocate", "graph": "g"}],
    "expect": {"static": "none", "faithful": "right", "strict": "right", "safe": "right"},
}


def of_tensors(*tensors: dict[str, object], **more: object) -> dict[str, object]:
    """A graph of an input `a` and these."""
    return {"graphs": [{"name": "g", "tensors": [{"name": "a", "flags": ["input"]}, *tensors], **more}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"steps": [{"do": "fly"}]}, "unknown act 'fly'"),
        ({"steps": [{"do": "set", "tensor": 3}]}, "tensor is 3, expected str"),
        ({"steps": [{"do": "allocate", "graph": "h"}]}, "unknown graph 'h'"),
        ({"steps": [{"do": "compute", "graph": "g"}]}, "has not been allocated"),
        ({"steps": [{"do": "allocate", "graph": "g"}, {"do": "read", "tensor": "g.b"}]}, "no tensor 'b'"),
        ({"expect": {"static": "none"}}, "expect.faithful is None"),
        ({"quirks": ["haste"]}, "unknown quirk 'haste'"),
        ({"devices": []}, ""),
        ({"devices": "CPU"}, "devices is 'CPU', expected list"),
        ({"graphs": [{"name": "g", "tensors": [{"name": "a", "src": ["b"]}]}]}, "unknown tensor 'b'"),
        ({"graphs": [{"name": "g", "tensors": [{"name": "a", "size": 3}]}]}, "unknown key 'size'"),
        ({"graphs": [{"name": "g", "tensors": [{"name": "a", "shared": "h.b"}]}]}, "shared 'h.b'"),
        (of_tensors({"name": "b", "op": "ADD", "src": ["a"]}), "tensor 'b': ADD of 1 sources, expected 2"),
        (of_tensors({"name": "b", "op": "CPY", "src": ["a", "a", "a"]}), "CPY of 3 sources, expected 1 to 2"),
        (of_tensors({"name": "b", "op": "SQR", "src": "a"}), "tensor 'b': src is 'a', expected list"),
        (of_tensors({"name": "b", "op": "SCALE", "src": ["a"], "params": ["x"]}), "params is 'x', expected number"),
        (of_tensors({"name": "b", "value": "1GiB"}), "tensor 'b': value is '1GiB', expected number"),
        (of_tensors({"name": "b", "place": True}), "tensor 'b': place is True, expected int"),
        (of_tensors({"name": "b", "inplace": True}), "tensor 'b': inplace without a source"),
        (of_tensors({"name": "b", "view": "a", "offs": "4"}), "tensor 'b': offs is '4', expected int"),
        (of_tensors(expand=3), "graph g: expand is 3, expected list"),
        (of_tensors(pinned=["a"]), "graph g: pinned is ['a'], expected table"),
    ],
)
def test_bad_scenarios_are_told_in_one_line(change: dict[str, object], says: str) -> None:
    with pytest.raises(CrossdockError) as error:
        play(parse_scenario({**MINIMAL, **change}))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    for text in ("id = ", "id = " + "[" * 9000):
        (tmp_path / "a.toml").write_text(text)
        with pytest.raises(InputError, match=r"a\.toml: not TOML"):
            load_scenario(tmp_path / "a.toml")
    with pytest.raises(InputError, match="No such file"):
        load_scenario(tmp_path / "b.toml")


def test_the_documentation_has_every_row_and_kind() -> None:
    text = (FOLDER.parents[1] / "docs" / "hazards.md").read_text("utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith(("| S", "| H"))}
    assert list(rows) == ROWS
    for row, line in rows.items():
        assert f"`{CORPUS[row].expect['static']}`" in line, row
    assert [kind for kind in Kind if f"`{kind}`" not in text] == []
