"""llama.cpp discussion 10780 on the bundled model: each cause as a table of runs that should all say the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from coordinator.config import Topology
from coordinator.model.gguf_file import ModelFile
from coordinator.model.hparams import ModelParams
from coordinator.model.sampling import Sampler
from coordinator.model.tokens import Tokenizer
from coordinator.ownership.facts import Finding
from coordinator.ownership.violation import OwnershipError
from coordinator.runtime.explain import explain_run
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.generate import Prompt, Timings, encode_images, generate
from coordinator.runtime.quirks import Quirk
from coordinator.runtime.session import Ownership, Session, SessionOptions
from coordinator.schedule.placement import PlacementOptions

N_PREDICT = 24


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of a cause; `label` says what is changed. Its answer should not depend on any of this."""

    label: str
    n_gpu_layers: int
    debug: tuple[str, ...] = ()
    pins: tuple[tuple[str, str], ...] = ()
    encodes: int = 1


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause behind the symptom, and the runs that show it."""

    ident: str
    title: str
    variants: tuple[Variant, ...]
    moral: str
    share_scheduler: bool = True
    quirks: frozenset[Quirk] = frozenset()


CAUSES = {
    cause.ident: cause
    for cause in (
        Cause(
            "s1",
            "the language graph reads the vision output where it was, after it was allocated on the same scheduler",
            (
                Variant("with inp_raw_copy", 3, ("inp_raw_copy",)),
                Variant("without", 3),
                Variant("without", 5),
                Variant("with kq_mask_copy", 3, ("kq_mask_copy",)),
                Variant("with kq_mask_copy", 4, ("kq_mask_copy",)),
            ),
            "same embeddings, different answers: the encoder is right, what the language graph reads is not",
        ),
        Cause(
            "s2",
            "decoding reads the keys and values of the image through new leafs that nobody writes",
            (Variant("", 0), Variant("", 3), Variant("", 5)),
            "the first word is right, the rest is made from what the last graph left in memory",
            share_scheduler=False,
            quirks=frozenset({Quirk.LEAF_CACHE}),
        ),
        Cause(
            "s3",
            "a pin changes the splits, and with them what is overwritten",
            (
                Variant("no pin", 3),
                Variant("vision_output on accel1", 3, pins=(("vision_output", "accel1"),)),
                Variant("no pin", 5),
                Variant("vision_output on accel0", 5, pins=(("vision_output", "accel0"),)),
            ),
            "the pin is innocent: the same stale read, of other bytes",
        ),
        Cause(
            "s4",
            "that the sequence has an image is forgotten after the first call: later tokens skip cross-attention",
            (Variant("", 0), Variant("", 3), Variant("", 5)),
            "the same everywhere, and wrong: no memory was touched that should not be",
            share_scheduler=False,
            quirks=frozenset({Quirk.FORGET_IMAGE}),
        ),
        Cause(
            "s5",
            "the vision graph adds to an input that is set only once: the second evaluation starts from its remains",
            (
                Variant("encoded once", 2, ("inp_raw_copy",)),
                Variant("encoded twice", 2, ("inp_raw_copy",), encodes=2),
                Variant("encoded twice", 5, ("inp_raw_copy",), encodes=2),
            ),
            "the same image, other embeddings: look at the encoder's inputs",
            share_scheduler=False,
            quirks=frozenset({Quirk.KEEP_INPUTS}),
        ),
    )
}
"""The causes by name, in the order of facts about the discussion."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run said: SHA-256 of the image's embeddings, and an answer or a finding."""

    variant: Variant
    embeddings: str
    answer: str
    finding: Finding | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """What all runs have in common."""

    model: ModelFile
    params: ModelParams
    tokenizer: Tokenizer
    prompt: Prompt
    workers: Topology
    fleet: FleetOptions


def reproduce(scene: Scene, cause: Cause, ownership: Ownership) -> Iterator[Outcome]:
    """Run a cause's variants one by one; a finding ends its workers, and the next run has new ones."""
    with ExitStack() as stack:
        fleet: Fleet | None = None
        for variant in cause.variants:
            if fleet is None:
                stack.close()
                fleet = stack.enter_context(Fleet(scene.workers, scene.fleet))
                fleet.start()
                fleet.handshake()
            outcome = _run(scene, cause, variant, ownership, fleet)
            if outcome.finding is not None:
                fleet = None
            yield outcome


def _run(scene: Scene, cause: Cause, variant: Variant, ownership: Ownership, fleet: Fleet) -> Outcome:
    options = SessionOptions(
        PlacementOptions(n_gpu_layers=variant.n_gpu_layers),
        share_scheduler=cause.share_scheduler,
        debug=variant.debug,
        ownership=ownership,
        pins=variant.pins,
        quirks=cause.quirks,
    )
    timings, pieces = Timings(), []
    session = Session(scene.model, scene.params, scene.workers, options, n_images=len(scene.prompt.images))
    session.open(fleet)
    try:
        for _ in range(variant.encodes):
            encode_images(session, scene.prompt, timings)
        sampler = Sampler(silent=ownership is Ownership.FAITHFUL)
        for _, text in generate(session, scene.tokenizer, scene.prompt, sampler, N_PREDICT, timings):
            pieces.append(text)
        session.close()
    except OwnershipError as error:
        found = error.finding
        if cause.share_scheduler:  # what the plans of two schedulers show depends on neither
            found = explain_run(session, found, len(scene.prompt.tokens))
        return Outcome(variant, _last(timings.digests), "".join(pieces), found)
    return Outcome(variant, _last(timings.digests), "".join(pieces))


def right_answer(scene: Scene, cause: Cause) -> str:
    """What the model says without the fault, with everything on the host and memory of its own for what outlives its
    graph."""
    quirks = cause.quirks & {Quirk.KEEP_INPUTS}  # another vision graph: it may say something else when it is right
    plain = replace(cause, variants=(Variant("", 0),), quirks=quirks)
    return next(iter(reproduce(scene, plain, Ownership.SAFE))).answer


def _last(digests: Sequence[str]) -> str:
    return digests[-1] if digests else ""
