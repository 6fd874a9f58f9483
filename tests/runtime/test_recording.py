"""Recordings: what is written is read, what is damaged is told in one line, and the first difference is the first."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.graph.node import contiguous_nb
from coordinator.report.diff import comparison_document, print_comparison
from coordinator.report.plan import answer
from coordinator.report.taps import ends, shape, statistics_text
from coordinator.runtime.compare import compare, layer_of
from coordinator.runtime.recording import (
    Header,
    Recorder,
    Recording,
    RecordingFile,
    entry_of,
    header,
    read_recording,
)
from coordinator.runtime.taps import DumpFolder, Tap, compile_patterns, statistics
from protocol.dtypes import DType
from protocol.errors import InputError, UsageError

NAMES = ("inp", "norm-0", "Kcur-0", "Kcur-0", "l_out-0", "norm-1", "l_out-1", "result")
TOKENS = [(5, "The"), (7, " image"), (-1, "")]


def tap_of(values: np.ndarray[Any, Any], *, name: str = "x", node: int = 0, evaluation: int = 1, **more: Any) -> Tap:
    """A contiguous tensor of float32, int32 or float16."""
    dtype = {"float32": DType.F32, "int32": DType.I32, "float16": DType.F16}[values.dtype.name]
    ne = (*values.shape[::-1], *[1] * (4 - values.ndim))
    facts: dict[str, Any] = {
        "graph": "language", "evaluation": evaluation, "step": evaluation, "node": node, "split": 0, "worker": "cpu0",
        "op": "ADD", "name": name, "occurrence": 0, "unread": False, "sources": ("a", "b"), "dtype": dtype, "ne": ne,
        "nb": contiguous_nb(dtype, ne), "data": memoryview(values.tobytes()),
    }  # fmt: skip
    return Tap(**(facts | more))


def taps(n_evaluations: int, change: Callable[[int, int, np.ndarray[Any, Any]], None] | None = None) -> list[Tap]:
    """Evaluations of a small graph; `change` may alter the values of node `k` of evaluation `e`."""
    found = []
    for e in range(1, n_evaluations + 1):
        for k, name in enumerate(NAMES):
            values = np.random.default_rng([e, k]).standard_normal((3, 4)).astype(np.float32)
            if change is not None:
                change(e, k, values)
            found.append(tap_of(values, name=name, node=k - 1, evaluation=e, occurrence=NAMES[:k].count(name)))
    return found


def head(**options: object) -> Header:
    return header("f00d", "model.gguf", ("cpu0",), options)


def recorded(found: list[Tap], label: str = "a", tokens: list[tuple[int, str]] = TOKENS) -> Recording:
    recorder = Recorder()
    for tap in found:
        recorder.add(tap)
    return recorder.finish(label, head(), tokens)


def written(path: Path, found: list[Tap], stopped: str = "") -> Path:
    with RecordingFile(path) as file:
        file.begin(head(n_gpu_layers=3, unset=None))
        for tap in found:
            file.add(entry_of(tap, statistics(tap.values()), tap.sha256()))
        file.finish(TOKENS, stopped)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    strange = tap_of(np.array([np.nan, np.inf, 1, 3], np.float32), name="\ud800 [bold]", node=9)
    empty = tap_of(np.array([np.nan, -np.inf], np.float32), name="none", node=10)
    found = [*taps(2), strange, empty]
    got = read_recording(written(tmp_path / "a.jsonl", found, "stale read"))
    assert got.entries == recorded(found).entries
    assert got.header == head(n_gpu_layers=3)
    assert (got.end.tokens, got.end.texts, got.end.stopped) == ((5, 7), ("The", " image"), "stale read")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert got.entries[-1].statistics.min is None


def test_an_unfinished_recording_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("before")

    def fail() -> None:
        with RecordingFile(path) as file:
            file.begin(head())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, target, link = tmp_path / "pipe", tmp_path / "target.jsonl", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(target)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    written(pipe, taps(1))
    got = os.read(reader, 1 << 16)
    os.close(reader)
    assert pipe.is_fifo()
    assert written(link, taps(1)).is_symlink()
    assert read_recording(target).entries == recorded(taps(1)).entries
    assert got == target.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target.jsonl"]


@pytest.mark.parametrize("name", ["/", ""])
def test_a_folder_is_told(name: str) -> None:
    with pytest.raises(InputError, match="cannot be written: it is a folder"):
        RecordingFile(Path(name))


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
@pytest.mark.parametrize("n_evaluations", [1, 40])
def test_a_full_device_is_told_and_stays(tmp_path: Path, n_evaluations: int) -> None:
    link = tmp_path / "full"  # not the device itself: whatever goes wrong here must not replace it
    link.symlink_to("/dev/full")
    with pytest.raises(InputError, match=f"--record {link}: cannot be written: No space left"):
        written(link, taps(n_evaluations))
    assert link.is_symlink()
    assert Path("/dev/full").is_char_device()


def edited(line: int, **changes: Any) -> Callable[[list[str]], list[str]]:
    def edit(lines: list[str]) -> list[str]:
        return [*lines[:line], json.dumps(json.loads(lines[line]) | changes), *lines[line + 1 :]]

    return edit


DAMAGES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "empty": (lambda lines: [], "an empty file is no recording"),
    "cut short": (lambda lines: lines[:-1], "ends after 8 tensors without its last line"),
    "cut in a line": (lambda lines: [*lines[:3], lines[3][:40]], "line 4: not JSON"),
    "a tensor lost": (lambda lines: lines[:2] + lines[3:], "expected 8 tensors, found 7"),
    "a tensor twice": (lambda lines: [*lines[:2], *lines[1:]], "line 3: 'inp' of language 1 was there before"),
    "something behind": (lambda lines: [*lines, lines[1]], "line 11: expected nothing behind"),
    "no map": (lambda lines: ["[]", *lines], "line 1: expected a map, got list"),
    "another file": (lambda lines: ['{"a": 1}'], "line 1: no recording"),
    "another version": (edited(0, version=2), "a recording of version 2: expected 1"),
    "a number for a name": (edited(3, name=7), "line 4.name: expected str, got int"),
    "too few extents": (edited(3, ne=[1, 2]), "line 4.ne: expected 4 items, got 2"),
    "an unknown field": (edited(3, colour="red"), "line 4: unknown field 'colour'"),
    "no number": (lambda lines: [line.replace('"n_nan": 0', '"n_nan": NaN') for line in lines], "not JSON: NaN"),
    "too large a number": (edited(3, statistics={"min": 10**400, "max": 1, "mean": 1, "std": 1, "n_nan": 0,
                                                 "n_inf": 0}), "line 4: int too large"),
    "not the texts of the tokens": (edited(9, texts=[]), "2 tokens and 0 texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_are_told(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "a.jsonl", taps(1))
    damage, words = DAMAGES[name]
    path.write_text("".join(f"{line}\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(InputError) as told:
        read_recording(path)
    assert words in str(told.value)
    assert "a.jsonl" in str(told.value)
    assert "\n" not in str(told.value)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_recording(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_recording(tmp_path / "none")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.sets(st.tuples(st.integers(1, 3), st.integers(0, len(NAMES) - 1)), max_size=6))
def test_the_first_difference_is_the_first(n_evaluations: int, changed: set[tuple[int, int]]) -> None:
    """Whatever differs: the first in order, and the count of the others."""

    def change(e: int, k: int, values: np.ndarray[Any, Any]) -> None:
        if (e, k) in changed:
            values[1, 2] += 0.5

    mine = sorted((e, k) for e, k in changed if e <= n_evaluations)
    found = compare(recorded(taps(n_evaluations)), recorded(taps(n_evaluations, change)))
    assert found.differs == bool(mine)
    assert (found.first is not None) == bool(mine)
    if found.first is None:
        assert found.n_common == n_evaluations * len(NAMES)
        return
    e, k = mine[0]
    assert found.first.a.key == ("language", e, NAMES[k], NAMES[:k].count(NAMES[k]))
    assert found.first.n_equal == (e - 1) * len(NAMES) + k
    assert found.n_later_differ == len(mine) - 1
    assert found.n_later == (n_evaluations - e + 1) * len(NAMES) - k - 1
    assert sum(part.n_differ for part in found.evaluations) == len(mine)
    assert sum(part.n_differ for part in found.layers) == sum(1 <= key[1] <= 6 for key in mine)
    change_found = found.first.change
    assert change_found is not None
    assert (change_found.n_differ, change_found.at) == (1, (0, 0, 1, 2))
    assert change_found.distance == pytest.approx(0.5)


def test_debug_inputs_and_other_nodes_do_not_count() -> None:
    """What only one run has is counted apart; a debug input is no tensor of the run at all."""
    mine = taps(1)
    debug = tap_of(np.ones(3, np.float32), name="inp_copy", node=-1, unread=True)
    found = compare(recorded([debug, *mine]), recorded(mine[:-1]))
    assert not found.differs
    assert (found.n_common, found.only_a, found.only_b) == (len(mine) - 1, 1, 0)


def test_other_shapes_types_and_answers() -> None:
    values = np.arange(6, dtype=np.float32)
    a = recorded([tap_of(values.reshape(2, 3))])
    found = compare(a, recorded([tap_of(values.reshape(3, 2))]))
    assert found.first is not None
    assert found.first.change is None  # no value has a partner
    assert compare(a, recorded([tap_of(values.view(np.int32).reshape(2, 3))])).first is not None
    longer = compare(a, recorded([tap_of(values.reshape(2, 3))], tokens=[*TOKENS[:2], (9, " shows")]))
    assert longer.first is None
    assert longer.differs
    assert longer.token is not None
    assert (longer.token.number, longer.token.a, longer.token.b) == (3, None, (9, " shows"))
    with pytest.raises(InputError, match="no tensor in common"):
        compare(a, recorded([tap_of(values, name="y")]))


@pytest.mark.parametrize(
    ("a", "b", "n_differ", "distance"),
    [
        ([0.0, 1.0], [-0.0, 1.0], 0, 0.0),
        ([1.0, 2.0], [math.nan, 2.5], 2, None),
        ([math.inf, 1.0], [math.inf, 3.0], 1, 2.0),
    ],
)
def test_strange_numbers(a: list[float], b: list[float], n_differ: int, distance: float | None) -> None:
    runs = [recorded([tap_of(np.array(values, np.float32))]) for values in (a, b)]
    found = compare(*runs)
    assert found.first is not None
    assert found.first.change is not None
    assert (found.first.change.n_differ, found.first.change.distance) == (n_differ, distance)
    json.dumps(comparison_document(found), allow_nan=False)


def test_only_the_first_values_are_kept() -> None:
    recorder = Recorder(keep_nbytes=100)
    for tap in taps(1):
        recorder.add(tap)
    assert len(recorder.entries) == len(NAMES)
    assert len(recorder.values) == 2  # 48 bytes each


def test_the_report_names_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    def change(e: int, k: int, values: np.ndarray[Any, Any]) -> None:
        if (e, k) >= (2, 3):
            values[0, 0] = math.nan

    a, b = recorded(taps(3)), recorded(taps(3, change), "-ngl 3 [red]", [(5, "The"), (8, " cat")])
    b = replace(b, header=replace(b.header, model="beef", options={"n_gpu_layers": "3"}))
    with answer() as console:
        print_comparison(console, compare(a, b))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "B         -ngl 3 [red]"
    text = "\n".join(lines)
    for words in (
        "n_gpu_layers not set (A), 3 (B)",
        "are not the same model",
        "language graph, evaluation 2: Kcur-0 (2)   ADD f32 [4, 3], behind 11 equal tensors",
        "1 of 12 values, at [0, 0, 0, 0]:",
        "12 of 12 later tensors differ",
        "language 2 (5 of 5), language 3 (8 of 8)",
        "language 0 (6 of 6), language 1 (4 of 4)",
        "differs from output token 2 on: A ' image' (7), B ' cat' (8)",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("Kcross-1", "language 1"),
        ("Qcur-12 (view) (permuted)", "language 12"),
        ("cache_k_l3 (view)", "language 3"),
        ("v.blk.2.attn_q (reshaped)", "language 2"),
        ("v.global.blk.0.out", "language global 0"),
        ("node_21", ""),
        ("result_output", ""),
    ],
)
def test_layers(name: str, layer: str) -> None:
    assert layer_of(("language", 1, name, 0)) == layer


# Taps


def test_quantised_and_narrow_values() -> None:
    """Q8_0: half a scale and 32 bytes; BF16: the upper half of float32."""
    block = np.float16(0.5).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()
    tap = tap_of(np.zeros(1, np.float32), dtype=DType.Q8_0, ne=(32, 2, 1, 1), nb=(34, 40, 80, 80))
    tap = replace(tap, data=memoryview(block + b"??????" + block))
    np.testing.assert_array_equal(tap.values()[0, 0], np.tile(np.arange(-8, 8, 0.5, np.float32), (2, 1)))
    assert tap.sha256() == replace(tap, nb=(34, 34, 68, 68), data=memoryview(block * 2)).sha256()
    halves = (np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    brain = tap_of(np.zeros(1, np.float32), dtype=DType.BF16, ne=(2, 1, 1, 1), nb=(2, 4, 4, 4))
    np.testing.assert_array_equal(replace(brain, data=memoryview(halves.tobytes())).values().reshape(-1), [1.5, -2.0])


def test_statistics() -> None:
    stats = statistics(np.array([1, 2, np.nan, np.inf, -np.inf, 6], np.float16))
    assert (stats.min, stats.max, stats.mean, stats.n_nan, stats.n_inf) == (1, 6, 3, 1, 2)
    assert stats.std == pytest.approx(np.std([1, 2, 6]))
    assert statistics_text(stats).endswith("1 NaN 2 inf")
    assert statistics(np.array([1.7e308, -1.7e308, 1.7e308])).std is None
    assert ends(np.arange(7)) == "0 1 2 ... 4 5 6"
    assert (shape((4, 1, 2, 1)), shape((1, 1, 1, 1))) == ("[4, 1, 2]", "[1]")


def test_patterns() -> None:
    for text in ("(", "a{99999999999}", "[z-a]"):
        with pytest.raises(UsageError, match="no regular expression"):
            compile_patterns([text])


def test_names_stay_in_their_folder(tmp_path: Path) -> None:
    folder = DumpFolder(tmp_path / "dump")
    for name in ("../../escape", "/etc/passwd", "", "a" * 500, "..", "x\0y"):
        path = folder.write(tap_of(np.ones(3, np.float32), name=name))
        assert path.parent == tmp_path / "dump"
        assert path.resolve().parent == folder.folder.resolve()
        np.testing.assert_array_equal(np.load(path).reshape(-1), np.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["dump"]
