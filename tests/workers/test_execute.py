"""The thread team: order, barriers, lifetime, cost of idling, and the same bits without fast paths."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from opcheck import four, resolve

from protocol.errors import PlanError, WorkerError
from protocol.ops import GluOp, Op, UnaryOp
from tests.patience import LATE_S, comes_true
from workers.execute import Executor, ResolvedOp, build_table, encode_params
from workers.kernels import row, warm

ROOT = Path(__file__).parents[2]


def chain(x, n):
    """n additions of x to itself, each reading what the one before wrote: x * 2**n. Returns ops and the last result."""
    ops, arrays = [], [x]
    for _ in range(n):
        arrays.append(np.zeros_like(x))
        ops.append(ResolvedOp(Op.ADD, (), resolve(arrays[-1]), (resolve(arrays[-2]), resolve(arrays[-2]))))
    return ops, arrays


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("futex", [True, False])
def test_each_op_sees_the_one_before(threads, futex, monkeypatch):
    if not futex:
        monkeypatch.setenv("CROSSDOCK_DISABLE", "futex")
    x = np.ones((1, 1, 3, 9000), np.float32)  # too large for one thread alone
    ops, arrays = chain(x, 40)
    table = build_table(ops, threads)
    with Executor(threads) as team:
        for _ in range(30 if futex else 3):
            arrays[-1][...] = 0
            team.run(table)
            assert (arrays[-1] == 2.0**40).all()


def test_a_range_of_rows_and_the_ops_it_belongs_to():
    x = np.ones((1, 1, 1, 8), np.float32)
    ops, arrays = chain(x, 4)
    ops.insert(1, ResolvedOp(Op.RESHAPE, (), resolve(x), (resolve(x),)))
    table = build_table(ops, 2)
    assert table.starts == (0, 1, 1, 2, 3, 4)
    assert table.rows.shape == (4, row.WORDS)
    with Executor(2) as team:
        team.run(table, table.starts[0], table.starts[3])
        assert [float(a[0, 0, 0, 0]) for a in arrays] == [1, 2, 4, 0, 0]
        team.run(table, 2, 2)
        team.run(table, 2)
        assert float(arrays[-1][0, 0, 0, 0]) == 16


def test_threads_end_with_the_executor():
    before = threading.active_count()
    teams = [Executor(3) for _ in range(3)]
    assert threading.active_count() == before + 6
    table = build_table(chain(np.ones((1, 1, 1, 64), np.float32), 3)[0], 3)
    for team in teams:
        team.run(table)
    start = time.monotonic()
    for team in teams:
        team.close()
        team.close()
    assert time.monotonic() - start < LATE_S
    assert threading.active_count() == before
    with pytest.raises(WorkerError, match="closed"):
        teams[0].run(table)


def test_runs_from_several_threads_take_turns():
    x = np.ones((1, 1, 1, 20000), np.float32)
    jobs = [chain(x, 20) for _ in range(4)]
    with Executor(2) as team:
        tables = [build_table(ops, 2) for ops, _ in jobs]
        callers = [threading.Thread(target=lambda t=t: [team.run(t) for _ in range(20)]) for t in tables]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert all((arrays[-1] == 2.0**20).all() for _, arrays in jobs)


@pytest.mark.parametrize("futex", [True, False])
def test_idle_threads_cost_nothing(futex, monkeypatch):
    if not futex:
        monkeypatch.setenv("CROSSDOCK_DISABLE", "futex")
    with Executor(4) as team:
        team.run(build_table(chain(np.ones((1, 1, 1, 64), np.float32), 3)[0], 4))
        assert comes_true(nobody_computes)
        assert sum(nobody_computes() for _ in range(3)) >= 2


def nobody_computes() -> bool:
    start = time.process_time()
    time.sleep(0.3)
    return time.process_time() - start < 0.03


def test_parameters_are_laid_out_as_ggml_does():
    words = encode_params(Op.ROPE, (0, 64, 2, 0, 8192, 500000, 1.0, 0.0, 1.0, 32.0, 1.0))
    assert words[:5].tolist() == [0, 64, 2, 0, 8192]
    assert words[5:11].view(np.float32).tolist() == [500000.0, 1.0, 0.0, 1.0, 32.0, 1.0]
    assert encode_params(Op.SCALE, (2, 0))[:2].view(np.float32).tolist() == [2.0, 0.0]


def test_an_op_without_kernel_ends_the_building():
    x = np.zeros((1, 1, 1, 4), np.int32)
    with pytest.raises(PlanError, match="ADD"):
        build_table([ResolvedOp(Op.ADD, (), resolve(x), (resolve(x), resolve(x)))], 1)


def sample_outputs() -> list[bytes]:
    """Results of one op of each family on fixed inputs."""
    rng = np.random.default_rng(7)
    x, y = (rng.standard_normal((1, 2, 5, 77)).astype(np.float32) for _ in range(2))
    half = x.astype(np.float16)
    mask = np.where(rng.random((1, 1, 5, 77)) < 0.4, -np.inf, 0).astype(np.float16)
    q, k = rng.standard_normal((1, 4, 5, 40)).astype(np.float32), rng.standard_normal((1, 2, 77, 40)).astype(np.float16)
    positions = four(np.arange(90, 92, dtype=np.int32))
    unary = [UnaryOp.SILU, UnaryOp.GELU, UnaryOp.GELU_ERF, UnaryOp.TANH, UnaryOp.EXP]
    cases = [
        (Op.MUL, [x, y], x, ()),
        (Op.DIV, [half, y], half, ()),
        *((Op.UNARY, [x * 9], x, (int(u),)) for u in unary),
        (Op.GLU, [x, y], x, (int(GluOp.SWIGLU), 0)),
        (Op.RMS_NORM, [x], x, (1e-5,)),
        (Op.NORM, [x], x, (1e-5,)),
        (Op.ROPE, [x, positions], x, (0, 76, 0, 0, 0, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0)),
        (Op.ROPE, [x, positions], x, (0, 70, 2, 0, 0, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0)),
        (Op.SOFT_MAX, [x, mask], x, (0.5, 0.0)),
        (Op.CPY, [x], half, ()),
        (Op.CPY, [half], x, ()),
        (Op.FLASH_ATTN_EXT, [q, k, k, mask], np.zeros((1, 5, 4, 40), np.float32), (0.2, 0.0, 0.0, 0)),
    ]
    ops, results = [], []
    for op, srcs, like, params in cases:
        results.append(np.zeros(like.shape, like.dtype))
        ops.append(ResolvedOp(op, params, resolve(results[-1]), tuple(resolve(s) for s in srcs)))
    keep = [s for _, srcs, _, _ in cases for s in srcs]
    with Executor(2) as team:
        team.run(build_table(ops, 2))
    assert keep
    return [r.tobytes() for r in results]


@pytest.mark.slow
@pytest.mark.timeout(600)  # kernels are compiled for these
@pytest.mark.parametrize("features", ["avx2,f16c,fma", "f16c,futex"])
def test_the_same_bits_without_cpu_features(features):
    program = "import sys, test_execute as t; sys.stdout.buffer.write(b''.join(t.sample_outputs()))"
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environ = {**os.environ, "CROSSDOCK_DISABLE": features, "PYTHONPATH": paths}
    for name in [n for n in environ if n.startswith("NUMBA_CPU")]:
        del environ[name]
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"".join(sample_outputs())


def test_warming_reports_each_kernel():
    seen = []
    count = warm.warm(lambda done, total, name: seen.append((done, total, name)))
    assert [done for done, _, _ in seen] == list(range(1, count + 1))
    assert {total for _, total, _ in seen} == {count}
    names = [name for _, _, name in seen]
    assert {"flash_attention", "binary", "lead"} <= set(names)
    assert len(set(names)) == count
    assert warm.is_warm()


def test_one_process_at_a_time_compiles(tmp_path):
    entered = threading.Event()

    def second():
        with warm._alone(tmp_path):
            entered.set()

    with warm._alone(tmp_path):
        other = threading.Thread(target=second)
        other.start()
        assert not entered.wait(0.2)
    other.join(LATE_S)
    assert entered.is_set()
    (tmp_path / "file").touch()
    with warm._alone(tmp_path / "file" / "cache"):
        pass  # a cache that cannot be written is no error
