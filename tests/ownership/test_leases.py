"""Leases: workers that are slow wherever they like never see a byte that is not theirs, and worse programs are caught.

The workers of `lease_machine` run what `lower` made of random graphs, in orders that hypothesis or an unkind scheduler
draws. What each operation reads is compared with one sequential evaluation: the bytes' writers, then the bytes.
"""

import os
import random
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from coordinator.config import parse_workers
from coordinator.model.presets import open_blueprint
from coordinator.ownership.leases import check_leases, check_plan_leases
from coordinator.runtime.session import devices_of
from coordinator.schedule.lower import Lowered
from coordinator.schedule.outline import Setting, plan_model
from coordinator.schedule.placement import PlacementOptions
from protocol.errors import PlanError
from protocol.program import Kind
from tests.ownership.lease_graphs import random_devices, random_graph
from tests.ownership.lease_machine import Cluster, kept_of
from tests.ownership.lease_mutations import (
    dropped,
    go_without,
    hold_back,
    instructions,
    prefer,
    published_early,
    without_final_waits,
)
from tests.ownership.lease_parts import Faults, Violation
from tests.report.plan_command import TINY

LONGER = int(os.environ.get("CROSSDOCK_TEST_EXAMPLES", "1"))
"""How many times more examples than usual."""

QUIET = list(HealthCheck)
SEEDS = st.integers(0, 1 << 32)
PLANES = ("shared", "message", "lent")
SOUND = Faults()


def cluster_of(seed: int, plane: str, faults: Faults = SOUND, n: int = 0) -> tuple[Cluster, random.Random]:
    """A cluster of `n` workers (0: 2 to 4), and what decides its graphs."""
    rng = random.Random(seed)
    return Cluster(random_devices(rng, n or rng.randint(2, 4)), plane, seed, faults), rng


def program(cluster: Cluster, rng: random.Random) -> Lowered:
    return cluster.plan(random_graph(rng, cluster.scheduler.devices), {})[0]


def same(lowered: Lowered) -> Lowered | None:
    return lowered


class Leases(RuleBasedStateMachine):
    """Several evaluations on one scheduler: hypothesis decides who goes on, how far, and when a message arrives."""

    faults = SOUND
    change = staticmethod(same)
    only = ""  # a plane, "" for all

    @initialize(seed=SEEDS, plane=st.sampled_from(PLANES))
    def start(self, seed: int, plane: str) -> None:
        self.cluster, self.rng = cluster_of(seed, self.only or plane, self.faults)
        self.programs: list[tuple[Lowered, dict[str, str]]] = []
        self.current: tuple[Lowered, dict[str, str]] | None = None

    @precondition(lambda self: self.cluster.idle)
    @rule(keeps=st.integers(0, 2))
    def new_graph(self, keeps: int) -> None:
        """Planned when the last evaluation is over, as by the evaluator; arenas may be replaced."""
        graph = random_graph(self.rng, self.cluster.scheduler.devices)
        kept = kept_of(self.cluster, graph, keeps)
        lowered, replaced = self.cluster.plan(graph, kept)
        check_leases(lowered)
        if replaced:
            self.programs.clear()
        self.current = (self.change(lowered) or lowered, kept)
        self.programs.append(self.current)
        self.cluster.submit(*self.current)

    @precondition(lambda self: self.cluster.idle and self.programs)
    @rule(which=st.integers(0, 20))
    def earlier_program(self, which: int) -> None:
        """Kept programs run again, after others had the same memory."""
        self.current = self.programs[which % len(self.programs)]
        self.cluster.submit(*self.current)

    @precondition(lambda self: self.current and len(self.cluster.workers[0].jobs) < 3)
    @rule()
    def next_step(self) -> None:
        """The same program again, while some are still in the step before."""
        assert self.current is not None
        self.cluster.submit(*self.current)

    @rule(worker=st.integers(0, 3), acts=st.sampled_from((1, 2, 3, 5, 10, 25, 1000)))
    def go_on(self, worker: int, acts: int) -> None:
        index = worker % len(self.cluster.workers)
        while acts and self.cluster.go_on(index):
            acts -= 1

    @rule(worker=st.integers(0, 3))
    def everybody_but(self, worker: int) -> None:
        """One rests where it is while the others go as far as they can; all messages to them arrive."""
        go_without(self.cluster, worker % len(self.cluster.workers))

    @precondition(lambda self: self.cluster.wires)
    @rule(which=st.integers(0, 11))
    def deliver(self, which: int) -> None:
        links = sorted(self.cluster.wires)
        self.cluster.deliver(links[which % len(links)])

    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            prefer(self.cluster, self.rng, 3)
            self.cluster.finish()


TestLeases = Leases.TestCase
TestLeases.settings = settings(
    max_examples=15 * LONGER, stateful_step_count=40, deadline=None, suppress_health_check=QUIET
)


@given(seed=SEEDS, plane=st.sampled_from(PLANES), changes=st.integers(0, 4))
@settings(max_examples=15 * LONGER, deadline=None, suppress_health_check=QUIET)
def test_unkind_orders(seed: int, plane: str, changes: int) -> None:
    """By rank, with few changes of rank: bugs that take few coincidences have a fair chance to show."""
    cluster, rng = cluster_of(seed, plane)
    for _ in range(2):
        lowered = program(cluster, rng)
        for _ in range(rng.randint(1, 3)):
            cluster.submit(lowered, {})
        prefer(cluster, rng, changes)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("seed", range(LONGER))
def test_one_worker_rests_at_every_point(seed: int, plane: str) -> None:
    """Every act of every worker in turn is the last one for as long as the others find something to do."""
    cluster, _ = cluster_of(seed, plane, n=3)
    for slow in range(3):
        acts, total = 0, 1
        while acts < total:
            cluster, rng = cluster_of(seed, plane, n=3)
            lowered = program(cluster, rng)
            for _ in range(2):
                cluster.submit(lowered, {})
            hold_back(cluster, slow, acts, rng)
            total, acts = cluster.workers[slow].acts, acts + 1


# ---- worse programs and worse workers


def caught(
    seed: int, plane: str, faults: Faults, change: Callable[[Lowered], Lowered | None], steps: int = 1, orders: int = 40
) -> Violation | None:
    """What goes wrong with a changed program, in some order out of many."""
    for attempt in range(orders):
        cluster, rng = cluster_of(seed, plane, faults)
        lowered = change(program(cluster, rng))
        if lowered is None:
            return None
        for _ in range(steps):
            cluster.submit(lowered, {})
        rng.seed(attempt)
        try:
            if attempt % 2:
                prefer(cluster, rng, attempt % 4)
            else:
                hold_back(cluster, rng.randrange(len(cluster.workers)), rng.randrange(80), rng)
        except Violation as violation:
            return violation
    return None


SHADOW = "should be by"


@pytest.mark.parametrize(
    ("plane", "fault"),
    [
        ("shared", Faults(acknowledge_early=True, watch_loans=False)),
        ("shared", Faults(acknowledge_half=True, watch_loans=False)),
        ("shared", Faults(any_step=True, watch_loans=False)),
        ("lent", Faults(send_late=True, watch_loans=False)),
    ],
)
def test_worse_workers_are_caught_by_what_they_read(plane: str, fault: Faults) -> None:
    assert any(SHADOW in str(caught(seed, plane, fault, same, steps=2)) for seed in range(20))
    assert caught(0, plane, SOUND, same, steps=2, orders=4) is None


def early(lowered: Lowered) -> Lowered | None:
    """The last SEND that can be published before its bytes are made."""
    made = [published_early(lowered, place) for place, _ in instructions(lowered, Kind.SEND)]
    return next((m for m in reversed(made) if m is not None), None)


@pytest.mark.parametrize("watch", [True, False])
def test_publishing_too_early_is_caught(watch: bool) -> None:
    """On all planes, and, where bytes are lent, from the loan itself or from what is read."""
    for plane in PLANES:
        words = "on loan" if watch and plane != "message" else SHADOW
        assert any(words in str(caught(seed, plane, Faults(watch_loans=watch), early)) for seed in range(12))


def test_ending_with_loans_out_is_caught() -> None:
    """At once; and when nobody looks, by the next step, which overwrites what a slow peer has not taken."""
    for plane, (watch, steps, words) in product(("shared", "lent"), ((True, 1, "ends step"), (False, 2, SHADOW))):
        faults = Faults(watch_loans=watch)
        assert any(words in str(caught(seed, plane, faults, without_final_waits, steps)) for seed in range(12))


def first_needed_wait(lowered: Lowered) -> Lowered | None:
    """Without the first wait that the proof insists on."""
    return next(filter(refusal, waits(lowered)), None)


@pytest.mark.parametrize(
    ("plane", "faults", "change"),
    [
        ("shared", Faults(), first_needed_wait),
        ("", Faults(), early),
        ("shared", Faults(), without_final_waits),
        ("shared", Faults(acknowledge_early=True), same),
        ("shared", Faults(acknowledge_half=True), same),
        ("shared", Faults(any_step=True), same),
        ("lent", Faults(), first_needed_wait),
        ("lent", Faults(), without_final_waits),
        ("lent", Faults(send_late=True), same),
    ],
)
def test_the_state_machine_can_fail(plane: str, faults: Faults, change: Callable[[Lowered], Lowered | None]) -> None:
    worse = type("Worse", (Leases,), {"only": plane, "faults": faults, "change": staticmethod(change)})
    with pytest.raises(Violation):
        run_state_machine_as_test(
            worse,
            settings=settings(
                max_examples=500, stateful_step_count=40, deadline=None, suppress_health_check=QUIET,
                phases=[Phase.generate], derandomize=True, database=None, print_blob=False,
                report_multiple_bugs=False,
            ),
        )  # fmt: skip


def waits(lowered: Lowered) -> list[Lowered]:
    """Programs without one of the waits that come before the end."""
    last = len(lowered.plan.splits)
    return [dropped(lowered, place) for place, item in instructions(lowered, Kind.WAIT) if item.split < last]


@pytest.mark.parametrize("watch", [True, False])
def test_a_dropped_wait_is_caught_unless_it_was_needless(watch: bool) -> None:
    """What the proof refuses goes wrong in some order, and what it lets pass goes wrong in none."""
    needed = 0
    for seed in range(6 * LONGER):
        cluster, rng = cluster_of(seed, "shared")
        for number, bad in enumerate(waits(program(cluster, rng))):
            needless = refusal(bad) is None
            found = caught(
                seed, "shared", Faults(watch_loans=watch), lambda low, k=number: waits(low)[k],
                orders=3 if needless else 80,
            )  # fmt: skip
            assert not (needless and found)
            assert needless or found or not watch  # without a look at loans only a wrong read shows
            needed += found is not None
    assert needed >= 4


def refusal(lowered: Lowered) -> str | None:
    """What the proof says against a program."""
    try:
        check_leases(lowered)
    except PlanError as error:
        return str(error)
    return None


def test_the_proof_names_what_is_wrong() -> None:
    said = set()
    for seed in range(12):
        cluster, rng = cluster_of(seed, "shared")
        lowered = program(cluster, rng)
        assert refusal(lowered) is None
        changes = [early(lowered), without_final_waits(lowered), *waits(lowered)]
        changes += [
            dropped(lowered, next(p for p, _ in instructions(lowered, kind)))
            for kind in (Kind.SEND, Kind.RECV)
            if lowered.transfers
        ]
        said |= {text.rpartition(": ")[2] for text in map(refusal, filter(None, changes)) if text}
    for words in ("ends while", "overwrites bytes", "waits for ever"):
        assert any(words in text for text in said), said


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_programs_of_a_model_are_proved_at_every_placement(workers: int) -> None:
    blueprint = open_blueprint(TINY)
    devices = devices_of(parse_workers(f"cpu:1,accel:{workers - 1}", 1))
    for layers in range(blueprint.params.text.n_layer + 2):
        placement = PlacementOptions(layers)
        setting = Setting(devices, (None,) * workers, placement, n_tokens=16, op_offload=False)
        for planned in plan_model(blueprint, setting).graphs:
            assert planned.plan is not None
            check_plan_leases(planned.plan)


def overlapping(seed: int, plane: str) -> Violation | None:
    """Two programs of four workers, the second begun by whoever is through with the first."""
    cluster, rng = cluster_of(seed, plane, Faults(watch_loans=False), n=4)
    first = program(cluster, rng)
    second, replaced = cluster.plan(random_graph(rng, cluster.scheduler.devices), {})
    if replaced:
        return None
    cluster.submit(first, {})
    cluster.submit(second, {})
    try:
        prefer(cluster, rng, 2)
    except Violation as violation:
        return violation
    return None


def test_steps_of_two_programs_must_not_overlap_on_one_board() -> None:
    """Programs share doorbells: the coordinator awaits every answer before it starts another program."""
    assert any("wait for each other" in str(overlapping(seed, "shared")) for seed in range(60))
    for plane in ("message", "lent"):
        assert not any(overlapping(seed, plane) for seed in range(10))  # messages carry their step
