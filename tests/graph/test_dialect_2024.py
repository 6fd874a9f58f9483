"""The graphs of December 2024: the published figures of the full-size model, and the numbers they compute."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ref_mllama as ref
from evaluate import run
from test_reference_model import N_CTX, Text, largest_error

from coordinator.graph.build import dims
from coordinator.graph.language_2024 import build_language_2024
from coordinator.graph.node import BufferRef, Graph
from coordinator.graph.vision import build_vision
from coordinator.graph.vision_2024 import build_vision_2024
from coordinator.model.hparams import ModelParams, RopeParams, TextParams, VisionParams, WeightInfo
from coordinator.model.weights import expected_weights
from coordinator.schedule.plan import Device
from coordinator.schedule.scheduler import Scheduler
from protocol.dtypes import DType
from protocol.ops import Op, UnaryOp, Usage

Array = np.ndarray[Any, Any]
MIB = 1 << 20

FULL = ModelParams(
    arch="mllama",
    name="Llama 3.2 11B Vision",
    text=TextParams(
        n_layer=40, n_embd=4096, n_ff=14336, n_head=32, n_head_kv=8, head_dim=128, n_vocab=128256, n_ctx_train=131072,
        rms_eps=1e-5, rope=RopeParams(128, 0, 500000.0, 1.0, 8192, True), cross_layers=tuple(range(3, 40, 5)),
    ),
    vision=VisionParams(
        n_layer=32, n_global=8, n_embd=1280, n_ff=5120, n_head=16, eps=1e-5, image_size=560, patch_size=14,
        max_tiles=4, channels=3, intermediate=(3, 7, 15, 23, 30), image_mean=(0, 0, 0), image_std=(1, 1, 1),
        gates_after_tanh=True,
    ),
    image_token=128256,
)  # fmt: skip
OFFLOADED = 30


def full_weights() -> dict[str, WeightInfo]:
    def dtype(name: str, n_dims: int) -> DType:
        if name == "v.patch_embd.weight":
            return DType.F16
        return DType.F32 if n_dims == 1 or name.startswith(("v.", "mm.")) else DType.Q4_K

    return {
        name: WeightInfo(name, dtype(name, len(shape)), dims(*shape), 0, 0)
        for name, shape in expected_weights(FULL).items()
    }


def full_place(name: str) -> BufferRef:
    layer = re.search(r"blk\.(\d+)\.|_l(\d+)$", name)
    on_device = layer is not None and int(layer[1] or layer[2]) >= FULL.text.n_layer - OFFLOADED
    return BufferRef("device" if on_device else "pinned", Usage.WEIGHTS)


def full_scheduler() -> Scheduler:
    ops = frozenset(op.name for op in Op if op not in (Op.GET_ROWS, Op.NONE))
    device = Device("device", "gpu", "device", 128, unsupported_ops=frozenset({"UNPAD"}), offload_ops=ops)
    return Scheduler((device, Device("cpu", "cpu", "pinned", 128, is_host=True)), op_offload=True)


def full_vision(debug: tuple[str, ...] = ()) -> Graph:
    assert FULL.vision is not None
    return build_vision_2024(FULL.vision, FULL.text.n_embd, full_weights(), full_place, debug=debug)


def test_published_language_figures() -> None:
    graph = build_language_2024(
        FULL, full_weights(), full_place, n_tokens=512, n_past=0, n_kv=512, n_outputs=512, n_ctx=512, kv_dtype=DType.F16
    )
    plan = full_scheduler().allocate(graph)
    copies = sum(len(split.inputs) for split in plan.splits)
    assert (len(graph.nodes), len(graph.nodes) + 2 * copies, len(plan.splits)) == (1030, 1252, 93)


def test_published_vision_figures() -> None:
    sizes = full_scheduler().allocate(full_vision()).buffer_sizes
    assert [round(sum(sizes[buft]) / MIB, 2) for buft in ("device", "pinned")] == [2864.12, 376.05]


def test_debug_input_makes_518_leafs_and_stays_allocated() -> None:
    graph = full_vision(("inp_raw_copy",))
    assert len(graph.leafs) == 518
    assert graph.tensors[graph.leafs[0]].name == "inp_raw_copy"
    assert graph.tensors[graph.leafs[0]].nbytes == 15_052_800
    assert graph.named("vision_output").nbytes == 104_923_136
    host = sum(full_scheduler().allocate(graph).buffer_sizes["pinned"])
    assert host == sum(full_scheduler().allocate(full_vision()).buffer_sizes["pinned"]) + 15_052_800


@pytest.fixture(scope="module")
def params() -> ModelParams:
    return ref.read_params()


@pytest.fixture(scope="module")
def weights(params: ModelParams) -> dict[str, Array]:
    return ref.read_weights(params)


def with_tanh_gelu(graph: Graph) -> Graph:
    """The graph with the other GELU: what is left of the difference is the mask."""
    tensors = tuple(
        replace(t, params=(int(UnaryOp.GELU),)) if t.op == Op.UNARY and t.params == (int(UnaryOp.GELU_ERF),) else t
        for t in graph.tensors
    )
    return replace(graph, tensors=tensors)


@pytest.mark.parametrize("raw", [False, True])
def test_vision_is_the_other_dialect_without_mask(params: ModelParams, raw: bool) -> None:
    params = ref.raw_gates(params) if raw else params
    weights, case, vision = ref.read_weights(params), ref.case("wide_1x3"), params.vision
    assert vision is not None
    n, tokens = vision.n_tile_tokens, vision.max_tiles * vision.n_tile_padded
    pixels, ratio = case["pixel_values"][0, 0], case["aspect_ratio_ids"].reshape(1).astype(np.int32)
    common = (vision, params.text.n_embd, ref.infos(weights), ref.place)
    got = run(
        build_vision_2024(*common),
        weights | {
            "inp_raw": pixels, "aspect_ratios": ratio, "positions": np.arange(n, dtype=np.int32),
            "embeddings": np.zeros((vision.max_tiles, n, vision.n_embd), np.float32),
        },
    )  # fmt: skip
    mask = np.zeros((tokens, tokens), np.float16)
    want = run(
        with_tanh_gelu(build_vision(*common)),
        weights | {"inp_raw": pixels, "aspect_ratio_id": ratio, "kq_mask": mask},
    )
    assert largest_error(got["vision_output"], want["vision_output"]) < 5e-5
    assert largest_error(got["vision_output"], case["cross_attention_states"]) > 1.0, "the mask matters"


class Text2024(Text):
    """The same model through the other graphs; its image has no masks."""

    def __call__(self, tokens: Array, cross_write: bool = False) -> Array:
        n, n_kv = len(tokens), N_CTX
        graph = build_language_2024(
            self.params, ref.infos(self.weights), ref.place, n_tokens=n, n_past=self.n_past, n_kv=n_kv, n_outputs=1,
            n_ctx=N_CTX, kv_dtype=self.kv, n_cross=self.n_cross, cross_write=cross_write,
        )  # fmt: skip
        positions = np.arange(self.n_past, self.n_past + n)
        mask = np.full((-(-n // 32) * 32, n_kv), -np.inf, np.float32)
        mask[:n] = np.where(np.arange(n_kv) <= positions[:, None], 0.0, -np.inf)
        leafs = self.weights | self.caches | {
            "inp_tokens": tokens.astype(np.int32), "inp_pos": positions.astype(np.int32), "KQ_mask": mask,
            "inp_out_ids": np.array([n - 1], np.int32),
        }  # fmt: skip
        if self.n_cross:
            leafs |= {"cross_states": self.states}
        self.n_past += n
        return run(graph, leafs)["result_output"].reshape(-1)


def test_text_is_the_reference(params: ModelParams, weights: dict[str, Array]) -> None:
    case = ref.case("text_only")
    model = Text2024(params, weights, case, DType.F32)
    logits = model(case["input_ids"])
    for step, token in enumerate(case["greedy"][:6]):
        assert largest_error(logits, case["greedy_logits"][step]) < 1e-4, step
        logits = model(np.array([token]))


def test_text_with_image_is_the_other_dialect_without_masks(params: ModelParams, weights: dict[str, Array]) -> None:
    case = ref.case("square_2x2")
    ours, other = (kind(params, weights, case, DType.F32) for kind in (Text2024, Text))
    cross_mask, row_mask = other.rows
    other.rows = np.zeros_like(cross_mask), np.ones_like(row_mask)
    for tokens in (case["input_ids"], case["greedy"][:1], case["greedy"][1:2]):
        first = tokens is case["input_ids"]
        assert largest_error(ours(tokens, first), other(tokens, first)) < 5e-5
