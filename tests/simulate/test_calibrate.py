"""Calibration: costs that are fitted from times, the files that hold them, and real workers."""

from __future__ import annotations

import sys
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.calibrate import Measured, fitted, write
from coordinator.cli.calibrate_measure import (
    DIGEST_NBYTES,
    HOP_NBYTES,
    HOPS,
    HOPS_AFTER,
    OUTPUT_NBYTES,
    Chains,
    Effort,
    Operations,
    Raw,
    Steps,
    fit_steps,
    noted_shares,
    samples_of,
)
from coordinator.cli.calibrate_rig import Rig
from coordinator.cli.parser import parse
from coordinator.cli.simulate_model import machine_of
from coordinator.config import parse_workers
from coordinator.model.presets import open_blueprint
from coordinator.runtime.session import devices_of
from coordinator.schedule.lower import Lowered
from coordinator.schedule.placement import PlacementOptions
from coordinator.simulate.calibrate_cases import TYPES, cases, reading
from coordinator.simulate.calibrate_fit import (
    Sample,
    errors,
    fit_cost,
    fit_costs,
    fit_mixed,
    fit_sums,
    line,
    noise,
    typical,
)
from coordinator.simulate.calibrate_layers import LARGE, SMALL, Shape, ends, layer_cases, layers
from coordinator.simulate.calibrate_room import WEIGHTS, Room
from coordinator.simulate.engine import simulate
from coordinator.simulate.hardware import CACHES_SWEPT, Cost, DeviceModel, LinkModel, Toll, Work
from coordinator.simulate.lowered import time_program
from coordinator.simulate.machine import Machine, make_machine
from coordinator.simulate.series import Load, Options, make_series
from coordinator.simulate.system import load_system
from coordinator.simulate.timed import Job
from coordinator.simulate.work import DIGEST, OUTPUT, weight_footprint, work_of
from protocol.dtypes import DType
from protocol.errors import Exit, UsageError
from protocol.messages import Port
from protocol.ops import Op
from protocol.program import Kind
from workers.kernels import table
from workers.kernels.stage import Operand

sys.path.insert(0, str(Path(__file__).parent))

from machines import gpu, host, machine

TRUE = Cost(op_s=2e-7, weight_s=1e-11, missed_s=4e-11, byte_s=3e-10, flop_s=1e-12, missed_op_s=5e-7)
EXTRA = Cost(op_s=5e-8, byte_s=1e-11, line_s=1.5e-8, exp_s=9e-10)
ROOM = Room(Rig.ARENA, 4 << 20)
STEPS = Steps(
    Toll(50e-6, 30e-6), Toll(80e-6, 40e-6), Toll(6e-6, 3e-6, 1e-6), Toll(4e-6, 5e-6, 2e-6),
    Toll(25e-6, 70e-6), Toll(3e-6, 2e-6),
    1e-10, 2e-10, 3e-6, 7e-10, 3e10, 0.1,
)  # fmt: skip
MIXED = Toll(1e-7, 3e-7)


def product(k: int, n: int, rows: int = 1) -> Work:
    weights = DType.Q8_0.row_nbytes(k) * n
    return Work("matvec", DType.Q8_0, weights, k * n, 4 * k * rows, 4 * n * rows, 2 * k * n * rows, rows)


def samples(cost: Cost) -> list[Sample]:
    works = [product(256, 64), product(256, 256), product(1536, 576), product(512, 1536, 4), product(2048, 1024)]
    pairs = [(work, missed) for work in works for missed in (False, True)]
    return [Sample(work, cost.seconds(work, float(missed)), missed) for work, missed in pairs]


def test_the_fit_finds_the_costs_that_made_the_times() -> None:
    found = fit_cost(samples(TRUE))
    for name in ("op_s", "weight_s", "missed_s", "byte_s", "flop_s", "missed_op_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    assert max(map(abs, errors(samples(TRUE), {"matvec.q8_0": found})["matvec.q8_0"])) < 1e-9


def test_the_fit_tells_lines_and_exponentials_from_bytes() -> None:
    shapes = ((64, 1, 1), (64, 9, 1), (32, 4, 64), (128, 8, 16), (64, 3, 40), (128, 2, 100))
    works = [
        Work("elementwise", DType.F32, 0, 0, 4 * d * n * m, 4 * d * n * m, op="ROPE", lines=n * m, exps=d * m)
        for d, n, m in shapes
    ]
    found = fit_cost([Sample(work, EXTRA.seconds(work)) for work in works])
    for name in ("op_s", "byte_s", "line_s", "exp_s"):
        assert getattr(found, name) == pytest.approx(getattr(EXTRA, name), rel=1e-6), name
    hidden = Work("matmat", DType.F32, hidden_nbytes=1000)
    assert EXTRA.seconds(hidden) == pytest.approx(5e-8 + 1e-8)


def test_no_cost_is_negative_whatever_the_times() -> None:
    noisy = [replace(s, seconds=s.seconds * (1.6 if i % 3 else 0.4)) for i, s in enumerate(samples(TRUE))]
    found = fit_cost(noisy)
    assert min(found.op_s, found.weight_s, found.byte_s, found.flop_s) >= 0.0
    assert found.missed_s >= found.weight_s
    assert fit_costs(noisy) == {"matvec.q8_0": found}


def test_times_that_do_not_grow_make_a_constant() -> None:
    assert line([(1, 3e-6), (10, 3e-6), (100, 3e-6)]) == pytest.approx((3e-6, 0.0))
    assert line([(100, 1e-6), (300, 3e-6)]) == pytest.approx((0.0, 1e-8))


def test_neighbours_do_not_count() -> None:
    quiet, busy = [1.0, 1.1, 1.2], [5.0] * 13
    assert typical(busy + quiet) == 1.1
    assert noise(busy + quiet) == pytest.approx(5.0 / 1.1 - 1.0)
    assert noise([2.0] * 8) == 0.0
    assert typical([3.0]) == 3.0


def test_prices_are_found_from_sums() -> None:
    counts = [(1, 0, 0), (1, 1, 2), (1, 2, 2), (1, 1, 9)]
    prices = (50e-6, 80e-6, 7e-6)
    rows = [(row, sum(n * price for n, price in zip(row, prices, strict=True))) for row in counts]
    assert fit_sums(rows) == pytest.approx(prices)


def test_what_ops_cost_more_among_others() -> None:
    works = [product(256, 64), product(512, 512)]
    costs = {"matvec.q8_0": TRUE}
    alone = {missed: sum(TRUE.seconds(work, float(missed)) for work in works) for missed in (False, True)}
    mixtures = [(works, alone[missed] + 2 * more, missed) for missed, more in ((False, 1e-7), (True, 4e-7))]
    found = fit_mixed(mixtures, costs)
    assert (found.base_s, found.missed_s) == pytest.approx((1e-7, 3e-7))
    assert fit_mixed([(works, alone[missed] / 2, missed) for missed in (False, True)], costs) == Toll()
    slower = [Sample(work, 2 * TRUE.seconds(work, float(missed)), missed) for missed in (False, True) for work in works]
    doubled = [(works, 2 * seconds, missed) for _, seconds, missed in mixtures]
    found = fit_mixed(doubled, costs, slower)  # what was measured counts more than what was fitted
    assert (found.base_s, found.missed_s) == pytest.approx((2e-7, 6e-7))


def outside_of(step: Toll, further: Toll, wake: Toll, each: Toll) -> dict[str, list[float]]:
    """What chains take outside of ops when this is what steps cost."""
    found = {f"bytes {n}": [4e-10 * n + 1e-4] for n in HOP_NBYTES} | {f"output {n}": [1e-4] for n in OUTPUT_NBYTES}
    found |= {"readers 1": [1e-3], "readers 2": [1e-3]}
    found |= {f"digest {n}": [step.seconds(0.0) + 7e-6 + 6e-10 * n] for n in DIGEST_NBYTES}
    for after, missed, hops in (("", 0.0, HOPS), (" after a sweep", 1.0, HOPS_AFTER)):
        a, b, c, d = (toll.seconds(missed) for toll in (step, further, wake, each))
        found |= {f"alone{after}": [a], f"three{after}": [a + 2 * b + 3 * c + 3 * d]}
        found |= {f"hops {n} of {k}{after}": [a + b + n * c + n * k * d] for n, k in hops}
    return found


def test_what_a_run_costs_besides_its_op() -> None:
    """Runs are noted with their one op, and simulated as what they cost besides and the op."""
    first, split, mixed = Toll(2e-7, 1e-6, 3e-6), Toll(1e-7, 8e-7, 2e-6), Toll(1e-8, 2e-7)
    costs = {"GET_ROWS.q8_0": Cost(op_s=3e-8, byte_s=1e-11), "MUL.f32": Cost(op_s=2e-8, byte_s=2e-11)}
    device = DeviceModel("cpu", "cpu", 0, 1e9, {"f32": 1e9}, costs=costs, mixed=mixed)
    others = (Toll(50e-6, 30e-6), Toll(80e-6, 40e-6), Toll(25e-6, 70e-6), Toll(3e-6, 2e-6))
    seconds = outside_of(*others)
    for after, missed, far, shape in (
        ("", 0.0, 0.0, SMALL[0]), (" after a sweep", 1.0, 0.0, LARGE[0]), (" behind others", 1.0, 1.0, LARGE[0]),
    ):  # fmt: skip
        of = ends(ROOM, shape, 1 << 20, 4096)
        seconds[f"first{after}"] = [first.seconds(missed, far) + device.seconds(work_of(of.lookup), missed)]
        seconds[f"split{after}"] = [split.seconds(missed, far) + device.seconds(work_of(of.norm), missed)]
    found = fit_steps(seconds, costs, mixed, far=ROOM)
    assert (found.digest_s, found.digest_byte_s) == pytest.approx((7e-6, 6e-10), rel=1e-3)
    pairs = [(found.first, first), (found.split, split)]
    pairs += zip((found.step, found.further, found.wake, found.each), others, strict=True)
    for toll, expected in pairs:
        assert astuple(toll) == pytest.approx(astuple(expected))
    assert fit_steps(seconds, {key: Cost(op_s=1.0) for key in costs}, far=ROOM).split == Toll()


def test_what_memory_has_for_all_is_known_when_they_slow_each_other_down() -> None:
    seconds = outside_of(*[Toll(1e-5)] * 4)
    seconds |= {
        f"{name}{after}": [1e-6] for name in ("first", "split") for after in ("", " after a sweep", " behind others")
    }
    costs = {"GET_ROWS.q8_0": Cost(op_s=3e-8), "MUL.f32": Cost(op_s=2e-8)}
    assert fit_steps(seconds, costs, far=ROOM).memory == 0.0
    alone = {name: took for name, took in seconds.items() if not name.startswith("readers")}
    assert fit_steps(alone, costs, far=ROOM).memory == 0.0
    nbytes = weight_footprint(reading(ROOM).ops)
    assert 0.8 * ROOM.cold_nbytes < nbytes <= ROOM.cold_nbytes
    for n in (2, 3):
        slower = seconds | {f"readers {n}": [1.5e-3]}
        assert fit_steps(slower, costs, far=ROOM).memory == pytest.approx(n * nbytes / 1.5e-3)


@pytest.mark.parametrize("shape", [SMALL[0], LARGE[0]])
def test_noted_runs_find_neither_code_nor_data_where_others_left_it(shape: Shape) -> None:
    worker = noted_shares(ROOM, shape, 3 << 20, layers(ROOM, shape, 1))[2]
    runs = [worker.ops[item.first : item.last] for item in worker.instructions if item.kind is Kind.RUN]
    assert [[op.op for op in run] for run in runs] == [[Op.GET_ROWS], [Op.MUL], [Op.MUL_MAT]]
    received = {(item.offset, item.nbytes) for item in worker.instructions if item.kind is Kind.RECV}
    sent = {(item.offset, item.nbytes) for item in worker.instructions if item.kind is Kind.SEND}
    (lookup,), (norm,), (output,) = runs
    assert sent == {(lookup.dst.offset, lookup.dst.span)}
    assert norm.src[0] is not None
    assert received == {(norm.src[0].offset, norm.src[0].span)}
    assert output.src[1] == norm.dst
    places = [lookup.dst, norm.src[0], norm.src[1], norm.dst, output.src[0], output.dst]
    spans = sorted((o.offset, o.offset + o.span) for o in places if o is not None)
    assert len(spans) == len(places)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= ROOM.nbytes
    assert output.src[0] is not None
    assert output.src[0].offset >= WEIGHTS
    for op in (lookup, norm, output):
        operands = [None if ref is None else Operand(ref.dtype, ref.ne, ref.nb) for ref in (op.dst, *op.src)]
        assert operands[0] is not None
        assert table.select(op.op, operands[0], tuple(operands[1:]), op.params, 1, table.EXACT), op


def test_measured_costs_replace_the_law() -> None:
    device = DeviceModel("cpu", "cpu", 0, 1e9, {"f32": 1e9}, costs={"matvec.q8_0": TRUE, "ADD": Cost(op_s=1e-3)})
    work = product(1536, 576)
    moved, flops = 4 * (1536 + 576), 2 * 1536 * 576
    other = 2e-7 + moved * 3e-10 + flops * 1e-12
    assert device.seconds(work) == pytest.approx(other + work.weight_nbytes * 1e-11)
    assert device.seconds(work, 1.0) == pytest.approx(other + 5e-7 + work.weight_nbytes * 4e-11)
    assert device.seconds(work, 0.5) == pytest.approx(other + 2.5e-7 + work.weight_nbytes * 2.5e-11)
    mixed = replace(device, mixed=Toll(1e-6, 2e-6))
    assert mixed.seconds(work, 0.5) - device.seconds(work, 0.5) == pytest.approx(2e-6)
    add = Work("elementwise", DType.F32, read_nbytes=8, write_nbytes=4, op="ADD")
    assert device.seconds(add) == 1e-3
    assert device.seconds(replace(add, op="MUL")) == pytest.approx(12e-9)


def test_weights_miss_the_cache_when_there_are_too_many() -> None:
    device = DeviceModel("cpu", "cpu", 0, 1e9, {"f32": 1e9}, cache_nbytes=32 << 20)
    assert [device.missed(n << 20) for n in (0, 8, 16, 32, 90)] == [0.0, 0.0625, 0.25, 1.0, 1.0]
    assert replace(device, cache_nbytes=0).missed(1 << 40) == 0.0


def test_workers_have_kernels_for_every_case() -> None:
    chosen = {(case.key, case.missed): case.ops[0] for case in (*cases(ROOM), *layer_cases(ROOM))}
    assert {f"matvec.{dtype.label}" for dtype in TYPES} <= {key for key, _ in chosen}
    for op in chosen.values():
        operands = [None if ref is None else Operand(ref.dtype, ref.ne, ref.nb) for ref in (op.dst, *op.src)]
        assert operands[0] is not None
        assert table.select(op.op, operands[0], tuple(operands[1:]), op.params, 1, table.EXACT), op


def step_s(lowered: Lowered, found: Machine) -> float:
    """One evaluation on this machine."""
    timed = time_program(lowered, found.models, found.fabric)
    return simulate([model.async_copies for model in found.models], found.fabric, [timed], [[Job(0)]], check=True).end_s


def test_receiving_costs_a_wake_up_at_each_split_and_something_for_each_transfer() -> None:
    """From the host to an accelerator and back: nobody else computes meanwhile."""

    def joined(link: LinkModel) -> Machine:
        return machine(gpu("gpu0"), link=link)

    plain = LinkModel("shared", 0.0, 1e12)
    load = Load(n_prompt=4, n_predict=1, n_images=0)
    options = Options(PlacementOptions(n_gpu_layers=8))
    lowered = make_series(open_blueprint("smollm2-135m"), joined(plain), options, load).lowered[-1]
    kinds = [[item.kind for item in program.instructions] for program in lowered.programs]
    assert [sum(a is not Kind.RECV and b is Kind.RECV for a, b in pairwise([None, *k])) for k in kinds] == [1, 1]
    n = len(lowered.transfers)
    assert n > 2
    base = step_s(lowered, joined(plain))
    assert step_s(lowered, joined(replace(plain, wake=Toll(1e-3)))) == pytest.approx(base + 2e-3)
    assert step_s(lowered, joined(replace(plain, each=Toll(1e-4)))) == pytest.approx(base + 1e-4 * n)


def test_what_an_emptied_cache_adds() -> None:
    shared = LinkModel("shared", 0.0, 1e12, fixed_s_per_token=1e-4, fixed_missed_s=5e-4, wake=Toll(0.0, 1e-3))
    load, options = Load(n_prompt=4, n_predict=1, n_images=0), Options(PlacementOptions(n_gpu_layers=8))

    def of(cache: int, link: LinkModel, **changes: Any) -> Machine:
        models = (replace(gpu("gpu0"), cache_nbytes=cache, **changes), replace(host(), cache_nbytes=cache, **changes))
        return make_machine(models, lambda source, target: link)

    lowered = make_series(open_blueprint("smollm2-135m"), of(0, shared), options, load).lowered[-1]
    huge, tiny = of(1 << 40, shared), of(1 << 20, shared)
    assert step_s(lowered, tiny) - step_s(lowered, huge) == pytest.approx(5e-4 + 2e-3)
    tolls = {"first": Toll(1e-3, 2e-3), "split": Toll(1e-5, 2e-5)}
    runs = sum(item.kind is Kind.RUN for program in lowered.programs for item in program.instructions)
    assert runs > 2
    for cache, first, split in ((1 << 40, 1e-3, 1e-5), (1 << 20, 3e-3, 3e-5)):
        more = step_s(lowered, of(cache, shared, **tolls)) - step_s(lowered, of(cache, shared))
        assert more == pytest.approx(2 * first + (runs - 2) * split, rel=1e-3)


def test_a_reply_with_a_measured_cost_takes_no_link() -> None:
    load = Load(n_prompt=4, n_predict=1, n_images=0)
    found = machine(gpu("gpu0"), link=LinkModel("slow", 1.0, 1e12))
    lowered = make_series(open_blueprint("smollm2-135m"), found, Options(), load).lowered[-1]
    replying = tuple(replace(model, costs={OUTPUT: Cost(byte_s=1e-9)}) for model in found.models)
    before, after = step_s(lowered, found), step_s(lowered, replace(found, models=replying))
    assert before - after == pytest.approx(1.0, rel=1e-3)


def test_what_others_read_in_a_step_costs_runs_of_ops() -> None:
    cache = 32 << 20
    models = tuple(replace(model, cache_nbytes=cache) for model in (gpu("gpu0"), host()))
    link = LinkModel("shared", 0.0, 1e12)
    plain = make_machine(models, lambda source, target: link)
    load, options = Load(n_prompt=4, n_predict=1, n_images=0), Options(PlacementOptions(n_gpu_layers=8))
    lowered = make_series(open_blueprint("smollm2-135m"), plain, options, load).lowered[-1]
    taxed = tuple(replace(model, first=Toll(0.0, 0.0, 1e-3), split=Toll(0.0, 0.0, 1e-5)) for model in models)
    runs = [sum(item.kind is Kind.RUN for item in program.instructions) for program in lowered.programs]
    read = [weight_footprint(program.ops) for program in lowered.programs]
    assert 0 < read[0] < CACHES_SWEPT * cache < read[1], "of what the host reads the accelerator loses all"
    lost = (1.0, read[0] / (CACHES_SWEPT * cache))
    expected = sum(share * (1e-3 + (n - 1) * 1e-5) for share, n in zip(lost, runs, strict=True))
    assert step_s(lowered, make_machine(taxed, lambda source, target: link)) - step_s(lowered, plain) == pytest.approx(
        expected, rel=1e-3
    )


def test_a_hash_takes_its_time_where_it_was_measured() -> None:
    load = Load(n_prompt=4, n_predict=1, n_images=0)
    found = machine(gpu("gpu0"))
    lowered = make_series(open_blueprint("smollm2-135m"), found, Options(), load).lowered[-1]
    accelerator, *others = lowered.programs
    hashing = replace(lowered, programs=(replace(accelerator, digests=(Port("hashed", 0, 0, 1 << 20),)), *others))
    costs = {DIGEST: Cost(2e-3, byte_s=1e-9)}
    knowing = replace(found, models=tuple(replace(model, costs=costs) for model in found.models))
    assert step_s(hashing, found) == step_s(lowered, found) == step_s(lowered, knowing)
    assert step_s(hashing, knowing) - step_s(lowered, knowing) == pytest.approx(2e-3 + (1 << 20) * 1e-9)


def test_cases_have_one_kind_each_and_stay_inside_their_room() -> None:
    found = list(cases(ROOM, quick=True))
    assert len({case.name for case in found}) == len(found)
    for case in found:
        assert {work_of(op).key for op in case.ops} == {case.key}
        operands = [o for op in case.ops for o in (op.dst, *op.src) if o is not None]
        assert all(o.offset >= 0 and o.offset + o.span <= ROOM.nbytes for o in operands), case.name
    assert {"matvec.q4_1", "matmat.f16", "attention.f16", "prompt-attention.f32"} < {case.key for case in found}


def calibration() -> Measured:
    found = [
        Sample(work_of(case.ops[0]), 1e-6 * (n + 1), case.missed) for n, case in enumerate(cases(ROOM, quick=True))
    ]
    costs = fit_costs(found) | {OUTPUT: Cost(byte_s=2e-10), DIGEST: Cost(3e-6, byte_s=7e-10), "SOFT_MAX.f32": EXTRA}
    return Measured(found, costs, MIXED, 0.05, STEPS, STEPS, 1, 32 << 20)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    topology, found = parse_workers("cpu:1,accel:2:64MiB", 1), calibration()
    system, network, messages = write(tmp_path / "here.toml", topology, found)
    assert [p.name for p in (system, network, messages)] == ["here.toml", "here-network.toml", "here-messages.toml"]
    machine = machine_of(str(system), str(network))
    assert machine.names == ("accel0", "accel1", "cpu0")
    assert machine.limits == (64 << 20, 64 << 20, None)
    for model in machine.models:
        assert set(model.costs) == set(found.costs)
        for key, cost in found.costs.items():
            for name in ("op_s", "weight_s", "byte_s", "flop_s", "missed_op_s", "line_s", "exp_s"):
                assert getattr(model.costs[key], name) == pytest.approx(getattr(cost, name), rel=1e-3), key
        for toll, expected in ((model.first, STEPS.first), (model.split, STEPS.split), (model.mixed, MIXED)):
            assert astuple(toll) == pytest.approx(astuple(expected))
        assert (model.step_s, model.step_missed_s, model.cache_nbytes) == pytest.approx((50e-6, 30e-6, 32 << 20))
    assert [pool.memory for pool in machine.fabric.pools] == [pytest.approx(STEPS.memory)]
    route = machine.fabric.between(2, 0)
    assert (route.wake.base_s, route.wake.missed_s) == pytest.approx((25e-6, 70e-6))
    assert (route.each.base_s, route.each.missed_s) == pytest.approx((3e-6, 2e-6))
    assert (route.latency_s, route.bandwidth) == pytest.approx((0.0, 1e10))
    assert (route.fixed_s, route.fixed_missed_s) == pytest.approx((80e-6, 40e-6))


def test_the_scheduler_sees_the_devices_of_a_run(tmp_path: Path) -> None:
    """Or the simulated plan would be another one."""
    topology = parse_workers("cpu:2,accel:1", 1)
    system, network, _ = write(tmp_path / "here.toml", topology, calibration())
    simulated = machine_of(str(system), str(network)).devices
    real = devices_of(topology)
    assert [replace(d, offload_min_batch=0) for d in simulated] == [replace(d, offload_min_batch=0) for d in real]


def test_the_written_files_simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system, network, _ = write(tmp_path / "here.toml", parse_workers("cpu:1,accel:1", 1), calibration())
    arguments = ["simulate", "--system", str(system), "--network", str(network), "--prompt", "8", "-n", "2", "--check"]
    assert parse(arguments)() == Exit.OK
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("costs = 3", "costs is 3: expected a table"),
        ("costs = { ADD = 3 }", "costs: ADD is 3: expected a table"),
        ("costs = { ADDED = { us = 1 } }", "costs: 'ADDED': expected KIND.TYPE or OP"),
        ('costs = { "matvec.q9" = { us = 1 } }', "costs: 'matvec.q9': expected KIND.TYPE or OP"),
        ("costs = { ADD = { us = -1 } }", "costs: ADD: us is -1: expected 0 to"),
        ("costs = { ADD = { line_ns = -1 } }", "costs: ADD: line_ns is -1: expected 0 to"),
        ('costs = { ROPE = { exp_ns = "1" } }', "costs: ROPE: exp_ns is '1': expected a number"),
        ("costs = { ADD = { ms = 1 } }", "costs: ADD: unknown key 'ms'"),
        ("split_us = true", "split_us is True: expected a number"),
        ("first_missed_us = -1", "first_missed_us is -1: expected 0 to"),
        ("accelerator = 1", "accelerator is 1: expected true or false"),
    ],
)
def test_wrong_costs_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(f'schema = 1\n[[device]]\nname = "a"\nclass = "cpu"\nbandwidth_gbs = 50\nfp16_tflops = 1\n{text}\n')
    with pytest.raises(UsageError) as error:
        load_system(file)
    assert message in str(error.value)
    assert "device 1" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "/nowhere/at/all.toml"], "--output /nowhere/at/all.toml: no such folder"),
        (["-o", "/"], "--output /: it is a folder"),
        (["-o", "."], "--output .: it is a folder"),
        (["-o", ""], "the value is empty"),
        (["-o", "/dev/null"], "--output /dev/null: not a regular file"),
        (["-o", "x.toml", "-w", "null:2"], "--workers null:2: null workers compute nothing that could be measured"),
        (["-o", "x.toml", "-w", "gpu:1"], "--workers 'gpu:1'"),
        ([], "the following arguments are required: -o/--output"),
    ],
)
def test_what_cannot_be_meant(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        parse(["calibrate", *arguments])()
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_real_workers_can_be_calibrated(tmp_path: Path) -> None:
    topology, effort = parse_workers("cpu:1,accel:2", 1), Effort(1, 1, quick=True)
    with Operations(topology, ROOM, quick=True) as operations:
        ops = operations.measure(effort.op_rounds, lambda _: None)
    assert all(len(seconds) == 1 and min(seconds) > 0.0 for seconds in ops.values())
    costs = fit_costs(samples_of(ROOM, effort, ops))
    long, short = product(4096, 1024), product(256, 64)
    assert costs["matvec.q8_0"].seconds(long) >= costs["matvec.q8_0"].seconds(short) >= 0.0  # how long is no test
    with Chains(topology, ROOM) as chains:
        steps = chains.measure(effort.step_rounds, lambda _: None)
    raw = Raw(ops, steps, steps)
    found = fitted(raw, 1, effort, ROOM)
    assert min(found.shared.step.base_s, found.shared.byte_s, found.messages.wake.base_s) >= 0.0
    system, network, _ = write(tmp_path / "here.toml", topology, found)
    assert len(machine_of(str(system), str(network)).models) == 3
