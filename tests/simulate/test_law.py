"""What a law of whole models says op by op: published rates come out, and nothing counts twice."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean, median

import pytest
from op_by_op import TABLE, Planned, errors, suited

from coordinator.simulate import law
from coordinator.simulate.hardware import DeviceModel, Work
from coordinator.simulate.known import constants, find_spec
from coordinator.simulate.law import BETWEEN, device_of
from coordinator.simulate.rates import LAST_LOGITS, prompt_work, spared_weights
from coordinator.simulate.verdicts import Outcome, predict_table
from coordinator.simulate.work import work_of
from protocol.dtypes import DType


@pytest.fixture(scope="module")
def rows() -> list[Outcome]:
    """Llama 7B in Q4_0, which most devices were measured with: two plans serve all of them."""
    return [
        o for o in suited(predict_table(TABLE))
        if o.row.model == "llama-7b" and o.row.quant == "Q4_0" and o.row.test in ("pp512", "tg128")
    ]  # fmt: skip


def test_published_rates_op_by_op(rows: list[Outcome]) -> None:
    """Within what is promised of the laws themselves, and no further than 5 % to one side."""
    found = errors(rows)
    assert {group: len(e) > 10 for group, e in found.items()} == dict.fromkeys(found, True)
    limits = {"prompt nvidia": 0.10, "decode nvidia": 0.08, "prompt apple": 0.12, "prompt amd": 0.12}
    assert {g: mean(map(abs, found[g])) for g in limits if mean(map(abs, found[g])) > limits[g]} == {}
    biases = {group: median(found[group]) for group in ("prompt nvidia", "prompt apple", "decode nvidia")}
    assert {group: bias for group, bias in biases.items() if abs(bias) >= 0.05} == {}


def test_the_law_counts_what_a_plan_has(rows: list[Outcome]) -> None:
    """Attention and products of a prompt in today's builds, FLOP for FLOP; and what is between the products."""
    case = next(o.case for o in rows if o.case is not None and o.group == "prompt nvidia" and o.row.year > LAST_LOGITS)
    ops = [work_of(op) for lowered in Planned().of(case).lowered for program in lowered.programs for op in program.ops]
    products, attention = prompt_work(case, 512, 0)
    counted = sum(work.flops for work in ops if work.kind in ("matmat", "matvec"))
    assert products.flops == pytest.approx(counted, rel=2e-3)
    assert attention.flops == sum(work.flops for work in ops if work.kind == "attention")
    moved = sum(w.read_nbytes + w.write_nbytes for w in ops if w.kind in ("elementwise", "copy"))
    assert moved == pytest.approx(4.8 / 4.5 * BETWEEN * products.flops, rel=0.02)


def test_old_builds_compute_the_output_for_all_tokens(rows: list[Outcome]) -> None:
    case = next(o.case for o in rows if o.case is not None and o.group == "prompt nvidia")
    old, new = (replace(case, row=replace(case.row, date=date)) for date in ("2024-03", "2024-04"))
    weights = case.load.weights
    assert prompt_work(old, 512, 0)[0].flops == int(2 * weights * 512)
    assert prompt_work(new, 512, 0)[0].flops == int(2 * (weights * 512 - spared_weights(case.load) * 511))
    output, mlp = 32000 * 4096, 3 * 4096 * 11008
    assert spared_weights(case.load) == pytest.approx(output + mlp, rel=0.01)
    assert prompt_work(old, 1, 0)[0].flops == prompt_work(new, 1, 0)[0].flops


def test_scores_go_through_memory_without_flash_attention() -> None:
    """Of two devices that compute alike, the one with more bandwidth gains; with flash attention neither does."""
    spec = find_spec("RTX 4090")
    assert spec is not None
    narrow, wide = (replace(spec, bandwidth=bandwidth) for bandwidth in (0.5e12, 2e12))
    scores = Work("attention", DType.F16, flops=4 * 128 * 10**9, rows=512)  # 1e9 of them, 16 bytes each
    law = constants("nvidia")
    gap = device_of(narrow, law).busy_s(scores) - device_of(wide, law).busy_s(scores)
    assert gap == pytest.approx(16e9 / law.values["eb"] * (1 / 0.5e12 - 1 / 2e12) / spec.k_prompt)
    flash = [device_of(s, law, flash=True) for s in (narrow, wide)]
    assert flash[0].busy_s(scores) == flash[1].busy_s(scores) < device_of(wide, law).busy_s(scores)
    assert flash[0].attention_rate <= flash[0].rate(DType.F16)


def test_overhead_goes_with_the_clock_of_nvidia_devices() -> None:
    spec = find_spec("RTX 4090")
    assert spec is not None
    slow = device_of(replace(spec, ghz=spec.ghz / 2), constants("nvidia"))
    assert slow.launch_s == pytest.approx(2 * device_of(spec, constants("nvidia")).launch_s)
    unknown = device_of(replace(spec, ghz=0.0), constants("nvidia"))
    assert unknown.launch_s == pytest.approx(device_of(replace(spec, ghz=2.0), constants("nvidia")).launch_s)


def test_bytes_between_products_would_count_twice(rows: list[Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [o for o in rows if o.group == "prompt nvidia"]
    once = median(errors(prompts)["prompt nvidia"])
    monkeypatch.setattr(law, "BETWEEN", 0.0)
    twice = median(errors(prompts)["prompt nvidia"])
    assert twice < once - 0.05
    assert abs(once) < abs(twice)


def test_a_layer_of_the_usual_width_takes_what_the_law_says() -> None:
    """A product by itself, and the bytes that go with it: together the rate of whole layers."""
    device = model("RTX 4090")
    whole = Work("matmat", DType.Q4_0, flops=10**12, rows=512)
    product = replace(whole, op="MUL_MAT")
    others = Work("elementwise", DType.F32, read_nbytes=int(10**12 * BETWEEN), op="ADD")
    assert device.busy_s(product) < device.busy_s(whole) == pytest.approx(1e12 / device.rate(DType.Q4_0))
    assert device.busy_s(product) + device.busy_s(others) == pytest.approx(device.busy_s(whole), rel=1e-6)


def test_no_product_is_free() -> None:
    """However slow the memory beside the products is specified."""
    starved = replace(model("RTX 4090"), bandwidth=1e9)
    product = Work("matmat", DType.Q4_0, flops=10**12, rows=512, op="MUL_MAT")
    assert starved.busy_s(product) == pytest.approx(0.5 * 1e12 / starved.rate(DType.Q4_0))


def model(name: str) -> DeviceModel:
    spec = find_spec(name)
    assert spec is not None
    return device_of(spec, constants(spec.cls))
