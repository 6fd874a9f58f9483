"""Recordings of runs: one line of JSON for every tensor that was looked at, to compare runs by."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from coordinator.runtime.taps import Statistics, Tap, Values, statistics
from protocol.errors import InputError, ProtocolError
from protocol.schema import from_plain, to_plain

FORMAT = "crossdock recording"
VERSION = 1
KEPT_NBYTES = 256 << 20
"""Bytes of values that a recording in memory keeps: the first ones, since the first difference is looked for."""

T = TypeVar("T")

Key = tuple[str, int, str, int]
"""Graph, its evaluation from 1, name, and its number among the graph's tensors of that name."""


@dataclass(frozen=True, slots=True)
class Header:
    """What was run: the model's content (protocol.content), the workers, and options by their names, as text."""

    format: str
    version: int
    model: str
    model_file: str
    workers: tuple[str, ...]
    options: dict[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of one evaluation; fields as in `Tap`, `type` as ggml names it."""

    graph: str
    evaluation: int
    node: int
    split: int
    worker: str
    op: str
    name: str
    occurrence: int
    sources: tuple[str, ...]
    type: str
    ne: tuple[int, int, int, int]
    sha256: str
    statistics: Statistics

    @property
    def key(self) -> Key:
        """What it is matched by."""
        return self.graph, self.evaluation, self.name, self.occurrence


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended: tokens, the text that each completed, and why it was `stopped` ("": it was not)."""

    n_tensors: int
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    stopped: str


@dataclass(frozen=True, slots=True)
class Recording:
    """A whole run; `values` of the first tensors when it was recorded in memory. `label` is for people."""

    label: str
    header: Header
    entries: tuple[Entry, ...]
    end: End
    values: Mapping[Key, Values] = field(default_factory=dict)


def header(model: str, model_file: str, workers: tuple[str, ...], options: Mapping[str, object]) -> Header:
    """The header of a new recording. Options that are not set are left out."""
    shown = {name: str(value)[:1000] for name, value in options.items() if value not in (None, [], "", False)}
    return Header(FORMAT, VERSION, model, model_file, workers, shown)


def entry_of(tap: Tap, stats: Statistics, sha256: str) -> Entry:
    """What a recording says of a tap."""
    return Entry(
        tap.graph, tap.evaluation, tap.node, tap.split, tap.worker, tap.op, tap.name, tap.occurrence, tap.sources,
        tap.dtype.label, tap.ne, sha256, stats,
    )  # fmt: skip


class Recorder:
    """Records into memory, with the values of the first tensors. Debug tensors do not count: nobody sets them."""

    def __init__(self, keep_nbytes: int = KEPT_NBYTES) -> None:
        self.entries: list[Entry] = []
        self.values: dict[Key, Values] = {}
        self.left_nbytes = keep_nbytes

    def add(self, tap: Tap) -> None:
        """A session's `on_tensor`."""
        if tap.unread:
            return
        values = tap.values()
        entry = entry_of(tap, statistics(values), tap.sha256())
        self.entries.append(entry)
        self.left_nbytes -= values.nbytes
        if self.left_nbytes >= 0:
            self.values[entry.key] = np.array(values)

    def finish(self, label: str, head: Header, tokens: list[tuple[int, str]], stopped: str = "") -> Recording:
        """The recording of what was added. `tokens` as `generate` yields them."""
        end = _end(len(self.entries), tokens, stopped)
        return Recording(label, head, tuple(self.entries), end, self.values)


class RecordingFile:
    """Writes a recording line by line beside `path`, which it takes when it is finished; dropped if it never is.

    A device, a pipe or a link (/dev/null, /dev/stdout) is written to as it is, never replaced. Raises InputError when
    it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.draft: Path | None = None
        self.n_tensors = 0
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            if path.is_symlink() or (path.exists() and not path.is_file()):
                self.file: TextIO = path.open("w", encoding="utf-8")
            else:
                self.draft = path.with_name(f".{path.name}.{os.getpid()}")
                self.file = self.draft.open("x", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--record {path}: cannot be written: {error.strerror}") from None

    def __enter__(self) -> RecordingFile:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what could not be written has been told
            self.file.close()
        if self.draft is not None:
            self.draft.unlink(missing_ok=True)

    def begin(self, head: Header) -> None:
        """The first line."""
        self._line(head)

    def add(self, entry: Entry) -> None:
        """A line per tensor."""
        self._line(entry)
        self.n_tensors += 1

    def finish(self, tokens: list[tuple[int, str]], stopped: str = "") -> None:
        """The last line; the file takes its name."""
        self._line(_end(self.n_tensors, tokens, stopped))
        try:
            self.file.close()
            if self.draft is not None:
                self.draft.replace(self.path)
        except OSError as error:
            raise InputError(f"--record {self.path}: cannot be written: {error.strerror}") from None

    def _line(self, value: Header | Entry | End) -> None:
        try:
            self.file.write(json.dumps(to_plain(value), allow_nan=False) + "\n")
        except OSError as error:
            raise InputError(f"--record {self.path}: cannot be written: {error.strerror}") from None


def _end(n_tensors: int, tokens: list[tuple[int, str]], stopped: str) -> End:
    made = [(token, text) for token, text in tokens if token >= 0]
    return End(n_tensors, tuple(token for token, _ in made), tuple(text for _, text in made), stopped[:4000])


def read_recording(path: Path) -> Recording:
    """The recording in a file.

    Raises InputError that names the line for one that is missing, cut short, damaged or of another version.
    """
    head: Header | None = None
    end: End | None = None
    entries: list[Entry] = []
    keys: set[Key] = set()
    for number, plain in _lines(path):
        where = f"{path.name}, line {number}"
        if end is not None:
            raise InputError(f"{where}: expected nothing behind the last line of a recording")
        if head is None:
            head = _read_header(plain, where)
        elif "n_tensors" in plain:
            end = _read(End, plain, where)
        else:
            entry = _read(Entry, plain, where)
            if entry.key in keys:
                raise InputError(f"{where}: {entry.name!r} of {entry.graph} {entry.evaluation} was there before")
            keys.add(entry.key)
            entries.append(entry)
    if head is None:
        raise InputError(f"{path.name}: an empty file is no recording: expected one of `crossdock run --record`")
    if end is None:
        raise InputError(f"{path.name}: ends after {len(entries)} tensors without its last line: the file is cut short")
    if end.n_tensors != len(entries):
        raise InputError(f"{path.name}: expected {end.n_tensors} tensors, found {len(entries)}")
    if len(end.tokens) != len(end.texts):
        raise InputError(f"{path.name}: {len(end.tokens)} tokens and {len(end.texts)} texts: expected as many")
    return Recording(path.name, head, tuple(entries), end)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    plain = json.loads(line, parse_constant=_refuse)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path.name}, line {number}: not JSON: {error}") from None
                if not isinstance(plain, dict):
                    raise InputError(f"{path.name}, line {number}: expected a map, got {type(plain).__name__}")
                yield number, plain
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8: {error.reason} at byte {error.start}") from None


def _read_header(plain: dict[str, Any], where: str) -> Header:
    if plain.get("format") != FORMAT:
        raise InputError(f"{where}: no recording: expected the format {FORMAT!r}")
    if plain.get("version") != VERSION:
        raise InputError(f"{where}: a recording of version {plain.get('version')!r}: expected {VERSION}")
    return _read(Header, plain, where)


def _read(cls: type[T], plain: dict[str, Any], where: str) -> T:
    try:
        return from_plain(cls, plain, where)
    except (ProtocolError, OverflowError) as error:
        raise InputError(str(error) if isinstance(error, ProtocolError) else f"{where}: {error}") from None


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
