"""`crossdock bench scaling --simulate`: real and simulated workers on one scale."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.bench_scale import HERE
from coordinator.cli.parser import parse
from coordinator.report import scaling as report
from coordinator.simulate.scale import ScalePoint
from coordinator.simulate.series import Load
from protocol.errors import ModelError, UsageError

WORKER = """
[[device]]
name = "{name}"
class = "cpu"
bandwidth_gbs = 10
fp16_tflops = 0.05
launch_us = 2
step_us = 50
async_copies = true
{rest}
"""
COSTS = '[device.costs]\n"matvec.q8_0" = { us = 2, weights_gbs = 8 }\n"matmat.q8_0" = { us = 5, gflops = 80 }\n'
QUICK = ("-p", "32", "-n", "4")


@pytest.fixture
def system(tmp_path: Path) -> str:
    """What `crossdock calibrate` would write, with two of its costs."""
    path = tmp_path / HERE
    accelerator = WORKER.format(name="accel0", rest="accelerator = true\n" + COSTS)
    path.write_text("schema = 1\n" + accelerator + WORKER.format(name="cpu0", rest=COSTS))
    (tmp_path / "here-network.toml").write_text(
        'schema = 1\n[[link]]\nname = "shared"\nlatency_us = 20\nbandwidth_gbs = 5\n'
    )
    return str(path)


def bench(*arguments: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert parse(["bench", "scaling", *arguments])() == 0
    return output.getvalue()


def curves(*arguments: str) -> dict[str, list[dict[str, Any]]]:
    document = json.loads(bench(*arguments, "--json"))
    return {curve["curve"]: curve["points"] for curve in document["curves"]}


def test_simulated_alone(system: str, tmp_path: Path) -> None:
    """The bundled model has 5 layers; pipelines are of 4 workers, so that 10 workers are two of them."""
    plot = tmp_path / "scaling.svg"
    found = curves("--simulate", system, "--no-real", "--workers", "10", *QUICK, "--plot", str(plot))
    assert [p["workers"] for p in found["strong"]] == [1, 2, 3, 4, 5]
    assert [(p["workers"], p["pipelines"]) for p in found["pipelined"]] == [(1, 1), (2, 1), (3, 1), (4, 1), (8, 2)]
    assert [(p["workers"], p["sequences"]) for p in found["weak"]] == [(n, n) for n in (1, 2, 3, 4, 8, 10)]
    assert {p["sequences"] for p in found["pipelined"]} == {10}
    assert not any("real" in p for points in found.values() for p in points)
    rates = {name: [p["simulated"]["tokens_per_s"] for p in points] for name, points in found.items()}
    assert rates["strong"][0] > rates["strong"][-1]  # hops, and nothing at the same time
    assert rates["pipelined"][3] > 1.5 * rates["pipelined"][0]
    assert rates["weak"][3] > 3 * rates["weak"][0]
    links = {p["simulated"]["link"].partition(" ")[0] for p in found["weak"]}
    assert links == {"shared"}  # the network beside the system
    assert "weak, simulated" in plot.read_text()
    assert "weak, real" not in plot.read_text()


def test_workers_share_the_processors_that_the_system_names(system: str) -> None:
    """Then the weak curve stands still where they are busy, and a further one says what a machine each would do."""
    path = Path(system)
    path.write_text(path.read_text().replace("schema = 1", "schema = 1\nprocessors = 2"))
    found = curves("--simulate", system, "--no-real", "--workers", "32", *QUICK)
    rates = {name: {p["workers"]: p["simulated"]["tokens_per_s"] for p in points} for name, points in found.items()}
    assert list(found) == ["strong", "pipelined", "weak", "apart"]
    assert rates["weak"][2] == pytest.approx(rates["apart"][2], rel=0.1)  # the host computes too
    assert rates["weak"][16] < 1.2 * rates["weak"][2]
    assert rates["apart"][4] > 1.8 * rates["weak"][4]
    assert (max(rates["weak"]), max(rates["apart"])) == (16, 32)


def test_numbers_of_workers_as_they_are_given(system: str) -> None:
    found = curves("--simulate", system, "--no-real", "-w", "2,6", "-w", "1", *QUICK, "--stages", "3")
    assert [p["workers"] for p in found["weak"]] == [1, 2, 6]
    assert [(p["workers"], p["pipelines"]) for p in found["pipelined"]] == [(1, 1), (2, 1), (6, 2)]


@pytest.mark.slow
def test_real_beside_simulated(system: str, tmp_path: Path) -> None:
    plot = tmp_path / "scaling.png"
    given = ("--simulate", system, "--workers", "2", *QUICK, "-r", "2", "--no-image")
    found = curves(*given, "--plot", str(plot))
    for name, of in (("strong", (1, 1)), ("weak", (1, 2))):
        assert [p["workers"] for p in found[name]] == [1, 2]
        for point, sequences in zip(found[name], of, strict=True):
            real = point["real"]
            rates = [sequences * 4 / seconds for seconds in real["token_seconds"]]
            assert len(rates) == 2
            assert real["tokens_per_s"] == pytest.approx(statistics.median(rates))
            assert real["token_ratio"] == pytest.approx(point["simulated"]["tokens_per_s"] / real["tokens_per_s"])
    assert plot.stat().st_size > 10_000


def test_the_table_compares_where_both_are_known() -> None:
    point = ScalePoint(
        workers=2, pipelines=1, requests=1, tokens_per_s=50.0, prompt_per_s=400.0, end_s=1.0, speedup=0.5,
        efficiency=0.25, busy=0.5, host_busy=0.001, link="", link_busy=0.0, fits=False, n_events=10, wall_s=0.1,
    )  # fmt: skip
    real = report.Real(1, 100, 10, (1.0, 0.5, 0.25), (0.4, 0.2, 0.1))
    found = report.Scaling("m", "s.toml", Load(), (report.Curve("strong", "", (report.Row(point, real),)),))
    assert report.table_rows(found) == [(
        "strong", "2 (too small)", "1", "200.0", "400.0", "2.00", "50.0", "50.0", "1.00", "0.50", "25 %", "50 %",
        "<1 %", "-",
    )]  # fmt: skip
    assert report.cost_line(found, 0) == "10 events in 0.1 s, at most 10 of 2 workers in 0.1 s"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--simulate",), "no here.toml in this folder: `crossdock calibrate -o here.toml`"),
        (("--simulate", "none.toml"), "none.toml: No such file"),
        (("--simulate", "SYSTEM", "-w", "cpu:1"), "expected numbers from 1 to 4096"),
        (("--simulate", "SYSTEM", "-w", "0"), "expected numbers from 1 to 4096"),
        (("--simulate", "SYSTEM", "-p", "1,2"), "--n-prompt: expected one value"),
        (("--simulate", "SYSTEM", "-p", "0"), "--n-prompt 0: expected at least 1"),
        (("--simulate", "SYSTEM", "-p", "5000"), "trained for at most 4096"),
        (("--simulate", "SYSTEM", "-ngl", "3"), "--n-gpu-layers"),
        (("--simulate", "SYSTEM", "--plot", "x.gif"), ".svg"),
        (("--simulate", "SYSTEM", "--network", "11gbe"), "--network 11gbe: no such file, and no kind of link"),
        (("--no-real",), "--no-real goes with --simulate"),
        (("--requests", "3"), "--requests goes with --simulate"),
    ],
)
def test_what_cannot_be_meant_is_said_at_once(
    system: str, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(UsageError, match=says):
        bench(*(system if text == "SYSTEM" else text for text in arguments))


def test_a_machine_without_accelerators_has_nothing_to_scale(tmp_path: Path) -> None:
    path = tmp_path / "host.toml"
    path.write_text("schema = 1\n" + WORKER.format(name="cpu0", rest=""))
    with pytest.raises(UsageError, match="no device besides the host"):
        bench("--simulate", str(path))


def test_rates_are_no_subject_of_simulation(system: str) -> None:
    with pytest.raises(UsageError, match="--simulate goes with scaling"):
        parse(["bench", "--simulate", system])()


def test_a_model_that_is_none(system: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"nothing")
    with pytest.raises(ModelError):
        bench("--simulate", system, "-m", str(bad))
