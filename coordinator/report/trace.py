"""Traces of runs, real or simulated, in the JSON that chrome://tracing and ui.perfetto.dev open."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from protocol.errors import InputError

Args = Mapping[str, str | int | float]

NS_PER_US: Final = 1e3
ROOM_NS: Final = 100
"""So much later may a slice be drawn for those before it: several in a row can take less than a ns each."""


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
    """What `track.name` comes to from `time_s` on, for its group; viewers show `gpu0 arena` and `bytes` together."""

    track: Track
    time_s: float
    value: float
    unit: str = "value"


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
    rows: dict[Track, _Row] = {}
    for piece in trace.slices:
        rows.setdefault(piece.track, _Row(*numbers.of(piece.track)))
    events = [rows[piece.track].add(piece) for piece in sorted(trace.slices, key=_by_time)]
    for number, arrow in enumerate(trace.arrows):
        last = len(arrow.points) - 1
        for k, (track, time_s) in enumerate(arrow.points):
            pid, tid = numbers.of(track)
            phase = "s" if k == 0 else "f" if k == last else "t"
            time = rows[track].within(time_s) if track in rows else _ns(time_s)
            event = {"ph": phase, "pid": pid, "tid": tid, "id": number, "name": arrow.name, "cat": "copy",
                     "ts": time / NS_PER_US}  # fmt: skip
            events.append(event | ({"bp": "e"} if phase == "f" else {}))
    for counter in trace.counters:
        events.append(
            {"ph": "C", "pid": numbers.group(counter.track.group), "name": counter.track.name,
             "ts": _ns(counter.time_s) / NS_PER_US, "args": {counter.unit: counter.value}}
        )  # fmt: skip
    events.sort(key=_order)
    return {"traceEvents": numbers.names() + events, "displayTimeUnit": "ms"}


class _Row:
    """The slices of a track in whole ns, which is how Perfetto thinks.

    It drops a slice that crosses the end of another (`slice_drop_overlapping_complete_event`), draws one without
    duration as part of the next, and ties an arrow to the slice that has begun and not ended. So both ends are rounded,
    what is shorter than a ns takes one, and what follows makes room.
    """

    def __init__(self, pid: int, tid: int) -> None:
        self.pid, self.tid = pid, tid
        self.starts_s: list[float] = []
        self.spans: list[tuple[int, int]] = []

    def add(self, piece: Slice) -> dict[str, Any]:
        """The complete event of a slice, which come in the order of time."""
        start, before = _ns(piece.start_s), self.spans[-1][1] if self.spans else 0
        start = before if start < before <= start + ROOM_NS else start
        end = max(start + 1, _ns(piece.start_s + piece.seconds))
        self.starts_s.append(piece.start_s)
        self.spans.append((start, end))
        return {"ph": "X", "pid": self.pid, "tid": self.tid, "name": piece.name, "cat": piece.category,
                "ts": start / NS_PER_US, "dur": (end - start) / NS_PER_US, "args": dict(piece.args)}  # fmt: skip

    def within(self, time_s: float) -> int:
        """ns of a time within a slice, the later one where two meet."""
        time, number = _ns(time_s), bisect_right(self.starts_s, time_s) - 1
        start, end = self.spans[number] if number >= 0 else (time, time)
        return min(max(time, start), end - 1) if start - ROOM_NS <= time <= end else time


def _by_time(piece: Slice) -> tuple[float, float]:
    return piece.start_s, piece.seconds


def _order(event: Mapping[str, Any]) -> tuple[float, bool]:
    """In time; at the same one slices come first, so that arrows find them."""
    return event["ts"], event["ph"] != "X"


def write_trace(path: Path, trace: Trace) -> None:
    """Write it as JSON. Raises InputError when the file cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump(trace_document(trace), file, ensure_ascii=False, separators=(",", ":"))
    except OSError as error:
        raise InputError(f"--trace {path}: {error.strerror}") from None


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


class _Numbers:
    """Processes and threads of the tracks, numbered as they are met; counters have no thread of their own."""

    def __init__(self) -> None:
        self.groups: dict[str, int] = {}
        self.tracks: dict[Track, int] = {}

    def of(self, track: Track) -> tuple[int, int]:
        """(pid, tid) of a track."""
        return self.group(track.group), self.tracks.setdefault(track, len(self.tracks) + 1)

    def group(self, name: str) -> int:
        """pid of a group."""
        return self.groups.setdefault(name, len(self.groups) + 1)

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
