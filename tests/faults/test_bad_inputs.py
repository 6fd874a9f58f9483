"""Every bad input is told in one line with a documented exit status, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults import surgery
from tests.faults.harness import COMMAND, Result, run

TEXT = ["-p", "hello", "-n", 1, "-q"]
ONE = ["-w", "cpu:1"]  # workers are started while files are read: no more of them than needed


@dataclass(frozen=True)
class Bench:
    """What a case may use: a sound model and image, and a directory of its own."""

    model: Path
    image: Path
    here: Path

    def changed(self, change: Callable[[object], None]) -> Path:
        path = self.here / "model.gguf"
        change(surgery.copy(self.model, path))
        return path

    def written(self, name: str, content: bytes) -> Path:
        path = self.here / name
        path.write_bytes(content)
        return path


@dataclass(frozen=True)
class Bad:
    """Arguments of `crossdock`, the status and words that must be told."""

    arguments: list[object]
    status: int
    words: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


Case = Callable[[Bench], Bad]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def of_model(path: Path, *words: str) -> Bad:
    return Bad(["run", "-m", path, *ONE, *TEXT], 3, words)


def of_image(bench: Bench, path: Path, *words: str) -> Bad:
    return Bad(["run", "-m", bench.model, *ONE, "-i", path, "-q"], 4, (path.name, *words))


def of_use(bench: Bench, *arguments: object, words: tuple[str, ...], status: int = 2) -> Bad:
    return Bad(["run", "-m", bench.model, *TEXT, *arguments], status, words)


# ---- the model file


@case
def model_is_missing(b: Bench) -> Bad:
    return of_model(b.here / "nowhere.gguf", "nowhere.gguf", "No such file")


@case
def model_is_a_directory(b: Bench) -> Bad:
    return of_model(b.here, b.here.name)


@case
def model_is_a_pipe(b: Bench) -> Bad:
    os.mkfifo(b.here / "pipe.gguf")
    return of_model(b.here / "pipe.gguf", "pipe.gguf", "regular file")


@case
def model_is_truncated(b: Bench) -> Bad:
    content = b.model.read_bytes()
    return of_model(
        b.written("short.gguf", content[: len(content) * 2 // 3]), "short.gguf", "tensor", "ends at byte", "truncated"
    )


@case
def model_header_is_truncated(b: Bench) -> Bad:
    return of_model(b.written("short.gguf", b.model.read_bytes()[:3000]), "short.gguf", "158 tensors", "2,976 bytes")


@case
def model_is_something_else(b: Bench) -> Bad:
    return of_model(
        b.written("notes.txt", b"These are my notes, not weights. " * 9), "notes.txt", "not a GGUF file", "Thes", "GGUF"
    )


@case
def model_counts_are_absurd(b: Bench) -> Bad:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60)
    return of_model(b.written("bomb.gguf", head + bytes(4096)), "bomb.gguf", f"{1 << 60:,} tensors", "4,096 bytes")


@case
def model_offset_is_beyond_the_file(b: Bench) -> Bad:
    def change(reader):  # type: ignore[no-untyped-def]
        surgery.tensor_info(reader, "output_norm.weight")[2][0] = 1 << 40

    return of_model(b.changed(change), "model.gguf", "output_norm.weight", "byte")


@case
def model_offset_overflows(b: Bench) -> Bad:
    def change(reader):  # type: ignore[no-untyped-def]
        surgery.tensor_info(reader, "output_norm.weight")[2][0] = (1 << 64) - 32

    return of_model(b.changed(change), "model.gguf", "output_norm.weight")


@case
def model_architecture_is_unknown(b: Bench) -> Bad:
    return of_model(
        b.changed(lambda r: surgery.set_value(r, "general.architecture", "xllama")), "xllama", "supported are", "mllama"
    )


@case
def model_tensor_type_is_unknown(b: Bench) -> Bad:
    def change(reader):  # type: ignore[no-untyped-def]
        surgery.tensor_info(reader, "blk.0.attn_q.weight")[1][0] = 77

    return of_model(b.changed(change), "model.gguf", "blk.0.attn_q.weight", "77")


@case
def model_tensor_type_does_not_fit_its_use(b: Bench) -> Bad:
    def change(reader):  # type: ignore[no-untyped-def]
        surgery.tensor_info(reader, "output_norm.weight")[1][0] = 26

    return of_model(b.changed(change), "output_norm.weight", "I32", "supported are")


@case
def model_tokenizer_is_unknown(b: Bench) -> Bad:
    return of_model(b.changed(lambda r: surgery.set_value(r, "tokenizer.ggml.model", "gptx")), "gptx", "supported")


@case
def model_tensor_has_another_shape(b: Bench) -> Bad:
    def change(reader):  # type: ignore[no-untyped-def]
        dims = surgery.tensor_info(reader, "blk.0.ffn_down.weight")[0]
        dims[:] = dims[::-1].copy()

    return of_model(b.changed(change), "blk.0.ffn_down.weight", "has the shape", "expected")


@case
def model_lacks_announced_layers(b: Bench) -> Bad:
    return of_model(b.changed(lambda r: surgery.set_value(r, "mllama.block_count", 7)), "model.gguf")


@case
def model_has_no_heads(b: Bench) -> Bad:
    return of_model(
        b.changed(lambda r: surgery.set_value(r, "mllama.attention.head_count", 0)), "mllama.attention.head_count", "0"
    )


# ---- images


@case
def image_is_missing(b: Bench) -> Bad:
    return of_image(b, b.here / "nowhere.png", "No such file")


@case
def image_is_a_pipe(b: Bench) -> Bad:
    os.mkfifo(b.here / "pipe.png")
    return of_image(b, b.here / "pipe.png", "regular file")


@case
def image_is_something_else(b: Bench) -> Bad:
    return of_image(b, b.written("notes.png", b"These are my notes."), "no image", "PNG")


@case
def image_is_truncated(b: Bench) -> Bad:
    content = b.image.read_bytes()
    return of_image(b, b.written("half.png", content[: len(content) // 2]), "truncated")


@case
def image_is_huge(b: Bench) -> Bad:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return of_image(b, b.written("huge.png", b"\x89PNG\r\n\x1a\n" + head + data), "pixels")


# ---- prompts


@case
def prompt_is_beyond_the_context(b: Bench) -> Bad:
    arguments = ["run", "-m", b.model, *ONE, "--raw", "-p", "word " * 300, "-c", 64, "-q"]
    return Bad(arguments, 5, ("tokens", "context of 64"))


@case
def prompt_has_no_room_for_an_image(b: Bench) -> Bad:
    arguments = ["run", "-m", b.model, *ONE, "--raw", "-p", "no place", "-i", b.image, "-q"]
    return Bad(arguments, 4, ("0 <|image|> tokens", "1 image"))


@case
def nothing_is_asked(b: Bench) -> Bad:
    return Bad(["run", "-m", b.model, *ONE, "-q"], 2, ("--prompt", "--image"))


@case
def context_is_beyond_the_models(b: Bench) -> Bad:
    return of_use(b, *ONE, "-c", 1 << 20, words=("--ctx-size 1048576", "trained"))


# ---- devices and placement


@case
def more_layers_than_the_model_has(b: Bench) -> Bad:
    return of_use(b, "-ngl", 99, words=("--n-gpu-layers 99", "6 layers", "0 to 7"))


@case
def kind_of_device_is_unknown(b: Bench) -> Bad:
    return of_use(b, "-w", "cpu:1,tpu:2", words=("tpu:2", "cpu, accel, null"))


@case
def device_is_unknown(b: Bench) -> Bad:
    return of_use(b, "-ot", "ffn=accel7", words=("accel7", "accel0, accel1, cpu0"))


@case
def too_many_devices(b: Bench) -> Bad:
    return of_use(b, "-w", "cpu:1,accel:9999", words=("9999", "64"))


@case
def memory_is_no_size(b: Bench) -> Bad:
    return of_use(b, "-w", "cpu:1,accel:1:lots", words=("'lots'", "64MiB"))


@case
def topology_is_no_toml(b: Bench) -> Bad:
    path = b.written("machines.toml", b"[[worker]\nname=")
    return of_use(b, "--topology", path, words=("machines.toml", "not TOML", "line 1"))


@case
def topology_has_a_wrong_field(b: Bench) -> Bad:
    path = b.written("machines.toml", b'[[worker]]\nkind = "cpu"\n[[worker]]\nkind = "accel"\nmemory = 1.5\n')
    return of_use(b, "--topology", path, words=("machines.toml", "worker 2", "memory", "1.5"))


@case
def topology_has_no_cpu(b: Bench) -> Bad:
    path = b.written("machines.toml", b'[[worker]]\nkind = "accel"\n')
    return of_use(b, "--topology", path, words=("machines.toml", "no cpu worker"))


@case
def topology_and_workers(b: Bench) -> Bad:
    path = b.written("machines.toml", b'[[worker]]\nkind = "cpu"\n')
    return of_use(b, "--topology", path, "-w", "cpu:2", words=("--workers cpu:2", "--topology"))


@case
def topology_and_threads(b: Bench) -> Bad:
    path = b.written("machines.toml", b'[[worker]]\nkind = "cpu"\n')
    return of_use(b, "--topology", path, "-t", 2, words=("--threads 2", "--topology"))


@case
def topology_and_workers_of_a_plan(b: Bench) -> Bad:
    path = b.written("machines.toml", b'[[worker]]\nkind = "cpu"\n')
    return Bad(["plan", b.model, "--topology", path, "-w", "cpu:2"], 2, ("--workers cpu:2", "--topology"))


@case
def override_matches_nothing(b: Bench) -> Bad:
    words = ("--override-tensor ffn_upp=accel0", "matches none of the model's 158 weights")
    return Bad(["plan", b.model, "-ot", "ffn_upp=accel0"], 2, words)


@case
def prompt_names_another_number_of_images(b: Bench) -> Bad:
    arguments = ["run", "-m", b.model, *ONE, "-p", "<|image|> or <|image|>?", "-i", b.image, "-q"]
    return Bad(arguments, 4, ("2 <|image|>", "1 images"))


@case
def accelerator_has_no_memory(b: Bench) -> Bad:
    return of_use(b, "-w", "cpu:1,accel:2:0", words=("accel0", "it has 0", "bytes short"), status=5)


@case
def accelerator_is_too_small(b: Bench) -> Bad:
    return of_use(b, "-w", "cpu:1,accel:1:64KiB", words=("accel0", "needs", "65,536", "short"), status=5)


# ---- the machine


@case
def port_is_out_of_range(b: Bench) -> Bad:
    return of_use(b, "--transport", "tcp", "--port", 65536, words=("65536", "65535"))


@case
def temporary_directory_is_too_long(b: Bench) -> Bad:
    deep = b.here / ("x" * 100)
    deep.mkdir()
    return Bad(["run", "-m", b.model, *ONE, *TEXT], 2, ("107", "TMPDIR"), {"TMPDIR": str(deep)})


@case
def switch_is_unknown(b: Bench) -> Bad:
    return Bad(["doctor"], 2, ("CROSSDOCK_DISABLE", "'mmfd'", "memfd"), {"CROSSDOCK_DISABLE": "mmfd"})


@case
def worker_speaks_another_version(b: Bench) -> Bad:
    import workers

    (b.here / "workers").mkdir()
    real = str(Path(workers.__file__).parent)
    patch = f"import protocol.version\nprotocol.version.MAJOR = 2\n__path__ = [{real!r}]\n"
    (b.here / "workers" / "__init__.py").write_text(patch)
    path = os.pathsep.join([str(b.here), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = ["run", "-m", b.model, *TEXT, "-w", "cpu:1"]
    return Bad(arguments, 7, ("cpu0", "protocol version 2", "expected 1"), {"PYTHONPATH": path})


@case
def command_is_unknown(b: Bench) -> Bad:
    return Bad(["rum"], 2, ("'rum'", "run"))


@case
def raw_with_system(b: Bench) -> Bad:
    return of_use(b, *ONE, "--raw", "-s", "x", words=("--system", "--raw"))


@case
def pin_is_to_no_device(b: Bench) -> Bad:
    return of_use(b, "--pin", "inp_pos=cpu7", words=("--pin inp_pos=cpu7", "unknown device 'cpu7'", "cpu0"))


@case
def pin_is_of_no_tensor(b: Bench) -> Bad:
    return of_use(b, "--pin", "vision_outputt=cpu0", words=("--pin vision_outputt=cpu0", "unknown tensor", "language"))


@case
def weights_type_is_for_no_weight(b: Bench) -> Bad:
    arguments = ["plan", "smollm2-135m", "--weights-type", "attn_q=q4_0"]
    return Bad(arguments, 2, ("--weights-type attn_q=q4_0", "begins none", "token_embd.weight", "vision"))


@case
def number_is_none(b: Bench) -> Bad:
    return of_use(b, "-n", "many", words=("--n-predict", "'many'"))


@case
def output_is_full(b: Bench) -> Bad:
    return of_use(b, *ONE, words=("No space left",), status=4)


# Two at a time: most of each is the start of an interpreter.
@pytest.fixture(scope="module")
def results(
    model: Path, image: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, tuple[Bad, Future[Result]]]]:
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")} & set(
        CASES
    )
    with ThreadPoolExecutor(2) as pool:
        started = {}
        for name in CASES:
            if name in wanted:
                bad = CASES[name](Bench(model, image, tmp_path_factory.mktemp("case")))
                started[name] = (bad, pool.submit(_run, name, bad))
        yield started


def _run(name: str, bad: Bad) -> Result:
    if name != "output_is_full":
        return run(bad.arguments, env=bad.env)
    with open("/dev/full", "wb") as full:
        return run(bad.arguments, env=bad.env, stdout=full.fileno())


FAST = {  # one of each kind: model, image, prompt, devices, memory, peer, arguments, environment
    "model_is_truncated", "model_architecture_is_unknown", "image_is_something_else", "prompt_is_beyond_the_context",
    "topology_has_a_wrong_field", "accelerator_is_too_small", "worker_speaks_another_version", "number_is_none",
    "switch_is_unknown", "command_is_unknown",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES])
def test_bad_input(name: str, results: dict[str, tuple[Bad, Future[Result]]]) -> None:
    bad, future = results[name]
    line = future.result().check(bad.status, *bad.words)
    assert len(line) < 500
    assert not re.search(r"internal error|Errno|object at 0x", line)


ALL_CLOSED = "<&- >&- 2>&-"


@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=pytest.mark.slow) for one in ALL_CLOSED.split()), ALL_CLOSED]
)
def test_closed_streams(closed: str, model: Path) -> None:
    command = ("sh", "-c", f'exec "$0" "$@" {closed}', COMMAND)
    result = run(["run", "-m", model, *ONE, *TEXT], command=command)
    assert (result.status, result.stderr, result.leftovers) == (0, "", [])
    assert bool(result.stdout) == (closed in ("<&-", "2>&-"))


def test_port_is_taken(model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = run(["run", "-m", model, *TEXT, "--transport", "tcp", "--port", port])
    result.check(2, str(port), "another program listens", "--port 0")


def test_many_bad_inputs() -> None:
    assert len(CASES) >= 40
