"""Strict ownership where compiled code walks the program: it finds what Python finds, at the same place."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from typing import Any

import pytest
from side import ARENA, PROGRAM, Side

from protocol import mailbox, sharedmem
from protocol import messages as m
from protocol.board import Board
from protocol.features import has
from protocol.mailbox import Mailbox
from protocol.program import Instruction, pack_instructions, pack_ops
from protocol.program import Kind as Does
from protocol.shadow import GRANULE, STEP_SHIFT, Kind, shadow_table
from workers.run import Compiled
from workers.shadow import Violation

pytestmark = pytest.mark.skipif(not has("mailbox"), reason="needs futex and memfd")

SIZE = 2 * GRANULE
N_PLACES = 6
GIVER, TAKER = 0, 1
SLOT = 5
WAYS = ("python", "compiled", "mailbox")
Rows = list[tuple[int, ...]]


def rang(doorbell: int, step: int) -> bool:
    """A doorbell, by its address, has rung in this step."""
    return ctypes.c_int32.from_address(doorbell).value == step


def place(number: int) -> tuple[int, int]:
    """Granules of a place."""
    return 2 * number, 2 * number + 2


def row(kind: Kind, group: int, at: int, value: int, peer: int = 0) -> tuple[int, ...]:
    return (kind, group, ARENA, *place(at), value, peer, 0)


# Worker 0: its input into place 0, a copy to place 1, both lent. Worker 1: takes them, copies, leaves a handle.
INSTRUCTIONS = (
    (
        Instruction(Does.COPY, 0, 0, 0, ARENA, SIZE, SIZE, (ARENA, 0)),
        Instruction(Does.SEND, 0, TAKER, 0, ARENA, 0, SIZE),
        Instruction(Does.SEND, 1, TAKER, 0, ARENA, SIZE, SIZE),
        Instruction(Does.WAIT, 0, TAKER, 0),
        Instruction(Does.WAIT, 1, TAKER, 0),
    ),
    (
        Instruction(Does.RECV, 0, GIVER, 0, ARENA, 0, SIZE, (ARENA, 0)),
        Instruction(Does.RECV, 1, GIVER, 0, ARENA, SIZE, SIZE, (ARENA, SIZE)),
        Instruction(Does.COPY, 0, 0, 1, ARENA, 2 * SIZE, SIZE, (ARENA, SIZE)),
        Instruction(Does.COPY, 0, 0, 1, ARENA, 3 * SIZE, SIZE, (ARENA, 2 * SIZE)),
    ),
)
PORTS = (((m.Port("x", ARENA, 0, SIZE), m.Port("kept", ARENA, 4 * SIZE, SIZE)), ()), ((), (m.Port("y", ARENA, 0, 4),)))
EXPECTED: tuple[Rows, Rows] = (
    [  # groups: two inputs, begin, instructions, end
        row(Kind.MARK, 0, 0, 1),
        row(Kind.OWN, 1, 4, 9),
        (Kind.EPOCH, 2, ARENA, 0, 0, 0, 0, 0),
        row(Kind.READ, 3, 0, 1),
        row(Kind.READ_OWN, 3, 4, 9),
        row(Kind.MARK, 3, 1, 2),
        row(Kind.READ, 4, 0, 1),
        row(Kind.READ, 5, 1, 2),
        row(Kind.READ_OWN_OR_EMPTY, 8, 5, 3),
        row(Kind.READ, 8, 1, 2),
    ],
    [
        (Kind.EPOCH, 0, ARENA, 0, 0, 0, 0, 0),
        row(Kind.READ_PEER, 1, 0, 1, GIVER),
        row(Kind.MARK, 1, 0, 1),
        row(Kind.READ_PEER, 2, 1, 2, GIVER),
        row(Kind.MARK, 2, 1, 2),
        row(Kind.READ, 3, 1, 2),
        row(Kind.MARK, 3, 2, 3),
        row(Kind.READ, 4, 2, 3),
        row(Kind.MARK, 4, 3, 4),
        row(Kind.READ, 5, 3, 4),
        (Kind.TAKE, 5, ARENA, 6, 7, SLOT, 0, 0),
        row(Kind.READ_HANDLE, 5, 3, SLOT),
    ],
)
READS = (Kind.READ, Kind.READ_OWN, Kind.READ_PEER)
MISTAKES = [(w, k) for w, rows in enumerate(EXPECTED) for k, r in enumerate(rows) if r[0] in READS]
INPUTS = ((b"x" * SIZE, b"k" * SIZE), ())


def tag_of(side: Side, at: int) -> int:
    """Of a place's first granule."""
    return int(side.arenas.shadows[ARENA].view.view("<i8")[1 + place(at)[0]])


class Pair:
    """Two workers, of which one has expectations that may be wrong."""

    def __init__(self, directory: str, rows: tuple[Rows, Rows] = EXPECTED) -> None:
        self.board_segment = sharedmem.create(mailbox.nbytes(2), directory, "board")
        self.board = Board(self.board_segment)
        self.sides = [Side(index, self.board, directory, SIZE * N_PLACES, shadow=True) for index in range(2)]
        self.shares = [self._share(index, rows[index]) for index in range(2)]
        self.ours = [Mailbox.offer(self.board_segment, index) for index in range(2)]
        self.theirs = [Mailbox.attach(self.board_segment.path, index) for index in range(2)]

    def _share(self, index: int, rows: Rows) -> Compiled:
        inputs, outputs = PORTS[index]
        peers = (self.sides[1 - index].lends(),)
        message = m.ProgramMessage(PROGRAM, "test", 2, inputs, outputs, (), peers, False)
        numbered = shadow_table([(*r[:7], k) for k, r in enumerate(rows)])
        return self.sides[index].compile(message, [pack_ops([]), pack_instructions(INSTRUCTIONS[index]), numbered], 2)

    def step(self, index: int, way: str, step: int) -> None:
        """A worker's step. Raises Violation."""
        side, share = self.sides[index], self.shares[index]
        assert share.script is not None
        inputs = [memoryview(data) for data in INPUTS[index]]
        if way == "mailbox":
            ours, theirs = self.ours[index], self.theirs[index]
            assert theirs is not None
            assert side.runner.walker is not None
            ours.writer.post(m.Step(PROGRAM, step), INPUTS[index])
            ours.writer.post(m.Shutdown())
            side.runner.walker.serve(share.script, theirs)
            assert theirs.reader.take().message == m.Shutdown()
            assert ours.reader.take().message.step == step
        else:
            side.runner.run(share if way == "compiled" else replace(share, script=None), step, inputs)

    def both(self, way: str, step: int) -> None:
        """A step of both, to its end."""
        giver = threading.Thread(target=self.step, args=(GIVER, way, step), daemon=True)
        giver.start()
        self.step(TAKER, way, step)
        giver.join(60)
        assert not giver.is_alive()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_as_meant_raises_no_alarm(way: str, directory: str) -> None:
    pair = Pair(directory)
    for step in (1, 2, (1 << 32) + 3):
        pair.both(way, step)
        assert tag_of(pair.sides[TAKER], 3) == step << STEP_SHIFT | 4
        assert bytes(pair.sides[TAKER].segment.view[3 * SIZE : 4 * SIZE]) == b"x" * SIZE
    assert tag_of(pair.sides[GIVER], 4) == -9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("worker", "wrong"), MISTAKES)
def test_every_read_is_checked_at_its_place(worker: int, wrong: int, way: str, directory: str) -> None:
    """One expectation asks for another write: that row is named, and nothing behind it has happened."""
    rows = ([*EXPECTED[0]], [*EXPECTED[1]])
    kind, group, arena, first, last, value, peer, _ = rows[worker][wrong]
    rows[worker][wrong] = (kind, group, arena, first, last, 77, peer, 0)
    pair = Pair(directory, rows)
    step = 5
    if worker == TAKER:
        giver = threading.Thread(target=pair.step, args=(GIVER, "compiled", step), daemon=True)
        giver.start()
    elif group == 8:  # behind the waits for what was lent
        for transfer in range(2):
            pair.board.acknowledge(transfer, step)
    with pytest.raises(Violation) as caught:
        pair.step(worker, way, step)
    found = value if kind != Kind.READ_OWN else -value
    expected = -77 if kind == Kind.READ_OWN else step << STEP_SHIFT | 77
    tag = found if kind == Kind.READ_OWN else step << STEP_SHIFT | found
    epoch = 5 if kind != Kind.READ_PEER else pair.sides[GIVER].arenas.shadows[ARENA].view.view("<i8")[0]
    assert caught.value.step == step
    assert caught.value.report == (wrong, first, tag, expected, epoch)
    marks = [r for r in EXPECTED[worker] if r[0] == Kind.MARK]
    for mark in marks:
        happened = mark[1] < group or (mark[1] == group and EXPECTED[worker].index(mark) < wrong)
        assert (tag_of(pair.sides[worker], mark[3] // 2) != 0) == happened, mark
    if worker == TAKER:
        taken = [transfer for transfer in range(2) if transfer + 1 < group]
        assert [t for t in range(2) if rang(pair.board.acknowledged(t), step)] == taken
        for transfer in range(2):
            pair.board.acknowledge(transfer, step)
        giver.join(60)
        assert not giver.is_alive()
    else:
        assert {t for t in range(2) if rang(pair.board.published(t), step)} <= {t for t in range(2) if t + 4 < group}


@pytest.mark.parametrize("way", WAYS)
def test_another_hand_wrote_what_is_read(way: str, directory: str) -> None:
    """As between graphs: the tag that is found is not one of this step's."""
    pair = Pair(directory)
    pair.both(way, 1)
    tags: Any = pair.sides[GIVER].arenas.shadows[ARENA].view.view("<i8")
    tags[1 + place(5)[0] + 1] = 1 << STEP_SHIFT | 6
    for transfer in range(2):
        pair.board.acknowledge(transfer, 2)
    with pytest.raises(Violation) as caught:
        pair.step(GIVER, way, 2)
    assert caught.value.report == (8, place(5)[0] + 1, 1 << STEP_SHIFT | 6, -3, 2)
