"""Every op but products and attention against its numpy definition, on drawn shapes and layouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opcheck import Array, Raw, close, expect, four, run

from protocol.dtypes import DType
from protocol.errors import PlanError
from protocol.ops import GluOp, Op, UnaryOp
from workers.kernels import activation, table
from workers.kernels.dequantise import TYPES
from workers.kernels.stage import Operand

EXAMPLES = settings(max_examples=15, deadline=None)
SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 31, 40, 1023, 1025, 2500])
COUNTS = st.integers(1, 4)
SEEDS = st.integers(0, 2**31)
ORDERS = st.permutations(range(4))


def draw(rng: np.random.Generator, shape: tuple[int, ...], order: list[int] | None = None) -> Array:
    """Normal floats; with `order` their axes lie in memory in that order, and with gaps."""
    if order is None:
        return rng.standard_normal(shape).astype(np.float32)
    wide = rng.standard_normal([shape[i] + (i != 3) for i in order]).astype(np.float32)
    wide = wide[tuple(slice(0, shape[i]) for i in order)]
    return wide.transpose([order.index(i) for i in range(4)])


def rows_of(order: list[int]) -> list[int]:
    """The same order with the rows dense, as most ops want them."""
    return [i for i in order if i != 3] + [3]


def check(
    op: Op, srcs: list[Array | None], dst: Array, params: tuple[int | float, ...] = (), tolerance: float = 2e-6
) -> Array:
    """One thread agrees with the definition, two and four agree with one in every bit."""
    result = run(op, list(srcs), dst.copy(), params)
    close(result, expect(op, srcs, dst, params), tolerance)
    for threads in (2, 4):
        again = run(op, list(srcs), dst.copy(), params, threads)
        assert again.tobytes() == result.tobytes(), f"{op.name} differs with {threads} threads"
    return result


@EXAMPLES
@given(
    SEEDS, SIZES, COUNTS, COUNTS, COUNTS, ORDERS, ORDERS, st.sampled_from([Op.ADD, Op.SUB, Op.MUL, Op.DIV]), st.data()
)
def test_binary(seed, n0, n1, n2, n3, a_order, b_order, op, data):
    rng = np.random.default_rng(seed)
    shape = (n3, n2, n1, n0)
    divisors = [data.draw(st.sampled_from([d for d in (1, 3, 7, n) if n % d == 0])) for n in shape]
    a, b = draw(rng, shape, a_order), draw(rng, tuple(divisors), b_order)
    b += np.copysign(0.1, b)
    check(op, [a, b], np.zeros(shape, np.float32))


def test_binary_in_half_precision():
    rng = np.random.default_rng(1)
    a, b = draw(rng, (1, 2, 3, 37)).astype(np.float16), draw(rng, (1, 1, 1, 37)).astype(np.float16)
    check(Op.ADD, [a, b], np.zeros(a.shape, np.float16), tolerance=1e-3)
    check(Op.MUL, [a, b.astype(np.float32)], np.zeros(a.shape, np.float32))


@EXAMPLES
@given(SEEDS, SIZES, COUNTS, COUNTS, ORDERS, st.sampled_from(sorted(activation._UNARY)))
def test_unary(seed, n0, n1, n2, order, function):
    x = draw(np.random.default_rng(seed), (1, n2, n1, n0), order) * 5
    check(Op.UNARY, [x], np.zeros(x.shape, np.float32), (int(function),))


@pytest.mark.parametrize("function", sorted(activation._UNARY))
def test_unary_at_the_ends(function):
    """Every magnitude, both infinities and NaN; errors against the value itself, not against the largest one."""
    x = np.concatenate([np.logspace(-40, 38, 4001), [0.0]]).astype(np.float32)
    x = np.concatenate([x, -x, np.linspace(-110, 110, 40001, dtype=np.float32)])
    if function is UnaryOp.EXP:
        x = x[x < 88.7]
    with np.errstate(over="ignore"):
        expected = expect(Op.UNARY, [four(x)], four(x), (int(function),))
        actual = run(Op.UNARY, [four(x)], four(np.zeros_like(x)), (int(function),))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=2e-7 * min(1.0, float(np.max(np.abs(expected)))))
    special = four(np.array([np.nan, np.inf, 1.0], np.float32))
    actual = run(Op.UNARY, [special], np.zeros_like(special), (int(function),))[0, 0, 0]
    assert np.isnan(actual[0]) == (function is not UnaryOp.RELU)
    assert actual[1] == (
        1.0 if function in (UnaryOp.TANH, UnaryOp.SIGMOID) else -np.inf if function is UnaryOp.NEG else np.inf
    )


def test_exp_is_right_to_the_last_bits():
    x = np.linspace(-103, 88.7, 200_001).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    actual = run(Op.UNARY, [four(x)], four(np.zeros_like(x)), (int(UnaryOp.EXP),))[0, 0, 0]
    ulps = np.abs(actual - expected) / np.spacing(expected.astype(np.float32))
    assert np.max(ulps) < 1.1
    ends = four(np.array([-np.inf, -200, 89, 1000, np.inf], np.float32))
    assert run(Op.UNARY, [ends], np.zeros_like(ends), (int(UnaryOp.EXP),)).tolist() == [
        [[[0, 0, np.inf, np.inf, np.inf]]]
    ]


@EXAMPLES
@given(SEEDS, SIZES, COUNTS, ORDERS, st.sampled_from([Op.SQR, Op.SQRT, Op.SCALE, Op.CLAMP]))
def test_simple_functions(seed, n0, n1, order, op):
    x = draw(np.random.default_rng(seed), (1, 1, n1, n0), order)
    x = np.abs(x) if op is Op.SQRT else x
    params = {Op.SCALE: (0.3, 1.5), Op.CLAMP: (-0.3, 0.5)}.get(op, ())
    check(op, [x], np.zeros(x.shape, np.float32), params)


@EXAMPLES
@given(SEEDS, SIZES, COUNTS, st.sampled_from(sorted(activation._GLU)), st.sampled_from(["two", "one", "swapped"]))
def test_glu(seed, n0, n1, function, form):
    rng = np.random.default_rng(seed)
    dst = np.zeros((1, 2, n1, n0), np.float32)
    if form == "two":
        check(Op.GLU, [draw(rng, dst.shape), draw(rng, dst.shape)], dst, (int(function), 0))
    else:
        check(Op.GLU, [draw(rng, (1, 2, n1, 2 * n0)), None], dst, (int(function), int(form == "swapped")))


@EXAMPLES
@given(SEEDS, SIZES, COUNTS, COUNTS, ORDERS, st.sampled_from([Op.NORM, Op.RMS_NORM, Op.SUM_ROWS]))
def test_norms(seed, n0, n1, n2, order, op):
    rng = np.random.default_rng(seed)
    x = draw(rng, (1, n2, n1, n0), rows_of(order)) + np.float32(2 if op is Op.SUM_ROWS else 0.5)
    dst = np.zeros((*x.shape[:3], 1 if op is Op.SUM_ROWS else n0), np.float32)
    check(op, [x], dst, () if op is Op.SUM_ROWS else (1e-5,))


@EXAMPLES
@given(SEEDS, st.integers(1, 70), COUNTS, COUNTS, ORDERS, st.sampled_from([0, 2]), st.booleans(), st.data())
def test_rope(seed, half, heads, tokens, order, mode, with_factors, data):
    rng = np.random.default_rng(seed)
    n_dims = 2 * half
    x = draw(rng, (1, tokens, heads, n_dims + data.draw(st.sampled_from([0, 0, 2, 9]))), rows_of(order))
    positions = four(rng.integers(0, 5000, tokens).astype(np.int32))
    factors = four(rng.uniform(0.5, 8, half).astype(np.float32)) if with_factors else None
    params = (0, n_dims, mode, 0, 8192, 500000.0, 0.5, 0.0, 1.25, 32.0, 1.0)
    check(Op.ROPE, [x, positions, factors], np.zeros(x.shape, np.float32), params)


def test_rope_by_large_angles():
    """Turned by its position alone, (1, 0) becomes its cosine and sine, rounded once."""
    positions = np.random.default_rng(0).integers(0, 2**31, 4096).astype(np.int32)
    x = np.zeros((1, len(positions), 1, 2), np.float32)
    x[..., 0] = 1
    turned = check(Op.ROPE, [x, four(positions), None], np.zeros_like(x), (0, 2, 2, 0, 0, 1e4, 1.0, 0.0, 1.0, 0.0, 0.0))
    exact = np.stack([np.cos(positions.astype(np.float64)), np.sin(positions.astype(np.float64))], -1)
    assert np.abs(turned[0, :, 0].astype(np.float64) - exact).max() <= 2.0**-25 * (1 + 1e-8)


@EXAMPLES
@given(SEEDS, SIZES, COUNTS, COUNTS, st.sampled_from([None, np.float16, np.float32]), st.sampled_from([1, 2]))
def test_soft_max(seed, n0, n1, heads, kind, mask_heads):
    rng = np.random.default_rng(seed)
    x = draw(rng, (1, heads * mask_heads, n1, n0)) * 3
    mask = None
    if kind is not None:
        mask = np.where(
            rng.random((1, mask_heads, n1 + 2, n0)) < 0.5, -np.inf, rng.standard_normal((1, mask_heads, n1 + 2, n0))
        )
        mask[:, :, 0] = -np.inf
        mask = mask.astype(kind)
    result = check(Op.SOFT_MAX, [x, mask], np.zeros_like(x), (0.3, 0.0))
    if mask is not None:
        assert not result[:, :, 0].any()


def test_diag_mask_inf():
    x = draw(np.random.default_rng(0), (2, 3, 5, 12))
    check(Op.DIAG_MASK_INF, [x], np.zeros_like(x), (4,))


@EXAMPLES
@given(SEEDS, SIZES, COUNTS, COUNTS, st.sampled_from([np.float32, np.float16, np.int32]))
def test_get_rows(seed, n0, n_ids, n2, kind):
    rng = np.random.default_rng(seed)
    rows = (draw(rng, (1, n2, 9, n0)) * 100).astype(kind)
    ids = rng.integers(0, 9, (1, 1, n2, n_ids)).astype(np.int32)
    check(Op.GET_ROWS, [rows, ids], np.zeros((1, n2, n_ids, n0), np.int32 if kind is np.int32 else np.float32))


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_get_rows_of_quantised_weights(dtype):
    """Bit for bit what the gguf package makes of the same bytes."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(int(dtype))
    n0, n_rows = 1536, 7
    data = rng.integers(0, 256, (n_rows, dtype.row_nbytes(n0)), dtype=np.uint8)
    blocks = data.reshape(-1, dtype.block_nbytes)
    for at in {DType.Q6_K: (208,), DType.Q4_K: (0, 2), DType.Q5_K: (0, 2), DType.Q4_1: (0, 2), DType.Q5_1: (0, 2)}.get(
        dtype, (0,)
    ):
        blocks[:, at : at + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(int(dtype)))
    ids = np.array([3, 6, 0, 3], np.int32)
    weights = Raw(data, dtype, (n0, n_rows, 1, 1))
    for threads in (1, 3):
        result = run(Op.GET_ROWS, [weights, four(ids)], np.zeros((1, 1, 4, n0), np.float32), (), threads)
        np.testing.assert_array_equal(result[0, 0], expected[ids])


def test_get_rows_of_bfloat16():
    x = draw(np.random.default_rng(2), (1, 1, 5, 19))
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    raw = Raw(bits.view(np.uint8), DType.BF16, (19, 5, 1, 1))
    result = run(Op.GET_ROWS, [raw, four(np.array([4, 1], np.int32))], np.zeros((1, 1, 2, 19), np.float32))
    np.testing.assert_array_equal(result[0, 0], expected[0, 0, [4, 1]])


def test_rows_outside_of_the_table_show():
    ids = four(np.array([0, -1, 5, 4], np.int32))
    result = run(Op.GET_ROWS, [np.ones((1, 1, 5, 3), np.float32), ids], np.zeros((1, 1, 4, 3), np.float32))
    assert np.isnan(result[0, 0]).all(axis=1).tolist() == [False, True, True, False]
    target = np.zeros((1, 1, 5, 3), np.float32)
    run(Op.SET_ROWS, [np.ones((1, 1, 4, 3), np.float32), ids.astype(np.int64)], target)
    assert target[0, 0].sum(axis=1).tolist() == [3, 0, 0, 0, 3]


@EXAMPLES
@given(
    SEEDS, SIZES, st.integers(1, 6), st.sampled_from([np.float32, np.float16]), st.sampled_from([np.int32, np.int64])
)
def test_set_rows(seed, n0, n_rows, kind, index_kind):
    """Also with one index twice: the later row stays, with any number of threads."""
    rng = np.random.default_rng(seed)
    cache = np.zeros((1, 1, 9, n0), kind)
    ids = four(rng.integers(0, 9, n_rows).astype(index_kind))
    check(Op.SET_ROWS, [draw(rng, (1, 1, n_rows, n0)), ids, cache], cache, tolerance=1e-3)


@EXAMPLES
@given(SEEDS, SIZES, COUNTS, COUNTS, COUNTS, ORDERS, st.sampled_from([Op.CONT, Op.CPY, Op.DUP]), st.data())
def test_copies(seed, n0, n1, n2, n3, order, op, data):
    kinds = st.sampled_from([np.float32, np.float16])
    source, target = data.draw(kinds), data.draw(kinds)
    x = draw(np.random.default_rng(seed), (n3, n2, n1, n0), order).astype(source, order="K")
    shape = data.draw(st.sampled_from([x.shape, (1, 1, 1, x.size), (n2, n3, n0, n1)]))
    spread = np.zeros((*shape[:2], shape[2] + 1, shape[3] * 2), target)[:, :, : shape[2], ::2]
    for dst in (np.zeros(shape, target), spread):
        expected = np.ascontiguousarray(x).reshape(shape).astype(target)
        for threads in (1, 2, 3):
            dst[...] = 0
            assert np.array_equal(run(op, [x], dst, (), threads), expected)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_copies_of_integers(kind):
    x = np.arange(60, dtype=kind).reshape(1, 3, 4, 5).transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(run(Op.CONT, [x], np.zeros(x.shape, kind)), x)


@EXAMPLES
@given(
    SEEDS,
    SIZES,
    COUNTS,
    COUNTS,
    COUNTS,
    st.integers(0, 3),
    st.integers(0, 5),
    st.sampled_from([np.float32, np.float16, np.int32]),
)
def test_concat(seed, n0, n1, n2, n3, axis, more, kind):
    rng = np.random.default_rng(seed)
    shape = [n3, n2, n1, n0]
    other = shape.copy()
    other[3 - axis] = more
    a, b = ((draw(rng, tuple(s)) * 100).astype(kind) for s in (shape, other))
    check(Op.CONCAT, [a, b], np.concatenate([a, b], 3 - axis) * 0, (axis,))
    check(Op.CONCAT, [b, a], np.concatenate([a, b], 3 - axis) * 0, (axis,))


@EXAMPLES
@given(SEEDS, SIZES, COUNTS, COUNTS, COUNTS, st.lists(st.integers(0, 3), min_size=4, max_size=4), ORDERS)
def test_pad_and_unpad(seed, n0, n1, n2, n3, widths, order):
    x = draw(np.random.default_rng(seed), (n3, n2, n1, n0), order)
    padded = np.ones([n + w for n, w in zip(x.shape, widths[::-1], strict=True)], np.float32)
    y = check(Op.PAD, [x], padded, tuple(v for w in widths for v in (0, w)))
    back = run(Op.UNPAD, [y], np.ones(x.shape, np.float32), tuple(widths))
    np.testing.assert_array_equal(back, x)


@EXAMPLES
@given(SEEDS, SIZES, COUNTS, COUNTS, st.lists(st.integers(1, 3), min_size=4, max_size=4), ORDERS)
def test_repeat(seed, n0, n1, n2, times, order):
    x = draw(np.random.default_rng(seed), (1, n2, n1, n0), order)
    check(Op.REPEAT, [x], np.zeros([n * t for n, t in zip(x.shape, times, strict=True)], np.float32))


def test_acc_beside_and_in_place():
    rng = np.random.default_rng(3)
    a, b = draw(rng, (1, 2, 6, 10)), draw(rng, (1, 2, 3, 4))
    params = (40, 240, 480, 84, 0)
    result = check(Op.ACC, [a, b], np.zeros_like(a), params)
    run(Op.ACC, [a, b], a, params, 2)
    np.testing.assert_array_equal(a, result)


@EXAMPLES
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(1, 4),
    COUNTS,
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.data(),
)
def test_im2col(seed, kernel_w, kernel_h, channels, step, pad, dilation, data):
    rng = np.random.default_rng(seed)
    w, h = (data.draw(st.integers(dilation * (k - 1) + 1, 12)) for k in (kernel_w, kernel_h))
    ow, oh = ((n + 2 * pad - dilation * (k - 1) - 1) // step + 1 for n, k in ((w, kernel_w), (h, kernel_h)))
    kernel, image = draw(rng, (2, channels, kernel_h, kernel_w)), draw(rng, (2, channels, h, w))
    params = (step, step, pad, pad, dilation, dilation, 1)
    for kind in (np.float32, np.float16):
        dst = np.zeros((2, oh, ow, channels * kernel_h * kernel_w), kind)
        check(Op.IM2COL, [kernel, image], dst, params, 1e-6 if kind is np.float32 else 1e-3)


@pytest.mark.parametrize(
    ("op", "params", "more"),
    [
        (Op.ADD, (), "same"),
        (Op.MUL, (), "same"),
        (Op.UNARY, (int(UnaryOp.GELU),), ""),
        (Op.SCALE, (0.5, 0.0), ""),
        (Op.RMS_NORM, (1e-5,), ""),
        (Op.NORM, (1e-5,), ""),
        (Op.SOFT_MAX, (0.5, 0.0), ""),
        (Op.GLU, (int(GluOp.SWIGLU), 0), "same"),
        (Op.ROPE, (0, 76, 0, 0, 0, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0), "positions"),
        (Op.ROPE, (0, 40, 2, 0, 0, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0), "positions"),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_in_place(op, params, more, threads):
    rng = np.random.default_rng(4)
    x = draw(rng, (1, 5, 3, 77))
    others = {"same": [draw(rng, x.shape)], "positions": [four(np.arange(7, 12, dtype=np.int32))]}.get(more, [])
    beside = run(op, [x, *others], np.zeros_like(x), params)
    over = x.copy()
    run(op, [over, *others], over, params, threads)
    assert over.tobytes() == beside.tobytes()


def test_a_value_does_not_depend_on_where_its_row_is_cut():
    x = draw(np.random.default_rng(5), (1, 1, 1, 64)) * 4
    for function in sorted(activation._UNARY):
        whole = run(Op.UNARY, [x], np.zeros_like(x), (int(function),))
        for n in range(1, 17):
            part = np.ascontiguousarray(x[..., 3 : 3 + n])
            assert (
                run(Op.UNARY, [part], np.zeros_like(part), (int(function),)).tobytes()
                == whole[..., 3 : 3 + n].tobytes()
            )


def test_an_op_without_kernel_is_named():
    x = Operand(DType.Q8_0, (32, 2, 1, 1), (34, 34, 68, 68))
    with pytest.raises(
        PlanError, match=r"ADD\[\] of \(q8_0\[32x2x1x1 strides 34x34x68x68\], absent\) to q8_0.*operands"
    ):
        table.select(Op.ADD, x, (x, None), (), 1)
    with pytest.raises(PlanError, match=r"ARGSORT.*no kernel for this op"):
        table.select(Op.ARGSORT, x, (x,), (), 1)
    assert not table.supports(Op.ADD, x, (x, None), ())
    assert table.supports(Op.ADD, x._replace(ne=(0, 2, 1, 1)), (x, None), ())
