"""Traces of runs, real or simulated, in the JSON that chrome://tracing and ui.perfetto.dev open."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol.errors import InputError

Args = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Track:
    """One row of a trace: `group` is shown as a process, `name` as a thread of it. Tracks appear in the order in which
    they are first named."""

    group: str
    name: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that went on from `start_s` for `seconds`; `args` are shown when it is clicked at."""

    track: Track
    name: str
    start_s: float
    seconds: float
    args: Args = field(default_factory=dict)
    category: str = "run"


@dataclass(frozen=True, slots=True)
class Arrow:
    """Cause and effect: through points (track, time in s) that each lie within a slice of their track."""

    name: str
    points: tuple[tuple[Track, float], ...]


@dataclass(frozen=True, slots=True)
class Counter:
    """The value of `name` from `time_s` on, for a track's group."""

    track: Track
    time_s: float
    value: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Everything that is drawn. Several can be joined: real and simulated, say, with groups of different names."""

    slices: tuple[Slice, ...] = ()
    arrows: tuple[Arrow, ...] = ()
    counters: tuple[Counter, ...] = ()

    def __add__(self, other: Trace) -> Trace:
        return Trace(self.slices + other.slices, self.arrows + other.arrows, self.counters + other.counters)


def trace_document(trace: Trace) -> dict[str, Any]:
    """The trace event format (Google's document of that name): complete, flow, counter and metadata events, in us and
    in the order of time."""
    numbers = _Numbers()
    events: list[dict[str, Any]] = []
    for piece in trace.slices:
        pid, tid = numbers.of(piece.track)
        events.append(
            {"ph": "X", "pid": pid, "tid": tid, "name": piece.name, "cat": piece.category, "ts": _us(piece.start_s),
             "dur": _us(piece.seconds), "args": dict(piece.args)}
        )  # fmt: skip
    for number, arrow in enumerate(trace.arrows):
        last = len(arrow.points) - 1
        for k, (track, time_s) in enumerate(arrow.points):
            pid, tid = numbers.of(track)
            phase = "s" if k == 0 else "f" if k == last else "t"
            event = {"ph": phase, "pid": pid, "tid": tid, "id": number, "name": arrow.name, "cat": "copy",
                     "ts": _us(time_s)}  # fmt: skip
            events.append(event | ({"bp": "e"} if phase == "f" else {}))
    for counter in trace.counters:
        pid, _ = numbers.of(counter.track)
        events.append(
            {"ph": "C", "pid": pid, "name": counter.track.name, "ts": _us(counter.time_s),
             "args": {"value": counter.value}}
        )  # fmt: skip
    events.sort(key=lambda event: (event["ts"], event.get("dur", 0.0)))  # rounded, what is short may have no duration
    return {"traceEvents": numbers.names() + events, "displayTimeUnit": "ms"}


def write_trace(path: Path, trace: Trace) -> None:
    """Write it as JSON. Raises InputError when the file cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump(trace_document(trace), file, ensure_ascii=False, separators=(",", ":"))
    except OSError as error:
        raise InputError(f"--trace {path}: {error.strerror}") from None


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


class _Numbers:
    """Processes and threads of the tracks, numbered as they are met; counters have no thread of their own."""

    def __init__(self) -> None:
        self.groups: dict[str, int] = {}
        self.tracks: dict[Track, int] = {}

    def of(self, track: Track) -> tuple[int, int]:
        """(pid, tid) of a track."""
        pid = self.groups.setdefault(track.group, len(self.groups) + 1)
        return pid, self.tracks.setdefault(track, len(self.tracks) + 1)

    def names(self) -> list[dict[str, Any]]:
        """Metadata that names and orders processes and threads."""
        found: list[dict[str, Any]] = []
        for group, pid in self.groups.items():
            found += _named("process", pid, 0, group, pid)
        for track, tid in self.tracks.items():
            found += _named("thread", self.groups[track.group], tid, track.name, tid)
        return found


def _named(what: str, pid: int, tid: int, name: str, order: int) -> Iterable[dict[str, Any]]:
    head = {"ph": "M", "pid": pid, "tid": tid}
    return (
        {**head, "name": f"{what}_name", "args": {"name": name}},
        {**head, "name": f"{what}_sort_index", "args": {"sort_index": order}},
    )
