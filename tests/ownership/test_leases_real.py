"""Leases of the real workers: planes and board in threads with naps, and processes that are halted now and then."""

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from coordinator.cli.options import DEMO_IMAGE, DEMO_MODEL
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.session import SessionOptions
from coordinator.schedule.lower import Lowered
from coordinator.schedule.placement import PlacementOptions
from protocol import sharedmem
from protocol.program import Kind
from tests.integration.describing import answer, chat_prompt, fleet_of, load
from tests.ownership.lease_graphs import random_graph
from tests.ownership.lease_mutations import Place, dropped, instructions, without_final_waits
from tests.ownership.lease_threads import in_pieces, threads_of
from tests.ownership.test_leases import LONGER, PLANES, cluster_of, early, program, refusal, same
from workers import peers


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="xd-", dir="/tmp") as path:  # short enough for a socket
        yield path


@pytest.mark.parametrize("plane", sorted({*PLANES, "lent"}))
@pytest.mark.parametrize("seed", range(4 * LONGER))
def test_real_planes_with_naps(plane: str, seed: int, directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lent`: messages of which none is copied."""
    if plane == "lent":
        monkeypatch.setattr(peers, "COPIED_NBYTES", 0)
    cluster, rng = cluster_of(seed, "message" if plane == "lent" else plane)
    with threads_of(cluster, directory, seed) as threads:
        for naps in threads.naps:
            naps.longest_s = 0.004
        monkeypatch.setattr(sharedmem, "copy", in_pieces(threads.naps[0]))
        for _ in range(3):
            lowered, _ = cluster.plan(random_graph(rng, cluster.scheduler.devices), {})
            compiled = threads.ship(lowered)
            assert threads.run(lowered, compiled, steps=1) == []
            assert threads.run(lowered, compiled, steps=3) == []


def wrong_for_real(
    seed: int, directory: str, change: Callable[[Lowered], Lowered | None], *, early: bool = False,
    before_copy_s: float = 0.0, before_run_s: float = 0.0, transfer: int | None = None, steps: int = 1,
) -> list[str]:  # fmt: skip
    """Outputs with wrong bytes of a changed program on the real shared plane, its workers held up at the worst point.

    Receivers sleep before they copy a transfer (None: any), or operations before they begin. A changed program whose
    workers wait for each other for ever has no outputs; those that are sound must have them.
    """
    cluster, rng = cluster_of(seed, "shared")
    lowered = program(cluster, rng)
    changed = change(lowered)
    if changed is None:
        return []
    numbers = [t.number for t in lowered.transfers if transfer in (None, t.number)]
    with threads_of(cluster, directory, seed, early=early) as threads:
        for naps in threads.naps:
            naps.before_copy_s = dict.fromkeys(numbers, before_copy_s)
            naps.before_run_s = before_run_s
        if change is same and not early:
            return threads.run(changed, threads.ship(changed), steps)
        wrong = threads.run(changed, threads.ship(changed), steps, patience_s=3.0)
    return [] if wrong == ["no answer"] else wrong


def test_early_acknowledgement_is_caught_for_real(directory: str) -> None:
    assert any(wrong_for_real(seed, directory, same, early=True, before_copy_s=0.02) for seed in range(20))
    assert not any(wrong_for_real(seed, directory, same, before_copy_s=0.002) for seed in range(3))


def test_early_publication_is_caught_for_real(directory: str) -> None:
    assert any(wrong_for_real(seed, directory, early, before_run_s=0.01) for seed in range(20))


def test_ending_with_loans_out_is_caught_for_real(directory: str) -> None:
    """By the bytes that the next step overwrites; where workers hang instead, another program is tried."""
    assert any(
        wrong_for_real(seed, directory, without_final_waits, before_copy_s=0.02, steps=2) for seed in range(4, 30)
    )


def test_a_dropped_wait_is_caught_for_real(directory: str) -> None:
    assert any(
        wrong_for_real(seed, directory, lambda low, k=place: dropped(low, k), before_copy_s=0.05, transfer=number)
        for seed in range(30)
        for place, number in needed_waits(seed)
    )


def needed_waits(seed: int) -> list[tuple[Place, int]]:
    """Waits of the program of a seed that the proof insists on, before its end; each with its transfer."""
    lowered = program(*cluster_of(seed, "shared"))
    last = len(lowered.plan.splits)
    rows = [(place, item.transfer) for place, item in instructions(lowered, Kind.WAIT) if item.split < last]
    return [row for row in rows if refusal(dropped(lowered, row[0]))]


def lent(seed: int, directory: str) -> list[str]:
    """Outputs with wrong bytes of two steps on the message plane, its frames handed over late."""
    cluster, rng = cluster_of(seed, "message")
    lowered = program(cluster, rng)
    with threads_of(cluster, tempfile.mkdtemp(dir=directory), seed) as threads:
        for naps in threads.naps:
            naps.before_post_s = 0.005
        return threads.run(lowered, threads.ship(lowered), steps=2)


def test_a_message_on_loan_needs_its_wait(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a copied body survives a plane that does not wait."""
    monkeypatch.setattr(peers.MessagePlane, "wait", lambda *_: None)
    assert not any(lent(seed, directory) for seed in range(3))
    monkeypatch.setattr(peers, "COPIED_NBYTES", 0)
    assert any(lent(seed, directory) for seed in range(20))
    monkeypatch.undo()
    monkeypatch.setattr(peers, "COPIED_NBYTES", 0)
    assert not any(lent(seed, directory) for seed in range(3))


# ---- processes


@contextmanager
def halting(fleet: Fleet, seed: int, longest_s: float = 0.05) -> Iterator[list[int]]:
    """Meanwhile one worker after the other is halted at a random moment for a random time; yields their numbers."""
    rng, stop, halted = random.Random(seed), threading.Event(), []

    def halt() -> None:
        while not stop.is_set():
            number = rng.randrange(len(fleet.processes))
            time.sleep(rng.random() * 0.02)
            os.kill(fleet.processes[number].pid, signal.SIGSTOP)
            time.sleep(rng.random() ** 2 * longest_s)
            os.kill(fleet.processes[number].pid, signal.SIGCONT)
            halted.append(number)

    thread = threading.Thread(target=halt)
    thread.start()
    try:
        yield halted
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_halted_worker_changes_no_byte(transport: str) -> None:
    """The bundled model over three workers: shared memory by ipc, messages by tcp."""
    demo = load(DEMO_MODEL)
    prompt = chat_prompt(demo, "Describe this image.", [DEMO_IMAGE])
    n_layer = demo.params.text.n_layer
    with fleet_of("cpu:1,accel:2", transport=transport) as fleet:
        expected = answer(fleet, demo, prompt, SessionOptions(), n_predict=20)
        for seed in range(LONGER):
            options = SessionOptions(PlacementOptions((n_layer // 2, n_layer + 1)[seed % 2]))
            with halting(fleet, seed) as halted:
                while len(halted) < 10:
                    assert answer(fleet, demo, prompt, options, n_predict=20) == expected
