"""Who holds which bytes when, and the picture of it."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import pytest
from plan_command import ROOT, TINY, run_plan

from coordinator.cli.parser import parse
from coordinator.cli.plan import setting_of
from coordinator.model.presets import open_blueprint
from coordinator.ownership.spans import Occupancy, occupancy
from coordinator.schedule.outline import plan_model
from protocol.errors import InputError, UsageError

DEMO = str(ROOT / "examples" / "crossdock-demo.gguf")
DISCUSSION = ("-ngl", "3", "-ub", "15", "--kv", "256")
"""The prompt of discussion 10780 on the bundled model."""


def occupied(model: str, *arguments: str, schedulers: tuple[int, ...] = (0, 0, 0)) -> Occupancy:
    chosen = parse(["plan", model, *arguments]).__closure__[0].cell_contents  # type: ignore[attr-defined]
    outline = plan_model(open_blueprint(model, chosen.weights_type), setting_of(chosen))
    return occupancy([graph.plan for graph in outline.graphs if graph.plan is not None], schedulers)


def test_the_language_graph_takes_over_the_vision_output() -> None:
    found = occupied(DEMO, *DISCUSSION)
    first = found.overwrites[0]
    assert (first.tensor, first.by, first.start, first.end) == ("vision_output", "inp_tokens", 0, 60)
    assert found.starts[1] <= first.at < first.until < found.starts[2]  # while the prompt is evaluated
    (held,) = [span for span in found.spans if span.tensor == "vision_output"]
    assert (held.start, held.end, held.death) == (0, 20480, found.starts[1])
    lost = [(loss.start, loss.end) for loss in found.overwrites]
    assert all(b <= c or d <= a for (a, b), (c, d) in combinations(lost, 2))


def test_an_unused_input_moves_it_out_of_the_way() -> None:
    found = occupied(DEMO, *DISCUSSION, "--debug-tensor", "inp_raw_copy")
    assert not found.overwrites
    (held,) = [span for span in found.spans if span.tensor == "vision_output"]
    assert (held.start, held.end) == (110592, 131072)


def test_schedulers_of_their_own_share_no_bytes() -> None:
    found = occupied(DEMO, *DISCUSSION, "--no-share-scheduler", schedulers=(0, 1, 1))
    assert not found.overwrites
    assert {span.buffer[0] for span in found.spans if span.graph == 0} == {0}


@pytest.mark.parametrize("arguments", [(DEMO, *DISCUSSION), (TINY, "-ngl", "2", "-ub", "40", "-c", "64")])
def test_no_two_tensors_hold_the_same_bytes_at_once(arguments: tuple[str, ...]) -> None:
    """But for results that take over what their own op is the last to read."""
    found = occupied(*arguments)
    for one, two in combinations(found.spans, 2):
        if one.buffer == two.buffer and one.graph == two.graph and one.start < two.end and two.start < one.end:
            earlier, later = sorted((one, two), key=lambda span: (span.death, span.birth))
            assert earlier.death <= later.birth + 1, (earlier, later)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"map.{suffix}"
    status, text = run_plan(DEMO, *DISCUSSION, "-q", "--memory-map", str(path))
    assert status == 0
    assert "20,408 of the 20,480 bytes of vision_output are overwritten" in text
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--memory-map", "map.pdf"), UsageError, r"--memory-map map.pdf: expected a file that ends in .svg or .png"),
        (("--memory-map", "map.svg", "--fit"), UsageError, "--memory-map and --fit are two answers: choose one"),
        (("--memory-map", "/no/such/map.svg"), InputError, r"--memory-map /no/such/map.svg: No such file or directory"),
    ],
)
def test_what_cannot_be_drawn(arguments: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_plan(TINY, *arguments)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"--memory-map map.svg: matplotlib is missing: install crossdock\[plots\]"):
        run_plan(TINY, "--memory-map", "map.svg")
