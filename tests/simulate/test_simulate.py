"""`crossdock simulate` as people call it: examples, questions, and arguments that cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documented import PAGES, ROOT, documented, simulate

from coordinator.cli.simulate_model import machine_of
from protocol.errors import Exit, InputError, UsageError

EXAMPLES = ROOT / "examples"
ONE = str(EXAMPLES / "systems" / "one-rtx4090.toml")
TWO = str(EXAMPLES / "systems" / "two-rtx4090.toml")
NEXT_DOOR = str(EXAMPLES / "networks" / "next-door.toml")
QUICK = ("smollm2-135m", "--prompt", "64", "-n", "4")


@pytest.mark.parametrize("path", sorted((EXAMPLES / "systems").glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_is_a_machine(path: Path) -> None:
    for network in ("pcie4x16", *map(str, sorted((EXAMPLES / "networks").glob("*.toml")))):
        machine = machine_of(str(path), network)
        assert machine.models[-1].cls == "cpu"
        assert len(machine.fabric.routes) == len(machine.models) * (len(machine.models) - 1)


def test_text() -> None:
    status, text = simulate([*QUICK, "--system", TWO, "--network", NEXT_DOOR, "--check"])
    assert status == Exit.OK
    for words in (
        "first token after", "tokens/s", "gpu0", "24.0 GiB", "10gbe gpu0 -> gpu1",
        "the fixed cost of 10gbe gpu0 -> gpu1 at split 2 (l_out-15)", "token: 4 evaluations",
    ):  # fmt: skip
        assert words in text
    assert simulate([*QUICK, "--system", TWO, "-q"])[1].count("\n") == 6


def test_json() -> None:
    document = json.loads(simulate([*QUICK, "--system", TWO, "--json"])[1])
    assert document["fits"]
    assert document["phases"]["token"]["evaluations"] == 4
    path = document["phases"]["token"]["critical_path"]
    assert sum(part["seconds"] for part in path) == pytest.approx(document["phases"]["token"]["seconds"])
    assert document["total_s"] == pytest.approx(document["first_token_s"] + document["phases"]["token"]["seconds"])
    assert {row["device"] for row in document["memory"]} == {"gpu0", "gpu1", "cpu"}
    assert document["links"][0]["bytes"] > 0


def test_too_large_is_said_and_exits_with_capacity(tmp_path: Path) -> None:
    system = tmp_path / "system.toml"
    system.write_text(Path(ONE).read_text().replace('preset = "RTX 4090"', 'preset = "RTX 4090"\nmemory = "64MiB"'))
    status, text = simulate([*QUICK, "--system", str(system)])
    assert status == Exit.CAPACITY
    assert "does not fit: gpu0 is" in text


def test_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    assert simulate([*QUICK, "--system", TWO, "--trace", str(file)])[0] == Exit.OK
    assert {e["ph"] for e in json.loads(file.read_text())["traceEvents"]} == {"M", "X", "s", "t", "f", "C"}


SWEEP = (*QUICK, "--system", ONE, "--sweep", "n-gpu-layers=0,31,batch=1,2")


@pytest.mark.slow
def test_sweep_as_a_table_and_a_plot(tmp_path: Path) -> None:
    plot = tmp_path / "sweep.svg"
    assert "n-gpu-layers  batch  first token" in simulate([*SWEEP, "--plot", str(plot)])[1]
    assert plot.read_text().startswith("<?xml")


def test_sweep() -> None:
    points = json.loads(simulate([*SWEEP, "--json"])[1])
    assert [(p["n_gpu_layers"], p["batch"]) for p in points] == [(0, 1), (0, 2), (31, 1), (31, 2)]
    assert points[0]["tokens_per_s"] < points[2]["tokens_per_s"]


def test_search() -> None:
    document = json.loads(simulate([*QUICK, "--system", ONE, "--search", "--json"])[1])
    assert document["n_gpu_layers"] == 31
    assert document["limits"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), UsageError, "--system TOML is missing"),
        (("--system", "none.toml"), UsageError, "none.toml: No such file"),
        (("--system", ONE, "--network", "11gbe"), UsageError, "--network 11gbe: no such file, and no kind of link"),
        (("--system", ONE, "--sweep", "batch=1", "--search"), UsageError, "--sweep and --search are two answers"),
        (("--system", ONE, "--plot", "x.svg"), UsageError, "expected --sweep"),
        (("--system", ONE, "--search", "-ngl", "3"), UsageError, "leave them out"),
        (("--system", ONE, "--sweep", "batch=1", "--plot", "x.doc"), UsageError, "expected a file that ends in"),
        (("--system", ONE, "--prompt", "9000"), UsageError, "the model was trained for 8192"),
        (("--system", ONE, "--trace", "/none/t.json"), InputError, "--trace /none/t.json"),
    ],
)
def test_arguments_that_cannot_be_meant(
    arguments: tuple[str, ...], error: type[UsageError], message: str
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        simulate([*QUICK, *arguments])


@pytest.mark.slow
def test_documented_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output on docs/simulation.md is the program's: `python tests/simulate/documented.py` writes them anew."""
    monkeypatch.chdir(ROOT)
    commands = documented(PAGES[0])
    assert commands
    for arguments, output in commands:
        assert simulate(arguments)[1] == output, arguments
