"""When each instruction of a step began and ended: by the wall clock, and by a virtual clock on modelled hardware."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from protocol.board import Board
from protocol.errors import ProtocolError
from protocol.program import Instruction, Kind
from protocol.timing import AHEAD, BLOCKS, PS, RESULT, TIME_WORDS, TIMINGS, Cost, unpack_costs
from workers.actions import Act, Action, Acts, join


class VirtualClock:
    """A worker's virtual time within a step, in picoseconds; the laws are those of coordinator/simulate/engine.py.

    RUN and COPY add what the model says. SEND leaves the sender's time on the board, RECV takes it from there: the
    transfer starts when both were ready and the link is free, the receiver goes on when it has arrived, and leaves on
    the board when the last byte has left, which is what WAIT waits for, and a SEND that blocks. Each link is taken to
    be its own medium. A sender that blocks learns of it only when it needs its clock again.
    """

    def __init__(self, board: Board, costs: Sequence[Cost]) -> None:
        self.board, self.costs = board, costs
        self.now = 0
        self.step = 0
        self._free: dict[int, int] = {}  # when a link is free again
        self._points: list[int] = []  # when the worker stopped at RECVs in a row
        self._floor = 0  # loans among them were back only then
        self._debts: list[tuple[int, int]] = []  # SENDs that block: instruction, transfer
        self.ends: dict[int, int] = {}  # of SENDs that block, once they are known

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        self._free.clear()
        self._debts.clear()
        self.ends.clear()
        self._new_block()
        self.now = self.costs[0].busy

    def send(self, number: int, item: Instruction) -> None:
        """Before bytes are published: say when."""
        self.settle()
        self._new_block()
        self.board.stamp_sent(item.transfer, self.now)
        if self.costs[number + 1].flags & BLOCKS:
            self._debts.append((number, item.transfer))

    def add(self, number: int) -> None:
        """A computation or a copy within the worker."""
        self.settle()
        self._new_block()
        self.now += self.costs[number + 1].busy

    def receive(self, number: int, item: Instruction) -> int:
        """Bytes have been received: on from when they were there. When they had left."""
        self.settle()
        cost = self.costs[number + 1]
        start = max(self.board.sent_clock(item.transfer), self._posted(cost), self._free.get(cost.route, 0))
        self._free[cost.route] = left = start + cost.busy
        self.board.stamp_left(item.transfer, self.step, left)
        if left + cost.lag > self.now:
            self._points.append(self.now)
            self.now = left + cost.lag
        return left

    def wait(self, number: int, item: Instruction) -> None:
        """A loan is back."""
        self.settle()
        left = self.board.left_clock(item.transfer, self.step)
        route = self.costs[number + 1].route
        self._free[route] = max(left, self._free.get(route, 0))
        self._floor = max(self._floor, left)
        self.now = max(self.now, left)

    def settle(self) -> None:
        """Find out until when the last SEND has blocked."""
        for number, transfer in self._debts:
            self.now = max(self.now, self.board.left_clock(transfer, self.step))
            self.ends[number] = self.now
        self._debts.clear()

    def end(self, n_instructions: int) -> int:
        """When everything is done that comes after the instructions, and the coordinator has the outputs."""
        self.settle()
        last = self.now
        for cost in self.costs[n_instructions + 1 :]:
            if cost.flags & RESULT:
                self._free[cost.route] = left = max(self.now, self._free.get(cost.route, 0)) + cost.busy
                last = max(last, left + cost.lag)
            else:
                self.now += cost.busy
        return max(last, self.now)

    def _posted(self, cost: Cost) -> int:
        """Since when the receiver has been ready: a device with asynchronous copies asks for several at once."""
        if not cost.flags & AHEAD:
            return self.now
        return next((point for point in self._points if point >= self._floor), self.now)

    def _new_block(self) -> None:
        self._points.clear()
        self._floor = 0


class Timing:
    """Times of one program's instructions: a table [n + 1, TIME_WORDS] per step, the last row for all of it."""

    def __init__(self, instructions: Sequence[Instruction], clock: VirtualClock | None, *, pace: bool) -> None:
        self.instructions, self.clock, self.pace = tuple(instructions), clock, pace
        self.table = np.zeros((len(instructions) + 1, TIME_WORDS), np.int64)
        self._origin = 0

    def begin(self, step: int) -> None:
        """A step begins."""
        self.table[:] = 0
        self.table[-1, 0] = self._origin = time.monotonic_ns()
        if self.clock is not None:
            self.clock.begin(step)
            self._sleep(self.clock.now)

    def finish(self) -> bytes:
        """The step is through: its table."""
        n = len(self.instructions)
        if self.clock is not None:
            self.table[-1, 3] = end = self.clock.end(n)
            for number, ps in self.clock.ends.items():
                self.table[number, 3] = ps
            self._sleep(end)
        self.table[-1, 1] = time.monotonic_ns()
        return self.table.tobytes()

    def watch(self, actions: Sequence[Action]) -> tuple[Action, ...]:
        """The actions of a program, one per instruction and perhaps one after them, with their times taken."""
        n = len(self.instructions)
        return (*(a._replace(act=partial(self._watched, a.number, a.act)) for a in actions[:n]), *actions[n:])

    def _watched(self, number: int, act: Act, step: int) -> None:
        clock, item = self.clock, self.instructions[number]
        if clock is not None and item.kind is Kind.SEND:
            clock.send(number, item)
        start = time.monotonic_ns()
        act(step)
        self.table[number, :2] = start, time.monotonic_ns()
        if clock is not None:
            self.table[number, 2:] = self._virtual(clock, number, item)
            self._sleep(clock.now)

    def _virtual(self, clock: VirtualClock, number: int, item: Instruction) -> tuple[int, int, int]:
        if item.kind is not Kind.SEND:
            clock.settle()
        start, left = clock.now, 0
        if item.kind in (Kind.RUN, Kind.COPY):
            clock.add(number)
        elif item.kind is Kind.RECV:
            left = clock.receive(number, item)
        elif item.kind is Kind.WAIT:
            clock.wait(number, item)
        return start, clock.now, left

    def _sleep(self, ps: int) -> None:
        """With `pace`: until the wall clock is where the virtual one is."""
        if self.pace:
            ahead = ps * 1_000_000_000 // PS - (time.monotonic_ns() - self._origin)
            if ahead > 0:
                time.sleep(ahead / 1e9)


def timing_of(kind: str, costs: object, instructions: Sequence[Instruction], board: Board) -> Timing:
    """The times of a program that are taken as `kind` of TIMINGS says, with its modelled costs (None: it has none).

    Raises ProtocolError when they do not go together.
    """
    if kind not in TIMINGS:
        raise ProtocolError(f"timing {kind[:40]!r}: expected one of {', '.join(map(repr, TIMINGS))}")
    if kind == "trace":
        return Timing(instructions, None, pace=False)
    clock = VirtualClock(board, unpack_costs(costs, len(instructions)))
    return Timing(instructions, clock, pace=kind == "pace")


def separate(instructions: Sequence[Instruction], acts: Acts) -> tuple[Action, ...]:
    """An action for each instruction."""
    return tuple(join([item], acts)[0]._replace(number=number) for number, item in enumerate(instructions))
