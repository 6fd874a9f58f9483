"""Placement never changes a byte: same image, same question, same answer, wherever the layers lie."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from coordinator.model.image import Tiles
from coordinator.runtime.generate import Prompt
from coordinator.runtime.session import SessionOptions
from coordinator.schedule.placement import PlacementOptions
from tests.integration.describing import Answer, Loaded, answer, fleet_of

WORKERS = ("cpu:1", "cpu:1,accel:1", "cpu:1,accel:2", "cpu:1,accel:3", "cpu:2,accel:1")
DEBUG = ((), ("inp_raw_copy", "inp_pos_copy", "attn_inp_kq_mask_copy"))
WAYS = tuple(itertools.product((True, False), DEBUG))
FLEETS = tuple(itertools.product((1, 2), ("ipc", "tcp")))
EVERYTHING = os.environ.get("PLACEMENTS") == "all"


@pytest.fixture(scope="module")
def expected(demo: Loaded, prompt: Prompt) -> Answer:
    with fleet_of("cpu:1") as fleet:
        found = answer(fleet, demo, prompt, SessionOptions())
    assert found.text.startswith("The image shows")
    return found


def placements(n_layer: int, accelerators: int) -> Iterator[PlacementOptions]:
    """Every number of offloaded layers, and a few odd distributions."""
    if not accelerators:
        yield PlacementOptions()
        return
    for layers in range(n_layer + 2):
        yield PlacementOptions(layers)
    yield PlacementOptions(None, kv_offload=False)
    yield PlacementOptions(0, overrides=((r"ffn_up", "accel0"), (r"v\.blk\.1\.", "accel0"), (r"mm\.0", "accel0")))
    if accelerators > 1:
        yield PlacementOptions(None, (1.0,) + (3.0,) * (accelerators - 1))


def check(demo: Loaded, prompt: Prompt, expected: Answer, workers: str, number: int) -> int:
    """Every placement on the fleet of that number; the number of runs.

    In all, each placement meets each way of sharing with each debug tensors, once; and each of them meets each fleet.
    `PLACEMENTS=all` lets all of them meet on every fleet.
    """
    accelerators = sum(int(part.split(":")[1]) for part in workers.split(",")) - 1
    threads, transport = FLEETS[number]
    runs = 0
    with fleet_of(workers, threads, transport) as fleet:
        for turn, place in enumerate(placements(demo.params.text.n_layer, accelerators)):
            if place.overrides and "accel" not in workers:
                continue
            for share, debug in WAYS if EVERYTHING else [WAYS[(number + turn) % len(WAYS)]]:
                options = SessionOptions(place, share_scheduler=share, debug=debug)
                assert answer(fleet, demo, prompt, options) == expected, (workers, threads, transport, options)
                runs += 1
    return runs


def test_a_few_placements(demo: Loaded, prompt: Prompt, expected: Answer) -> None:
    with fleet_of("cpu:1,accel:2") as fleet:
        runs = ((0, True, ()), (3, True, ("inp_raw_copy",)), (4, False, DEBUG[1]), (None, True, ()))
        for layers, share, debug in runs:
            options = SessionOptions(PlacementOptions(layers), share_scheduler=share, debug=debug)
            assert answer(fleet, demo, prompt, options) == expected
    with fleet_of("cpu:1,accel:1", 2, "tcp") as fleet:
        assert answer(fleet, demo, prompt, SessionOptions()) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", WORKERS)
def test_every_placement(demo: Loaded, prompt: Prompt, expected: Answer, workers: str) -> None:
    runs = sum(check(demo, prompt, expected, workers, number) for number in range(len(FLEETS)))
    print(f"{workers}: {runs} runs, all the same bytes")


def test_another_image_gives_another_answer(demo: Loaded, prompt: Prompt, expected: Answer) -> None:
    """The comparison can fail: a black image has other embeddings."""
    tiles = prompt.images[0]
    black = Tiles(tiles.pixels * 0, tiles.aspect_ratio_id, tiles.num_tiles, tiles.rows, tiles.cols)
    with fleet_of("cpu:1") as fleet:
        found = answer(fleet, demo, Prompt(prompt.tokens, (black,)), SessionOptions())
    assert found.digests != expected.digests
    assert found.text != expected.text
