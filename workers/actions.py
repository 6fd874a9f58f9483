"""What a step of a program does: its instructions bound to addresses, several of one kind in a row at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from protocol.board import Board, State
from protocol.mailbox import Mailbox
from protocol.messages import Done, ProgramMessage
from protocol.program import NOWHERE, Instruction, Kind, OpRecord
from protocol.sharedmem import copy
from workers.arena import Arenas
from workers.peers import Plane
from workers.shadow import Expectations


class Walker(Protocol):
    """Runs scripts, which are programs for compiled code (workers/script.py)."""

    def run(self, script: Any, step: int) -> tuple[int, int, int]:
        """One step, its inputs are in place. Nanoseconds of computing, waiting and copying. Raises Violation."""

    def serve(self, script: Any, box: Mailbox) -> Done | None:
        """Run and answer the program's steps as they come, until there is another message.

        The end of the last step where its answer found no room in the mailbox. Raises Violation.
        """


class Engine(Protocol):
    """Computes operations: built into something runnable once, run in pieces."""

    def build(self, ops: Sequence[OpRecord], arenas: Arenas, *, overlaps: bool = False) -> Any:
        """Bind checked operations to addresses. Raises CapacityError for an op without a kernel."""

    def run(self, built: Any, first: int, last: int) -> None:
        """Compute operations [first, last)."""

    def close(self) -> None:
        """End the threads."""


@runtime_checkable
class Scripting(Protocol):
    """An engine that has compiled code for whole steps, too."""

    def script(
        self,
        message: ProgramMessage,
        instructions: Sequence[Instruction],
        arenas: Arenas,
        plane: Plane,
        built: Any,
        checks: Expectations | None,
        times: NDArray[np.int64] | None,
    ) -> Any:
        """A checked program as compiled code walks it, with strict ownership's checks; None where it cannot.

        With `times` every step leaves there when its instructions began and ended, and answers with it.
        """

    def walker(self, board: Board, index: int) -> Walker:
        """Runs scripts for worker `index`."""


class Phase(IntEnum):
    """What a worker's time goes to."""

    COMPUTE = 0
    WAIT = 1
    COPY = 2


Act = Callable[[int], None]
"""Part of a program, bound to addresses; it is told the step."""


class Action(NamedTuple):
    """What a step does at once: one instruction, or several in a row of one kind, from or to one peer.

    `number` is that of the first instruction, for the board.
    """

    number: int
    split: int
    state: State
    phase: Phase
    act: Act


Check = Callable[[int, int], None]
"""Checks a group of expectations (see protocol.shadow) in a step. Raises Violation."""

_PHASES = {
    Kind.RUN: Phase.COMPUTE, Kind.COPY: Phase.COPY, Kind.SEND: Phase.COPY, Kind.RECV: Phase.WAIT,
    Kind.WAIT: Phase.WAIT, Kind.TAP: Phase.COPY,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Acts:
    """Makes instructions of one program into acts."""

    program: int
    arenas: Arenas
    plane: Plane
    engine: Engine
    built: Any
    tapped: bytearray

    def of(self, item: Instruction, late: Act | None = None) -> Act:
        """`late` is for received bytes, before the peer may write over them."""
        program, plane, base = self.program, self.plane, self._base(item.arena)
        if item.kind is Kind.RUN:
            run, built, first, last = self.engine.run, self.built, item.first, item.last
            return lambda step: run(built, first, last)
        if item.kind is Kind.SEND:
            return lambda step: plane.send(program, step, item, base)
        if item.kind is Kind.RECV and late is not None:
            return lambda step: plane.receive(program, step, item, base, partial(late, step))
        if item.kind is Kind.RECV:
            return lambda step: plane.receive(program, step, item, base)
        if item.kind is Kind.WAIT:
            return lambda step: plane.wait(step, item)
        if item.kind is Kind.TAP:
            return self._tap(item)
        if self.arenas.virtual:
            return lambda step: None
        target, source, nbytes = base + item.offset, self._base(item.src[0]) + item.src[1], item.nbytes
        return lambda step: copy(target, source, nbytes)

    def _base(self, arena: int) -> int:
        return self.arenas.address(arena) if arena != NOWHERE else 0

    def _tap(self, item: Instruction) -> Act:
        def tap(step: int) -> None:
            self.tapped.extend(self.arenas.read(item.arena, item.offset, item.nbytes))

        return tap


def join(instructions: Sequence[Instruction], acts: Acts) -> tuple[Action, ...]:
    """Instructions of one kind in a row, in one split and with one peer, become one action."""
    actions, number = [], 0
    for _, group in groupby(instructions, lambda item: (item.kind, item.split, item.kind is Kind.RUN or item.peer)):
        items = list(group)
        actions.append(_action(number, items[0], _in_turn([acts.of(item) for item in items])))
        number += len(items)
    return tuple(actions)


def _action(number: int, item: Instruction, act: Act) -> Action:
    phase = _PHASES[item.kind]
    return Action(number, item.split, State.WAITING if phase is Phase.WAIT else State.BUSY, phase, act)


def _in_turn(acts: Sequence[Act]) -> Act:
    if len(acts) == 1:
        return acts[0]

    def every(step: int) -> None:
        for act in acts:
            act(step)

    return every


def checked(instructions: Sequence[Instruction], acts: Acts, check: Check, n_ports: int) -> tuple[Action, ...]:
    """One action for each instruction, with the check of its expectations; and one for those after the last."""
    actions = []
    for number, item in enumerate(instructions):
        before = partial(check, n_ports + 1 + number)
        late = item.kind is Kind.RECV
        act = acts.of(item, before) if late else _in_turn([before, acts.of(item)])
        actions.append(_action(number, item, act))
    split = instructions[-1].split if instructions else 0
    after = partial(check, n_ports + 1 + len(instructions))
    return (*actions, Action(len(instructions), split, State.BUSY, Phase.COPY, after))
