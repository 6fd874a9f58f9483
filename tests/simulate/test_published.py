"""Published rates: what rows mean, what the laws make of them, and how they are judged."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from coordinator.simulate.cases import case_of
from coordinator.simulate.claims import NO_CLAIM, PROMISES, fault_of, group_of
from coordinator.simulate.fit import FIXED, PRIORS, Measured, defaults, fit_class, minimise
from coordinator.simulate.hosts import calibrate_host, usual_host
from coordinator.simulate.judge import fair, fit_all, fitting, judge
from coordinator.simulate.known import constants
from coordinator.simulate.law import Constants
from coordinator.simulate.models import workload_of
from coordinator.simulate.published import Row, read_rows
from coordinator.simulate.published import test_of as read_test
from coordinator.simulate.rates import Ask, tokens_per_s
from coordinator.simulate.verdicts import figures, measured_cases, predict_table, reasons
from protocol.errors import InputError

DAMAGE = ["", "+ +", "CPU", "M1", "2x", "RTX 4090 + M1 7c", "ngl=0/33", "ngl=99/0", "row split", "RPC", "tg0", "pp7",
          "tg128 @ d9999", "IQ2_XXS", "F32", "apple", "cpu", "nv", "\t", "9" * 400]  # fmt: skip

TABLE = Path(__file__).parents[2] / "benchmarks" / "published" / "rates.csv"


def row(**changes: object) -> Row:
    base = Row("r", "2025-07", "RTX 3090", "nv", "ampere", 936e9, 142e12, "llama-7b", 6.74e9, 3.56 * 2**30, "Q4_0",
               "ngl=all", 1, "", "tg128", 158.0, "", "")  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pp512", ("prompt", 512, 0, 512)), ("tg128", ("decode", 128, 0, 512)), ("tg~200", ("decode", 200, 0, 512)),
        ("pp~prompt", ("prompt", 512, 0, 512)), ("pp512 ub16", ("prompt", 512, 0, 16)),
        ("tg128 @ d4096", ("decode", 128, 4096, 512)), ("tg32 @ 16384", ("decode", 32, 16384, 512)),
        ("tg1(pp1)", ("decode", 1, 0, 512)),
    ],
)  # fmt: skip
def test_tests(text: str, expected: tuple[str, int, int, int]) -> None:
    test = read_test(row(test=text))
    assert (test.kind, test.n, test.depth, test.ubatch) == expected


@pytest.mark.parametrize(
    "text", ["buffer MiB", "encode 576 tok", "pp512+tg128", "pp0", "tg99999999999", "pp1000000 ub1", ""]
)
def test_tests_that_are_none(text: str) -> None:
    with pytest.raises(InputError):
        read_test(row(test=text))


def test_batches_are_said_in_notes_too() -> None:
    assert read_test(row(test="pp2048", notes="-b 2048 -ub 256")).ubatch == 256
    assert read_test(row(test="pp2048", split="RPC layer split ub256")).ubatch == 256
    assert read_test(row(test="pp2048", notes="-b 128")).ubatch == 128


@pytest.mark.parametrize(
    ("date", "year"),
    [("2025-07", 2025 + 6.5 / 12), ("2023-11..2025", 2023 + 10.5 / 12), ("2024-10..2026-10", 2025 + 9.5 / 12),
     ("2026", 2026.5), ("", 2025.5), ("soon", 2025.5)],
)  # fmt: skip
def test_years(date: str, year: float) -> None:
    assert row(date=date).year == pytest.approx(year)


def test_flash_attention_is_what_notes_say() -> None:
    """A poster's "CUDA rows fa=1" stands in the notes of all rows, but says nothing of other backends."""
    assert case_of(row(notes="Vulkan fa=1")).flash
    assert case_of(row(notes="CUDA rows fa=1")).flash
    assert not case_of(row(notes="CUDA rows fa=1", hardware="M2 10c", cls="apple")).flash
    assert not case_of(row(notes="fa=no")).flash


def test_workload_by_hand() -> None:
    """llama-7b in Q4_0: the file less a Q4_0 embedding of 32000 x 4096, and 2 x 2 x 4096 x 32 bytes of KV a token."""
    load = workload_of("llama-7b", 6.74e9, 3.56 * 2**30, "Q4_0")
    assert load.read_nbytes == pytest.approx(3.56 * 2**30 - 32000 * 4096 * 18 / 32)
    assert (load.kv_nbytes, load.layers, load.guessed) == (2 * 2 * 4096 * 32, 32, False)
    experts = workload_of("gpt-oss-120b", 0, 60.87 * 2**30, "F16/MXFP4")
    assert experts.experts
    assert experts.read_nbytes == pytest.approx(experts.file_nbytes * 5.1 / 116.8)


def test_unknown_models_are_guessed_by_size() -> None:
    load = workload_of("Nova 9000", 8.2e9, 4.7 * 2**30, "Q4_K_M")
    assert load.guessed
    assert 28 <= load.layers <= 40
    assert workload_of("nova-13b-chat", 0, 0, "Q8_0").read_nbytes == pytest.approx(13e9 * 8.5 / 8, rel=0.1)
    assert workload_of("nova-100b-a5b", 0, 0, "Q4_K_M").experts
    with pytest.raises(InputError, match="neither params_b nor file_gib"):
        workload_of("Nova", 0, 0, "Q4_0")
    with pytest.raises(InputError, match="quant 'W8A8' is not known"):
        workload_of("llama-7b", 0, 0, "W8A8")


def test_bandwidth_and_peak_may_be_missing() -> None:
    told, bare = case_of(row()), case_of(row(bandwidth=0.0, flops=0.0, arch="", cls=""))
    assert tokens_per_s(told, Ask()) == tokens_per_s(bare, Ask())


def test_unknown_hardware() -> None:
    """By its columns where there are any; a processor by the memory in its name; else it says so."""
    rate = tokens_per_s(case_of(row(hardware="RTX 9999", arch="ada", bandwidth=1000e9, flops=300e12)), Ask())
    assert 120 < rate < 250
    cpu = case_of(row(hardware="Threadripper X 8ch DDR5-5600", cls="cpu", bandwidth=0.0, flops=0.0))
    assert cpu.specs[0].bandwidth == 8 * 8 * 5600e6
    with pytest.raises(InputError, match="hardware 'RTX 9999' is not known, and the row has no bandwidth"):
        case_of(row(hardware="RTX 9999", bandwidth=0.0))
    with pytest.raises(InputError, match="no peak_fp16_tflops"):
        case_of(row(hardware="RTX 9999", flops=0.0))


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({}, "decode nvidia"), ({"test": "pp512"}, "prompt nvidia"), ({"group": "vulkan"}, "vulkan"),
        ({"hardware": "M2 Max 38c", "cls": "apple"}, "decode apple"),
        ({"hardware": "Tesla P40", "cls": "nvold"}, "old nvidia"),
        ({"n_devices": 4, "split": "layer split equal"}, "decode layers"),
        ({"n_devices": 2, "split": "row split"}, "rows"),
        ({"split": "ngl=12/33", "n_devices": 2}, "decode offload"),
        ({"split": "RPC layer split", "n_devices": 2, "link": "1GbE"}, "decode rpc"),
        ({"split": "RPC layer split", "n_devices": 2, "link": "Wi-Fi AP"}, "wifi"),
        ({"test": "pp512 ub32"}, "small batch"), ({"model": "gpt-oss-20b"}, "experts"),
    ],
)  # fmt: skip
def test_groups(changes: dict[str, object], group: str) -> None:
    assert group_of(case_of(row(**changes))) == group
    assert group in NO_CLAIM or any(promise.group == group for promise in PROMISES)


def test_rows_that_cannot_be_true_are_faults_by_rule() -> None:
    assert fault_of(case_of(row(tps=158.0))) == ""
    assert "faster than its memory" in fault_of(case_of(row(tps=260.0)))  # 260 x 3.75 GB > 936 GB/s
    assert fault_of(case_of(row(tps=10.0, notes="bug case: 13x slower")))
    assert fault_of(case_of(row(tps=1.0))) == ""  # far from any prediction, but no rule against it


def test_depth_devices_and_network_cost_time() -> None:
    def rate(**changes: object) -> float:
        return tokens_per_s(case_of(row(model="llama3-8b", params=8.03e9, file_nbytes=4.58 * 2**30, **changes)), Ask())

    assert rate(test="tg128") > rate(test="tg8192") > rate(test="tg128 @ d32768")
    one, four = rate(), rate(n_devices=4, split="layer split equal")
    hop = constants("layers").values["hop_us"] * 1e-6
    assert 1 / four - 1 / one == pytest.approx(3 * hop)
    remote = rate(n_devices=2, split="RPC layer split", link="1GbE")
    assert 1 / remote - 1 / one == pytest.approx(5.5e-3 + (128256 * 4 + 2 * 4096 * 4) / 0.117e9, rel=1e-3)
    slow = rate(group="pihost")
    assert 1 / slow - 1 / one == pytest.approx(1e-3)
    pipelined = rate(test="pp8192", n_devices=4, split="layer split equal")
    assert rate(test="pp8192") < pipelined < 4 * rate(test="pp8192")


def test_machines_are_solved_from_two_rows() -> None:
    """Decode is linear in the share of layers: two rows give both sides, and all other shares follow."""
    cases = [(case_of(row(split=f"ngl={n}/33", n_devices=2)), 1000 / (99 - 3 * n + 0.5 * n)) for n in (0, 11, 33)]
    host = calibrate_host([cases[0], cases[2]], usual_host(cases[0][0]))
    found = tokens_per_s(cases[1][0], Ask(defaults(), {"RTX 3090 | llama-7b": host}))
    assert found == pytest.approx(cases[1][1], rel=0.01)


def test_fit_recovers_what_made_the_rows() -> None:
    """Rates made by constants far from the priors, with one absurd outlier: the fit finds the constants."""
    priors = {name: value for stage in PRIORS["amd"].values() for name, (value, _) in stage.items()}
    truth = Constants(dict(FIXED["amd"]) | priors | {"eb": 0.7, "c_us": 220.0})
    ask = Ask(lambda cls: truth)
    cases = [
        case_of(row(hardware=name, cls="amd", model=model, params=0.0, file_nbytes=0.0, quant=quant))
        for name in ("RX 7900 XTX", "RX 7800 XT", "RX 6800 XT", "Strix Halo 8060S")
        for model, quant in (("llama-7b", "Q4_0"), ("llama3.2-3b", "Q8_0"), ("llama-13b", "Q4_0"))
    ]
    made = [Measured(case, tokens_per_s(case, ask)) for case in cases]
    made[0] = Measured(made[0].case, made[0].tps * 3)
    found = fit_class("amd", made, Ask(defaults())).values
    assert found["eb"] == pytest.approx(0.7, rel=0.03)
    assert found["c_us"] == pytest.approx(220, rel=0.1)  # the prior, 100, draws a little


def test_minimise_on_a_known_valley() -> None:
    found = minimise(lambda x: np.array([10 * (x[1] - x[0] ** 2), 1 - x[0]]) * 1e-2, np.array([-1.2, 1.0]), 400)
    assert found == pytest.approx([1.0, 1.0], abs=1e-2)


def test_the_table_in_the_repository() -> None:
    """Every row gets a prediction or says why; what the constants were fitted to is well inside the promises."""
    outcomes = predict_table(TABLE)
    assert len(outcomes) == len(read_rows(TABLE))
    assert all(o.why for o in outcomes if o.predicted is None)
    assert sum(o.predicted is None for o in outcomes) < 25
    limits = {promise.group: promise.limit for promise in PROMISES}
    found = {g.group: g for g in figures(outcomes)}
    assert set(limits) <= set(found)
    assert all(found[group].mape <= limit for group, limit in limits.items())
    assert sum(reasons(outcomes).values()) > 0


def test_nothing_is_promised_where_the_calibration_is_missing(tmp_path: Path) -> None:
    table = tmp_path / "rates.csv"
    table.write_text("hardware,cls,bw_gbs,model,quant,split,n_devices,link,test,tps\n"
                     "Xeon W-3245 6ch DDR4-2933,cpu,140.8,llama-7b,Q4_0,ngl=all,1,,tg128,17\n"
                     "Some CPU,cpu,100,llama-7b,Q4_0,ngl=all,1,,tg128,17\n"
                     "RTX 3090,nv,936,llama-7b,Q4_0,ngl=10/33,2,PCIe,tg128,17\n"
                     "Strix Halo 8060S,amd,256,gpt-oss-120b,F16/MXFP4,RPC layer split,2,,tg128,20\n"
                     "Strix Halo 8060S,amd,256,llama-7b,Q4_0,RPC layer split,2,,tg128,20\n")  # fmt: skip
    groups = [outcome.group for outcome in predict_table(table)]
    assert groups == ["decode cpu", "unmeasured", "unmeasured", "decode rpc", "unmeasured"]


@pytest.mark.slow
def test_shipped_constants_are_those_of_the_fit() -> None:
    cases = fair(measured_cases(predict_table(TABLE)))
    for cls, law in fit_all(cases).items():
        shipped = constants(cls).values
        assert set(shipped) == set(law.values), cls
        for name, value in law.values.items():
            assert shipped[name] == pytest.approx(value, rel=2e-3), (cls, name)


@pytest.mark.slow
def test_judging_never_fits_on_what_it_judges() -> None:
    """A device whose rates are wrong by a factor of 3 is judged wrong: its own rows did not teach the law."""
    cases = [m for m in measured_cases(predict_table(TABLE)) if m in fitting([m], "amd")]
    spoilt = [Measured(m.case, m.tps * (0.3 if m.case.row.hardware == "RX 6800 XT" else 1)) for m in cases]
    verdicts, judged = judge(spoilt, n_splits=4)
    errors = [row.error for row in judged if row.ident == "S084"]
    assert errors
    assert mean(errors) > 1.5
    assert {v.promise.group: v.n_rows for v in verdicts}["decode amd"] > 10


@pytest.mark.parametrize("seed", range(20))
def test_damaged_tables_are_predicted_or_say_why(tmp_path: Path, seed: int) -> None:
    """Cells that nobody expects: a positive rate, or one line; never another exception."""
    draw = random.Random(seed)
    with TABLE.open(encoding="utf-8") as file:
        rows = draw.sample(list(csv.DictReader(file)), 30)
    columns = [name for name in rows[0] if name not in ("tps", "n_devices")]
    numbers = {"bw_gbs", "peak_fp16_tflops", "peak_int8_tops", "params_b", "file_gib"}
    for record in rows:
        for name in draw.sample(columns, 3):
            record[name] = draw.choice(["", "0", "16", "0.001"] if name in numbers else DAMAGE)
    path = tmp_path / "damaged.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for outcome in predict_table(path):
        assert "\n" not in outcome.why
        assert outcome.why if outcome.predicted is None else outcome.predicted > 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).parent / "crossdock", *arguments], capture_output=True, text=True)


def test_command(tmp_path: Path) -> None:
    table = tmp_path / "rates.csv"
    table.write_text("id,hardware,model,quant,test,tps\na,RTX 3090,llama3-8b,Q4_K_M,tg128,120\nb,Abacus,llama3-8b,Q4_0,"
                     "tg128,1\nc,RTX 4090,llama-7b,F16,pp512,9000\n")  # fmt: skip
    done = run("simulate", "--published", str(table), "--json")
    first, second, third = json.loads(done.stdout)
    assert set(first) >= {"id", "predicted", "measured", "error"}
    assert first["error"] == pytest.approx(first["predicted"] / 120 - 1)
    assert second["predicted"] is None
    assert "Abacus" in second["why"]
    assert abs(third["error"]) < 0.3
    shown = run("simulate", "--published", str(table))
    assert "decode nvidia" in shown.stdout
    table.write_text("hardware,model,test\n")
    failed = run("simulate", "--published", str(table))
    assert failed.returncode == 4
    assert failed.stderr.count("\n") == 1
    assert "no column 'tps'" in failed.stderr


def test_devices_command() -> None:
    listed = json.loads(run("devices", "--json").stdout)
    rtx = next(device for device in listed["devices"] if device["name"] == "RTX 3090")
    assert rtx["bandwidth_gbs"] == 936
    assert 500 < rtx["decode_gbs"] < 936
    assert "10gbe" in {link["name"] for link in listed["links"]}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("hardware,model,test,tps\nx,y,tg128,fast\n", "line 2: tps is 'fast': expected a number"),
        ("hardware,model,test,tps\nx,y,tg128,0\n", "line 2: tps is '0': expected a positive number"),
        ("hardware,model,test,tps,bw_gbs\nx,y,tg128,1,nan\n", "line 2: bw_gbs is 'nan': expected a number from 0"),
        ("hardware,model,test,tps,n_devices\nx,y,tg128,1,1e9\n", "line 2: n_devices is 1e9: expected at most 4,096"),
        ("hardware,model,test,tps\n", "0 rows: expected 1 to"),
        ("\x00\xff", "no column 'hardware'"),
    ],
)
def test_bad_tables_get_one_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        read_rows(path)
    assert line in str(raised.value)
