"""Masks against transformers' own and against the definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.model.hparams import VisionParams
from coordinator.runtime.inputs import CrossMasks, ImageSpan, text_inputs, vision_mask
from coordinator.runtime.one_token import TokenInputs

DATA = Path(__file__).parent.parent / "data" / "ref_mllama"
IMAGE_TOKEN = 300
VISION = VisionParams(
    n_layer=4, n_global=2, n_embd=64, n_ff=128, n_head=4, eps=1e-5, image_size=56, patch_size=14, max_tiles=4,
    channels=3, intermediate=(1, 3), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), gates_after_tanh=True,
)  # fmt: skip


@pytest.mark.parametrize("case", ["square_2x2", "wide_1x3", "small_1x1"])
def test_cross_masks_are_those_of_transformers(case: str) -> None:
    with np.load(DATA / f"{case}.npz") as arrays:
        ids = arrays["input_ids"].reshape(-1)
        tiles = int(arrays["num_tiles"].reshape(-1)[0])
        sees_tile = arrays["cross_attention_mask"].reshape(len(ids), -1)
        rows = arrays["full_text_row_masked_out_mask"].reshape(-1)
    span = ImageSpan(int(np.flatnonzero(ids == IMAGE_TOKEN)[0]), tiles)
    masks = CrossMasks.of(VISION, [span], len(ids)).rows(0, len(ids))
    open_ = np.repeat(sees_tile, VISION.n_tile_tokens, axis=1).astype(bool) | (rows == 0)[:, None]
    np.testing.assert_array_equal(masks["cross_mask"] == 0, open_)
    np.testing.assert_array_equal(masks["row_mask"].reshape(-1), rows)


def test_new_tokens_see_what_the_last_prompt_token_sees() -> None:
    masks = CrossMasks.of(VISION, [ImageSpan(2, 3)], 5)
    np.testing.assert_array_equal(masks.rows(9, 1)["cross_mask"], masks.rows(4, 1)["cross_mask"])


def test_images_are_seen_until_the_next_one() -> None:
    """Images at 1, 2 (a run) and 5: the run is seen up to 5, the last image to the end."""
    n = VISION.max_tiles * VISION.n_tile_tokens
    spans = [ImageSpan(1, 1), ImageSpan(2, 2), ImageSpan(5, 4)]
    visible = CrossMasks.of(VISION, spans, 8).visible
    seen = [[bool(visible[t, k * n]) for k in range(3)] for t in range(8)]
    assert seen == [
        [False, False, False], [True, False, False], [True, True, False], [True, True, False], [True, True, False],
        [False, False, True], [False, False, True], [False, False, True],
    ]  # fmt: skip
    assert visible[1, VISION.n_tile_tokens - 1]
    assert not visible[1, VISION.n_tile_tokens]  # one real tile only


def test_vision_mask_blocks_only_invalid_pairs() -> None:
    mask = vision_mask(VISION, 3)
    padded, tokens = VISION.n_tile_padded, VISION.n_tile_tokens
    invalid = [t >= 3 * padded or t % padded >= tokens for t in range(4 * padded)]
    expected = np.array([[-np.inf if q and k else 0.0 for k in invalid] for q in invalid], np.float16)
    np.testing.assert_array_equal(mask, expected)


def test_text_inputs_are_causal() -> None:
    inputs = text_inputs([7, 8, 9], 2, 8)
    assert inputs["inp_pos"].tolist() == [2, 3, 4]
    assert inputs["out_ids"].tolist() == [2]
    assert (inputs["attn_inp_kq_mask"] == 0).sum(axis=1).tolist() == [3, 4, 5]


@pytest.mark.parametrize("images", [0, 1])
def test_tokens_written_in_place_are_like_others(images: int) -> None:
    """From token to token, after a jump back, and from the prompt's own positions on."""
    masks = CrossMasks.of(VISION, [ImageSpan(2, 3)], 5) if images else None
    others = CrossMasks.of(VISION, [ImageSpan(0, 1)], 3) if images else None
    tables = {} if masks is None else masks.rows(0, 1)
    places = {name: memoryview(bytearray(a.nbytes)) for name, a in (text_inputs([1], 0, 32) | tables).items()}
    made = TokenInputs.of(places, 32)
    assert made is not None
    for token, n_past, mask in [
        *((100 + n, n, masks) for n in range(2, 9)), (7, 4, masks), (8, 5, masks), (9, 6, others), (10, 7, others),
        (10, 7, masks), (3, 31, masks), (4, 0, masks), (5, 1, masks),
    ]:  # fmt: skip
        made.set(token, n_past, mask)
        expected = text_inputs([token], n_past, 32) | ({} if mask is None else mask.rows(n_past, 1))
        assert {name: bytes(place) for name, place in places.items()} == {k: v.tobytes() for k, v in expected.items()}


def test_inputs_that_are_not_a_tokens_are_not_written_in_place() -> None:
    places = {name: memoryview(bytearray(a.nbytes)) for name, a in text_inputs([1], 0, 32).items()}
    assert TokenInputs.of(places, 32) is not None
    assert TokenInputs.of(places | {"debug": memoryview(bytearray(4))}, 32) is None
    del places["inp_pos"]
    assert TokenInputs.of(places, 32) is None
