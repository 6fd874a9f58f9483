"""What the builders promise beyond numbers: leafs, names, pins, debug inputs and errors for bad files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ref_mllama as ref
from evaluate import run

from coordinator.graph.build import Builder, dims, show_dims
from coordinator.graph.debug import route_debug_inputs
from coordinator.graph.language import CrossState, build_language
from coordinator.graph.language_2024 import build_language_2024
from coordinator.graph.node import BufferRef, Graph
from coordinator.graph.vision import build_vision
from coordinator.graph.vision_2024 import build_vision_2024
from coordinator.model.hparams import ModelParams, WeightInfo
from coordinator.model.weights import expected_weights
from protocol.dtypes import DType
from protocol.errors import ModelError, UsageError
from protocol.ops import Flag, Op, Usage

PARAMS = ref.read_params()
SIZES: dict[str, Any] = {"n_tokens": 5, "n_kv": 32, "n_outputs": 1, "n_ctx": 64, "kv_dtype": DType.F16}


def weights(params: ModelParams = PARAMS) -> dict[str, WeightInfo]:
    return {n: WeightInfo(n, DType.F32, dims(*ne), 0, 0) for n, ne in expected_weights(params).items()}


def vision(infos: dict[str, WeightInfo] | None = None, **more: Any) -> Graph:
    assert PARAMS.vision is not None
    return build_vision(PARAMS.vision, PARAMS.text.n_embd, infos or weights(), ref.place, **more)


def vision_2024(infos: dict[str, WeightInfo] | None = None, **more: Any) -> Graph:
    assert PARAMS.vision is not None
    return build_vision_2024(PARAMS.vision, PARAMS.text.n_embd, infos or weights(), ref.place, **more)


def language(infos: dict[str, WeightInfo] | None = None, **more: Any) -> Graph:
    return build_language(PARAMS, infos or weights(), ref.place, **(SIZES | {"cross": CrossState(68, True)} | more))


def language_2024(infos: dict[str, WeightInfo] | None = None, **more: Any) -> Graph:
    sizes = SIZES | {"n_past": 3, "n_cross": 68, "cross_write": True}
    return build_language_2024(PARAMS, infos or weights(), ref.place, **(sizes | more))


ALL = [vision, language, vision_2024, language_2024]


def weight_names(graph: Graph) -> list[str]:
    leafs = [graph.tensors[i] for i in graph.leafs]
    return [t.name for t in leafs if t.buffer is not None and t.buffer.usage == Usage.WEIGHTS]


@pytest.mark.parametrize("graphs", [(vision, language), (vision_2024, language_2024)])
def test_every_weight_of_a_file_is_used_once(graphs: tuple[Callable[[], Graph], ...]) -> None:
    used = [name for build in graphs for name in weight_names(build())]
    assert sorted(used) == sorted(expected_weights(PARAMS))


@pytest.mark.parametrize("build", ALL)
def test_a_missing_or_misshapen_weight_is_one_line(build: Callable[..., Graph]) -> None:
    for name in weight_names(build()):
        info = weights()[name]
        with pytest.raises(ModelError, match=f"'{name}' is missing from the model"):
            build({n: w for n, w in weights().items() if n != name})
        shape = (info.ne[0] + 1, *info.ne[1:])
        with pytest.raises(ModelError, match=rf"'{name}' has the wrong shape: expected \[.*\], got \[{shape[0]}"):
            build(weights() | {name: replace(info, ne=shape)})


@pytest.mark.parametrize("build", ALL)
def test_graphs_are_reproducible_and_named(build: Callable[..., Graph]) -> None:
    graph = build()
    assert graph == build()
    assert all(graph.tensors[i].name for i in (*graph.nodes, *graph.leafs))
    output = graph.tensors[graph.expand[-1]]
    assert output.name in ("vision_output", "result_output")
    assert output.flags == Flag.OUTPUT
    assert all(t.src == tuple(s for s in t.src if s < t.id) for t in graph.tensors)


def test_cross_layers_are_left_out_without_image() -> None:
    names = weight_names(language(cross=None))
    assert not [n for n in names if n.startswith(("blk.1.", "blk.4."))]
    assert {t.name for t in language(cross=None).tensors if t.flags & Flag.INPUT} == {
        "inp_tokens", "inp_pos", "attn_inp_k_idxs", "attn_inp_v_idxs", "attn_inp_kq_mask", "out_ids",
    }  # fmt: skip


@pytest.mark.parametrize("build", [language, language_2024])
def test_cross_caches_are_written_before_they_are_read(build: Callable[..., Graph]) -> None:
    graph = build()
    for name in ("cross_k_l1", "cross_v_l1", "cross_k_l4", "cross_v_l4"):
        cache = graph.by_name[name]
        uses = [graph.tensors[i] for i in graph.nodes if graph.tensors[i].view_src == cache]
        assert [t.op for t in uses][:2] == [Op.CPY, Op.VIEW], name
        assert sum(t.name == name for t in graph.tensors) == 1


@pytest.mark.parametrize("build", [language, language_2024])
def test_decoding_needs_no_cross_states(build: Callable[..., Graph]) -> None:
    graph = build(cross=CrossState(68, False)) if build is language else build(cross_write=False)
    assert "cross_states" not in {graph.tensors[i].name for i in graph.leafs}
    assert not any("cross_attn_k_proj" in name for name in weight_names(graph))
    assert graph.named("cross_v_l4").buffer == BufferRef("CPU", Usage.ANY)


def test_last_layer_may_be_a_cross_layer() -> None:
    """The rows that are put out are chosen in the last layer that runs, whichever kind it is."""
    for last in (5, 4):
        params = replace(PARAMS, text=replace(PARAMS.text, cross_layers=(1, last)))
        infos = weights(params)
        for cross in (CrossState(68, False, mask_attention=True), None):
            graph = build_language(params, infos, ref.place, **SIZES, cross=cross)
            assert graph.named("l_out-3").ne[1] == SIZES["n_tokens"]
            assert graph.named("result_output").ne[1] == 1


def test_norms_are_pinned_to_the_layer() -> None:
    devices = ["one", None, "two", None, None, "two"]
    for build in (language, language_2024):
        graph = build(pin_norm=devices.__getitem__)
        pinned = [(graph.tensors[i].name, graph.tensors[i].op, device) for i, device in graph.pins]
        assert pinned == [
            (f"norm-{il}", Op.RMS_NORM, device) for il, device in enumerate(devices) for _ in range(2) if device
        ]


def test_rope_factors_are_one_leaf_per_device() -> None:
    def place(name: str) -> BufferRef:
        return BufferRef("late" if name.startswith(("blk.3", "blk.5")) else "early", Usage.WEIGHTS)

    graph = build_language(PARAMS, weights(), place, **SIZES)
    found = [t.buffer.buft for t in graph.tensors if t.name == "rope_freqs.weight" and t.buffer]
    assert found == ["early", "late"]


@pytest.mark.parametrize("build", ALL)
def test_debug_input_is_first_and_changes_nothing_else(build: Callable[..., Graph]) -> None:
    plain = build()
    name = "inp_raw_copy" if "inp_raw" in plain.by_name else "l_out-2_copy"
    graph = build(debug=[name])
    like, extra = graph.named(name.removesuffix("_copy")), graph.named(name)
    assert (extra.dtype, extra.ne, extra.flags, extra.op) == (like.dtype, like.ne, Flag.INPUT, Op.NONE)
    assert graph.nodes == plain.nodes
    assert graph.leafs == (extra.id, *plain.leafs)
    assert graph.expand == (extra.id, *plain.expand)
    assert graph.tensors[:-1] == plain.tensors


@pytest.mark.parametrize("name", ["inp_raw", "nonsense_copy", "_copy", ""])
def test_unknown_debug_name(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown debug tensor .* in vision: expected .* such as inp_raw_copy, "):
        vision(debug=[name])


def test_debug_names_go_to_the_graphs_that_have_them() -> None:
    graphs = vision(), language()
    names = ["inp_raw_copy", "l_out-0_copy"]
    assert route_debug_inputs(names, *graphs) == (("inp_raw_copy",), ("l_out-0_copy",))
    with pytest.raises(UsageError, match="in vision or language"):
        route_debug_inputs(["nothing_copy"], *graphs)


def test_embeddings_in_half_precision_are_cast() -> None:
    infos = weights()
    infos["v.position_embd.weight"] = replace(infos["v.position_embd.weight"], dtype=DType.F16)
    graph = vision(infos)
    cast = graph.named("v.position_embd.weight (copy)")
    assert (cast.op, cast.dtype, len(cast.src)) == (Op.CPY, DType.F32, 1)


def test_one_leaf_per_weight() -> None:
    b = Builder(weights(), ref.place)
    assert b.weight("mm.0.bias") == b.weight("mm.0.bias", 64)


def test_long_names_are_cut_at_63_bytes() -> None:
    b = Builder({}, ref.place)
    x = b.name(b.leaf("x", DType.F32, 4), "ä" * 40)
    assert b.reshape(x, 2, 2).name == "ä" * 31 + " "
    assert len(b.reshape(x, 4).name.encode()) <= 63


def test_a_name_given_later_holds_for_earlier_values() -> None:
    b = Builder({}, ref.place)
    x = b.leaf("x", DType.F32, 4)
    b.name(x, "y")
    assert b.reshape(x, 2, 2).name == "y (reshaped)"


def test_view_of_a_view_points_at_the_root() -> None:
    b = Builder({}, ref.place)
    x = b.leaf("x", DType.F32, 4, 4)
    inner = b.view(b.view(x, (4, 2), (), 16), (2,), (), 8)
    assert (inner.view_src, inner.view_offs) == (x.id, 24)
    with pytest.raises(AssertionError):
        b.view(x, (4, 4), (), 16)


def test_show_dims() -> None:
    assert [show_dims(ne) for ne in ((1, 1, 1, 1), (4, 1, 3, 1), (4, 1, 1, 1))] == ["[1]", "[4, 1, 3]", "[4]"]


def test_wide_evaluation_shows_rounding() -> None:
    """float32 and float64 differ by rounding only, and the latter does not round at all."""
    b = Builder({}, ref.place)
    x = b.leaf("x", DType.F32, 64, 4)
    b.expand(b.norm(b.mul_mat(x, x), 1e-5))
    value = np.random.default_rng(1).standard_normal((4, 64))
    graph = b.graph("g")
    narrow = run(graph, {"x": value.astype(np.float32)})["node_1"]
    wide = run(graph, {"x": value}, wide=True)["node_1"]
    assert (narrow.dtype, wide.dtype) == (np.float32, np.float64)
    assert 0 < np.max(np.abs(narrow - wide)) < 1e-6
