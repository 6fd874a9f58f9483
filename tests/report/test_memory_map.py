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
from coordinator.report import memory_map_run
from coordinator.runtime.stopwatch import Evaluation
from coordinator.schedule.outline import plan_model
from protocol.dtypes import DType
from protocol.errors import InputError, UsageError
from protocol.ops import Op
from protocol.program import OperandRef, OpRecord
from protocol.timing import Times

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
    with pytest.raises(UsageError, match=r"--memory-map map.svg: matplotlib, .*missing: .* -m pip install matplotlib"):
        run_plan(TINY, "--memory-map", "map.svg")


class Drawn:
    """Stands in for `draw_run_map`: draws, and keeps what was drawn."""

    def __init__(self) -> None:
        self.draw = memory_map_run.draw_run_map
        self.taken: list[Evaluation] = []
        self.found: list[Occupancy] = []

    def __call__(self, path: Path, taken: list[Evaluation], *, apart: bool, kept: bool) -> Occupancy:
        self.taken = list(taken)
        self.found.append(self.draw(path, taken, apart=apart, kept=kept))
        return self.found[-1]


def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Tensors lie where they were planned, and each from and to a time of its own evaluation."""
    drawn, path = Drawn(), tmp_path / "map.svg"
    monkeypatch.setattr(memory_map_run, "draw_run_map", drawn)
    monkeypatch.setattr(memory_map_run, "_TITLE_WIDTH", 0.0)  # whatever part of the time the tokens took
    workers = ("-w", "cpu:1,accel:1", "-ngl", "3", "-ub", "15", "-c", "256", "-n", "7", "--ownership", "faithful")
    assert parse(["run", *workers, "--memory-map", str(path)])() == 0
    said = capfd.readouterr().err
    assert "of the 20,480 bytes of vision_output are overwritten while they are wanted" in said
    assert "faithful ownership copies nothing" in said
    assert "4 of 6 x token" in path.read_text()
    (found,) = drawn.found
    shown = drawn.taken[:6]  # the image, the prompt, four of six tokens
    planned = occupancy([evaluation.lowered.plan for evaluation in shown], [0] * len(shown))
    assert sorted((s.buffer, s.graph, s.tensor, s.start, s.end) for s in found.spans) == sorted(
        (s.buffer, s.graph, s.tensor, s.start, s.end) for s in planned.spans
    )
    lengths = [evaluation.end_ns - evaluation.start_ns for evaluation in shown]
    assert found.starts == tuple(sum(lengths[:k]) for k in range(len(shown) + 1))
    assert all(found.starts[s.graph] <= s.birth < s.death <= found.starts[s.graph + 1] for s in found.spans)
    for buffer in found.sizes:  # one worker's: nodes follow each other by the clock as they do in the plan
        names = [[s.tensor for s in occupied.spans if s.buffer == buffer] for occupied in (planned, found)]
        assert names[0] == names[1]
    assert all(found.starts[1] <= loss.at < loss.until <= found.starts[2] for loss in found.overwrites)


def test_a_run_that_cannot_be_drawn_is_not_begun() -> None:
    with pytest.raises(UsageError, match=r"--memory-map map.pdf: expected a file that ends in .svg or .png"):
        parse(["run", "--memory-map", "map.pdf"])()
    with pytest.raises(InputError, match=r"--memory-map /no/such/map.svg: expected a file in a directory that exists"):
        parse(["run", "--memory-map", "/no/such/map.svg"])()


def test_ops_of_a_split_share_its_time() -> None:
    """A worker notes 1,000 ns for two ops, of which one moves nine times as many bytes."""

    def op(node: int, n: int) -> OpRecord:
        operand = OperandRef(1, 0, DType.F32, (n, 1, 1, 1), (4, 4 * n, 4 * n, 4 * n))
        return OpRecord(node, Op.CONT, (), operand, (operand,))

    row = Times(5000, 6000, 0, 0, 0)
    times = [(begin, end) for _, begin, end in memory_map_run.shared([op(0, 100_000), op(1, 900_000)], row)]
    assert times == [(5000, 5100), (5100, 6000)]
