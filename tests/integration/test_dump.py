"""Looking without touching: every intermediate of both graphs, and what two runs do not have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from coordinator.cli.parser import parse
from coordinator.graph.node import Graph
from coordinator.model.gguf_file import weight_bytes
from coordinator.model.sampling import Sampler
from coordinator.ownership.violation import OwnershipError
from coordinator.runtime import evaluate as runtime
from coordinator.runtime.compare import compare
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.generate import Prompt, Timings, encode_images, generate
from coordinator.runtime.recording import Recorder, Recording, header
from coordinator.runtime.session import Ownership, Session, SessionOptions
from coordinator.runtime.taps import Tap
from coordinator.schedule.placement import PlacementOptions
from protocol import messages as m
from protocol.dtypes import DType
from protocol.errors import CapacityError, Exit, InputError, ProtocolError, UsageError
from protocol.ops import Op
from protocol.program import Instruction, Kind, pack_instructions
from tests.graph import evaluate
from tests.integration.describing import Loaded, fleet_of
from workers.arena import Arenas
from workers.peers import SharedPlane
from workers.run import NullEngine, compile_program

ALL = (".*",)
SAFE, STRICT, FAITHFUL = Ownership.SAFE, Ownership.STRICT, Ownership.FAITHFUL
N_PREDICT = 3


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Three workers of one host: shared memory."""
    with fleet_of("cpu:1,accel:2") as running:
        yield running


def open_session(fleet: Fleet, demo: Loaded, options: SessionOptions) -> Session:
    session = Session(demo.model, demo.params, fleet.topology, options, n_images=1)
    session.open(fleet)
    return session


def say(session: Session, demo: Loaded, prompt: Prompt, n_predict: int = N_PREDICT) -> list[tuple[int, str]]:
    """Tokens of a greedy answer; a run that reads stale bytes may well compute what is no number."""
    encode_images(session, prompt, Timings())
    return list(generate(session, demo.tokenizer, prompt, Sampler(silent=True), n_predict, Timings()))


def laid_out(session: Session) -> dict[Any, Any]:
    """Everything that was decided about each graph: splits, copies, and where every tensor and copy lies."""
    found: dict[Any, Any] = {"memory": [budget.parts for budget in session.budgets]}
    for (key, _), shipped in session.evaluator.programs.items():  # type: ignore[misc]
        plan = shipped.plan
        homes = {ident: (home.worker, home.offset) for ident, home in shipped.lowered.homes.items()}
        assert len(homes) >= len(plan.graph.nodes) // 2
        found[key] = (
            plan.places, plan.backend, plan.cause, plan.splits, plan.copies, plan.sources, plan.buffer_sizes, plan.epoch
        )  # fmt: skip
        found["homes", key] = homes
    return found


def run(fleet: Fleet, demo: Loaded, prompt: Prompt, options: SessionOptions) -> tuple[dict[Any, Any], Any, int]:
    """Where everything lies, the answer or why it was stopped, and the number of tensors that were looked at."""
    session = open_session(fleet, demo, options)
    seen: list[str] = []
    session.on_tensor = lambda tap: seen.append(tap.sha256())
    said = say(session, demo, prompt)
    where = laid_out(session)
    session.close()
    return where, said, len(seen)


LOOKED_AT = {
    "safe": SessionOptions(PlacementOptions(3)),
    "safe, all offloaded, two schedulers": SessionOptions(share_scheduler=False),
    "safe, everything checked": SessionOptions(PlacementOptions(4), check=True, debug=("inp_raw_copy",)),
    "strict, two schedulers": SessionOptions(PlacementOptions(2), ownership=STRICT, share_scheduler=False),
    "faithful": SessionOptions(PlacementOptions(3), ownership=FAITHFUL),
}


def unmoved(plain: dict[Any, Any], looked: dict[Any, Any]) -> None:
    """The plans are equal; looking at views may need homes that computing does not."""
    assert plain.keys() == looked.keys()
    for key, value in plain.items():
        if isinstance(key, tuple) and key[0] == "homes":
            assert value.items() <= looked[key].items(), key
        else:
            assert value == looked[key], key


@pytest.mark.parametrize("name", LOOKED_AT)
def test_looking_at_everything_moves_nothing(fleet: Fleet, demo: Loaded, prompt: Prompt, name: str) -> None:
    options = LOOKED_AT[name]
    plain = run(fleet, demo, prompt, options)
    looked = run(fleet, demo, prompt, replace(options, taps=ALL))
    unmoved(plain[0], looked[0])
    assert plain[1] == looked[1]
    assert plain[2] == 0
    assert looked[2] > 600


@pytest.mark.slow
@pytest.mark.parametrize("ownership", [SAFE, FAITHFUL])
def test_so_over_messages(demo: Loaded, prompt: Prompt, ownership: Ownership) -> None:
    with fleet_of("cpu:1,accel:2", transport="tcp") as fleet:
        assert fleet.plane == "message"
        for layers in (0, 3, 5, None):
            options = SessionOptions(PlacementOptions(layers), ownership=ownership)
            plain, looked = (run(fleet, demo, prompt, replace(options, taps=taps)) for taps in ((), ALL))
            unmoved(plain[0], looked[0])
            assert (plain[1], looked[2] > 600) == (looked[1], True)


@pytest.mark.slow
def test_a_stale_read_is_told_all_the_same(demo: Loaded, prompt: Prompt) -> None:
    stories = []
    for taps in ((), ALL):
        with fleet_of("cpu:1,accel:2") as fleet:
            session = open_session(fleet, demo, SessionOptions(PlacementOptions(3), ownership=STRICT, taps=taps))
            with pytest.raises(OwnershipError) as stopped:
                say(session, demo, prompt)
            stories.append(stopped.value.finding)
    assert stories[0] == stories[1]


# What is seen


def leafs_of(demo: Loaded, graph: Graph, taps: dict[str, Tap]) -> dict[str, Any]:
    """Weights from the file, inputs as they were seen, the image as the vision graph left it, empty caches."""
    leafs: dict[str, Any] = {}
    for ident in graph.leafs:
        leaf = graph.tensors[ident]
        if leaf.name in taps:
            leafs[leaf.name] = taps[leaf.name].values()
        elif leaf.name == "cross_states":
            leafs[leaf.name] = taps["vision_output"].values()
        elif leaf.name in demo.model.weights:
            data = np.frombuffer(weight_bytes(demo.model, leaf.name), np.uint8)
            leafs[leaf.name] = dequantize(data, GGMLQuantizationType(leaf.dtype)).reshape(-1)
        else:
            assert leaf.name.startswith(("cache", "cross")), leaf.name
            leafs[leaf.name] = np.zeros(leaf.nelements, np.float16 if leaf.dtype is DType.F16 else np.float32)
    return leafs


def test_every_tensor_is_what_it_should_be(fleet: Fleet, demo: Loaded, prompt: Prompt) -> None:
    """Against definitions in numpy, each tensor in memory of its own; then the caches, byte by byte."""
    session = open_session(fleet, demo, SessionOptions(PlacementOptions(3), taps=ALL))
    taps: list[Tap] = []
    session.on_tensor = taps.append
    encode_images(session, prompt, Timings())
    vision = next(iter(session.evaluator.programs.values())).plan.graph
    n_vision = len(taps)
    logits, result, shipped = session.evaluate(prompt.tokens)
    assert result.taps == tuple(taps[n_vision:])
    assert {tap.worker for tap in taps} == set(fleet.topology.names)
    inputs = {tap.name: tap for tap in taps if tap.node < 0 or tap.name == "vision_output"}
    for graph, seen in ((vision, taps[:n_vision]), (shipped.plan.graph, taps[n_vision:])):
        nodes = [tap for tap in seen if tap.node >= 0]
        assert [tap.node for tap in nodes] == list(range(len(graph.nodes)))
        leafs = leafs_of(demo, graph, inputs)
        wanted = evaluate.Evaluation(graph, leafs, False)
        for tap in nodes:
            ident = graph.nodes[tap.node]
            if not graph.tensors[ident].is_view_op:
                wanted.compute(ident)
            close(tap, wanted.read(ident))
            wanted.read(ident)[...] = tap.values()  # the next node is judged by what it has read
    assert taps[-1].data.tobytes() == logits.tobytes()
    last = {tap.name: tap for tap in taps if tap.op == "SET_ROWS"}
    assert len(last) == 6
    for name, tap in last.items():
        assert tap.data.tobytes() == session.read(name.removesuffix(" (view)")), name
        assert tap.sha256() == hashlib.sha256(tap.data).hexdigest()
    session.close()


ERRORS = {"MUL_MAT": 2e-2, "FLASH_ATTN_EXT": 1e-5}  # quantised weights meet quantised activations


def close(tap: Tap, want: np.ndarray[Any, Any]) -> None:
    """Within what the order of sums and half precision leave open."""
    got = tap.values()
    assert got.shape == want.shape, tap.name
    assert got.dtype == want.dtype, tap.name
    if got.dtype.kind == "i":
        np.testing.assert_array_equal(got, want, tap.name)
        return
    scale = max(float(np.abs(want).max()), 1e-3)
    error = float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max()) / scale
    assert error < ERRORS.get(tap.op, 5e-7), (tap.graph, tap.node, tap.name, error)


def test_a_view_is_seen_in_its_own_shape(fleet: Fleet, demo: Loaded, prompt: Prompt) -> None:
    """PERMUTE and VIEW nodes are the numbers of what they look at, in another order; their hash is of those."""
    session = open_session(fleet, demo, SessionOptions(PlacementOptions(3), taps=("^Qcur-0", "attn_q")))
    taps: dict[tuple[str, int], Tap] = {}
    session.on_tensor = lambda tap: taps.update({(tap.name, tap.occurrence): tap})
    say(session, demo, prompt, 1)
    session.close()
    flat, permuted = taps["v.blk.0.attn_q", 0], taps["v.blk.0.attn_q (reshaped) (permuted)", 0]
    assert flat.op == Op.MUL_MAT.name
    assert permuted.ne == (32, 64, 4, 1)
    np.testing.assert_array_equal(permuted.values()[0], flat.values().reshape(64, 4, 32).transpose(1, 0, 2))
    assert permuted.sha256() == hashlib.sha256(np.ascontiguousarray(permuted.values()).tobytes()).hexdigest()
    assert permuted.sha256() != flat.sha256()
    assert [taps["Qcur-0", k].op for k in range(3)] == ["MUL_MAT", "RESHAPE", "ROPE"]


def test_two_programs_do_not_share_a_key(fleet: Fleet, demo: Loaded, prompt: Prompt) -> None:
    session = open_session(fleet, demo, SessionOptions(PlacementOptions(3)))
    assert session.encode(0, prompt.images[0])[0].taps == ()
    session.evaluator.taps = runtime.compile_patterns(("^vision_output$",))
    assert [tap.name for tap in session.encode(0, prompt.images[0])[0].taps] == ["vision_output"]
    assert len(session.evaluator.programs) == 2
    session.close()


def test_too_much_for_one_reply(fleet: Fleet, demo: Loaded, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.runtime.taps.MAX_BUFFER_NBYTES", 1 << 20)
    session = open_session(fleet, demo, SessionOptions(PlacementOptions(0), taps=("blk", "ln")))
    with pytest.raises(CapacityError, match=r"--dump-tensor blk --dump-tensor ln: [0-9,]+ bytes of the vision graph"):
        session.encode(0, prompt.images[0])
    session.close()


@pytest.mark.parametrize(
    ("taps", "error", "words"),
    [
        ([(1, 4090, 8)], ProtocolError, r"bytes \[4090, 4098\) of an arena of 4096"),
        ([(1, 8, -8)], ProtocolError, r"bytes \[8, 0\) of an arena"),
        ([(7, 0, 8)], ProtocolError, "unknown arena 7"),
        ([(1, 0, 600), (1, 8, 600)], CapacityError, "1200 bytes of taps, at most 1024"),
    ],
)
def test_workers_refuse_bad_taps(
    taps: list[tuple[int, int, int]], error: type[Exception], words: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("workers.run.MAX_BUFFER_NBYTES", 1024)
    arenas = Arenas(str(tmp_path), "accel0", limit=None, shared=False, virtual=False)
    arenas.allocate(1, 4096, "compute")
    instructions = [Instruction(Kind.TAP, 0, 0, 0, *place) for place in taps]
    tables = [memoryview(b""), memoryview(pack_instructions(instructions).tobytes())]
    message = m.ProgramMessage(0, "test", 0, (), (), (), (), False)
    with pytest.raises(error, match=words):
        compile_program(message, tables, arenas, SharedPlane(None), NullEngine(), 2, frozenset())  # type: ignore[arg-type]


# Where two runs part

Meddle = Callable[[Session, int], None]


def record(
    fleet: Fleet, demo: Loaded, prompt: Prompt, options: SessionOptions, meddle: Meddle = lambda session, past: None
) -> Recording:
    """A run of a few tokens; `meddle` is called before each evaluation of the language graph."""
    session = open_session(fleet, demo, replace(options, taps=ALL))
    recorder = Recorder()
    session.on_tensor = recorder.add
    inner = session.evaluate

    def evaluate_after(tokens: Any) -> Any:
        meddle(session, session.n_past)
        return inner(tokens)

    session.evaluate = evaluate_after  # type: ignore[method-assign]
    said = say(session, demo, prompt)
    session.close()
    return recorder.finish("", header(demo.model.fingerprint, "demo", fleet.topology.names, {}), said)


@pytest.fixture(scope="module")
def right(fleet: Fleet, demo: Loaded, prompt: Prompt) -> Recording:
    return record(fleet, demo, prompt, SessionOptions(PlacementOptions(3)))


def test_placements_do_not_differ(fleet: Fleet, demo: Loaded, prompt: Prompt, right: Recording) -> None:
    """Nor do ownership, schedulers and debug tensors where nothing is overwritten."""
    options = SessionOptions(share_scheduler=False, debug=("inp_raw_copy",), ownership=FAITHFUL)
    other = record(fleet, demo, prompt, options)
    found = compare(right, other)
    assert (found.differs, found.first, found.only_a, found.only_b) == (False, None, 0, 0)
    assert found.n_common == len(right.entries) > 600
    assert {(x.split, x.worker) for x in right.entries} != {(x.split, x.worker) for x in other.entries}


def test_the_overwritten_image_is_found(fleet: Fleet, demo: Loaded, prompt: Prompt, right: Recording) -> None:
    """Cause S1 of discussion 10780: the vision graph is right, the first product with its output is not."""
    wrong = record(fleet, demo, prompt, SessionOptions(PlacementOptions(3), ownership=FAITHFUL))
    found = compare(wrong, right)
    assert found.differs
    assert found.first is not None
    first = found.first
    assert first.a.key == ("language", 1, "Kcross-1", 0)
    assert "cross_states" in first.a.sources
    assert (first.a.worker, first.a.split) == (first.b.worker, first.b.split) == ("cpu0", 0)
    assert first.change is not None
    assert 0 < first.change.n_differ <= first.change.n_values == 64 * 40
    assert not any(part.label.startswith("vision") for part in found.evaluations)
    assert found.token is not None
    assert found.token.number == 1


def flip(tensor: str, at: int, n_past: int) -> Meddle:
    """Changes a bit of byte `at` of a resident tensor when the sequence has `n_past` tokens."""

    def meddle(session: Session, past: int) -> None:
        if past == n_past:
            home = session.memory.resident[tensor, session.placement(tensor).buft]
            byte = session.read(tensor)[at]
            session.fleet.request(home.worker, m.Write(home.arena, home.offset + at), [bytes([byte ^ 0x40])])

    return meddle


@pytest.mark.parametrize(("tensor", "seen"), [("cache_v_l2", "cache_v_l2 (view)"), ("cross_k_l3", "cross_k_l3 (view)")])
def test_one_byte_is_found(
    fleet: Fleet, demo: Loaded, prompt: Prompt, right: Recording, tensor: str, seen: str
) -> None:
    meddle = flip(tensor, 131, len(prompt.tokens))
    found = compare(right, record(fleet, demo, prompt, SessionOptions(PlacementOptions(3)), meddle))
    assert found.first is not None
    assert found.first.a.key == ("language", 2, seen, 0)
    assert found.first.change is not None
    assert found.first.change.n_differ == 1
    assert found.evaluations[0].label == "language 2"
    assert 0 < found.n_later_differ < found.n_later


# The commands


def crossdock(*arguments: object) -> int:
    return parse([str(argument) for argument in arguments])()


def test_run_dumps_saves_and_records(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "made" / "here"
    folder.mkdir(parents=True)
    (folder / "vision-0001-0147-vision_output-0.npy").symlink_to(victim)
    recording = tmp_path / "run.jsonl"
    wanted = ["--dump-tensor", "^vision_output$", "--dump-tensor", "Kcur-2", "--dump-dir", folder]
    common = ["-w", "cpu:1,accel:1", "-n", 2]
    assert crossdock("run", "-q", *common, *wanted, "--record", recording, "--debug-tensor", "inp_raw_copy") == Exit.OK
    out, err = capfd.readouterr()
    assert out.startswith("The")
    lines = err.splitlines()
    assert len(lines) == 9  # one of the image; four of the prompt and of the token: product, two views, rotation
    assert lines[0].startswith("vision 1  step 1  split ")
    assert all("  sha256 " in line and " min " in line for line in lines)
    files = sorted(folder.iterdir())
    assert len(files) == 9
    assert victim.read_text() == "mine"
    assert not any(file.is_symlink() for file in files)
    image = np.load(folder / "vision-0001-0147-vision_output-0.npy")
    assert hashlib.sha256(image.tobytes()).hexdigest()[:12] in lines[0]
    assert crossdock("diff", recording, "", *common, "--json") == Exit.OK
    told = json.loads(capfd.readouterr().out)
    assert (told["differs"], told["common"], told["only"][0]) == (False, 9, 0)
    assert told["only"][1] > 400


def test_diff_runs_two_configurations(capfd: pytest.CaptureFixture[str]) -> None:
    """What strict ownership stops has no tensors of the language graph: the answers differ, nothing else does."""
    assert crossdock("diff", "--ownership strict", "--ownership faithful", "-ngl", 3, "-n", 1, "--json") == Exit.FOUND
    told = json.loads(capfd.readouterr().out)
    assert told["runs"][0]["stopped"].startswith("stale read: Kcross-1 would read vision_output")
    assert (told["runs"][1]["stopped"], told["first"]) == ("", None)
    assert told["token"]["a"] is None
    assert [run["header"]["options"]["n_gpu_layers"] for run in told["runs"]] == ["3", "3"]


@pytest.mark.slow
def test_diff_names_the_first_tensor(capfd: pytest.CaptureFixture[str]) -> None:
    assert crossdock("diff", "-ngl 3 --ownership faithful", "-ngl 3", "-n", 2) == Exit.FOUND
    lines = capfd.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith("first"))
    assert "language graph, evaluation 1: Kcross-1   MUL_MAT f32 [64, 40]" in first
    assert any(line.startswith("answer    differs from output token 1 on") for line in lines)


def test_what_cannot_be_meant(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("{}\n")
    for arguments, error, words in (
        (["run", "--dump-tensor", "("], UsageError, r"--dump-tensor \(: no regular expression"),
        (["run", "-w", "cpu:1", "--dump-tensor", "nothing"], UsageError, "nothing: matches no node or input of vision"),
        (["run", "--dump-dir", tmp_path], UsageError, "expected --dump-tensor REGEX"),
        (["run", "--dump-tensor", "x", "--dump-dir", file / "x"], InputError, "cannot be written to: Not a directory"),
        (["run", "--record", file / "x"], InputError, "cannot be written: Not a directory"),
        (["run", "--record", tmp_path], InputError, "cannot be written: "),
        (["diff", file, ""], InputError, "file, line 1: no recording"),
        (["diff", "", tmp_path / "none"], UsageError, "no such file"),
        (["diff", "-ngl 3 '", ""], UsageError, "No closing quotation"),
        (["diff", "-ngl 3 --unknown", ""], UsageError, "--unknown"),
        (["diff", "", "-ngl 3", "--dump-tensor", "["], UsageError, "no regular expression"),
    ):
        with pytest.raises(error, match=words):
            crossdock(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
