"""What runs seldom: single tokens are masked like many, equal NaNs are no difference, a fleet leaves its process as it
was."""

from __future__ import annotations

import ctypes
import math
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coordinator.model.presets import open_blueprint
from coordinator.runtime.compare import compare
from coordinator.runtime.inputs import text_inputs, vision_inputs, vision_inputs_2024
from coordinator.runtime.nursery import Nursery
from coordinator.runtime.recording import Recorder, Recording, header
from protocol.features import has
from tests.integration.describing import fleet_of
from tests.runtime.test_recording import tap_of

TINY = str(Path(__file__).parent.parent / "data" / "ref_mllama" / "config.json")


def test_one_token_sees_what_the_last_of_many_does() -> None:
    one, many = text_inputs([9], 4, 8), text_inputs([7, 8, 9], 2, 8)
    for name in ("inp_pos", "attn_inp_k_idxs", "attn_inp_v_idxs", "attn_inp_kq_mask"):
        np.testing.assert_array_equal(one[name], many[name][-1:], name)
        assert one[name].dtype == many[name].dtype


def test_both_dialects_are_given_the_same_image() -> None:
    params = open_blueprint(TINY).params.vision
    assert params is not None
    tiles: Any = SimpleNamespace(pixels=np.arange(12.0, dtype=np.float64), aspect_ratio_id=5, num_tiles=2)
    new, old = vision_inputs(params, tiles), vision_inputs_2024(params, tiles)
    np.testing.assert_array_equal(new["inp_raw"], old["inp_raw"])
    assert new["aspect_ratio_id"].tolist() == old["aspect_ratios"].tolist() == [5]
    assert old["positions"].tolist() == list(range(params.n_tile_tokens))
    assert old["embeddings"].shape == (params.max_tiles, params.n_tile_tokens, params.n_embd)
    assert not old["embeddings"].any()


def recorded(*named: tuple[str, str, list[float]]) -> Recording:
    recorder = Recorder()
    for node, (graph, name, values) in enumerate(named):
        recorder.add(tap_of(np.array(values, np.float32), graph=graph, name=name, node=node))
    return recorder.finish("a", header("f00d", "model.gguf", ("cpu0",), {}), [])


def test_equal_nans_are_equal_values() -> None:
    a, b = (recorded(("language", "x", [math.nan, 1.0, last])) for last in (2.0, 3.0))
    found = compare(a, b)
    assert found.first is not None
    assert found.first.change is not None
    assert (found.first.change.n_differ, found.first.change.at, found.first.change.distance) == (1, (0, 0, 0, 2), 1.0)


def test_layers_are_told_in_the_order_they_are_computed() -> None:
    names = [("vision", "v.blk.3.out"), ("vision", "v.blk.10.out"), ("language", "l_out-0"), ("language", "l_out-11")]
    a, b = (recorded(*((graph, name, [value]) for graph, name in reversed(names))) for value in (1.0, 2.0))
    assert [part.label for part in compare(a, b).layers] == ["vision 3", "vision 10", "language 0", "language 11"]


def adopts() -> int:
    found = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(37, ctypes.byref(found), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
    return found.value


@pytest.mark.skipif(not has("fork"), reason="workers are started one by one here")
def test_two_fleets_at_once_leave_it_as_it_was(tmp_path: Path) -> None:
    """The first to begin is the first to end: the other one still wants its orphans."""
    with ExitStack() as second:
        with ExitStack() as first:
            first.callback(start_nursery(tmp_path).end)
            second.callback(start_nursery(tmp_path).end)
        assert adopts() == 1
    assert adopts() == 0


def start_nursery(directory: Path) -> Nursery:
    """One that bears nobody."""
    made = Nursery.start(str(directory), [], "")
    assert made is not None
    return made


@pytest.mark.skipif(not has("fork"), reason="workers are started one by one here")
def test_orphans_are_ours_only_while_workers_are_born() -> None:
    before = adopts()
    with fleet_of("null:1"):
        pass
    assert adopts() == before == 0
