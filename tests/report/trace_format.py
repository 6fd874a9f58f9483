"""Rules of the trace event format (Google's document of that name), and those that Perfetto's importer adds to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

_NEEDED = {
    "M": {"pid", "tid", "name", "args"},
    "X": {"pid", "tid", "name", "cat", "ts", "dur", "args"},
    "C": {"pid", "name", "ts", "args"},
    **{phase: {"pid", "tid", "id", "name", "cat", "ts"} for phase in "stf"},
}
_NAMES = {"process_name": "name", "thread_name": "name", "process_sort_index": "sort_index",
          "thread_sort_index": "sort_index"}  # fmt: skip


def _ns(us: float) -> int:
    """Viewers think in whole nanoseconds: Perfetto drops a slice that crosses the end of another by one."""
    return round(us * 1e3)


def faults(document: dict[str, Any]) -> Iterator[str]:
    """What a viewer would drop or draw wrongly: each fault in words."""
    events = document["traceEvents"]
    broken = [f"event {number}: {text}" for number, event in enumerate(events) for text in _alone(event)]
    yield from broken
    if broken:
        return
    timed = [event for event in events if event["ph"] != "M"]
    yield from _tracks(events)
    yield from _slices([event for event in timed if event["ph"] == "X"])
    yield from _flows(timed)
    counters: dict[tuple[int, str], float] = {}
    for event in (event for event in timed if event["ph"] == "C"):
        key = event["pid"], event["name"]
        if event["ts"] < counters.get(key, 0.0):
            yield f"counter {key}: time runs backwards at {event['ts']}"
        counters[key] = event["ts"]


def _alone(event: dict[str, Any]) -> Iterator[str]:
    """A known phase with all that it needs; times are finite and not negative."""
    needed = _NEEDED.get(event.get("ph", ""))
    if needed is None:
        yield f"unknown phase {event.get('ph')!r}"
        return
    if needed - event.keys():
        yield f"{event['ph']}: no {sorted(needed - event.keys())}"
    for key in ("ts", "dur"):
        if not 0.0 <= event.get(key, 0.0) < 1e15:
            yield f"{key} is {event[key]}"
    if event["ph"] == "M" and _NAMES.get(event["name"], "") not in event["args"]:
        yield f"metadata {event['name']} without its argument"
    if event["ph"] == "C" and not all(isinstance(value, (int, float)) for value in event["args"].values()):
        yield f"counter {event['name']}: a value that is no number"


def _tracks(events: list[dict[str, Any]]) -> Iterator[str]:
    """Every process and thread that is used is named, once."""
    named = [(e["pid"], e["tid"], e["name"]) for e in events if e["ph"] == "M"]
    if len(set(named)) < len(named):
        yield "a process or thread is named twice"
    for pid, tid in {(e["pid"], e["tid"]) for e in events if "tid" in e and e["ph"] != "M"}:
        if (pid, tid, "thread_name") not in named:
            yield f"thread {tid} of process {pid} has no name"
    for pid in {e["pid"] for e in events}:
        if not any(p == pid and name == "process_name" for p, _, name in named):
            yield f"process {pid} has no name"


def _slices(events: list[dict[str, Any]]) -> Iterator[str]:
    """On each track slices come in the order of time, last a nanosecond at least, and do not overlap by one."""
    ends: dict[tuple[int, int], int] = {}
    for event in events:
        key = event["pid"], event["tid"]
        if _ns(event["ts"]) < ends.get(key, 0):
            yield f"track {key}: {event['name']} at {event['ts']} begins before {ends[key]} ns"
        if _ns(event["dur"]) < 1:
            yield f"track {key}: {event['name']} at {event['ts']} takes no time"
        ends[key] = _ns(event["ts"]) + _ns(event["dur"])


def _flows(timed: list[dict[str, Any]]) -> Iterator[str]:
    """A flow starts once, ends once, keeps its name, and goes from slice to slice, each of which begins no earlier than
    the one before: Perfetto turns other steps round."""
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in timed:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((_ns(event["ts"]), _ns(event["ts"]) + _ns(event["dur"])))
        elif event["ph"] in "stf":
            flows[event["id"]].append(event)
    for ident, points in flows.items():
        phases = "".join(point["ph"] for point in points)
        if phases != "s" + "t" * (len(points) - 2) + "f":
            yield f"flow {ident}: phases {phases}"
        if len({(point["name"], point["cat"]) for point in points}) > 1:
            yield f"flow {ident}: several names"
        before = 0
        for point in points:
            spans, time = slices[point["pid"], point["tid"]], _ns(point["ts"])
            begun = next((start for start, end in spans if start <= time < end), None)
            if begun is None:
                yield f"flow {ident}: {point['ph']} at {point['ts']} lies in no slice"
            elif begun < before:
                yield f"flow {ident}: {point['ph']} at {point['ts']} lies in a slice that began before the last"
            before = begun or before
