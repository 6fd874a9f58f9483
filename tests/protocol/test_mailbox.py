"""Mailboxes: order, room, what a peer may write into them, waiting; and a fleet that uses them beside the socket."""

from __future__ import annotations

import multiprocessing
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.cli.options import DEMO_MODEL
from coordinator.runtime import fleet as fleet_module
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.session import Session, SessionOptions
from coordinator.schedule.placement import PlacementOptions
from protocol import mailbox as module
from protocol import messages as m
from protocol import sharedmem
from protocol.board import NBYTES
from protocol.errors import ProtocolError, WorkerError
from protocol.features import has
from protocol.mailbox import BOX_NBYTES, CAPACITY, N_SLOTS, Mailbox
from tests.integration.describing import fleet_of, load
from tests.patience import LATE_S, comes_true
from tests.protocol.echoing import echo

pytestmark = pytest.mark.skipif(not has("mailbox"), reason="needs futex and memfd")

REQUESTS = NBYTES  # of worker 0: where its box of requests begins
DONE = m.Done(3, 1 << 40, 5, 4, 3, 2, 1, ())
MESSAGES: list[tuple[Any, list[bytes]]] = [
    (m.Step(3, 7), [b"abc", b"", b"x" * 1000]),
    (m.Step(1 << 60, -1), []),
    (DONE, [b"logits"]),
    (m.Done(3, 9, 5, 4, 3, 2, 1, ("ab" * 32,)), [b"logits"]),
    (m.Write(1, 64), [b"bytes"]),
    (m.Failed("model", "too bad"), []),
    (m.Shutdown(), []),
]

Pair = tuple[Mailbox, Mailbox]


@pytest.fixture
def segment(tmp_path: Path) -> sharedmem.Segment:
    return sharedmem.create(module.nbytes(2), str(tmp_path), "board")


def pair(segment: sharedmem.Segment, worker: int = 0) -> Pair:
    """The coordinator's side and the worker's."""
    ours = Mailbox.offer(segment, worker)
    theirs = Mailbox.attach(segment.path, worker)
    assert theirs is not None
    return ours, theirs


@pytest.fixture
def demo_session() -> Iterator[Session]:
    demo = load(DEMO_MODEL)
    with fleet_of("cpu:1,accel:1") as fleet:
        session = Session(demo.model, demo.params, fleet.topology, SessionOptions(PlacementOptions(3)))
        session.open(fleet)
        session.evaluate([5, 6, 7])
        yield session


def words(segment: sharedmem.Segment) -> Any:
    return segment.view[REQUESTS : REQUESTS + 1024].view(np.uint32)


def test_messages_arrive_as_they_were(segment: sharedmem.Segment) -> None:
    for worker in (0, 1):
        ours, theirs = pair(segment, worker)
        for message, buffers in MESSAGES:
            assert ours.writer.post(message, buffers)
            assert theirs.writer.post(message, buffers)
        for end in (theirs.reader, ours.reader):
            for message, buffers in MESSAGES:
                assert end.waiting
                assert end.inside
                envelope = end.take()
                assert envelope.message == message
                assert [bytes(b) for b in envelope.buffers] == buffers
            assert not end.waiting


@pytest.mark.parametrize("sizes", [(), (4,), (4, 0, 100)])
def test_steps_written_in_place_are_like_others(sizes: tuple[int, ...], segment: sharedmem.Segment) -> None:
    ours, theirs = pair(segment)
    record = module.StepRecord(3, sizes)
    for step in (1, 1 << 40):
        for number, place in enumerate(record.inputs):
            place[:] = bytes([number + step % 7]) * len(place)
        record.set_step(step)
        assert record.message() == m.Step(3, step)
        assert ours.writer.post_step(record)
        assert ours.writer.post(record.message(), record.inputs)
        written, posted = theirs.reader.take(), theirs.reader.take()
        assert written == posted
        assert written.message == m.Step(3, step)
        assert [bytes(data) for data in written.buffers] == [bytes(data) for data in record.inputs]
    assert not ours.writer.post_step(module.StepRecord(3, (CAPACITY,)))
    for _ in range(N_SLOTS):
        assert ours.writer.post_step(record)
    assert not ours.writer.post_step(record)


def test_what_does_not_fit_passes_by_in_order(segment: sharedmem.Segment) -> None:
    ours, theirs = pair(segment)
    big = bytes(CAPACITY)
    assert ours.writer.post(m.Step(0, 1))
    assert not ours.writer.post(m.Step(0, 2), [big])
    ours.writer.pass_by()  # the caller sent it through the socket
    assert ours.writer.post(m.Step(0, 3))
    reader = theirs.reader
    assert reader.take().message.step == 1
    assert reader.waiting
    assert not reader.inside
    reader.passed()
    assert reader.take().message.step == 3
    assert ours.writer.post(m.Step(0, 4), [big[:-100]])  # everything was taken: all the room again
    assert reader.take().buffers[0] == big[:-100]


def test_as_many_messages_as_slots(segment: sharedmem.Segment) -> None:
    ours, theirs = pair(segment)
    assert [ours.writer.post(m.Step(0, k)) for k in range(N_SLOTS + 1)] == [True] * N_SLOTS + [False]
    ours.writer.pass_by()
    for k in range(N_SLOTS):
        assert theirs.reader.take().message.step == k
    assert theirs.reader.waiting
    assert not theirs.reader.inside


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, CAPACITY // 3)), max_size=120), st.sampled_from([0, 2**32 - 20]))
def test_any_traffic_keeps_its_order(
    tmp_path_factory: pytest.TempPathFactory, traffic: list[int | None], at: int
) -> None:
    """A number posts that many bytes, None takes; against a queue. Also where the count of messages begins again."""
    segment = sharedmem.create(module.nbytes(1), str(tmp_path_factory.mktemp("box")), "board")
    ours, theirs = pair(segment)
    ours.writer.posted = theirs.reader.taken = at
    words(segment)[[0, 16]] = at
    socket: deque[int] = deque()
    queue: deque[int] = deque()
    for step, nbytes in enumerate([*traffic, *[None] * len(traffic)]):
        if nbytes is not None:
            if not ours.writer.post(m.Step(0, step), [bytes([step % 251]) * nbytes]):
                socket.append(step)
                ours.writer.pass_by()
            queue.append(step)
        elif queue:
            assert theirs.reader.waiting
            if theirs.reader.inside:
                envelope = theirs.reader.take()
                found = envelope.message.step
                assert bytes(envelope.buffers[0]).strip(bytes([found % 251])) == b""
                assert len(envelope.buffers[0]) == traffic[found]
            else:
                theirs.reader.passed()
                found = socket.popleft()
            assert found == queue.popleft()
        assert theirs.reader.waiting == bool(queue)
    segment.close()


def at_slot(word: int, value: int) -> Callable[[Any], None]:
    def spoil(cells: Any) -> None:
        cells[32 + 4 + word] = value  # of message 1

    return spoil


def in_record(word: int, value: int) -> Callable[[Any], None]:
    def spoil(cells: Any) -> None:
        cells[256 + word] = value

    return spoil


BAD: dict[str, tuple[Callable[[Any], None], str]] = {
    "outside": (at_slot(1, CAPACITY), "record of"),
    "far outside": (at_slot(1, 0xFFFFFFFF), "record of"),
    "too long": (at_slot(2, 0xFFFFFFFF), "record of"),
    "nothing": (at_slot(2, 0), "record of 0 bytes"),
    "cut": (at_slot(2, 20), "frames of"),
    "cut in the lengths": (at_slot(2, 10), "frames: expected"),
    "no frames": (in_record(1, 0), "record of 0 frames"),
    "many frames": (in_record(1, 0xFFFFFFFF), "record of 4294967295 frames"),
    "long frame": (in_record(2, 17), "frames of"),
    "longer frame": (in_record(3, 0xFFFFFFFF), "frames of"),
    "kind": (in_record(0, 9), "unknown kind 9"),
    "another kind": (in_record(0, 2), "numbers of a record in 16 bytes: expected 56"),
    "frames": (in_record(0, 0), "prelude of 16 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_refused(case: str, segment: sharedmem.Segment) -> None:
    spoil, text = BAD[case]
    ours, theirs = pair(segment)
    ours.writer.post(m.Step(0, 1), [b"abcd"])
    ours.writer.post(m.Step(0, 2))
    cells = segment.view[REQUESTS : REQUESTS + BOX_NBYTES].view(np.uint32)
    spoil(cells)
    with pytest.raises(ProtocolError, match=text):
        theirs.reader.take()
    assert theirs.reader.take().message.step == 2


def test_random_records_are_refused_or_read(segment: sharedmem.Segment) -> None:
    rng = np.random.default_rng(1)
    ours, theirs = pair(segment)
    data = segment.view[REQUESTS + 1024 : REQUESTS + BOX_NBYTES]
    refused = 0
    for k in range(2000):
        ours.writer.post(*MESSAGES[k % len(MESSAGES)])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(0, 40)] = rng.integers(0, 256)
        try:
            theirs.reader.take()
        except ProtocolError:
            refused += 1
    assert refused > 200


def test_what_was_taken_does_not_change(segment: sharedmem.Segment) -> None:
    ours, theirs = pair(segment)
    ours.writer.post(m.Step(0, 1), [b"abcd"])
    envelope = theirs.reader.take()
    segment.view[REQUESTS:] = 255
    assert (envelope.message.step, bytes(envelope.buffers[0])) == (1, b"abcd")
    assert envelope.buffers[0].readonly


def test_only_where_it_is_offered(segment: sharedmem.Segment, tmp_path: Path) -> None:
    board = sharedmem.create(NBYTES, str(tmp_path), "small")
    assert Mailbox.attach(board.path, 0) is None
    assert Mailbox.attach(segment.path, 0) is None  # not yet
    with pytest.raises(WorkerError, match="cannot open"):
        Mailbox.attach(f"{tmp_path}/nothing", 0)


def test_between_processes(segment: sharedmem.Segment) -> None:
    ours = Mailbox.offer(segment, 1)
    other = multiprocessing.get_context("spawn").Process(target=echo, args=(segment.path,))
    other.start()
    for step in range(1000):
        if step % 50 == 25:
            time.sleep(0.002)
        ours.writer.post(m.Step(0, step), [struct.pack("<q", step)])
        while not ours.reader.wait(1.0):
            assert other.exitcode is None
        envelope = ours.reader.take()
        assert (envelope.message.step, struct.unpack("<q", envelope.buffers[0])) == (step, (step,))
    ours.writer.post(m.Shutdown())
    other.join(60)
    assert other.exitcode == 0


def test_waiting_ends_and_costs_nothing(segment: sharedmem.Segment) -> None:
    ours, _ = pair(segment)
    began, busy = time.monotonic(), time.thread_time()
    assert not ours.reader.wait(0.3)
    assert 0.25 < time.monotonic() - began < LATE_S
    assert time.thread_time() - busy < 0.05


def test_a_fleet_keeps_the_order_of_both_ways() -> None:
    """Small messages in the mailbox, large ones through the socket, answers likewise."""
    big = np.random.default_rng(2).bytes(3 * CAPACITY // 2)
    with fleet_of("cpu:1") as fleet:
        arena = next(fleet.arena_numbers[0])
        fleet.request(0, m.Allocate(arena, len(big), "test", False))
        for data in (b"first", big, b"third", big[::-1], b"fifth"):
            fleet.send(0, m.Write(arena, 0), [data])
        for _ in range(5):
            fleet.gather([0])
        expected = b"fifth" + big[::-1][5:]
        for nbytes in (5, len(big), 7):
            assert fleet.request(0, m.Read(arena, 0, nbytes)).buffers[0] == expected[:nbytes]


def is_asleep(fleet: Fleet) -> bool:
    """No worker takes processor time, which the system counts in hundredths of a second."""
    busy = [process.vitals().cpu_s for process in fleet.processes]
    time.sleep(0.4)
    return all(p.vitals().cpu_s - b <= 0.01 for p, b in zip(fleet.processes, busy, strict=True))


def test_an_idle_worker_sleeps() -> None:
    with fleet_of("cpu:1") as fleet:
        fleet.request(0, m.StatsRequest())
        assert comes_true(lambda: is_asleep(fleet))
        assert sum(is_asleep(fleet) for _ in range(3)) >= 2


def test_a_worker_that_has_run_sleeps(demo_session: Session) -> None:
    """Also where it waits for the next step without Python."""
    for _ in range(3):
        demo_session.evaluate([5])
    assert comes_true(lambda: is_asleep(demo_session.fleet))
    assert sum(is_asleep(demo_session.fleet) for _ in range(3)) >= 2


def test_a_request_to_a_dead_worker_says_so() -> None:
    with fleet_of("cpu:1") as fleet:
        fleet.request(0, m.StatsRequest())
        fleet.processes[0].kill()
        fleet.processes[0].wait(LATE_S)
        began = time.monotonic()
        with pytest.raises(WorkerError, match="cpu0 was killed by SIGKILL"):
            fleet.request(0, m.StatsRequest())
        assert time.monotonic() - began < fleet_module._DEATH_S / 2
