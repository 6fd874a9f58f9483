"""Traces: what viewers ask of the format, for anything and for a simulated run."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coordinator.model.presets import open_blueprint
from coordinator.report.simulate_trace import simulated_trace
from coordinator.report.trace import Arrow, Counter, Slice, Trace, Track, trace_document, write_trace
from coordinator.simulate.live import live_bytes
from coordinator.simulate.predict import Prediction, predict
from coordinator.simulate.series import Load, Options, make_series
from protocol.errors import InputError
from tests.report.trace_format import faults

sys.path.insert(0, str(Path(__file__).parents[1] / "simulate"))

from machines import gpu, machine

A, B = Track("real", "worker a"), Track("real", "link")


def test_document() -> None:
    trace = Trace(
        (Slice(A, "split 1", 1.0, 0.5, {"bytes": 7}), Slice(B, "x", 1.5, 0.25)),
        (Arrow("x", ((A, 1.4), (B, 1.6), (A, 1.9))),),
        (Counter(Track("real", "bytes"), 1.0, 42),),
    )
    events = trace_document(trace + Trace((Slice(Track("simulated", "worker a"), "split 1", 0, 1),)))["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert [(e["ts"], e["dur"]) for e in slices] == [(0, 1e6), (1e6, 5e5), (1.5e6, 2.5e5)]
    assert slices[1]["args"] == {"bytes": 7}
    assert len({(e["pid"], e["tid"]) for e in slices}) == 3
    assert slices[1]["pid"] == slices[2]["pid"] != slices[0]["pid"]
    assert [(e["ph"], e["id"]) for e in events if e["ph"] in "stf"] == [("s", 0), ("t", 0), ("f", 0)]
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]}
    assert {"real", "simulated", "worker a", "link"} <= names
    assert [e["args"] for e in events if e["ph"] == "C"] == [{"value": 42}]


def test_slices_are_whole_nanoseconds_that_do_not_overlap() -> None:
    """What ends and begins at one moment does so in the file, whatever rounding makes of both; three slices of a third
    of a ns take one each, the next makes room, and arrows stay with their slices."""
    third = 1e-9 / 3
    ends = [0.0, 1.4e-9, 2.6e-9, 2.6e-9 + third, 2.6e-9 + 2 * third, 2.6e-9 + 3 * third, 9e-9]
    slices = [Slice(A, str(k), a, b - a) for k, (a, b) in enumerate(pairwise(ends))]
    arrow = Arrow("x", ((A, ends[2]), (A, ends[3] + third / 2), (A, ends[5])))
    document = trace_document(Trace(tuple(slices), (arrow,)))
    assert not list(faults(document))
    events = [e for e in document["traceEvents"] if e["ph"] == "X"]
    spans = [(round(e["ts"] * 1e3), round((e["ts"] + e["dur"]) * 1e3)) for e in events]
    assert spans == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6), (6, 9)]
    assert [round(e["ts"] * 1e3) for e in document["traceEvents"] if e["ph"] in "stf"] == [3, 4, 6]


def test_file(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.json", Trace((Slice(A, "x", 0, 1),)))
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    with pytest.raises(InputError, match=r"--trace .*: No such file"):
        write_trace(tmp_path / "none" / "t.json", Trace())


@pytest.fixture(scope="module")
def found() -> Prediction:
    series = make_series(
        open_blueprint("smollm2-135m"), machine(gpu("gpu0"), gpu("gpu1")), Options(),
        Load(n_prompt=64, n_predict=3, n_images=0),
    )  # fmt: skip
    return predict(series)


def test_simulated_run(found: Prediction) -> None:
    """A track per request, worker and link; slices of a track follow one another; arrows begin and end in slices."""
    events: list[dict[str, Any]] = trace_document(simulated_trace(found))["traceEvents"]
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    slices: dict[str, list[tuple[float, float]]] = {}
    for e in (e for e in events if e["ph"] == "X"):
        slices.setdefault(named[e["pid"], e["tid"]], []).append((e["ts"], e["ts"] + e["dur"]))
    assert {"request 0", "gpu0", "gpu1", "cpu", "gpu0 -> gpu1"} <= set(slices)
    for pieces in slices.values():
        pieces.sort()
        assert all(a[1] <= b[0] + 0.01 for a, b in pairwise(pieces))
    for e in (e for e in events if e["ph"] in "stf"):
        pieces = slices[named[e["pid"], e["tid"]]]
        assert any(start - 0.01 <= e["ts"] <= end + 0.01 for start, end in pieces), e
    runs = [e for e in events if e["ph"] == "X" and e.get("cat") == "run"]
    assert all("cause" in e["args"] for e in runs if e["name"].startswith("split"))
    copies = [e for e in events if e.get("cat") == "copy" and e["ph"] == "X"]
    assert sum(e["args"]["bytes"] for e in copies) == sum(found.timeline.route_nbytes)
    counters = {(e["name"], *e["args"]) for e in events if e["ph"] == "C"}
    assert {("gpu0 queue", "depth"), ("gpu1 arena", "bytes")} <= counters


def test_live_bytes_fit_the_buffers(found: Prediction) -> None:
    for lowered in found.series.lowered:
        plan = lowered.plan
        for split, nbytes in zip(plan.splits, live_bytes(plan), strict=True):
            buft = plan.devices[split.backend].buft
            assert 0 < nbytes <= sum(plan.buffer_sizes[buft])
