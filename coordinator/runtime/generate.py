"""From a prompt with images to a stream of text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.model.image import Tiles
from coordinator.model.sampling import Sampler
from coordinator.model.tokens import Tokenizer
from coordinator.runtime.evaluate import Shipped
from coordinator.runtime.inputs import CrossMasks, ImageSpan
from coordinator.runtime.session import Session
from protocol.errors import CapacityError, InputError


@dataclass(slots=True)
class Timings:
    """Wall times of one answer in nanoseconds, and what ran."""

    encode_ns: int = 0
    prompt_ns: int = 0
    n_prompt: int = 0
    n_made: int = 0
    decode_ns: int = 0
    n_decoded: int = 0
    digests: list[str] = field(default_factory=list)
    vision: Shipped | None = None
    prompt: Shipped | None = None
    decode: Shipped | None = None
    encode_ps: int = 0  # by the virtual clock, where there is one: without what the host does between evaluations
    prompt_ps: int = 0
    decode_ps: int = 0
    stop: str = "length"  # why the answer ended: stop (a stop token), length (-n), context (full)

    @property
    def tokens_per_second(self) -> float:
        """Rate of decoding, the prompt left out; 0 before the second token."""
        return self.n_decoded / (self.decode_ns / 1e9) if self.decode_ns else 0.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a prompt, and its images in the order of their tokens."""

    tokens: tuple[int, ...]
    images: tuple[Tiles, ...] = ()


def check_prompt(prompt: Prompt, image_token: int | None, n_ctx: int) -> tuple[ImageSpan, ...]:
    """Where the prompt's images stand.

    Raises InputError when image tokens and images differ in number, CapacityError when the prompt does not fit.
    """
    if not prompt.tokens:
        raise InputError("the prompt is empty")
    positions = [i for i, token in enumerate(prompt.tokens) if token == image_token]
    if len(positions) != len(prompt.images):
        raise InputError(
            f"the prompt has {len(positions)} <|image|> tokens, but {len(prompt.images)} images were given"
        )
    if len(prompt.tokens) >= n_ctx:
        raise CapacityError(
            f"the prompt has {len(prompt.tokens)} tokens: a context of {n_ctx} holds {n_ctx - 1} and an answer"
        )
    return tuple(ImageSpan(p, tiles.num_tiles) for p, tiles in zip(positions, prompt.images, strict=True))


def encode_images(session: Session, prompt: Prompt, timings: Timings) -> None:
    """Run the vision tower for every image and set the cross-attention masks of the prompt."""
    spans = check_prompt(prompt, session.params.image_token, session.n_ctx)
    for number, tiles in enumerate(prompt.images):
        result, timings.vision = session.encode(number, tiles)
        timings.encode_ns += result.wall_ns
        timings.encode_ps += result.virtual_ps
        timings.digests.append(result.digests["vision_output"])
    if session.params.vision is not None and spans:
        session.masks = CrossMasks.of(session.params.vision, spans, len(prompt.tokens))


def generate(
    session: Session, tokenizer: Tokenizer, prompt: Prompt, sampler: Sampler, n_predict: int, timings: Timings
) -> Iterator[tuple[int, str]]:
    """Evaluate the prompt in micro-batches, then yield (token, text it completes) one by one.

    Ends at a stop token, after `n_predict` tokens or when the context is full. Images must be encoded before.
    """
    history = list(prompt.tokens)
    start = time.perf_counter_ns()
    for first in range(0, len(history), session.options.n_ubatch):
        logits, result, timings.prompt = session.evaluate(history[first : first + session.options.n_ubatch])
        timings.prompt_ps += result.virtual_ps
    timings.prompt_ns, timings.n_prompt = time.perf_counter_ns() - start, len(history)
    stream = tokenizer.stream()
    for made in range(n_predict):
        token = sampler.sample(logits, history)
        if token in tokenizer.stop_ids:
            timings.stop = "stop"
            break
        history.append(token)
        timings.n_made += 1
        yield token, stream.push(token)
        if made + 1 == n_predict:
            break
        if session.n_past >= session.n_ctx:
            timings.stop = "context"
            break
        start = time.perf_counter_ns()
        logits, result, timings.decode = session.evaluate([token])
        timings.decode_ns += time.perf_counter_ns() - start
        timings.decode_ps += result.virtual_ps
        timings.n_decoded += 1
    rest = stream.finish()
    if rest:
        yield -1, rest
