"""The benchmarks measure what they say: ratios, shares, twins that agree, hops that move bytes."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import hop, measure, ops, process, profile, tables, twins
from coordinator.cli.parser import parse
from coordinator.report import bench as report
from protocol import messages as m
from protocol import sharedmem
from protocol.dtypes import DType
from protocol.errors import UsageError


def clock(*seconds: float) -> Callable[[], float]:
    return itertools.cycle(seconds).__next__


def test_interleaved_rivals_are_compared_sample_by_sample() -> None:
    slowing = {"ours": clock(1.0, 2.0, 4.0), "peer": clock(3.0, 6.0, 12.0), "other": clock(9.0)}
    samples = measure.interleave(slowing, 3)
    row = measure.compare("x", "a row", samples, "t/s", lambda s: 1 / s)
    assert (row.peer_name, row.ratio, row.low, row.high, row.samples) == ("peer", 3.0, 3.0, 3.0, 3)
    assert (row.ours, row.peer, row.others) == (0.5, 1 / 6, {"other": 1 / 9})
    assert measure.compare("x", "a row", samples, "s", lambda s: s, against="other").ratio == 4.5
    assert "ratio 3.00 (3.00-3.00)" in row.line()


def test_a_budget_ends_it_after_three_rounds() -> None:
    assert len(measure.interleave({"a": clock(1.0)}, 50, budget_s=0.0)["a"]) == 3


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("dtype", [DType.Q4_0, DType.Q4_K, DType.Q6_K, DType.Q8_0, DType.F16, DType.BF16])
def test_twins_compute_the_same_product(dtype: DType, columns: int) -> None:
    case = ops.matrix_case(dtype, 512, 64, columns)
    memory = twins.memory_of(case.graph, case.given)
    ours = twins.Ours(case.graph, memory, 1)
    native = twins.Ggml(case.graph, memory, 1)
    repacked = twins.Ggml(case.graph, memory, 1, repack=True)
    assert bool(repacked.buffers) == (dtype in (DType.Q4_0, DType.Q4_K))
    twins.check_close(case.graph, memory, ours, {"native": native, "repacked": repacked}, case.tolerance)
    if repacked.buffers:  # made before the weights change: now it has to be found out
        memory[next(t.id for t in case.graph.tensors if t.name == "w")][:] = 0
        with pytest.raises(AssertionError, match="repacked is"):
            twins.check_close(case.graph, memory, ours, {"repacked": repacked}, case.tolerance)
    for twin in (ours, native, repacked):
        twin.close()


def test_a_profile_covers_every_operation_once() -> None:
    graph, memory = profile.step_graph("demo", 2)
    kinds = profile.kinds(graph)
    counted = sorted(node for nodes in kinds.values() for node in nodes)
    assert counted == sorted(n for n in graph.nodes if not graph.tensors[n].is_view_op)
    some = profile.part(graph, next(nodes for label, nodes in kinds.items() if label.startswith("MUL_MAT q8_0")))
    ours, theirs = twins.Ours(some, memory, 1), twins.Ggml(some, memory, 1)
    twins.check_close(some, memory, ours, {"native": theirs}, ops.LOOSE)
    ours.close()
    theirs.close()


def test_later_files_replace_rows_of_earlier_ones(tmp_path: Path) -> None:
    def written(name: str, *rows: measure.Row) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps([measure.document(rows, {"load": [1.5]}, {})]))
        return path

    pair = measure.Row("hop", "1 KB", 2.0, "ms", 4.0, "TCP", 2.0, 1.5, 2.5)
    alone = measure.Row("start", "first token", 1.0, "s", note="n=3")
    first = written("a.json", pair, alone)
    second = written("b.json", measure.Row("hop", "1 KB", 1.0, "ms", 4.0, "TCP", 4.0, 3.5, 4.5))
    text = tables.markdown(tables.rows_of([first, second]))
    assert "| 1 KB | 1 | ms | 4 (TCP) | 4.00 | 3.50 to 4.50 |" in text
    assert "| first token | 1 | s | n=3 |" in text
    assert "2.00" not in text


def test_hops_move_the_bytes() -> None:
    workers = hop.Workers("shared")
    try:
        nbytes = 1 << 10
        sent = os.urandom(nbytes)
        source, target = workers.arenas[nbytes]
        workers.fleet.request(hop.SENDER, m.Write(source, 0), [sent])
        assert workers.timer(nbytes)() > 0
        got = workers.fleet.request(hop.RECEIVER, m.Read(target, 0, nbytes))
        assert bytes(got.buffers[0]) == sent
    finally:
        workers.close()


def test_memory_beyond_the_model_leaves_arenas_and_the_file_out(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"x" * (32 << 20))
    before = process.beyond(os.getpid(), model)
    mapped = sharedmem.attach(str(model), 32 << 20)
    arena = sharedmem.create(32 << 20, str(tmp_path), "cpu0-1")
    arena.view[:] = 1
    assert mapped.view.sum() > 0
    assert max(process.beyond(os.getpid(), model)) - max(before) < 8 << 20
    plain = np.ones(32 << 20, np.uint8)
    assert min(np.subtract(process.beyond(os.getpid(), model), before)) > 24 << 20
    assert plain[0] == 1


def point(workers: str, threads: int, ubatch: int, *walls: float) -> report.Point:
    repetitions = tuple(report.Repetition(wall, wall / 2, wall / 4) for wall in walls)
    return report.Point(report.Setting(workers, 1, threads, "-", ubatch), (report.Test("pp64", 64, 640, repetitions),))


def test_scaling_is_against_the_same_micro_batch() -> None:
    points = [point("cpu:1", 1, 128, 4.0), point("cpu:1", 1, 512, 2.0), point("cpu:1", 2, 512, 1.0, 1.0, 8.0)]
    assert [report.gain(points, p, p.tests[0]) for p in points] == [(1, 1), (1, 1), (2, 1)]
    header, rows = report.scaling_rows(points)
    assert dict(zip(header, rows[2], strict=True)) == {
        "workers": "cpu:1", "threads": "2", "ngl": "-", "ubatch": "512", "test": "pp64", "per second": "64.0",
        "speed-up": "2.00", "efficiency": "1.00", "outside": "50%", "waiting": "25%", "bytes": "10 B",
    }  # fmt: skip
    header, rows = report.rate_rows(points)
    assert rows[2][5:] == ("64.0", "32.3", "8.00", "64.0")
    assert report.markdown(header, rows).splitlines()[1].startswith("| --- | ---: |")


def bench(*arguments: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert parse(["bench", *arguments])() == 0
    return output.getvalue()


@pytest.mark.slow
def test_the_command_measures_each_combination(tmp_path: Path) -> None:
    picture = tmp_path / "scaling.svg"
    drawn = ("--plot", str(picture))
    arguments = ("-w", "null:2", "-t", "1", "-ngl", "half,all", "-ub", "8,16", "-p", "16", "-n", "2", "-r", "2")
    found = json.loads(bench("scaling", *arguments, *drawn, "--json"))
    assert [(p["n_gpu_layers"], p["ubatch"]) for p in found["points"]] == [
        ("half", 8), ("half", 16), ("all", 8), ("all", 16)
    ]  # fmt: skip
    for each in found["points"]:
        assert [(t["test"], t["n"], len(t["seconds"])) for t in each["tests"]] == [
            ("image", 1, 2), ("pp16", 16, 2), ("tg2", 2, 2)
        ]  # fmt: skip
        for test in each["tests"]:
            assert test["per_second"] == pytest.approx(np.median([test["n"] / s for s in test["seconds"]]))
    assert found["points"][0]["tests"][1]["bytes"] > 0
    assert picture.is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "5000"], "at most 4096"),
        (["-p", "0", "-n", "0", "--no-image"], "nothing to measure"),
        (["-ngl", "3"], "no accelerator"),
        (["-ngl", "half,99", "-w", "null:2"], "expected 0 to 6"),
        (["-p", "x"], "expected numbers"),
        (["-ngl", "some"], "half or all"),
        (["--plot", "x.svg"], "draws scaling"),
        (["scaling", "--plot", "x.gif"], ".svg"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bench(*arguments)


def test_a_plot_without_matplotlib_is_refused_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="plots"):
        bench("scaling", "--plot", "x.svg")
