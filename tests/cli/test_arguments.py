"""Arguments that cannot be meant are told in one line before anything is done."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from coordinator.cli import _MAX_LINE, _run, shorten
from coordinator.cli.options import DEMO_IMAGE, DEMO_MODEL, EXAMPLES

SYSTEM = str(EXAMPLES / "systems" / "one-rtx4090.toml")
TEXT_MODEL = "smollm2-135m"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is said of a usage error."""
    assert _run([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert re.fullmatch(r"crossdock: .*   \[exit 2\]", line)
    return line


# ---- images of a model that takes none


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", TEXT_MODEL),
        ("plan", TEXT_MODEL, "--fit", "--device", "gpu0:1GiB"),
        ("check", TEXT_MODEL),
        ("simulate", TEXT_MODEL, "--system", SYSTEM),
        ("simulate", TEXT_MODEL, "--system", SYSTEM, "--sweep", "batch=1,2"),
    ],
)
def test_images_for_a_text_model(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, *arguments, "--images", 3)
    assert "--images 3: SmolLM2 135M (llama) takes no images: expected 0, or no --images" in line


def test_images_for_the_other_model_of_a_diff(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--images 2: SmolLM2" in refused(capsys, "plan", "--images", 2, "--diff", TEXT_MODEL)


@pytest.mark.parametrize("images", [[], ["--images", "0"]])
def test_a_text_model_goes_without_images(images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["plan", TEXT_MODEL, "--phase", "token", "--json", *images]) == 0
    assert [graph["what"] for graph in json.loads(capsys.readouterr().out)["graphs"]] == ["one token"]


def test_a_model_that_takes_images_is_planned_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["plan", "--json"]) == 0
    whats = [graph["what"] for graph in json.loads(capsys.readouterr().out)["graphs"]]
    assert whats == ["one image", "prompt of 512, with the image", "one token, with the image"]


# ---- values that are empty, unknown or long


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--workers", ""), ("run", "-m", ""), ("run", "-i", ""), ("run", "--topology", ""), ("run", "-ngl", ""),
        ("run", "-ts", ""), ("run", "-ot", ""), ("run", "--trace="), ("run", "--dump-tensor", ""), ("run", "-n", ""),
        ("run", "--simulate", ""), ("plan", ""), ("plan", "--device", ""), ("plan", "--host", ""),
        ("plan", "--topology", ""), ("plan", "--graph", ""), ("plan", "--diff", "-ot", ""), ("check", "--phase", ""),
        ("diff", "", "-w ''"), ("simulate", "--system", ""), ("simulate", "--sweep", ""), ("devices", "--network", ""),
        ("bench", "-w", ""), ("bench", "--plot", ""), ("calibrate", "-o", ""), ("convert", "", "-o", "x.gguf"),
        ("scenario", ""), ("reproduce", ""), ("",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_empty_value_is_no_default(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, *arguments)
    assert re.search(r"is empty|''|expected", line)


def test_buffer_types_that_no_device_has(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(
        capsys, "plan", "--device", "gpu0", "--device", "gpu1:reads=gpu0+nowhere", "--host", "CPU:reads=gpu1"
    )
    assert "--device gpu1:reads=gpu0+nowhere: reads=nowhere: no device has that: expected of gpu0, gpu1, CPU" in line
    line = refused(capsys, "plan", "--device", "gpu0:buft=vram:reads=CPU", "--host", "CPU:reads=gpu0")
    assert "--host CPU:reads=gpu0: reads=gpu0: no device has that: expected of vram, CPU" in line


LONG = "ab" * 50_000


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "-w", LONG), ("run", "-w", f"cpu:1,{LONG}:1,x"), ("run", f"--{LONG}"), (LONG,), ("run", "-n", LONG),
        ("plan", "--device", LONG), ("plan", "--device", f"gpu0:{LONG}=1"), ("plan", LONG),
        ("plan", "-ngl", "9" * 5000), ("plan", "-ot", f"{'x ' * 50_000}=CPU"),
        ("run", "-m", LONG), ("scenario", LONG), ("reproduce", LONG),
    ],
    ids=range(13),
)  # fmt: skip
def test_long_values_are_shortened(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status = _run(list(arguments))
    assert status in (2, 3, 4)
    (line,) = capsys.readouterr().err.splitlines()
    assert "more ...]" in line
    assert len(line) < _MAX_LINE + 50
    assert line.endswith(f"   [exit {status}]")


def test_what_is_shortened_keeps_its_ends() -> None:
    usual = "model.gguf: tensor blk.3.ffn_down.weight ends at byte 98,412,345 but the file has 71,303,168 (truncated?)"
    assert shorten(usual) == usual
    assert shorten(f"a {'x' * 150}{'y' * 1000}{'z' * 150} b") == f"a {'x' * 130}[... 1,040 more ...]{'z' * 130} b"
    lines = shorten("--option " + "word " * 1000 + "expected a number")
    assert lines.startswith("--option word")
    assert lines.endswith("word expected a number")
    assert len(lines) <= _MAX_LINE


# ---- files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a model under two names, and a link to a file that is not there yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(DEMO_MODEL.read_bytes())
    os.link("model.gguf", "twin.gguf")
    os.symlink("later.json", "link.json")
    os.symlink(tmp_path, "around")
    (tmp_path / "here.toml").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run --trace a.json --record ./a.json", "--trace a.json is the file of --record (./a.json)"),
        ("run --trace later.json --record link.json", "--trace later.json is the file of --record (link.json)"),
        ("run --record around/a --memory-map a", "--record around/a is the file of --memory-map (a)"),
        ("run --dump-tensor x --dump-dir . --trace around", "--trace around is the file of --dump-dir (.)"),
        ("run -m model.gguf --record twin.gguf", "--record twin.gguf is the file of the model (model.gguf)"),
        ("run -m model.gguf -i a.png -i b.png --trace b.png", "--trace b.png is the file of --image"),
        ("run --topology here.toml --record here.toml", "--record here.toml is the file of --topology"),
        ("run --simulate here.toml --trace around/here.toml", "--trace around/here.toml is the file of --simulate"),
        (f"run --record {DEMO_MODEL}", "is the file of the bundled model"),
        (f"run --trace {DEMO_IMAGE}", "is the file of the bundled image"),
        ("plan model.gguf --memory-map around/model.gguf", "--memory-map around/model.gguf is the file of the model"),
        ("simulate model.gguf --system here.toml --trace model.gguf", "--trace model.gguf is the file of the model"),
        ("bench -m model.gguf --plot twin.gguf", "--plot twin.gguf is the file of the model"),
        ("convert . -o here.toml", "--output here.toml is the file of the folder"),
    ],
)
@pytest.mark.usefixtures("here")
def test_two_outputs_or_an_input_are_one_file(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir())
    line = refused(capsys, *arguments.split())
    assert words in line
    assert "name another one" in line
    assert sorted(os.listdir()) == before


@pytest.mark.usefixtures("here")
def test_files_that_are_nobodys_to_lose(capsys: pytest.CaptureFixture[str]) -> None:
    """One device for several outputs, a system message, the names of presets and links, and a model that was converted
    into its folder before."""
    message = ["-s", "t.json", "--trace", "t.json"]
    assert "no_such" in refused(capsys, "run", *message, "-w", "no_such")
    assert "no_such" in refused(capsys, "run", "-s", "", "--dump-dir", ".", "--dump-tensor", "x", "-w", "no_such")
    assert "no_such" in refused(capsys, "simulate", "tiny", "--trace", "pcie4x16", "--system", "no_such")
    assert "no_such" in refused(capsys, "run", "--trace", "/dev/null", "--record", "/dev/null", "-w", "no_such")
    assert _run(["convert", ".", "-o", "model.gguf"]) != 0
    assert "model.safetensors" in capsys.readouterr().err


# ---- what a system's devices share


def test_devices_show_what_a_system_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system = tmp_path / "here.toml"
    device = '[[device]]\nname = "cpu"\npreset = "Ryzen 7950X DDR5-6000"\n'
    for top, text, facts in (
        ("", "", {}),
        ("processors = 1.5\n", "share 1.5 processors\n", {"processors": 1.5}),
        ("processors = 2\nmemory_gbs = 21\n", "share 2 processors and 21 GB/s", {"processors": 2, "memory_gbs": 21}),
    ):
        system.write_text(f"schema = 1\n{top}{device}")
        assert _run(["devices", "--system", str(system)]) == 0
        shown = capsys.readouterr().out
        assert text in shown
        assert ("share" in shown) == bool(text)
        assert _run(["devices", "--system", str(system), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert {key: document[key] for key in document if key not in ("devices", "links")} == facts


# ---- a wrong idea of a command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "expected a command, such as crossdock run (crossdock --help lists them)"),
        ("-ngl 3 run", "-ngl: options stand behind the command: crossdock run -ngl ..."),
        ("run describe.png", "describe.png: expected --prompt TEXT, --image FILE or --model GGUF (see crossdock run"),
        ("run --temprature 1", "--temprature 1: is --temperature meant? (see crossdock run --help)"),
        ("run --colour", "unrecognized arguments: --colour (see crossdock run --help)"),
        ("plan -m model.gguf", "-m: MODEL is the one argument without an option (see crossdock plan --help)"),
        ("diff a b c", "c: expected two runs, options of each in quotes"),
        ("run -m smollm2-135m -p x", "--model smollm2-135m: a preset has no weights to run with: expected a GGUF file"),
        ("bench -m llama-3.2-11b-vision", "crossdock plan llama-3.2-11b-vision, and simulate, do without"),
        ("simulate --system 4090", "--system 4090: No such file; expected one as in examples/systems"),
        ("devices --system 4090", "--system 4090: No such file; expected one as in examples/systems"),
        ("devices --network wify", "--network wify: no such file, and no kind of link: expected one of pcie3x16"),
        ("run -p x --top-p 2", "top_p is 2.0: expected 0 to 1"),
        ("run -p x -ngl most", "-ngl/--n-gpu-layers: 'most': expected a number of layers, or all"),
        ("reproduce 7", "reproduce 7: expected 10780"),
    ],
)  # fmt: skip
def test_what_to_write_instead(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, *arguments.split())


def test_help_may_be_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, usage in ((["help"], "usage: crossdock [-h]"), (["help", "plan"], "usage: crossdock plan [-h]")):
        with pytest.raises(SystemExit) as ended:
            _run(arguments)
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(usage)


def test_one_kind_of_link_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["devices", "--network", "10gbe", "--json"]) == 0
    assert [link["name"] for link in json.loads(capsys.readouterr().out)["links"]] == ["10gbe"]
