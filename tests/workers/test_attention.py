"""FLASH_ATTN_EXT against its definition: head sizes, grouped heads, layouts, masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opcheck import Array, close, expect, run

from protocol.dtypes import DType
from protocol.ops import Op
from workers.kernels import attention
from workers.kernels.stage import Operand


def heads(rng: np.random.Generator, n: int, count: int, width: int, kind: type, batch: int = 1) -> Array:
    """[batch, heads, n, width], each position's heads side by side in memory, as in a cache."""
    return rng.standard_normal((batch, n, count, width)).astype(kind).transpose(0, 2, 1, 3)


def attend(q: Array, k: Array, v: Array, mask: Array | None, threads: int = 1) -> Array:
    dst = np.zeros((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), np.float32)
    return run(Op.FLASH_ATTN_EXT, [q, k, v, mask], dst, (q.shape[3] ** -0.5, 0.0, 0.0, 0), threads)


def check(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    result = attend(q, k, v, mask)
    close(result, expect(Op.FLASH_ATTN_EXT, [q, k, v, mask], result, (q.shape[3] ** -0.5, 0.0, 0.0, 0)), 2e-6)
    for threads in (2, 3, 4):
        assert attend(q, k, v, mask, threads).tobytes() == result.tobytes(), f"differs with {threads} threads"
    return result


def causal(n: int, n_keys: int, kind: type = np.float16, rows: int = 0) -> Array:
    """Query i sees the keys up to n_keys - n + i; `rows` more rows than queries."""
    late = np.arange(n_keys) > np.arange(n + rows)[:, None] + n_keys - n
    return np.where(late, -np.inf, 0.0).astype(kind)[None, None]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 7, 16, 20, 32, 64, 80, 128]),
    st.sampled_from([1, 16, 24, 50, 64]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 9, 33]),
    st.sampled_from([1, 5, 63, 64, 65, 130, 200]),
    st.sampled_from([np.float16, np.float32]),
    st.sampled_from(["none", "f16", "f32", "random", "per head"]),
    st.integers(1, 2),
)
def test_against_the_definition(seed, width, v_width, kv_heads, group, n, n_keys, kind, masking, batch):
    rng = np.random.default_rng(seed)
    q = heads(rng, n, kv_heads * group, width, np.float32, batch)
    k, v = (heads(rng, n_keys, kv_heads, w, kind, batch) for w in (width, v_width))
    mask = None
    if masking in ("f16", "f32"):
        mask = causal(n, max(n_keys, 1), np.float16 if masking == "f16" else np.float32, rows=3)
    elif masking != "none":
        shape = (1, kv_heads * group if masking == "per head" else 1, n, n_keys)
        mask = np.where(rng.random(shape) < 0.6, -np.inf, rng.standard_normal(shape)).astype(np.float16)
    check(q, k, v, mask)


def test_rows_without_keys_are_zeros():
    rng = np.random.default_rng(0)
    q, k, v = heads(rng, 5, 4, 32, np.float32), heads(rng, 70, 2, 32, np.float16), heads(rng, 70, 2, 32, np.float16)
    mask = np.zeros((1, 1, 5, 70), np.float16)
    mask[0, 0, [0, 3]] = -np.inf
    result = check(q, k, v, mask)
    assert not result[0, [0, 3]].any()
    assert result[0, [1, 2, 4]].all()


def test_memory_never_written_behind_the_last_visible_key_is_not_used():
    """A cache is read in padded lengths: what lies behind may be anything, NaN too."""
    rng = np.random.default_rng(1)
    q, k, v = heads(rng, 3, 2, 16, np.float32), heads(rng, 256, 1, 16, np.float16), heads(rng, 256, 1, 16, np.float16)
    mask = np.full((1, 1, 3, 256), -np.inf, np.float16)
    mask[..., :100] = causal(3, 100)
    clean = check(q, k, v, mask)
    k[:, :, 100:], v[:, :, 100:] = np.nan, np.inf
    assert attend(q, k, v, mask).tobytes() == clean.tobytes()


def test_a_row_does_not_depend_on_its_batch():
    """The same query alone, among others, and with a longer padded cache: the same bits."""
    rng = np.random.default_rng(2)
    n, n_keys = 29, 100
    q, k, v = (heads(rng, m, c, 64, t) for m, c, t in ((n, 6, np.float32), (192, 2, np.float16), (192, 2, np.float16)))
    mask = causal(n, n_keys)
    whole = attend(q, k[:, :, :n_keys], v[:, :, :n_keys], mask)
    longer = np.full((1, 1, 1, 192), -np.inf, np.float16)
    for i in (0, 7, 28):
        longer[0, 0, 0, :n_keys] = mask[0, 0, i]
        alone = attend(q[:, :, i : i + 1], k, v, longer)
        assert alone[0, 0].tobytes() == whole[0, i].tobytes()


def test_large_scores_and_long_sums_stay_precise():
    rng = np.random.default_rng(3)
    q, k = heads(rng, 4, 1, 80, np.float32) * 6, heads(rng, 6432, 1, 80, np.float32)
    v = heads(rng, 6432, 1, 80, np.float32) + np.float32(1)
    result = attend(q / 6, k, v, None)
    close(result, expect(Op.FLASH_ATTN_EXT, [q / 6, k, v, None], result, (80**-0.5, 0.0, 0.0, 0)), 1e-6)
    result = attend(q, k, v, None)
    close(result, expect(Op.FLASH_ATTN_EXT, [q, k, v, None], result, (80**-0.5, 0.0, 0.0, 0)), 1e-5)


def test_scratch_memory_does_not_grow_with_the_sequence():
    def room(n: int) -> int:
        q = Operand(DType.F32, (80, n, 16, 1), (4, 5120, 320, 5120 * n))
        dst = Operand(DType.F32, (80, 16, n, 1), (4, 320, 5120, 5120 * n))
        stages = attention.stages(Op.FLASH_ATTN_EXT, dst, (q, q, q), (0.1, 0.0, 0.0, 0), 2)
        assert stages is not None
        return stages[0].work_nbytes

    assert room(6432) == room(64) < 1 << 20


@pytest.mark.parametrize("params", [(0.1, 8.0, 0.0, 0), (0.1, 0.0, 30.0, 0)])
def test_alibi_and_soft_caps_are_refused(params):
    q = Operand(DType.F32, (16, 4, 2, 1), (4, 64, 256, 512))
    dst = Operand(DType.F32, (16, 2, 4, 1), (4, 64, 128, 512))
    assert attention.stages(Op.FLASH_ATTN_EXT, dst, (q, q, q), params, 1) is None
