"""Run the main job in this process, with real workers, and keep what must never depend on placement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.config import parse_workers
from coordinator.model.chat import ChatTemplate, Message
from coordinator.model.gguf_file import ModelFile, open_model
from coordinator.model.hparams import ModelParams
from coordinator.model.image import load_image, preprocess
from coordinator.model.params import read_params
from coordinator.model.sampling import Sampler
from coordinator.model.tokens import Tokenizer
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.generate import Prompt, Timings, encode_images, generate
from coordinator.runtime.session import Session, SessionOptions


@dataclass(frozen=True)
class Loaded:
    """A model file with everything that is read from it."""

    model: ModelFile
    params: ModelParams
    tokenizer: Tokenizer
    chat: ChatTemplate


@dataclass(frozen=True)
class Answer:
    """What has to be the same everywhere: digests of the image embeddings, and the answer."""

    digests: tuple[str, ...]
    tokens: tuple[int, ...]
    text: str


def load(path: Path) -> Loaded:
    model = open_model(path)
    tokenizer = Tokenizer.from_metadata(model.metadata, path.name)
    return Loaded(model, read_params(model), tokenizer, ChatTemplate.from_metadata(model.metadata, tokenizer))


def chat_prompt(loaded: Loaded, text: str, images: Sequence[Path] = ()) -> Prompt:
    ids = loaded.tokenizer.encode(loaded.chat.render([Message("user", text, len(images))]).text, parse_special=True)
    assert loaded.params.vision is not None or not images
    tiles = tuple(preprocess(load_image(image), loaded.params.vision) for image in images)  # type: ignore[arg-type]
    return Prompt(tuple(ids), tiles)


@contextmanager
def fleet_of(workers: str, threads: int = 1, transport: str = "ipc", arithmetic: str = "exact") -> Iterator[Fleet]:
    """A started fleet."""
    with Fleet(parse_workers(workers, threads), FleetOptions(transport, arithmetic=arithmetic)) as fleet:
        fleet.start()
        fleet.handshake()
        yield fleet


def answer(fleet: Fleet, loaded: Loaded, prompt: Prompt, options: SessionOptions, n_predict: int = 40) -> Answer:
    """Open a session on a running fleet, answer, and close the session."""
    session = Session(loaded.model, loaded.params, fleet.topology, options, n_images=len(prompt.images))
    session.open(fleet)
    timings = Timings()
    encode_images(session, prompt, timings)
    pieces = list(generate(session, loaded.tokenizer, prompt, Sampler(), n_predict, timings))
    session.close()
    tokens = tuple(token for token, _ in pieces if token >= 0)
    return Answer(tuple(timings.digests), tokens, "".join(text for _, text in pieces))
