"""Where threads wait for each other: everywhere where bytes are shared, and hardly anywhere else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from opcheck import Array, Raw, four, resolve

from protocol.dtypes import DType
from protocol.ops import GluOp, Op
from workers.barriers import Step, plan_flags
from workers.execute import Executor, ResolvedOp, Table, build_table
from workers.kernels import row
from workers.kernels.stage import Kernel, Operand, Stage

RNG = np.random.default_rng(3)


def weights(n: int, k: int) -> Raw:
    """Q8_0 of any bits, with scales around 0.01."""
    raw = RNG.integers(0, 256, (n * k // 32, 34), np.uint8)
    raw[:, :2] = RNG.uniform(0.005, 0.015, n * k // 32).astype(np.float16)[:, None].view(np.uint8)
    return Raw(raw.reshape(-1), DType.Q8_0, (k, n, 1, 1))


def made(op: Op, dst: Array, *src: Array | Raw, params: tuple[int | float, ...] = ()) -> ResolvedOp:
    return ResolvedOp(op, params, resolve(dst), tuple(resolve(s) for s in src))


class Layer:
    """The feed-forward half and the projections of a layer for `m` tokens: every kind of hand-over between threads."""

    def __init__(self, m: int, k: int = 512) -> None:
        def zeros(n: int) -> Array:
            return four(np.zeros((m, n), np.float32))

        self.x = four(RNG.standard_normal((m, k)).astype(np.float32))
        self.norm, self.q, self.k, self.v, self.out = zeros(k), zeros(k), zeros(k), zeros(k), zeros(k)
        self.gate, self.up = zeros(3 * k), zeros(3 * k)
        self.factors = four(RNG.standard_normal(k).astype(np.float32))
        self.matrices = [weights(n, j) for n, j in ((k, k), (k, k), (k, k), (3 * k, k), (3 * k, k), (k, 3 * k))]
        wq, wk, wv, wg, wu, wd = self.matrices
        self.ops = [
            made(Op.RMS_NORM, self.norm, self.x, params=(1e-5,)),
            made(Op.MUL, self.norm, self.norm, self.factors),
            made(Op.MUL_MAT, self.q, wq, self.norm),
            made(Op.MUL_MAT, self.k, wk, self.norm),
            made(Op.MUL_MAT, self.v, wv, self.norm),
            made(Op.ADD, self.q, self.q, self.k),
            made(Op.MUL_MAT, self.gate, wg, self.q),
            made(Op.MUL_MAT, self.up, wu, self.q),
            made(Op.GLU, self.gate, self.gate, self.up, params=(int(GluOp.SWIGLU), 0)),
            made(Op.MUL_MAT, self.out, wd, self.gate),
            made(Op.ADD, self.x, self.out, self.v),
        ]

    def results(self) -> bytes:
        return b"".join(a.tobytes() for a in (self.norm, self.q, self.k, self.v, self.gate, self.out, self.x))


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("threads", [2, 4])
def test_the_same_bytes_for_every_number_of_threads(m: int, threads: int) -> None:
    layer = Layer(m)
    start = layer.x.copy()
    with Executor(1) as one, Executor(threads) as team:
        one.run(build_table(layer.ops, 1))
        expected, layer.x[...] = layer.results(), start
        table = build_table(layer.ops, threads)
        for _ in range(20):
            layer.q[...], layer.gate[...], layer.x[...] = 7, 7, start
            team.run(table)
            assert layer.results() == expected


def flags(table: Table, flag: int) -> int:
    return int(((table.rows[:, row.FLAGS] & flag) != 0).sum())


def test_hardly_any_barriers_and_nothing_quantised_twice() -> None:
    layer = Layer(1)  # kept: a table's own memory must not be what an operand has just given back
    table = build_table(layer.ops, 2)
    assert len(table.rows) == 17
    assert flags(table, row.REPEAT) == 3  # k, v; up
    assert flags(table, row.BARRIER) == 6  # around three groups of products; the last one ends with the job
    assert flags(table, row.ALONE) == 8 + 3  # with the three that are not run
    alone = build_table(layer.ops, 1)
    assert (flags(alone, row.REPEAT), flags(alone, row.BARRIER), flags(alone, row.ALONE)) == (3, 0, 0)


def test_a_job_that_starts_behind_what_a_row_repeats() -> None:
    """Every way to cut the layer into jobs, as splits do."""
    layer = Layer(3)
    start = layer.x.copy()
    with Executor(2) as team:
        table = build_table(layer.ops, 2)
        team.run(table)
        expected = layer.results()
        for cut, later in itertools.combinations(range(1, len(layer.ops)), 2):
            layer.x[...] = start
            for first, last in itertools.pairwise((0, cut, later, len(layer.ops))):
                table.work[:] = 99  # another program's
                team.run(table, table.starts[first], table.starts[last])
            assert layer.results() == expected, (cut, later)


def test_activations_that_change_are_quantised_again() -> None:
    x, y = (four(RNG.standard_normal(512).astype(np.float32)) for _ in range(2))
    a, b, w = four(np.zeros(512, np.float32)), four(np.zeros(512, np.float32)), weights(512, 512)
    ops = [made(Op.MUL_MAT, a, w, x), made(Op.ADD, x, x, y), made(Op.MUL_MAT, b, w, x)]
    with Executor(1) as team:
        table = build_table(ops, 1)
        assert flags(table, row.REPEAT) == 0
        team.run(table)
        team.run(build_table([made(Op.MUL_MAT, a, w, x)], 1))
    assert a.tobytes() == b.tobytes()


def _noop(row: int, ith: int, nth: int) -> None:
    """Never called."""


KERNELS = [Kernel(_noop) for _ in range(3)]


def random_step(rng: np.random.Generator) -> Step:
    """Few addresses, so that much collides; large and small results."""

    def operand() -> tuple[int, Operand]:
        n = int(rng.choice([64, 4096, 32768]))
        return int(rng.integers(0, 12)) * 4096, Operand(DType.F32, (n, 1, 1, 1), (4, 4 * n, 4 * n, 4 * n))

    kind = rng.integers(0, 4)
    shared = int(rng.choice([1024, 2048]))
    stage = [
        Stage(KERNELS[0], 4096, (1, shared), makes=shared),
        Stage(KERNELS[1], 4096, (1, shared), takes=shared),
        Stage(KERNELS[2], int(rng.choice([0, 3000]))),
        Stage(KERNELS[2]),
    ][kind]
    if kind < 2:
        n = 64 if rng.random() < 0.5 else 32768
        columns = (1 << 16, Operand(DType.F32, (n, 1, 1, 1), (4, 4 * n, 4 * n, 4 * n)))
        return Step(stage, Op.MUL_MAT, operand(), (operand(), columns))
    return Step(stage, Op.ADD, operand(), (operand(), operand()))


def touched(step: Step, work: int) -> tuple[set[int], set[int]]:
    """Read and written places in units of 512 bytes; scratch memory lies behind all operands."""

    def units(start: int, nbytes: int) -> set[int]:
        return set(range(start // 512, -(-(start + nbytes) // 512)))

    reads = set().union(*(units(at, 4 * t.ne[0]) for at, t in step.src if t))  # type: ignore[misc]
    writes = units(step.dst[0], 4 * step.dst[1].ne[0])
    stage = step.stage
    if stage.makes:
        return reads, units(work, stage.makes)
    if stage.takes:
        return reads | units(work, stage.takes), writes
    return reads, writes | units(work, stage.work_nbytes)


def check_order(steps: Sequence[Step], planned: Sequence[tuple[int, int]], work: int) -> None:
    """No barrier between two rows of which not both are the first thread's: then they share no byte that is written."""
    for i, j in itertools.combinations(range(len(steps)), 2):
        if any(planned[k][0] & row.BARRIER for k in range(i, j)) or planned[i][0] & planned[j][0] & row.ALONE:
            continue
        if (planned[i][0] | planned[j][0]) & row.REPEAT:
            continue
        (reads, writes), (more, other) = touched(steps[i], work), touched(steps[j], work)
        assert not writes & (more | other), (i, j)
        assert not other & reads, (i, j)


def test_rows_without_a_barrier_share_nothing() -> None:
    rng = np.random.default_rng(11)
    barriers = repeats = 0
    for _ in range(300):
        work = 1 << 20
        steps = [random_step(rng) for _ in range(12)]
        planned = plan_flags(steps, work, 2)
        check_order(steps, planned, work)
        barriers += sum(flag & row.BARRIER for flag, _ in planned)
        for number, (flag, earlier) in enumerate(planned):
            if flag & row.REPEAT:
                repeats += 1
                assert earlier < number
                assert steps[earlier].src[1] == steps[number].src[1]
    assert 300 < barriers < 300 * 11
    assert repeats > 10
