"""Random programs: clean ones raise no alarm, a program without findings is right, and safe is always right."""

import random
from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.ownership.check import check_sequence
from coordinator.ownership.facts import Kind
from coordinator.ownership.host import walk
from coordinator.ownership.interpret import run
from coordinator.ownership.programs import document_sequence
from coordinator.ownership.sequence import Sequence, Step
from coordinator.schedule.check import check_plan
from coordinator.schedule.document import load_document
from coordinator.schedule.runs import NOBODY, Runs
from protocol.errors import PlanError
from tests.conformance.documents import tame_document
from tests.ownership.programs import Program

RANDOM = given(rng=st.randoms(use_true_random=False))
FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
MORE = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
SCHEDULES = (None, frozenset[str](), frozenset({"GPU0"}), frozenset({"GPU1"}))


def stale_plans(sequence: Sequence) -> bool:
    """True when a graph was given places of another that do not do for it, which ggml does not notice."""
    for instance in walk(sequence).plans:
        try:
            check_plan(instance)
        except PlanError:
            return True
    return False


@RANDOM
@MORE
def test_no_false_alarm_in_programs_that_read_only_their_own(rng: random.Random) -> None:
    """Such programs are as clean as ggml's plans are. What is found all the same is there, on real bytes: places of
    another graph, or a host input that a device fetches late, after a later split of the same evaluation (H07, H08).
    """
    sequence = Program(rng, clean=True).sequence
    machine = walk(sequence)
    runs = [run(machine.actions, strict=True, late=late) for late in SCHEDULES]
    findings = [f for f in check_sequence(sequence) if not f.is_cost]
    if not findings:
        assert all(r.is_right for r in runs)
    if Kind.STALE_PLAN in {f.kind for f in findings}:
        assert stale_plans(sequence)
        return
    for found in findings:
        assert found.kind is Kind.OVERWRITTEN_IN_FLIGHT
        assert found.reader is not None
        assert found.overwriter is not None
        assert found.reader.what == "copy"
        assert (found.reader.graph, found.reader.evaluation) == (found.overwriter.graph, found.overwriter.evaluation)
        assert any(r.violation is not None for r in runs)


@RANDOM
@MORE
def test_clean_programs_raise_no_alarm(rng: random.Random) -> None:
    """On synchronous devices, where nothing is late."""
    sequence = Program(rng, clean=True, asynchronous=False).sequence
    findings = [f for f in check_sequence(sequence) if not f.is_cost]
    if findings:
        assert {f.kind for f in findings} <= {Kind.STALE_PLAN}
        assert stale_plans(sequence)
        return
    assert run(walk(sequence).actions, strict=True).is_right


@RANDOM
@MORE
def test_without_a_finding_every_schedule_is_right(rng: random.Random) -> None:
    sequence = Program(rng, clean=False).sequence
    machine = walk(sequence)
    manifest = [f for f in machine.findings if not f.is_cost and not f.latent]
    for late in SCHEDULES:
        plain, strict = run(machine.actions, late=late), run(machine.actions, strict=True, late=late)
        if not manifest:
            assert plain.is_right
        if not plain.is_right:
            assert strict.violation is not None


@RANDOM
@MORE
def test_safe_ownership_is_right_under_every_schedule(rng: random.Random) -> None:
    machine = walk(Program(rng, clean=False).sequence, safe=True)
    assert [f for f in machine.findings if not f.is_cost] == []
    for late in SCHEDULES:
        assert run(machine.actions, strict=True, late=late).is_right


@RANDOM
@FEW
def test_injected_stale_reads_are_found(rng: random.Random) -> None:
    program = Program(rng, clean=True)
    first = next(s.graph for s in program.steps if s.do == "compute")
    other = rng.choice([g["name"] for g in program.graphs if g["name"] != first])
    read = next(s for s in program.steps if s.do == "read" and s.tensor.startswith(f"{first}."))
    program.steps += [Step("allocate", graph=other), read]
    found = check_sequence(program.sequence)
    assert any(f.kind is Kind.STALE_READ and f.tensor == read.tensor for f in found)


@RANDOM
@FEW
def test_random_documents_raise_no_alarm(rng: random.Random) -> None:
    document = load_document(tame_document(rng))
    found = check_sequence(document_sequence(document))
    assert [f for f in found if f.kind is not Kind.UNPLACED_INPUT] == []


WRITES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5)), max_size=20)


@given(WRITES, st.integers(0, 40), st.integers(0, 40))
def test_runs_are_a_byte_by_byte_map(writes: list[tuple[int, int, int]], start: int, end: int) -> None:
    runs, plain = Runs(), [NOBODY] * 40
    for a, b, who in writes:
        runs.write(a, b, who)
        plain[a:b] = [who] * max(0, min(b, 40) - a)
    found = runs.read(start, end)
    assert [who for a, b, who in found for _ in range(a, b)] == plain[start:end]
    assert all(x[1] == y[0] and x[2] != y[2] for x, y in pairwise(found))
