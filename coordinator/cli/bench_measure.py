"""The measurements of `crossdock bench`: prompts, tokens one by one, and images, on an open session."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from coordinator.model.image import Tiles, preprocess
from coordinator.report.bench import Repetition, Test
from coordinator.runtime.evaluate import Shipped, StepResult
from coordinator.runtime.inputs import CrossMasks, ImageSpan
from coordinator.runtime.session import Session
from coordinator.schedule.links import sent_bytes

Steps = list[tuple[StepResult, Shipped]]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What to measure: prompt lengths, numbers of tokens, whether images, and how often."""

    prompts: tuple[int, ...]
    tokens: tuple[int, ...]
    image: bool
    repetitions: int

    @property
    def n_ctx(self) -> int:
        """Positions that the longest test takes."""
        return max((*self.prompts, *(1 + n for n in self.tokens if n), 1))


def measure(session: Session, wishes: Wishes, progress: Callable[[str], None]) -> tuple[Test, ...]:
    """All tests, each after a run to warm up.

    With images the vision tower runs first, on all of its tiles, and every position of the tests sees its output.
    """
    done: list[Test] = []
    if wishes.image:
        tiles = tiles_of(session)
        done.append(_repeat("image", 1, wishes, progress, lambda: _encode(session, tiles)))
    for n in filter(None, wishes.prompts):
        done.append(_repeat(f"pp{n}", n, wishes, progress, lambda n=n: _prompt(session, n)))  # type: ignore[misc]
    for n in filter(None, wishes.tokens):
        done.append(_repeat(f"tg{n}", n, wishes, progress, lambda n=n: _generate(session, n)))  # type: ignore[misc]
    return tuple(done)


def _repeat(
    name: str, n: int, wishes: Wishes, progress: Callable[[str], None], run: Callable[[], tuple[float, Steps]]
) -> Test:
    progress(name)
    run()
    results = [run() for _ in range(wishes.repetitions)]
    nbytes = sum(sum(sent_bytes(shipped.lowered).values()) for _, shipped in results[0][1])
    return Test(name, n, nbytes, tuple(_repetition(*result) for result in results))


def _repetition(wall_s: float, steps: Steps) -> Repetition:
    done = [list(result.done.values()) for result, _ in steps]
    kernel_ns = sum(d.compute_ns for of_step in done for d in of_step)
    wait_ns = sum(sum(d.wait_ns for d in of_step) / len(of_step) for of_step in done)
    return Repetition(wall_s, kernel_ns / 1e9, wait_ns / 1e9)


def _encode(session: Session, tiles: Tiles) -> tuple[float, Steps]:
    start = time.perf_counter()
    step = session.encode(0, tiles)
    return time.perf_counter() - start, [step]


def _prompt(session: Session, n: int) -> tuple[float, Steps]:
    """A prompt of `n` random tokens on an empty context, in micro-batches."""
    tokens, ubatch = begin(session, n), session.options.n_ubatch
    return _evaluate(session, [tokens[first : first + ubatch] for first in range(0, n, ubatch)])


def _generate(session: Session, n: int) -> tuple[float, Steps]:
    """`n` random tokens one by one, behind a first one that is not counted."""
    tokens = begin(session, n + 1)
    session.evaluate(tokens[:1])
    return _evaluate(session, [[token] for token in tokens[1:]])


def _evaluate(session: Session, batches: Sequence[Sequence[int]]) -> tuple[float, Steps]:
    steps: Steps = []
    start = time.perf_counter()
    for batch in batches:
        _, result, shipped = session.evaluate(batch)
        steps.append((result, shipped))
    return time.perf_counter() - start, steps


def begin(session: Session, n: int) -> list[int]:
    """An empty context and `n` tokens; the first one is the image's if there is one."""
    session.restart()
    params, draw = session.params, random.Random(n)
    tokens = [draw.randrange(params.text.n_vocab) for _ in range(n)]
    if session.n_images:
        assert params.vision is not None
        assert params.image_token is not None
        tokens[0] = params.image_token
        session.masks = CrossMasks.of(params.vision, (ImageSpan(0, params.vision.max_tiles),), n)
    return tokens


def tiles_of(session: Session) -> Tiles:
    """A picture for the largest canvas: how long the tower takes does not depend on what is on it."""
    vision = session.params.vision
    assert vision is not None
    rows, columns = max(vision.canvases, key=lambda canvas: canvas[0] * canvas[1])
    size = (columns * vision.image_size, rows * vision.image_size)
    return preprocess(Image.radial_gradient("L").resize(size).convert("RGB"), vision)
