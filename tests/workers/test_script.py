"""Programs as compiled code walks them against the same in Python, alone and mixed; and steps taken from a mailbox."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from side import ARENA, PROGRAM, Side

from protocol import mailbox, sharedmem
from protocol import messages as m
from protocol.board import Board, State
from protocol.features import has
from protocol.mailbox import CAPACITY, Mailbox
from protocol.program import Instruction, Kind, pack_instructions, pack_ops
from protocol.timing import TIME_WORDS
from tests.patience import LATE_S, comes_true
from workers.run import Compiled

pytestmark = pytest.mark.skipif(not has("mailbox"), reason="needs futex and memfd")

SLOT, N_SLOTS = 96, 12  # bytes


@dataclass
class Program:
    """Instructions of each worker, and what they do to all bytes when they are done in the order of `sequence`."""

    n_workers: int
    instructions: list[list[Instruction]]
    sequence: list[tuple[tuple[int, int], tuple[int, int]]]  # (worker, slot) gets the bytes of (worker, slot)
    n_transfers: int
    inputs: list[tuple[m.Port, ...]]
    outputs: list[tuple[m.Port, ...]]

    def apply(self, memory: np.ndarray[Any, Any]) -> None:
        for target, source in self.sequence:
            memory[target] = memory[source]


def sides_of(n_workers: int, board: Board, directory: str) -> list[Side]:
    return [Side(index, board, directory, SLOT * N_SLOTS) for index in range(n_workers)]


def shares_of(program: Program, sides: Sequence[Side], timing: str = "") -> list[Compiled]:
    """Each worker's."""
    shares = []
    for k, side in enumerate(sides):
        peers = tuple(other.lends() for other in sides if other is not side)
        message = m.ProgramMessage(
            PROGRAM, "test", program.n_transfers, program.inputs[k], program.outputs[k], (), peers, False, timing
        )
        tables = [pack_ops([]), pack_instructions(program.instructions[k])]
        shares.append(side.compile(message, tables, len(sides), board=side.board))
    return shares


def random_program(draw: random.Random, n_workers: int, length: int) -> Program:
    """Copies and transfers at random; lent slots are waited for before they are written, and all of them at the end."""
    made = Program(n_workers, [[] for _ in range(n_workers)], [], 0, [()] * n_workers, [()] * n_workers)
    lent: list[list[tuple[int, int, int]]] = [[] for _ in range(n_workers)]  # slot, transfer, peer

    def get_back(worker: int, slot: int | None) -> None:
        for loan in [loan for loan in lent[worker] if slot in (None, loan[0])]:
            made.instructions[worker].append(Instruction(Kind.WAIT, loan[1], loan[2]))
            lent[worker].remove(loan)

    for _ in range(length):
        target, source = ((draw.randrange(n_workers), draw.randrange(N_SLOTS)) for _ in range(2))
        (worker, slot), (peer, other) = target, source
        if target == source:
            continue
        get_back(worker, slot)
        if worker == peer:
            copy = Instruction(Kind.COPY, 0, 0, 0, ARENA, slot * SLOT, SLOT, (ARENA, other * SLOT))
            made.instructions[worker].append(copy)
        else:
            number = made.n_transfers
            made.n_transfers += 1
            made.instructions[peer].append(Instruction(Kind.SEND, number, worker, 0, ARENA, other * SLOT, SLOT))
            receive = Instruction(Kind.RECV, number, peer, 0, ARENA, slot * SLOT, SLOT, (ARENA, other * SLOT))
            made.instructions[worker].append(receive)
            lent[peer].append((other, number, worker))
            if draw.random() < 0.2:  # so that SEND and WAIT alternate, too
                get_back(peer, None)
        made.sequence.append((target, source))
    for worker in range(n_workers):
        get_back(worker, None)
    return made


def together(*calls: Any) -> None:
    """Run all at once; all of them have to end."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LATE_S)
        assert not thread.is_alive(), "the workers wait for each other for ever"


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int, directory: str) -> None:
    """Each worker by compiled code or in Python, drawn for each step: what is in memory is as if one did it all."""
    draw = random.Random(seed)
    n_workers = draw.choice([2, 2, 3])
    program = random_program(draw, n_workers, draw.randrange(5, 120))
    board = Board.create(directory)
    sides = sides_of(n_workers, board, directory)
    shares = shares_of(program, sides)
    assert all(share.script is not None for share in shares)
    memory = np.random.default_rng(seed).integers(0, 256, (n_workers, N_SLOTS, SLOT), np.uint8)
    for side in sides:
        side.segment.view[: SLOT * N_SLOTS] = memory[side.index].reshape(-1)
    for step in (1, 2, (1 << 31) - 1, 1 << 31, (1 << 32) + 3, (1 << 32) + 4):
        chosen = [share if draw.random() < 0.6 else replace(share, script=None) for share in shares]
        together(*(
            lambda side=side, share=share, step=step: side.runner.run(share, step, [])
            for side, share in zip(sides, chosen, strict=True)
        ))  # fmt: skip
        program.apply(memory)
        for side in sides:
            np.testing.assert_array_equal(side.segment.view[: SLOT * N_SLOTS], memory[side.index].reshape(-1))
            assert board.progress(side.index).state is State.IDLE
            assert board.progress(side.index).step == step & 0xFFFFFFFF


@pytest.mark.parametrize("seed", range(3))
def test_times_of_instructions(seed: int, directory: str) -> None:
    """Compiled code takes them as Python does: one after the other within the step, the results are the same."""
    program = random_program(random.Random(seed), 2, 60)
    board = Board.create(directory)
    sides = sides_of(2, board, directory)
    shares = shares_of(program, sides, "trace")
    assert all(share.script is not None for share in shares)
    tables: list[np.ndarray[Any, Any]] = [np.empty(0)] * 2

    def step(index: int, number: int) -> None:
        _, outputs = sides[index].runner.run(shares[index], number, [])
        tables[index] = np.frombuffer(outputs[-1], np.int64).reshape(-1, TIME_WORDS)

    for number in (1, 2):
        before = time.monotonic_ns()
        together(*(lambda index=index, number=number: step(index, number) for index in range(2)))  # type: ignore[misc]
        after = time.monotonic_ns()
        for table, instructions in zip(tables, program.instructions, strict=True):
            assert len(table) == len(instructions) + 1
            assert not table[:, 2:].any()
            starts, ends = table[:-1, 0], table[:-1, 1]
            assert (starts <= ends).all()
            sends = np.array([item.kind is Kind.SEND for item in instructions])
            assert (ends[:-1] <= starts[1:])[~(sends[:-1] & sends[1:])].all()
            assert before <= table[-1, 0] <= starts.min()
            assert ends.max() <= table[-1, 1] <= after


def _ping(n: int, *, batch: bool) -> Program:
    """Worker 0 lends `n` times, each time waiting before the next or after all of them; 1 takes them one by one."""
    lends, takes = [], []
    for k in range(n):
        lends.append(Instruction(Kind.SEND, k, 1, k, ARENA, 0, SLOT))
        if not batch:
            lends.append(Instruction(Kind.WAIT, k, 1, k))
        takes.append(Instruction(Kind.RECV, k, 0, k, ARENA, (k % N_SLOTS) * SLOT, SLOT, (ARENA, 0)))
    if batch:
        lends.extend(Instruction(Kind.WAIT, k, 1, n) for k in range(n))
    ports = [(m.Port("x", ARENA, 0, SLOT), m.Port("y", ARENA, SLOT, 4)), ()]
    return Program(2, [lends, takes], [], n, ports, [(), (m.Port("z", ARENA, 0, SLOT * N_SLOTS),)])  # type: ignore[list-item]


def test_acknowledged_at_the_latest_before_it_sleeps(directory: str) -> None:
    """The sender waits after each SEND, and the receiver has RECVs in a row: told of all at once, both would hang."""
    board = Board.create(directory)
    sides = sides_of(2, board, directory)
    shares = shares_of(_ping(50, batch=False), sides)
    data = [memoryview(b"a" * SLOT), memoryview(b"bbbb")]
    together(lambda: sides[0].runner.run(shares[0], 5, data), lambda: sides[1].runner.run(shares[1], 5, []))
    assert bytes(sides[1].segment.view[:SLOT]) == b"a" * SLOT


class Serving:
    """Two workers that take their steps from mailboxes, each in a thread."""

    def __init__(self, directory: str, program: Program) -> None:
        self.segment = sharedmem.create(mailbox.nbytes(2), directory, "board")
        board = Board(self.segment)
        self.sides = sides_of(2, board, directory)
        self.shares = shares_of(program, self.sides)
        self.ours = [Mailbox.offer(self.segment, index) for index in range(2)]
        theirs = [Mailbox.attach(self.segment.path, index) for index in range(2)]
        self.theirs = [box for box in theirs if box is not None]
        self.ended: list[m.Done | None] = [None, None]

    def serve(self, index: int) -> None:
        walker = self.sides[index].runner.walker
        assert walker is not None
        self.ended[index] = walker.serve(self.shares[index].script, self.theirs[index])

    def start(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=self.serve, args=(index,), daemon=True) for index in range(2)]
        for thread in threads:
            thread.start()
        return threads

    def answer(self, index: int) -> Any:
        deadline = time.monotonic() + LATE_S
        while not self.ours[index].reader.wait(0.1):
            assert time.monotonic() < deadline
        return self.ours[index].reader.take()


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("at", [0, (1 << 32) - 3])
def test_steps_from_the_mailbox(batch: bool, at: int, directory: str) -> None:
    serving = Serving(directory, _ping(9, batch=batch))
    for ours, theirs in zip(serving.ours, serving.theirs, strict=True):
        ours.writer.posted = theirs.reader.taken = ours.reader.taken = theirs.writer.posted = at
    for box in range(4):
        words = serving.segment.view[mailbox.board.NBYTES + box * mailbox.BOX_NBYTES :][:1024].view(np.uint32)
        words[[mailbox.POSTED, mailbox.TAKEN]] = at
    threads = serving.start()
    record = mailbox.StepRecord(PROGRAM, [SLOT, 4])
    for step in range(1, 40):
        value = bytes([step]) * SLOT
        if step % 3:
            record.inputs[0][:], record.inputs[1][:] = value, b"yyyy"
            record.set_step(step)
            assert serving.ours[0].writer.post_step(record)
        else:  # an input that is not given stays as it is
            assert serving.ours[0].writer.post(m.Step(PROGRAM, step), [value, b""])
        assert serving.ours[1].writer.post(m.Step(PROGRAM, step))
        if step % 10 == 0:
            time.sleep(0.01)  # everybody falls asleep
        done, taken = serving.answer(0), serving.answer(1)
        assert (done.message.program, done.message.step, done.buffers) == (PROGRAM, step, ())
        assert (taken.message.step, taken.message.received_nbytes) == (step, 9 * SLOT)
        assert taken.message.total_ns >= taken.message.wait_ns + taken.message.compute_ns + taken.message.copy_ns > 0
        assert bytes(taken.buffers[0])[: 9 * SLOT] == value * 9
        assert bytes(serving.sides[0].segment.view[SLOT : SLOT + 4]) == b"yyyy"
    for index, thread in enumerate(threads):
        serving.ours[index].writer.post(m.Forget((3,)))
        thread.join(LATE_S)
        assert not thread.is_alive()
        assert serving.ended[index] is None
        assert serving.theirs[index].reader.take().message == m.Forget((3,))


OTHERS: dict[str, tuple[Any, list[bytes]]] = {
    "another program": (m.Step(PROGRAM + 1, 3), [b"a" * SLOT, b"bbbb"]),
    "an input too few": (m.Step(PROGRAM, 3), [b"a" * SLOT]),
    "an input too many": (m.Step(PROGRAM, 3), [b"a" * SLOT, b"bbbb", b""]),
    "a short input": (m.Step(PROGRAM, 3), [b"a" * (SLOT - 1), b"bbbb"]),
    "a long input": (m.Step(PROGRAM, 3), [b"a" * SLOT, b"bbbbb"]),
    "another message": (m.Shutdown(), []),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_messages_are_left_to_python(case: str, directory: str) -> None:
    serving = Serving(directory, _ping(1, batch=True))
    message, buffers = OTHERS[case]
    serving.ours[0].writer.post(message, buffers)
    together(lambda: serving.serve(0))
    envelope = serving.theirs[0].reader.take()
    assert (envelope.message, [bytes(data) for data in envelope.buffers]) == (message, buffers)
    serving.ours[0].writer.pass_by()  # and one that came through the socket
    together(lambda: serving.serve(0))
    assert serving.theirs[0].reader.waiting
    assert not serving.theirs[0].reader.inside


@pytest.mark.parametrize(("word", "value"), [(0, 9), (1, 1 << 31), (2, 8), (3, 0xFFFFFFFF), (4, 2)])
def test_spoilt_steps_are_left_to_python(word: int, value: int, directory: str) -> None:
    """Kind, number of frames, and lengths: Python says what is wrong."""
    serving = Serving(directory, _ping(1, batch=True))
    serving.ours[0].writer.post(m.Step(PROGRAM, 3), [b"a" * SLOT, b"bbbb"])
    start = mailbox.board.NBYTES + mailbox.DATA
    serving.segment.view[start : start + 64].view(np.uint32)[word] = value
    together(lambda: serving.serve(0))
    assert serving.theirs[0].reader.waiting
    assert not serving.ours[0].reader.waiting


def test_an_answer_without_room_is_left_to_python(directory: str) -> None:
    serving = Serving(directory, _ping(1, batch=True))
    assert serving.theirs[1].writer.post(m.Write(1, 0), [bytes(CAPACITY - 300)])  # that nobody takes
    serving.ours[1].writer.post(m.Step(PROGRAM, 4))
    serving.sides[0].board.publish(0, 4)
    together(lambda: serving.serve(1))
    done = serving.ended[1]
    assert done is not None
    assert (done.program, done.step, done.received_nbytes, done.digests) == (PROGRAM, 4, SLOT, ())
    assert serving.theirs[1].writer.posted == 1


def test_what_is_lent_is_back_before_anything_else(directory: str) -> None:
    """The answer may come first, the next request is not looked at before the peer has taken the bytes."""
    serving = Serving(directory, _ping(1, batch=True))
    thread = threading.Thread(target=serving.serve, args=(0,), daemon=True)
    thread.start()
    serving.ours[0].writer.post(m.Step(PROGRAM, 8), [b"a" * SLOT, b"bbbb"])
    assert serving.answer(0).message.step == 8
    serving.ours[0].writer.post(m.Step(PROGRAM, 9), [b"c" * SLOT, b"bbbb"])
    assert comes_true(lambda: serving.sides[0].board.progress(0).state is State.WAITING)
    thread.join(0.1)
    assert bytes(serving.sides[0].segment.view[:SLOT]) == b"a" * SLOT
    assert serving.sides[0].board.progress(0).state is State.WAITING
    serving.sides[0].board.acknowledge(0, 8)
    assert serving.answer(0).message.step == 9
    assert bytes(serving.sides[0].segment.view[:SLOT]) == b"c" * SLOT
    serving.ours[0].writer.post(m.Shutdown())
    thread.join(0.1)
    assert thread.is_alive()
    serving.sides[0].board.acknowledge(0, 9)
    thread.join(LATE_S)
    assert not thread.is_alive()


def test_lent_bytes_are_back_when_others_have_used_the_doorbell_since(directory: str) -> None:
    """Programs number their transfers alike: another one, of other workers, may have run in the meantime."""
    serving = Serving(directory, _ping(1, batch=True))
    thread = threading.Thread(target=serving.serve, args=(0,), daemon=True)
    thread.start()
    serving.ours[0].writer.post(m.Step(PROGRAM, 8), [b"a" * SLOT, b"bbbb"])
    assert serving.answer(0).message.step == 8
    serving.sides[0].board.acknowledge(0, 8)
    serving.sides[0].board.acknowledge(0, 9)
    serving.ours[0].writer.post(m.Shutdown())
    thread.join(LATE_S)
    assert not thread.is_alive()


def test_waiting_for_steps_costs_nothing(directory: str) -> None:
    serving = Serving(directory, _ping(1, batch=True))
    serving.ours[0].writer.post(m.Shutdown())
    together(lambda: serving.serve(0))  # compiled code is loaded
    serving.theirs[0].reader.take()
    busy: list[float] = []

    def serve() -> None:
        began = time.thread_time()
        serving.serve(0)
        busy.append(time.thread_time() - began)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    time.sleep(0.4)
    serving.ours[0].writer.post(m.Shutdown())
    thread.join(LATE_S)
    assert busy[0] < 0.02
