"""The whole program against transformers: converted by our converter, run by worker processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.model.convert import convert
from coordinator.model.hparams import VisionParams
from coordinator.model.image import load_image, preprocess
from coordinator.model.sampling import Sampler
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.generate import Prompt, Timings, encode_images
from coordinator.runtime.session import Session, SessionOptions
from coordinator.schedule.placement import PlacementOptions
from protocol.dtypes import DType
from tests.integration.describing import Loaded, fleet_of, load

DATA = Path(__file__).parent.parent / "data" / "ref_mllama"
IMAGES = ("square_2x2", "wide_1x3", "small_1x1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = tmp_path_factory.mktemp("reference") / "reference.gguf"
    convert(DATA, path, DType.F32)
    return load(path)


@pytest.fixture(scope="module")
def fleet() -> object:
    with fleet_of("cpu:1,accel:2") as fleet:
        yield fleet


def tiles_of(case: str, vision: VisionParams | None) -> tuple[object, ...]:
    assert vision is not None
    return (preprocess(load_image(DATA / "images" / f"{case}.png"), vision),) if case in IMAGES else ()


@pytest.mark.parametrize("layers", [0, 4, None])
@pytest.mark.parametrize("case", [*IMAGES, "text_only"])
def test_transformers(reference: Loaded, fleet: Fleet, case: str, layers: int | None) -> None:
    """Cross states and logits within 1e-4, 16 greedy tokens equal, prompt in one piece and in pieces of five."""
    with np.load(DATA / f"{case}.npz") as arrays:
        want = {name: arrays[name] for name in arrays.files}
    ids = tuple(want["input_ids"].reshape(-1).tolist())
    prompt = Prompt(ids, tiles_of(case, reference.params.vision))  # type: ignore[arg-type]
    options = SessionOptions(PlacementOptions(layers), kv_dtype=DType.F32, n_ubatch=512 if layers != 4 else 5)
    session = Session(reference.model, reference.params, fleet.topology, options, n_images=len(prompt.images))
    session.open(fleet)
    encode_images(session, prompt, Timings())
    if prompt.images:
        np.testing.assert_array_equal(
            prompt.images[0].pixels, want["pixel_values"].reshape(prompt.images[0].pixels.shape)
        )
        states = np.frombuffer(session.read("cross_states"), np.float32)
        np.testing.assert_allclose(states, want["cross_attention_states"].reshape(-1), rtol=0, atol=1e-4)
    for first in range(0, len(ids), options.n_ubatch):
        logits, _, _ = session.evaluate(ids[first : first + options.n_ubatch])
    np.testing.assert_allclose(logits, want["logits"].reshape(-1, len(logits))[-1], rtol=0, atol=1e-4)
    tokens, sampler = [], Sampler()
    for _ in range(16):
        tokens.append(sampler.sample(logits))
        logits, _, _ = session.evaluate(tokens[-1:])
    assert tokens == want["greedy"].reshape(-1).tolist()
    session.close()
