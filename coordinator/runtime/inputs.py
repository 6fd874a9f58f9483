"""The values of a graph's INPUT tensors: tokens, positions, cache rows and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coordinator.model.hparams import VisionParams
from coordinator.model.image import Tiles

Array = npt.NDArray[np.generic]
MASKED = np.float16(-np.inf)


def vision_inputs(params: VisionParams, tiles: Tiles) -> dict[str, Array]:
    """Inputs of the vision graph for one image."""
    return {
        "inp_raw": np.ascontiguousarray(tiles.pixels, np.float32),
        "aspect_ratio_id": np.array([tiles.aspect_ratio_id], np.int32),
        "kq_mask": vision_mask(params, tiles.num_tiles),
    }


def vision_inputs_2024(params: VisionParams, tiles: Tiles) -> dict[str, Array]:
    """Inputs of the vision graph of December 2024, which adds to the zeros of `embeddings`."""
    return {
        "inp_raw": np.ascontiguousarray(tiles.pixels, np.float32),
        "aspect_ratios": np.array([tiles.aspect_ratio_id], np.int32),
        "embeddings": np.zeros((params.max_tiles, params.n_tile_tokens, params.n_embd), np.float32),
        "positions": np.arange(params.n_tile_tokens, dtype=np.int32),
    }


def vision_mask(params: VisionParams, num_tiles: int) -> npt.NDArray[np.float16]:
    """f16 [M*N', M*N']: -inf only where query and key are both invalid (padding, or of an absent tile)."""
    token = np.arange(params.max_tiles * params.n_tile_padded)
    tile, position = np.divmod(token, params.n_tile_padded)
    invalid = (tile >= num_tiles) | (position >= params.n_tile_tokens)
    mask = np.zeros((len(token), len(token)), np.float16)
    mask[np.ix_(invalid, invalid)] = MASKED
    return mask


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where one image stands: position of its <|image|> token, number of its real tiles."""

    position: int
    num_tiles: int


@dataclass(frozen=True, slots=True)
class CrossMasks:
    """Which rows of the cross states each position of the prompt may see; later positions are like the last one.

    `visible` bool [prompt, n_cross]; `n_tile_tokens` rows per tile, `max_tiles` tiles per image.
    """

    visible: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, params: VisionParams, images: Sequence[ImageSpan], n_prompt: int) -> CrossMasks:
        """Image k is seen from its token up to the next one's; the last to the end; a run of directly consecutive
        image tokens extends to the end of the last of the run."""
        n_tile, tiles = params.n_tile_tokens, params.max_tiles
        visible = np.zeros((n_prompt, len(images) * tiles * n_tile), np.bool_)
        end = n_prompt
        for k in reversed(range(len(images))):
            if k + 1 < len(images) and images[k + 1].position != images[k].position + 1:
                end = images[k + 1].position
            first = k * tiles * n_tile
            visible[images[k].position : end, first : first + images[k].num_tiles * n_tile] = True
        return cls(visible)

    def rows(self, first: int, n_tokens: int) -> dict[str, Array]:
        """`cross_mask` f16 [n_tokens, n_cross] and `row_mask` f32 [n_tokens, 1] for positions from `first` on.

        A position that sees nothing has its mask opened (it attends to everything) and its row mask 0, as in
        Hugging Face's implementation.
        """
        if n_tokens == 1:  # each step of a generation
            row = self.visible[min(first, len(self.visible) - 1)]
            if row.any():
                mask = np.full((1, len(row)), MASKED)
                mask[0, row] = 0
                return {"cross_mask": mask, "row_mask": np.ones((1, 1), np.float32)}
        index = np.minimum(np.arange(first, first + n_tokens), len(self.visible) - 1)
        visible = self.visible[index]
        sees = np.asarray(visible.any(axis=1)).reshape(-1, 1)
        mask = np.where(visible | ~sees, np.float16(0), MASKED)
        return {"cross_mask": mask.astype(np.float16), "row_mask": sees.astype(np.float32)}


def text_inputs(tokens: Sequence[int], n_past: int, n_kv: int) -> dict[str, Array]:
    """Inputs of the language graph for `tokens` at positions n_past, n_past + 1, ...; logits of the last one."""
    n = len(tokens)
    positions = np.arange(n_past, n_past + n, dtype=np.int64)
    if n == 1:  # each step of a generation
        mask = np.full((1, n_kv), MASKED)
        mask[0, : n_past + 1] = 0
    else:
        mask = np.where(np.arange(n_kv)[None, :] <= positions[:, None], np.float16(0), MASKED)
    return {
        "inp_tokens": np.array(tokens, np.int32),
        "inp_pos": positions.astype(np.int32),
        "attn_inp_k_idxs": positions,
        "attn_inp_v_idxs": positions,
        "attn_inp_kq_mask": mask,
        "out_ids": np.array([n - 1], np.int32),
    }
