"""`crossdock simulate` as people call it: examples, questions, and arguments that cannot be meant."""

from __future__ import annotations

import json
import re
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


def test_a_search_names_what_limits_its_goal() -> None:
    """The prompt, though tokens take longer."""
    document = json.loads(simulate([*QUICK, "--system", ONE, "--search", "first-token", "--json"])[1])
    assert {line.partition(":")[0] for line in document["limits"]} == {"prompt"}
    assert document["phases"]["token"]["seconds"] > document["phases"]["prompt"]["seconds"]


def test_the_sweep_that_is_proposed_works() -> None:
    text = simulate([*QUICK, "--system", ONE])[1]
    (proposed,) = re.findall(r"--sweep (\S+) shows all", text)
    rows = simulate(["smollm2-135m", "--prompt", "64", "-n", "0", "--system", ONE, "--sweep", proposed])[1]
    assert [line.split()[0] for line in rows.splitlines()[4:]] == [str(n) for n in range(0, 32, 3)]


def test_shared_processors_are_said_and_take_time(tmp_path: Path) -> None:
    system = tmp_path / "system.toml"
    shared = "schema = 1\nprocessors = 0.5\nmemory_gbs = 4000"
    system.write_text(Path(ONE).read_text().replace("schema = 1", shared))
    rates = []
    for path in (ONE, str(system)):
        given = [*QUICK, "-ngl", "0", "--no-op-offload", "--system", path]
        rates.append(json.loads(simulate([*given, "--json"])[1])["tokens_per_s"])
    assert "; 0.5 processors and 4,000 GB/s of weights for 1 of them" in simulate([*given, "-q", "--check"])[1]
    assert rates[1] == pytest.approx(rates[0] / 2, rel=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("processors = 0", "processors is 0: expected 0.01 to 4096"),
        ("processors = nan", "processors is nan: expected 0.01"),
        ('processors = "two"', "processors is 'two': expected a number"),
        ("memory_gbs = 20", "memory_gbs: expected processors with it"),
        ("processors = 2\nmemory_gbs = -1", "memory_gbs is -1: expected 0.001"),
    ],
)
def test_shared_machines_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    system = tmp_path / "system.toml"
    system.write_text(Path(ONE).read_text().replace("schema = 1", f"schema = 1\n{text}"))
    with pytest.raises(UsageError, match=message):
        simulate([*QUICK, "--system", str(system)])


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
        (("--system", ONE, "--batch", "1000000"), UsageError, "--batch 1000000: expected at most 4096"),
        (("--system", ONE, "--requests", "1000000"), UsageError, "--requests 1000000: expected at most 4096"),
        (("--system", ONE, "--sweep", "batch=2,1000000"), UsageError, "--batch 1000000: expected at most 4096"),
        (("--system", ONE, "--trace", "/none/t.json"), InputError, "--trace /none/t.json"),
    ],
)
def test_arguments_that_cannot_be_meant(
    arguments: tuple[str, ...], error: type[UsageError], message: str
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        simulate([*QUICK, *arguments])


@pytest.mark.parametrize("more", [("--search",), ("--system", ONE), ("--sweep", "batch=1"), ("--trace", "t.json")])
def test_published_rates_need_nothing_else(more: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=f"--published and {more[0]} are two answers"):
        simulate(["--published", "rates.csv", *more])
    with pytest.raises(UsageError, match="its rows name their models: leave smollm2-135m out"):
        simulate(["smollm2-135m", "--published", "rates.csv"])


@pytest.mark.slow
def test_documented_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output on docs/simulation.md is the program's: `python tests/simulate/documented.py` writes them anew."""
    monkeypatch.chdir(ROOT)
    commands = documented(PAGES[0])
    assert commands
    for arguments, output in commands:
        assert simulate(arguments)[1] == output, arguments
