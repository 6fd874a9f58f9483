"""What ownership costs: a whole answer in strict and in safe mode against the same in faithful mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks import models
from benchmarks.measure import Row, compare, interleave
from coordinator.cli.options import DEMO_IMAGE
from coordinator.config import parse_workers
from coordinator.model.chat import ChatTemplate, Message
from coordinator.model.gguf_file import open_model
from coordinator.model.image import load_image, preprocess
from coordinator.model.params import read_params
from coordinator.model.sampling import Sampler
from coordinator.model.tokens import Tokenizer
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.generate import Prompt, Timings, encode_images, generate
from coordinator.runtime.session import Ownership, Session, SessionOptions
from coordinator.schedule.placement import PlacementOptions

WORKERS = "cpu:1,accel:2"
N_PREDICT = 24


def rows(quick: bool) -> Iterator[Row]:
    """The bundled model with its image, SmolLM2 with a text; a scheduler per graph, so that strict finds nothing."""
    for name, file in (("demo", models.model_file("demo")), ("smollm2-q4_1", models.model_file("smollm2-q4_1"))):
        with ExitStack() as stack:
            answers = {mode: stack.enter_context(_Answers(file, mode)) for mode in Ownership}
            samples = interleave({mode.value: a.timed() for mode, a in answers.items()}, 9 if quick else 61, 120.0)
        for mode in (Ownership.SAFE, Ownership.STRICT):
            pair = {"ours": samples[mode], "faithful": samples[Ownership.FAITHFUL]}
            label = f"{name}, an answer of {N_PREDICT} tokens, {mode} ownership"
            yield compare("ownership", label, pair, "ms", lambda s: 1e3 * s)


class _Answers:
    """A session in one mode, answering the same question again and again."""

    def __init__(self, file: Path, mode: Ownership) -> None:
        self.stack = ExitStack()
        model = open_model(file)
        params = read_params(model)
        self.tokenizer = Tokenizer.from_metadata(model.metadata, file.name)
        images = () if params.vision is None else (preprocess(load_image(DEMO_IMAGE), params.vision),)
        chat = ChatTemplate.from_metadata(model.metadata, self.tokenizer)
        text = chat.render([Message("user", "Describe this image.", len(images))]).text
        self.prompt = Prompt(tuple(self.tokenizer.encode(text, parse_special=True)), images)
        options = SessionOptions(
            PlacementOptions(params.text.n_layer // 2), 256, share_scheduler=False, ownership=mode
        )  # fmt: skip
        self.session = Session(model, params, parse_workers(WORKERS, 1), options, n_images=len(images))

    def __enter__(self) -> _Answers:
        fleet = self.stack.enter_context(Fleet(self.session.topology, FleetOptions()))
        fleet.start()
        fleet.handshake()
        self.session.open(fleet)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def timed(self) -> Callable[[], float]:
        """Seconds from image and prompt to the last token."""

        def once() -> float:
            start = time.perf_counter()
            self.session.restart()
            timings = Timings()
            encode_images(self.session, self.prompt, timings)
            for _ in generate(self.session, self.tokenizer, self.prompt, Sampler(), N_PREDICT, timings):
                pass
            return time.perf_counter() - start

        once()  # ships the programs
        return once
