"""Trace files keep the rules of their format; a simulated run and a real one name their tracks alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.parser import parse
from coordinator.report.trace import Arrow, Counter, Slice, Trace, Track, trace_document
from tests.report.trace_format import faults

EXAMPLES = Path(__file__).parents[2] / "examples"
A, B = Track("devices", "a"), Track("links", "a -> b")
GOOD = trace_document(
    Trace(
        (Slice(A, "late", 2.0, 1.0), Slice(A, "early", 0.5, 1.0), Slice(B, "x", 1.0, 1.5)),
        (Arrow("x", ((A, 0.75), (B, 1.5), (A, 2.5))),),
        (Counter(A, 0.5, 7), Counter(A, 1.5, 0)),
    )
)


def simulated(folder: Path, model: str, system: str, *more: str) -> dict[str, Any]:
    """What `crossdock simulate --trace` writes."""
    path = folder / "trace.json"
    arguments = ["simulate", model, "--system", str(EXAMPLES / "systems" / system), "--trace", str(path), "-q", *more]
    assert parse(arguments)() == 0
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.parametrize("more", [(), ("--requests", "2"), ("--parallel", "-ub", "16"), ("-ngl", "9")])
def test_simulated_runs_keep_the_rules(tmp_path: Path, more: tuple[str, ...]) -> None:
    document = simulated(tmp_path, "smollm2-135m", "two-rtx4090.toml", "--prompt", "48", "-n", "2", *more)
    assert not list(faults(document))
    events = document["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "s", "f", "C"} | {e["ph"] for e in events if e["ph"] == "t"}
    links = {e["args"]["name"] for e in events if e["name"] == "thread_name" and "->" in e["args"]["name"]}
    assert links <= {f"{a} -> {b}" for a in ("gpu0", "gpu1", "cpu") for b in ("gpu0", "gpu1", "cpu")}
    assert links


def _spoil(document: dict[str, Any], phase: str, **changes: object) -> None:
    next(event for event in document["traceEvents"] if event["ph"] == phase).update(changes)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda d: _spoil(d, "X", ph="Z"), "unknown phase 'Z'"),
        (lambda d: _spoil(d, "X", ts=-1.0), "ts is -1.0"),
        (lambda d: _spoil(d, "X", ts=1.9e6), "begins before"),
        (lambda d: _spoil(d, "X", tid=99), "has no name"),
        (lambda d: _spoil(d, "C", pid=99), "process 99 has no name"),
        (lambda d: _spoil(d, "C", ts=1.6e6), "time runs backwards"),
        (lambda d: _spoil(d, "C", args={"value": "7"}), "a value that is no number"),
        (lambda d: _spoil(d, "f", id=1), "phases"),
        (lambda d: _spoil(d, "s", name="y"), "several names"),
        (lambda d: _spoil(d, "t", ts=2.9e6), "lies in no slice"),
        (lambda d: _spoil(d, "f", ts=1.2e6), "lies in a slice that began before"),
        (lambda d: _spoil(d, "X", dur=0.0), "takes no time"),
        (lambda d: _spoil(d, "M", args={}), "without its argument"),
        (lambda d: d["traceEvents"].append(d["traceEvents"][0]), "named twice"),
        (lambda d: d["traceEvents"].append({"ph": "X"}), "no ['args', 'cat', 'dur'"),
    ],
)
def test_every_rule_is_looked_at(spoil: Callable[[dict[str, Any]], None], told: str) -> None:
    assert not list(faults(GOOD))
    document = deepcopy(GOOD)
    spoil(document)
    found = list(faults(document))
    assert any(told in text for text in found), found
