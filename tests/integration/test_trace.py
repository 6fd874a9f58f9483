"""Traces of real runs: what workers did and when, beside the same run by its virtual clock."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from coordinator.cli.parser import parse
from coordinator.model.sampling import Sampler
from coordinator.report.run_trace import run_trace
from coordinator.report.trace import Slice, Trace, Track, trace_document
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.generate import Timings, encode_images, generate
from coordinator.runtime.session import Session, SessionOptions
from coordinator.runtime.stopwatch import Stopwatch
from coordinator.schedule.links import sent_bytes
from coordinator.schedule.placement import PlacementOptions
from coordinator.simulate.hardware import DeviceModel, LinkModel
from coordinator.simulate.machine import make_machine
from protocol.errors import CrossdockError, InputError, UsageError
from tests.integration.describing import Loaded, chat_prompt, load
from tests.report.trace_format import faults

EXAMPLES = Path(__file__).parents[2] / "examples"
SLACK_S = 2e-9

GPU = DeviceModel("gpu", "nvidia", 0, 900e9, {"f16": 8e13}, launch_s=3e-6, async_copies=True)
HOST = DeviceModel("host", "cpu", 0, 60e9, {"f32": 4e11}, launch_s=2e-6)
MACHINE = make_machine((GPU, HOST), lambda source, target: LinkModel("card", 4e-6, 24e9))


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(EXAMPLES / "crossdock-demo.gguf")


def taken(fleet: Fleet, loaded: Loaded, stopwatch: Stopwatch, **options: object) -> list[int]:
    prompt = chat_prompt(loaded, "Describe this image.", [EXAMPLES / "images" / "tower.png"])
    chosen = SessionOptions(PlacementOptions(3), **options)  # type: ignore[arg-type]
    session = Session(loaded.model, loaded.params, fleet.topology, chosen, n_images=1)
    session.stopwatch = stopwatch
    session.open(fleet)
    encode_images(session, prompt, Timings())
    tokens = [token for token, _ in generate(session, loaded.tokenizer, prompt, Sampler(), 3, Timings())]
    session.close()
    return tokens


@pytest.fixture(scope="module")
def both(fleet: Fleet, loaded: Loaded) -> tuple[Stopwatch, Trace]:
    """A run by both clocks, and its trace."""
    stopwatch = Stopwatch(MACHINE, keep=True)
    taken(fleet, loaded, stopwatch)
    return stopwatch, run_trace(fleet.topology.names, stopwatch.taken)


def by_track(trace: Trace) -> dict[Track, list[Slice]]:
    found: dict[Track, list[Slice]] = defaultdict(list)
    for piece in sorted(trace.slices, key=lambda piece: piece.start_s):
        found[piece.track].append(piece)
    return found


def test_nobody_does_two_things_at_once(both: tuple[Stopwatch, Trace]) -> None:
    for track, pieces in by_track(both[1]).items():
        for one, two in pairwise(pieces):
            assert one.start_s + one.seconds <= two.start_s + SLACK_S, (track, one, two)


def test_both_clocks_tell_the_same_story(both: tuple[Stopwatch, Trace]) -> None:
    found = by_track(both[1])
    groups = {track.group for track in found}
    assert groups == {f"{prefix}{group}" for prefix in ("", "simulated ") for group in ("requests", "devices", "links")}
    for track, pieces in found.items():
        if not track.group.startswith("simulated"):
            twin = found[Track(f"simulated {track.group}", track.name)]
            real = [(piece.name, piece.args) for piece in pieces if piece.category in ("run", "vision", "language")]
            assert real == [(p.name, p.args) for p in twin if p.category in ("run", "vision", "language")]
    (split, *_) = [p for p in found[Track("devices", "accel0")] if p.name == "split 1"]
    assert split.args["graph"] == "vision"
    assert split.args["nodes"] > 10
    assert "v.blk" in str(split.args["cause"])


def test_links_carry_what_the_programs_send(both: tuple[Stopwatch, Trace]) -> None:
    stopwatch, trace = both
    expected: dict[str, int] = defaultdict(int)
    for evaluation in stopwatch.taken:
        for (source, target), nbytes in sent_bytes(evaluation.lowered).items():
            expected[f"{('accel0', 'cpu0')[source]} -> {('accel0', 'cpu0')[target]}"] += nbytes
    for group in ("links", "simulated links"):
        carried: dict[str, int] = defaultdict(int)
        for piece in trace.slices:
            if piece.track.group == group:
                carried[piece.track.name] += int(piece.args["bytes"])
        assert carried == expected


def test_arrows_lie_on_slices_and_go_forward(both: tuple[Stopwatch, Trace]) -> None:
    found = by_track(both[1])
    assert len(both[1].arrows) > 10
    for arrow in both[1].arrows:
        times = [time for _, time in arrow.points]
        assert times == sorted(times)
        for track, time in arrow.points:
            assert any(piece.start_s <= time <= piece.start_s + piece.seconds for piece in found[track]), arrow


def test_a_trace_of_the_wall_clock_alone_with_taps(fleet: Fleet, loaded: Loaded) -> None:
    stopwatch = Stopwatch(keep=True)
    tokens = taken(fleet, loaded, stopwatch, taps=("l_out-2",), check=True)
    assert tokens == taken(fleet, loaded, Stopwatch(MACHINE), taps=("l_out-2",), check=True)
    trace = run_trace(fleet.topology.names, stopwatch.taken)
    assert not any(piece.track.group.startswith("simulated") for piece in trace.slices)
    assert {piece.name for piece in trace.slices if piece.category == "tap"} == {"look at l_out-2"}
    phases = {event["ph"] for event in trace_document(trace)["traceEvents"]}
    assert phases == {"M", "X", "s", "t", "f", "C"}


def test_the_command_writes_both_into_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, system = tmp_path / "trace.json", EXAMPLES / "systems" / "one-rtx4090.toml"
    command = ["run", "-w", "cpu:1,accel:1", "-n", "2", "--trace", str(path), "--simulate", str(system), "--json"]
    assert parse(command)() == 0
    document = json.loads(capsys.readouterr().out)
    assert document["virtual"]["devices"] == ["gpu0", "cpu"]
    assert 0 < document["virtual"]["encode_ms"] < 1000
    written = json.loads(path.read_text())
    assert not list(faults(written))
    events = written["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names >= {"devices", "simulated devices", "links", "simulated links"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--trace", "/no/such/t.json"], InputError, "--trace /no/such/t.json: expected a file in a directory"),
        (["--pace"], UsageError, "--pace goes with --simulate TOML"),
        (["--network", "10gbe"], UsageError, "--network goes with --simulate TOML"),
        (
            ["--simulate", str(EXAMPLES / "systems" / "m4-max.toml")],
            UsageError,
            "expected one for each of the 3 workers",
        ),
    ],
)
def test_what_cannot_be_meant(arguments: list[str], error: type[CrossdockError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(["run", *arguments])()
