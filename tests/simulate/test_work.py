"""Bytes and operations of single ops, and of whole graphs against sums known from elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import gpu, machine

from coordinator.model.presets import open_blueprint
from coordinator.simulate.hardware import Work
from coordinator.simulate.series import Load, Options, make_series
from coordinator.simulate.work import copy_work, work_of
from protocol.dtypes import DType
from protocol.ops import Op
from protocol.program import OperandRef, OpRecord


def tensor(dtype: DType, *ne: int) -> OperandRef:
    full = (*ne, 1, 1, 1)[:4]
    return OperandRef(0, 0, dtype, (full[0], full[1], full[2], full[3]), (1, 1, 1, 1))


def op(kind: Op, dst: OperandRef, *src: OperandRef | None) -> OpRecord:
    return OpRecord(0, kind, (), dst, src)


def test_matrix_times_vector_and_matrix() -> None:
    weights = tensor(DType.Q8_0, 4096, 1024)
    one = work_of(op(Op.MUL_MAT, tensor(DType.F32, 1024, 1), weights, tensor(DType.F32, 4096, 1)))
    nbytes = 4096 * 1024 // 32 * 34
    sizes = (nbytes, 4096 * 1024, 4096 * 4, 1024 * 4, 2 * 4096 * 1024)
    assert replace(one, op="") == Work("matvec", DType.Q8_0, *sizes, rows=1)
    many = work_of(op(Op.MUL_MAT, tensor(DType.F32, 1024, 512), weights, tensor(DType.F32, 4096, 512)))
    assert (many.kind, many.weight_nbytes, many.rows) == ("matmat", nbytes, 512)
    assert many.flops == 512 * one.flops


def test_each_matrix_of_a_batch_is_read_once() -> None:
    k, q = tensor(DType.F16, 128, 256, 8), tensor(DType.F32, 128, 7, 32)
    work = work_of(op(Op.MUL_MAT, tensor(DType.F32, 256, 7, 32), k, q))
    assert work.weight_nbytes == 128 * 256 * 8 * 2
    assert work.rows == 7 * 32 // 8
    assert work.flops == 2 * 128 * 256 * 7 * 32


def test_attention_reads_the_cache_once_whatever_the_heads() -> None:
    q, cache = tensor(DType.F32, 128, 16, 32), tensor(DType.F16, 128, 1024, 8)
    mask = tensor(DType.F16, 1024, 16)
    attention = op(Op.FLASH_ATTN_EXT, tensor(DType.F32, 128, 32, 16), q, cache, cache, mask)
    work = work_of(attention)
    assert work.weight_nbytes == 2 * 128 * 1024 * 8 * 2
    assert work.read_nbytes == 128 * 16 * 32 * 4 + 1024 * 16 * 2
    assert work.flops == 4 * 128 * 1024 * 16 * 32
    assert work_of(attention, streams=16).flops == work.flops // 16
    assert work_of(attention, streams=16).weight_nbytes == work.weight_nbytes


def test_rows_of_tables_and_caches() -> None:
    table, ids = tensor(DType.Q4_0, 4096, 128256), tensor(DType.I32, 3)
    got = work_of(op(Op.GET_ROWS, tensor(DType.F32, 4096, 3), table, ids))
    assert (got.kind, got.read_nbytes, got.write_nbytes) == ("copy", 3 * 4096 // 32 * 18, 3 * 4096 * 4)
    rows = tensor(DType.F32, 1024, 3)
    put = work_of(op(Op.SET_ROWS, tensor(DType.F16, 1024, 4096), rows, tensor(DType.I64, 3)))
    assert (put.read_nbytes, put.write_nbytes) == (3 * 1024 * 4, 3 * 1024 * 2)


def test_elementwise_and_copies() -> None:
    x, bias = tensor(DType.F32, 64, 10), tensor(DType.F32, 64)
    add = work_of(op(Op.ADD, x, x, bias))
    assert (add.kind, add.read_nbytes, add.write_nbytes) == ("elementwise", 64 * 10 * 4 + 64 * 4, 64 * 10 * 4)
    assert work_of(op(Op.CONT, x, x)).kind == "copy"
    kernel, image = tensor(DType.F16, 14, 14, 3, 1280), tensor(DType.F32, 560, 560, 3, 4)
    columns = work_of(op(Op.IM2COL, tensor(DType.F32, 588, 1600, 4), kernel, image))
    assert columns.read_nbytes == 560 * 560 * 3 * 4 * 4
    assert copy_work(100).read_nbytes == copy_work(100).write_nbytes == 100


def dense(*ne: int) -> OperandRef:
    """As an op's contiguous F32 operand."""
    a, b, c, d = (*ne, 1, 1, 1)[:4]
    return OperandRef(0, 0, DType.F32, (a, b, c, d), (4, 4 * a, 4 * a * b, 4 * a * b * c))


def test_lines_are_what_kernels_take_in_one_go() -> None:
    x = dense(64, 10, 4)
    half = replace(x, ne=(64, 5, 4, 1))

    def lines(kind: Op, *src: OperandRef, dst: OperandRef = x, params: tuple[int, ...] = ()) -> int:
        return work_of(replace(op(kind, dst, *src), params=params)).lines

    assert [lines(Op.ADD, x, b) for b in (x, dense(1), dense(64), dense(1, 10))] == [1, 1, 40, 40]
    assert [lines(kind, x) for kind in (Op.UNARY, Op.RMS_NORM, Op.CONT)] == [1, 40, 1]
    assert lines(Op.CONT, half, dst=dense(64, 5, 4)) == 20
    assert [lines(Op.CONCAT, x, x, params=(axis,)) for axis in (0, 1)] == [80, 40]
    assert lines(Op.SET_ROWS, dense(64, 10), tensor(DType.I64, 10), dst=tensor(DType.F16, 64, 512)) == 10
    product = work_of(op(Op.MUL_MAT, dense(128, 40), tensor(DType.Q8_0, 256, 128), dense(256, 40)))
    assert (product.lines, product.hidden_nbytes, product.read_nbytes) == (128 * 40, 256 * 40 * 4, 0)


def test_exponentials_are_scores_and_angles() -> None:
    """Angles are computed once for all heads of a position."""
    rope = work_of(op(Op.ROPE, dense(64, 9, 10), dense(64, 9, 10), tensor(DType.I32, 10)))
    assert (rope.lines, rope.exps) == (90, 640)
    q, cache = tensor(DType.F32, 128, 16, 32), tensor(DType.F16, 128, 1024, 8)
    attention = op(Op.FLASH_ATTN_EXT, tensor(DType.F32, 128, 32, 16), q, cache, cache)
    assert work_of(attention).exps == 16 * 32 * 1024
    assert work_of(attention, streams=16).exps == 32 * 1024


def test_a_token_reads_every_weight_but_the_embedding() -> None:
    """Llama 3.2 11B without an image: all of its text weights outside the cross layers, and of the caches what is asked
    for."""
    blueprint = open_blueprint("llama-3.2-11b-vision")
    series = make_series(blueprint, machine(gpu("gpu0")), Options(), Load(n_prompt=1, n_predict=1, n_images=0))
    works = [work_of(o) for program in series.lowered[-1].programs for o in program.ops]
    read = sum(w.weight_nbytes for w in works if w.kind == "matvec")
    cross = {f"blk.{il}." for il in blueprint.params.text.cross_layers}
    expected = sum(
        w.nbytes for w in blueprint.weights.values()
        if len([n for n in w.ne if n > 1]) > 1 and not w.name.startswith(("v.", "mm.", "token_embd", *cross))
    )  # fmt: skip
    assert read == expected
    cache = sum(w.weight_nbytes for w in works if w.kind == "attention")
    assert cache == 32 * 2 * 256 * 1024 * 2  # 32 layers, k and v, 256 positions of 8 heads x 128, f16
    assert sum(w.flops for w in works if w.kind == "matvec") == pytest.approx(2 * 7.5e9, rel=0.01)
