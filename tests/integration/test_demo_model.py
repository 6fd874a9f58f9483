"""The bundled model says what is in the picture, and says it because of the picture."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coordinator.cli.options import DEMO_MODEL, EXAMPLES
from coordinator.model.image import Tiles, preprocess
from coordinator.model.sampling import Sampler
from coordinator.runtime.generate import Prompt, Timings, encode_images, generate
from coordinator.runtime.session import Session, SessionOptions
from protocol import messages as m
from tests.integration.describing import Loaded, chat_prompt, fleet_of, load

FIXTURES = json.loads((Path(__file__).parent.parent / "data" / "demo_fixtures.json").read_text())
CAPTIONS = json.loads((EXAMPLES / "images" / "captions.json").read_text())
FREE = 0.25
"""Share of pictures whose proportions make the processor pad, as in the model card's evaluation."""


class Describer:
    """One session, asked about one picture after another."""

    def __init__(self, loaded: Loaded, session: Session) -> None:
        self.loaded, self.session = loaded, session
        self.tokens = chat_prompt(loaded, "<|image|>Describe this image.").tokens

    def ask(self, tiles: Tiles, *, blind: bool = False) -> tuple[list[int], str]:
        """Tokens and text; blind: with the vision tower's output overwritten by zeros."""
        self.session.restart()
        prompt, timings = Prompt(self.tokens, (tiles,)), Timings()
        encode_images(self.session, prompt, timings)
        if blind:
            home = self.session.memory.resident["cross_states", self.session.placement("cross_states").buft]
            zeros = bytes(len(self.session.read("cross_states")))
            self.session.fleet.request(home.worker, m.Write(home.arena, home.offset), (zeros,))
        pieces = list(generate(self.session, self.loaded.tokenizer, prompt, Sampler(), 40, timings))
        return [token for token, _ in pieces if token >= 0], "".join(text for _, text in pieces)


@pytest.fixture(scope="module")
def describer() -> Iterator[Describer]:
    loaded = load(DEMO_MODEL)
    with fleet_of("cpu:1,accel:1") as fleet:
        session = Session(loaded.model, loaded.params, fleet.topology, SessionOptions(), n_images=1)
        session.open(fleet)
        yield Describer(loaded, session)


@pytest.fixture(scope="module")
def pictures() -> list[tuple[str, Any]]:
    """Sentence and picture of 60 held-out scenes."""
    sys.path.insert(0, str(EXAMPLES / "demo_model"))
    try:
        world = __import__("world")
    finally:
        sys.path.pop(0)
    rng = random.Random("pictures that training never drew")
    found = []
    while len(found) < 60:
        scene = world.sample_scene(rng, FREE)
        enlargement = 1 if (scene.rows, scene.columns) == (1, 1) else 2  # a single tile is seen at one size only
        width, height = (int(side * 48 * enlargement) for side in (scene.columns, scene.rows))
        found.append((scene.caption, world.render(scene, rng, width, height)))
    return found


@pytest.mark.parametrize("name", sorted(CAPTIONS))
def test_example_images(describer: Describer, name: str) -> None:
    """The true sentence, and the very tokens that transformers chooses with the unquantised weights."""
    assert describer.loaded.params.vision is not None
    tokens, text = describer.ask(preprocess(Image.open(EXAMPLES / "images" / name), describer.loaded.params.vision))
    assert text == CAPTIONS[name]
    want = FIXTURES[name]
    assert describer.tokens == tuple(want["prompt_tokens"])
    assert tokens == [token for token in want["tokens"] if token not in describer.loaded.tokenizer.stop_ids]


def test_it_looks(describer: Describer, pictures: list[tuple[str, Any]]) -> None:
    """At least 90 % right with the picture, at most 5 % blind or with the next picture."""
    vision = describer.loaded.params.vision
    assert vision is not None
    tiles = [preprocess(picture, vision) for _, picture in pictures]
    right = sum(describer.ask(t)[1] == caption for t, (caption, _) in zip(tiles, pictures, strict=True))
    swapped = sum(describer.ask(tiles[i - 1])[1] == caption for i, (caption, _) in enumerate(pictures[:20]))
    blind = sum(describer.ask(tiles[i], blind=True)[1] == caption for i, (caption, _) in enumerate(pictures[:20]))
    assert right >= 0.9 * len(pictures), right
    assert swapped <= 1
    assert blind <= 1


def test_without_a_picture_it_says_so(describer: Describer) -> None:
    loaded = describer.loaded
    session = Session(loaded.model, loaded.params, describer.session.fleet.topology, SessionOptions())
    session.open(describer.session.fleet)
    prompt = chat_prompt(loaded, "Describe this image.")
    pieces = generate(session, loaded.tokenizer, prompt, Sampler(), 40, Timings())
    assert "".join(text for _, text in pieces) == "I do not see an image."
    session.close()
