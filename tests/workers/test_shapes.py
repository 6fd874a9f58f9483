"""Operands that do not agree are refused with one line; whatever is not refused stays inside its operands."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guarded import Case, Memory, survive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import ROPE, catalogue, dense, mutate
from opcheck import run

from protocol.dtypes import DType
from protocol.errors import CapacityError, PlanError
from protocol.ops import Op, UnaryOp
from protocol.program import OperandRef, OpRecord
from workers.arena import Arenas
from workers.engine import KernelEngine
from workers.kernels import shapes
from workers.kernels.stage import Operand
from workers.kernels.table import ARITHMETICS, FAMILIES, check_arithmetic
from workers.kernels.warm import warm


def _here(arithmetic: str) -> bool:
    try:
        check_arithmetic(arithmetic)
    except CapacityError:
        return False
    return True


HERE = [arithmetic for arithmetic in ARITHMETICS if _here(arithmetic)]
"""What this CPU can compute with."""

F16, I32, I64, Q8 = DType.F16, DType.I32, DType.I64, DType.Q8_0


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Compiled once, before anything forks."""
    warm()


def mutated(seed: int, arithmetic: str = "exact") -> Case:
    rng = random.Random(seed)
    return replace(mutate(rng.choice(catalogue()), rng), arithmetic=arithmetic)


def test_every_op_with_kernels_has_a_rule() -> None:
    assert set(shapes.RULES) == set(FAMILIES)
    assert {case.op for case in catalogue()} == set(FAMILIES)


@pytest.mark.parametrize("arithmetic", HERE)
def test_valid_ops_run(arithmetic: str) -> None:
    cases = [replace(case, arithmetic=arithmetic) for case in catalogue()]
    assert survive(cases) == Counter(ran=len(cases), refused=0, outside=0)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=20), st.sampled_from(HERE))
def test_spoilt_ops_are_refused_or_stay_inside(seeds: list[int], arithmetic: str) -> None:
    survive([mutated(seed, arithmetic) for seed in seeds])


SPOILT = int(os.environ.get("SPOILT_OPS", "10000"))
"""Spoilt operations per arithmetic; a long run takes 1,000,000."""


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", HERE)
def test_many_spoilt_ops(arithmetic: str) -> None:
    total: Counter[str] = Counter()
    for start in range(0, SPOILT, 1000):
        total += survive([mutated(seed, arithmetic) for seed in range(start, start + 1000)], start)
    assert min(total["ran"], total["refused"]) > SPOILT // 4, total


X, HALF, WEIGHTS = dense(24, 3, 5, 2), dense(24, 3, 5, 2, dtype=F16), dense(64, 9, 3, 2, dtype=Q8)
Q, KEYS, MASK = dense(16, 3, 4), dense(16, 70, 2, dtype=F16), dense(70, 3, dtype=F16)
SCALED = (0.2, 0.0, 0.0, 10)
INDEX = dense(4, 3, 2, dtype=I32)
POSITIONS = dense(5, dtype=I32)
KERNEL, IMAGE, PATCHES = dense(3, 2, 3, 7), dense(9, 7, 3, 2), dense(18, 4, 3, 2)
PART = dense(5, 3, 2)

REFUSED: list[tuple[str, Op, tuple[int | float, ...], Operand, tuple[Operand | None, ...]]] = [
    (r"ADD destination: expected \[24, 3, 5, 1\], got \[24, 3, 5, 2\]", Op.ADD, (), X, (dense(24, 3, 5), X)),
    (r"MUL source 1: expected extents that divide \[24, 3, 5, 2\], got \[7,", Op.MUL, (), X, (X, dense(7))),
    (r"DIV source 1: .* got \[24, 0, 1, 1\]", Op.DIV, (), X, (X, dense(24, 0))),
    (r"SUB source 1: expected a tensor, got none", Op.SUB, (), X, (X,)),
    (r"SQR destination: .*share no bytes", Op.SQR, (), X._replace(nb=(4, 96, 0, 1440)), (X,)),
    (r"SQR source 0: .*multiples of 4", Op.SQR, (), X, (X._replace(nb=(2, 96, 288, 1440)),)),
    (r"GLU source 0: expected \[48, 5, 1, 1\]", Op.GLU, (2, 0), dense(24, 5), (dense(24, 5),)),
    (r"GLU source 1: expected \[24, 5", Op.GLU, (2, 0), dense(24, 5), (dense(24, 5), dense(24, 4))),
    (r"RMS_NORM destination: expected \[24, 3, 5, 1\]", Op.RMS_NORM, (1e-5,), X, (dense(24, 3, 5),)),
    (r"SUM_ROWS source 0, elements", Op.SUM_ROWS, (), dense(1, 3), (dense(0, 3),)),
    (r"SOFT_MAX source 1, rows: expected at least 3, got 2", Op.SOFT_MAX, (1.0, 0.0), X, (X, dense(24, 2))),
    (r"SOFT_MAX source 1, columns: expected 24, got 23", Op.SOFT_MAX, (1.0, 0.0), X, (X, dense(23, 3))),
    (r"ROPE parameter 1: .* up to 24, got 26", Op.ROPE, (0, 26, *ROPE[2:]), X, (X, POSITIONS)),
    (r"ROPE source 1: expected a vector of at least 5", Op.ROPE, ROPE, X, (X, dense(4, dtype=I32))),
    (r"ROPE source 1: .* got \[5, 0, 1, 1\]", Op.ROPE, ROPE, X, (X, dense(5, 0, dtype=I32))),
    (r"ROPE source 2: expected a vector of at least 4", Op.ROPE, ROPE, X, (X, POSITIONS, dense(3))),
    (r"FLASH_ATTN_EXT source 3, rows: expected at least 3, got 2", Op.FLASH_ATTN_EXT, SCALED, dense(16, 4, 3),
     (Q, KEYS, KEYS, dense(70, 2, dtype=F16))),
    (r"FLASH_ATTN_EXT source 3, columns: expected 70, got 64", Op.FLASH_ATTN_EXT, SCALED, dense(16, 4, 3),
     (Q, KEYS, KEYS, dense(64, 3, dtype=F16))),
    (r"FLASH_ATTN_EXT source 1, width", Op.FLASH_ATTN_EXT, SCALED, dense(16, 4, 3),
     (Q, dense(24, 70, 2, dtype=F16), KEYS)),
    (r"FLASH_ATTN_EXT source 1, heads: expected extents that divide \[4\], got \[3\]", Op.FLASH_ATTN_EXT, SCALED,
     dense(16, 4, 3), (Q, dense(16, 70, 3, dtype=F16), KEYS)),
    (r"FLASH_ATTN_EXT source 2, all but", Op.FLASH_ATTN_EXT, SCALED, dense(16, 4, 3),
     (Q, KEYS, dense(16, 69, 2, dtype=F16), MASK)),
    (r"MUL_MAT source 1, elements in a row: expected 64, got 32", Op.MUL_MAT, (), dense(9, 5, 6, 2),
     (WEIGHTS, dense(32, 5, 6, 2))),
    (r"MUL_MAT source 0, axes 2 and 3", Op.MUL_MAT, (), dense(9, 5, 5, 2), (WEIGHTS, dense(64, 5, 5, 2))),
    (r"MUL_MAT destination: expected \[9, 5, 6, 2\], got \[9, 6", Op.MUL_MAT, (), dense(9, 6, 6, 2),
     (WEIGHTS, dense(64, 5, 6, 2))),
    (r"GET_ROWS destination: expected \[64, 4, 3, 2\]", Op.GET_ROWS, (), dense(64, 5, 3, 2), (WEIGHTS, INDEX)),
    (r"GET_ROWS source 1, axis 3: expected 1, got 2", Op.GET_ROWS, (), dense(64, 4, 3, 2),
     (WEIGHTS, dense(4, 3, 2, 2, dtype=I32))),
    (r"SET_ROWS source 1, indices: expected 3, got 4", Op.SET_ROWS, (), X, (X, dense(4, dtype=I64))),
    (r"SET_ROWS source 0, all but", Op.SET_ROWS, (), X, (dense(20, 3, 5, 2), dense(3, dtype=I64))),
    (r"CPY destination, elements: expected 720, got 696", Op.CPY, (), dense(24, 29, dtype=F16), (X,)),
    (r"CONCAT source 1", Op.CONCAT, (1,), dense(24, 6, 5, 2), (X, dense(20, 3, 5, 2))),
    (r"CONCAT destination: expected \[24, 6, 5, 2\]", Op.CONCAT, (1,), dense(24, 7, 5, 2), (X, X)),
    (r"CONCAT parameter 0: expected an axis from 0 to 3, got 4", Op.CONCAT, (4,), dense(24, 6, 5, 2), (X, X)),
    (r"CONCAT source 0: expected a tensor, got none", Op.CONCAT, (1,), dense(24, 6, 5, 2), (None, X, X)),
    (r"PAD destination: expected \[27, 3", Op.PAD, (0, 3, 0, 0, 0, 0, 0, 0), dense(28, 3, 5, 2), (X,)),
    (r"PAD parameters: expected at least 0, got -1", Op.PAD, (0, -1, 0, 0, 0, 0, 0, 0), X, (X,)),
    (r"UNPAD destination: expected \[21, 3", Op.UNPAD, (3, 0, 0, 0), dense(20, 3, 5, 2), (X,)),
    (r"REPEAT source 0: expected extents that divide \[25, 3", Op.REPEAT, (), dense(25, 3, 5, 2), (X,)),
    (r"ACC parameters: expected elements among 2880 bytes", Op.ACC, (96, 288, 1440, 2500, 0), X, (X, PART)),
    (r"ACC parameters: expected at least 0, got -96", Op.ACC, (-96, 288, 1440, 500, 0), X, (X, PART)),
    (r"ACC part of the destination: .*share no bytes", Op.ACC, (8, 288, 1440, 0, 0), X, (X, PART)),
    (r"IM2COL parameters, strides", Op.IM2COL, (0, 1, 0, 0, 1, 2, 1), PATCHES, (KERNEL, IMAGE)),
    (r"IM2COL source 1, channels: expected 3, got 2", Op.IM2COL, (2, 2, 0, 0, 1, 1, 1), PATCHES,
     (KERNEL, dense(9, 7, 2, 2))),
    (r"IM2COL destination: expected \[18, 4, 3, 2\], got \[18, 4, 4", Op.IM2COL, (2, 2, 0, 0, 1, 1, 1),
     dense(18, 4, 4, 2), (KERNEL, IMAGE)),
    (r"IM2COL parameters: expected at least 6, got 5", Op.IM2COL, (2, 2, 0, 0, 1), PATCHES, (KERNEL, IMAGE)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "op", "params", "dst", "src"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_one_line_says_what_is_wrong(message: str, op: Op, params: Any, dst: Operand, src: Any) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        shapes.check(op, dst, src, params)
    assert "\n" not in str(caught.value)


def test_nothing_is_asked_of_results_without_elements() -> None:
    shapes.check(Op.ADD, dense(0, 3), (None,), ())
    shapes.check_overlaps(Op.ADD, (0, dense(0, 3)), ((0, X), None))


def test_in_place() -> None:
    shapes.check_overlaps(Op.ADD, (4096, X), ((4096, X), (4096, X)))
    shapes.check_overlaps(Op.ROPE, (4096, X), ((4096, X), (0, POSITIONS)))
    shapes.check_overlaps(Op.CPY, (4096, X), ((0, X), (4096, X)))
    shapes.check_overlaps(Op.SET_ROWS, (4096, X), ((0, dense(24, 2, 5, 2)), (9000, dense(2, dtype=I64)), (4096, X)))


@pytest.mark.parametrize(
    ("op", "dst", "src"),
    [
        (Op.ADD, (4096, X), ((4100, X), None)),
        (Op.ADD, (4096, X), ((0, X), (4096 + 2876, dense(1)))),
        (Op.CPY, (4096, X), ((4096, HALF),)),
        (Op.CONT, (4096, X), ((4096, Operand(DType.F32, (24, 3, 5, 2), (12, 4, 288, 1440))),)),
        (Op.MUL_MAT, (4096, X), ((4096, X), (0, X))),
        (Op.SUM_ROWS, (4096, X), ((4096, X),)),
        (Op.ROPE, (4096, X), ((4096, X), (4100, POSITIONS))),
        (Op.SET_ROWS, (4096, X), ((0, X), (4096, dense(3, dtype=I64)))),
    ],
)
def test_other_overlaps_are_refused(op: Op, dst: Any, src: Any) -> None:
    with pytest.raises(PlanError, match=rf"{op.name} source \d: expected .*bytes.* the start of "):
        shapes.check_overlaps(op, dst, src)


def test_columns_beside_each_other_do_not_overlap() -> None:
    left, wide = (
        Operand(DType.F32, (8, 5, 1, 1), (4, 96, 480, 480)),
        Operand(DType.F32, (9, 5, 1, 1), (4, 96, 480, 480)),
    )
    shapes.check_overlaps(Op.CPY, (4096, left), ((4096 + 32, left),))
    shapes.check_overlaps(Op.CPY, (4096 + 32, left), ((4096, left),))
    with pytest.raises(PlanError, match="CPY source 0"):
        shapes.check_overlaps(Op.CPY, (4096 + 32, left), ((4096, wide),))


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("at_end", [False, True])
def test_rows_beyond_the_table_are_nan_or_left_out(kind: type, at_end: bool) -> None:
    memory = Memory(4 * 6 * 5, at_end)
    rows = memory.bytes.view(np.float32).reshape(1, 1, 5, 6)
    rows[:] = np.arange(30).reshape(rows.shape)
    far = int(np.iinfo(kind).max)
    indices = np.array([0, -1, 4, 5, far, -far - 1], kind).reshape(1, 1, 1, 6)
    picked = run(Op.GET_ROWS, [rows, indices], np.zeros((1, 1, 6, 6), np.float32))
    np.testing.assert_array_equal(picked[0, 0, [0, 2]], rows[0, 0, [0, 4]])
    assert np.isnan(picked[0, 0, [1, 3, 4, 5]]).all()
    run(Op.SET_ROWS, [np.full((1, 1, 6, 6), 7, np.float32), indices], rows)
    assert (rows[0, 0, [0, 4]] == 7).all()
    np.testing.assert_array_equal(rows[0, 0, 1:4].reshape(-1), np.arange(6, 24))
    del rows
    memory.free()


def test_a_shipped_program_is_refused_before_anything_runs(tmp_path: Path) -> None:
    arenas = Arenas(str(tmp_path), "w", limit=None, shared=False, virtual=False)
    arenas.allocate(1, 1 << 16, "test")

    def ref(offset: int, operand: Operand) -> OperandRef:
        return OperandRef(1, offset, *operand)

    good = OpRecord(7, Op.UNARY, (int(UnaryOp.SILU),), ref(0, X), (ref(0, X),))
    k_differs = OpRecord(
        8, Op.MUL_MAT, (), ref(0, dense(9, 5, 3, 2)), (ref(8192, WEIGHTS), ref(32768, dense(32, 5, 3, 2)))
    )
    shifted = OpRecord(9, Op.UNARY, (int(UnaryOp.SILU),), ref(4, X), (ref(0, X),))
    engine = KernelEngine(1)
    engine.build([good], arenas)
    with pytest.raises(PlanError, match=r"^operation 1: MUL_MAT source 1, elements in a row: expected 64, got 32$"):
        engine.build([good, k_differs], arenas)
    with pytest.raises(PlanError, match=r"^operation 0: UNARY source 0: expected .* 4 bytes before the start of f32 "):
        engine.build([shifted], arenas)
    engine.close()
    arenas.release(1)


def test_the_harness_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check a kernel leaves its operands and dies, and the case is named."""
    good = Case(Op.SQR, (), dense(1024), (dense(1024),))
    spoilt = Case(Op.GET_ROWS, (), dense(64, 4, 3, 2), (dense(64, 9, 3, 2), dense(4, 3, 2, 64, dtype=I32)))
    assert survive([good, spoilt]) == Counter(ran=1, refused=1, outside=0)
    rule = shapes.RULES[Op.GET_ROWS]
    monkeypatch.setitem(shapes.RULES, Op.GET_ROWS, replace(rule, agree=lambda call: None))
    with pytest.raises(AssertionError, match=r"SIGSEGV at case 1, .*GET_ROWS"):
        survive([good, spoilt])
