"""Ownership in real runs: 10780 reproduced, every cause caught, planted faults found, and no alarm without one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from coordinator.cli.options import DEMO_IMAGE
from coordinator.cli.reproduce import WORKERS
from coordinator.config import parse_workers
from coordinator.ownership.facts import Kind
from coordinator.ownership.violation import OwnershipError
from coordinator.runtime import evaluate
from coordinator.runtime.fleet import FleetOptions
from coordinator.runtime.generate import Prompt
from coordinator.runtime.reproduce import CAUSES, Outcome, Scene, reproduce, right_answer
from coordinator.runtime.session import Ownership, SessionOptions
from coordinator.schedule.lower import Lowered
from coordinator.schedule.placement import PlacementOptions
from protocol.errors import UsageError
from tests.integration.clean_runs import clean_runs
from tests.integration.describing import Loaded, answer, chat_prompt, fleet_of


@pytest.fixture(scope="module")
def scene(demo: Loaded, prompt: Prompt) -> Scene:
    return Scene(demo.model, demo.params, demo.tokenizer, prompt, parse_workers(WORKERS, 1), FleetOptions())


def outcomes(scene: Scene, cause: str, ownership: Ownership) -> list[Outcome]:
    return list(reproduce(scene, CAUSES[cause], ownership))


def test_discussion_10780(scene: Scene) -> None:
    right = right_answer(scene, CAUSES["s1"])
    assert "red tower" in right
    faithful = outcomes(scene, "s1", Ownership.FAITHFUL)
    assert len({outcome.embeddings for outcome in faithful}) == 1
    by_run = {(o.variant.label, o.variant.n_gpu_layers): o.answer == right for o in faithful}
    assert by_run["with inp_raw_copy", 3]
    assert by_run["without", 5]
    assert not by_run["without", 3]
    fluent = next(o for o in faithful if o.variant.label == "with kq_mask_copy")
    assert fluent.answer != right
    assert fluent.answer.startswith("The image shows")
    assert all(o.answer == right and o.finding is None for o in outcomes(scene, "s1", Ownership.SAFE))


@pytest.mark.slow
def test_the_story_of_10780(scene: Scene) -> None:
    cause = replace(CAUSES["s1"], variants=CAUSES["s1"].variants[:2])
    hidden, shown = (o.finding for o in reproduce(scene, cause, Ownership.STRICT))
    assert hidden is not None
    assert shown is not None
    assert (hidden.kind, hidden.latent, shown.kind, shown.latent) == (Kind.STALE_READ, True, Kind.STALE_READ, False)
    assert shown.writer is not None
    assert shown.reader is not None
    assert shown.overwriter is not None
    assert (shown.writer.graph, shown.writer.tensor, shown.reader.graph) == ("vision", "vision_output", "language")
    assert shown.overwriter.graph == "language"
    assert shown.overwriter.epoch > shown.writer.epoch
    assert any("inp_raw_copy" in label for label in shown.hidden_by)
    assert any(label.startswith("n-gpu-layers 5") for label in shown.hidden_by)
    assert any("n-gpu-layers 3" in label or "without inp_raw_copy" in label for label in hidden.shown_by)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cause", "kind", "safe"),
    [
        ("s2", Kind.UNWRITTEN_READ, Kind.UNWRITTEN_READ),  # nobody can know which tensor was meant
        ("s3", Kind.STALE_READ, None),
        ("s4", Kind.LOST_STATE, None),
        ("s5", Kind.INPUT_CONSUMED, None),
    ],
)
def test_the_other_causes(scene: Scene, cause: str, kind: Kind, safe: Kind | None) -> None:
    right = right_answer(scene, CAUSES[cause])
    faithful = outcomes(scene, cause, Ownership.FAITHFUL)
    assert any(o.answer != right for o in faithful)
    assert all(o.finding is None for o in faithful)
    assert {o.finding.kind for o in outcomes(scene, cause, Ownership.STRICT) if o.finding} == {kind}
    for outcome in outcomes(scene, cause, Ownership.SAFE):
        if safe is None:
            assert (outcome.answer, outcome.finding) == (right, None)
        else:
            assert outcome.finding is not None
            assert outcome.finding.kind is safe


def misplaced(lowered: Lowered, worker: int, which: int) -> Lowered:
    """The program with the result of one op put where that of the op before it lies: a fault of an allocator."""
    program = lowered.programs[worker]
    ops = list(program.ops)
    before, op = ops[which - 1], ops[which]
    ops[which] = replace(op, dst=replace(op.dst, arena=before.dst.arena, offset=before.dst.offset))
    programs = list(lowered.programs)
    programs[worker] = replace(program, ops=tuple(ops))
    return replace(lowered, programs=tuple(programs))


@pytest.mark.parametrize("plane", ["ipc", "tcp"])
def test_a_planted_fault_is_found(
    demo: Loaded, prompt: Prompt, plane: str, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    lower = evaluate.lower

    def faulty(plan: Any, homes: Any, **more: Any) -> Lowered:
        lowered = lower(plan, homes, **more)
        if plan.graph.name != "language":
            return lowered
        ops = lowered.programs[-1].ops
        which = next(
            i
            for i, op in enumerate(ops)
            if i
            and op.op.name == "MUL_MAT"
            and ops[i - 1].op.name == "MUL_MAT"
            and op.dst.arena == ops[i - 1].dst.arena
        )
        return misplaced(lowered, len(lowered.programs) - 1, which)

    monkeypatch.setattr(evaluate, "lower", faulty)
    options = SessionOptions(PlacementOptions(0), share_scheduler=False, check=True)
    with fleet_of("cpu:1,accel:1", 1, plane) as fleet, pytest.raises(OwnershipError) as caught:
        answer(fleet, demo, prompt, options)
    assert caught.value.finding.kind in (Kind.OVERLAP, Kind.UNWRITTEN_READ)
    assert caught.value.finding.reader is not None


def test_a_clean_strict_run(demo: Loaded, prompt: Prompt) -> None:
    with fleet_of("cpu:1,accel:2") as fleet:
        for check, (ownership, share) in itertools.product(
            (True, False), ((Ownership.SAFE, True), (Ownership.STRICT, False))
        ):
            options = SessionOptions(ownership=ownership, share_scheduler=share, check=check)
            assert "red tower" in answer(fleet, demo, prompt, options).text


@pytest.mark.slow
def test_no_alarm_without_a_fault() -> None:
    assert clean_runs(24, seed=1) == []


def test_one_place_holds_one_image(demo: Loaded) -> None:
    prompt = chat_prompt(demo, "Describe these images.", [DEMO_IMAGE, DEMO_IMAGE])
    with fleet_of("cpu:1") as fleet, pytest.raises(UsageError, match="2 images"):
        answer(fleet, demo, prompt, SessionOptions(ownership=Ownership.FAITHFUL))
