"""The graphs reproduce what Hugging Face computed for the reference model, stage by stage and token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ref_mllama as ref
from evaluate import Evaluation, run

from coordinator.graph.language import CrossState, build_language
from coordinator.graph.vision import build_vision
from coordinator.model.hparams import ModelParams
from protocol.dtypes import DType

Array = np.ndarray[Any, Any]
WITH_IMAGE = ref.CASES[:3]
N_CTX = 48


@pytest.fixture(scope="module")
def params() -> ModelParams:
    return ref.read_params()


@pytest.fixture(scope="module")
def weights(params: ModelParams) -> dict[str, Array]:
    return ref.read_weights(params)


def vision_mask(params: ModelParams, tiles: Array) -> Array:
    v = params.vision
    assert v is not None
    valid = np.zeros((v.max_tiles, v.n_tile_padded), bool)
    valid[: int(tiles.sum()), : v.n_tile_tokens] = True
    invalid = ~valid.reshape(-1)
    return np.where(invalid[:, None] & invalid, -np.inf, 0.0).astype(np.float16)


def run_vision(
    params: ModelParams, weights: dict[str, Array], case: dict[str, Array], wide: bool = False
) -> Evaluation:
    assert params.vision is not None
    graph = build_vision(params.vision, params.text.n_embd, ref.infos(weights), ref.place)
    leafs = weights | {
        "inp_raw": case["pixel_values"][0, 0],
        "aspect_ratio_id": case["aspect_ratio_ids"].reshape(1).astype(np.int32),
        "kq_mask": vision_mask(params, case["aspect_ratio_mask"]),
    }
    return run(graph, leafs)


class Text:
    """A language model with its caches, run in as many graphs as one likes."""

    def __init__(self, params: ModelParams, weights: dict[str, Array], case: dict[str, Array], kv: DType) -> None:
        self.params, self.weights, self.kv = params, weights, kv
        self.states = case.get("cross_attention_states")
        width = params.text.n_head_kv * params.text.head_dim
        dtype = np.float16 if kv == DType.F16 else np.float32
        # what was not written must not matter: caches start as junk
        self.caches = {
            f"cache_{x}_l{il}": np.full((N_CTX, width), 7, dtype) for x in "kv" for il in range(params.text.n_layer)
        }
        self.n_past, self.n_cross, self.masks = 0, 0, {}
        if self.states is not None:
            self.n_cross = self.states.shape[1]
            for il in params.text.cross_layers:
                self.caches |= {f"cross_{x}_l{il}": np.full((self.n_cross, width), 7, np.float32) for x in "kv"}
            self.rows = image_masks(params, case)

    def __call__(self, tokens: Array, cross_write: bool = False) -> Array:
        n, n_kv = len(tokens), -(-(self.n_past + len(tokens)) // 16) * 16
        cross = CrossState(self.n_cross, cross_write) if self.n_cross else None
        graph = build_language(
            self.params, ref.infos(self.weights), ref.place, n_tokens=n, n_kv=n_kv, n_outputs=1, n_ctx=N_CTX,
            kv_dtype=self.kv, cross=cross,
        )  # fmt: skip
        positions = np.arange(self.n_past, self.n_past + n)
        leafs = self.weights | self.caches | {
            "inp_tokens": tokens.astype(np.int32),
            "inp_pos": positions.astype(np.int32),
            "attn_inp_k_idxs": positions,
            "attn_inp_v_idxs": positions,
            "attn_inp_kq_mask": np.where(np.arange(n_kv) <= positions[:, None], 0, -np.inf).astype(np.float16),
            "out_ids": np.array([n - 1], np.int32),
        }  # fmt: skip
        if self.n_cross:
            cross_mask, row_mask = self.rows
            at = np.minimum(positions, len(row_mask) - 1)  # a new token sees what the prompt's last one saw
            leafs |= {"cross_mask": cross_mask[at], "row_mask": row_mask[at], "cross_states": self.states}
        self.n_past += n
        return run(graph, leafs)["result_output"].reshape(-1)


def image_masks(params: ModelParams, case: dict[str, Array]) -> tuple[Array, Array]:
    """The cross mask [T, n_cross] and the row mask [T, 1], by the facts' rules 3.5 and 3.6."""
    assert params.vision is not None
    sees = case["cross_attention_mask"][0, :, 0]
    row_mask = sees.any(axis=1, keepdims=True).astype(np.float32)
    bias = np.where(sees, 0.0, -np.inf).repeat(params.vision.n_tile_tokens, axis=1)
    return np.where(row_mask == 0, 0.0, bias).astype(np.float16), row_mask


def largest_error(got: Array, want: Array) -> float:
    return float(np.max(np.abs(got.reshape(want.shape) - want)))


@pytest.mark.parametrize("name", WITH_IMAGE)
def test_vision(params: ModelParams, weights: dict[str, Array], name: str) -> None:
    case = ref.case(name)
    got = run_vision(params, weights, case)
    assert largest_error(got["vision_output"], case["cross_attention_states"]) < 5e-5
    assert largest_error(got["v.features"], case["vision_output"]) < 5e-5


@pytest.mark.parametrize("name", WITH_IMAGE[:1])
def test_vision_stages(params: ModelParams, weights: dict[str, Array], name: str) -> None:
    case = ref.case(name)
    got = run_vision(params, weights, case)
    stages = {"pre_tile": "v.pre_tile", "pos": "v.positions", "ln_pre": "v.pre_ln", "ln_post": "v.post_ln"}
    stages |= {"post_tile": "v.post_tile"}
    stages |= {f"local{i}": f"v.blk.{i}.out" for i in range(4)} | {
        f"global{i}": f"v.global.blk.{i}.out" for i in range(2)
    }
    for theirs, ours in stages.items():
        assert largest_error(got[ours], case[f"h_{theirs}"]) < 5e-5, ours


def test_vision_with_raw_gates_is_the_same(params: ModelParams, weights: dict[str, Array]) -> None:
    case, raw = ref.case("small_1x1"), ref.raw_gates(params)
    got = run_vision(raw, ref.read_weights(raw), case)
    assert largest_error(got["vision_output"], case["cross_attention_states"]) < 5e-5


@pytest.mark.parametrize("name", ref.CASES)
def test_greedy(params: ModelParams, weights: dict[str, Array], name: str) -> None:
    case = ref.case(name)
    model = Text(params, weights, case, DType.F32)
    logits = model(case["input_ids"], cross_write=True)
    assert largest_error(logits, case["logits"][0, -1]) < 5e-5
    for step, token in enumerate(case["greedy"]):
        assert largest_error(logits, case["greedy_logits"][step]) < 1e-4, step
        assert int(np.argmax(logits)) == token, step
        if step < len(case["greedy"]) - 1:
            logits = model(np.array([token]))


def test_prompt_in_pieces(params: ModelParams, weights: dict[str, Array]) -> None:
    case = ref.case("wide_1x3")
    model, ids = Text(params, weights, case, DType.F32), case["input_ids"]
    model(ids[:3], cross_write=True)
    model(ids[3:11])
    assert largest_error(model(ids[11:]), case["logits"][0, -1]) < 5e-5


def test_half_precision_cache_costs_little(params: ModelParams, weights: dict[str, Array]) -> None:
    case = ref.case("text_only")
    assert largest_error(Text(params, weights, case, DType.F16)(case["input_ids"]), case["logits"][0, -1]) < 2e-2
