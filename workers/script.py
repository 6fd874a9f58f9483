"""Steps without Python: a program's instructions as a table for kernels/steps.py, and the worker's loop there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol import mailbox
from protocol.board import Board
from protocol.messages import Done, ProgramMessage
from protocol.program import Instruction, Kind
from workers.arena import Arenas
from workers.execute import Executor, Table
from workers.kernels import serving, steps, team
from workers.peers import SharedPlane
from workers.shadow import Expectations

_SCRIPTED = frozenset({Kind.RUN, Kind.COPY, Kind.SEND, Kind.RECV, Kind.WAIT})
_NAP_NS, _IDLE_NAP_S = 50_000_000, 10  # a sleeper's second chance, should it ever miss a wake-up


@dataclass(frozen=True, slots=True, eq=False)
class Script:
    """A program as the compiled walker reads it (kernels/steps.py has the layout), at `address`.

    `checks` are strict ownership's, `times` the table that each step fills.
    """

    block: NDArray[np.int64]
    address: int
    number: int
    received_nbytes: int
    checks: Expectations | None
    times: NDArray[np.int64] | None


class Spent(NamedTuple):
    """Nanoseconds of a step."""

    compute: int
    wait: int
    copy: int


def script_of(
    message: ProgramMessage,
    instructions: Sequence[Instruction],
    arenas: Arenas,
    plane: SharedPlane,
    built: Table,
    checks: Expectations | None,
    times: NDArray[np.int64] | None,
) -> Script | None:
    """The script of a checked program; None for one with instructions that need Python.

    Each step fills the table `times` [n + 1, TIME_WORDS], where there is one, and answers with it behind the outputs.
    """
    if any(item.kind not in _SCRIPTED for item in instructions):
        return None
    rows = [_row(number, item, arenas, plane, built) for number, item in enumerate(instructions)]
    places = [
        (arenas.address(port.arena) + port.offset, port.nbytes) for port in (*message.inputs, *message.outputs)
    ]  # fmt: skip
    n_last = len(list(takewhile(lambda item: item.kind is Kind.WAIT, reversed(instructions))))
    if times is not None:  # an answer has the times of all rows, the last WAITs among them
        places.append((int(times.ctypes.data), times.nbytes))
        n_last = 0
    received = sum(item.nbytes for item in instructions if item.kind is Kind.RECV)
    n_outputs = len(places) - len(message.inputs)
    head = np.zeros(steps.ROWS, np.int64)
    head[:6] = message.program, len(rows), len(message.inputs), n_outputs, received, n_last
    head[steps.CHECKS] = 0 if checks is None else checks.address
    head[steps.TIMES] = 0 if times is None else times.ctypes.data
    head[steps.IDLE_PATIENCE] = team.FIRST_NS
    table = np.array(rows, np.int64).reshape(-1)
    block = np.concatenate([head, table, np.array(places, np.int64).reshape(-1)])
    return Script(block, int(block.ctypes.data), message.program, received, checks, times)


def _row(number: int, item: Instruction, arenas: Arenas, plane: SharedPlane, built: Table) -> tuple[int, ...]:
    """ROW_WORDS words."""
    head, board = (int(item.kind), number, item.split), plane.board
    if item.kind is Kind.RUN:
        return (*head, built.address, built.starts[item.first], built.starts[item.last], 0, 0, 0)
    if item.kind is Kind.SEND:
        return (*head, board.published(item.transfer), 0, 0, 0, 0, 0)
    if item.kind is Kind.WAIT:
        return (*head, board.acknowledged(item.transfer), 0, 0, 0, 0, team.FIRST_NS)
    target = arenas.address(item.arena) + item.offset
    if item.kind is Kind.COPY:
        return (*head, 0, target, arenas.address(item.src[0]) + item.src[1], item.nbytes, 0, 0)
    source = plane.mapped[item.peer, item.src[0]].address + item.src[1]
    bells = board.published(item.transfer), board.acknowledged(item.transfer)
    return (*head, bells[0], target, source, item.nbytes, bells[1], team.FIRST_NS)


class Walker:
    """Runs scripts: one step at a time for Python, or steps as they come in the mailbox. One thread may use it."""

    def __init__(self, board: Board, index: int, executor: Executor) -> None:
        self._block = np.zeros(steps.CONTROL_WORDS, np.int64)
        self._words = self._block.data  # quicker than numpy, item by item
        self._address = int(self._block.ctypes.data)
        self._words[steps.LINE] = board.line(index)
        self._words[steps.THREADS], self._words[steps.TEAM], self._words[steps.TEAM_FUTEX] = executor.team
        self._words[steps.NAP + 1], self._words[steps.IDLE_NAP] = _NAP_NS, _IDLE_NAP_S
        self._words[steps.BOX_DATA] = mailbox.DATA

    def run(self, script: Script, step: int) -> Spent:
        """One step, its inputs are in place. Raises Violation in strict ownership."""
        if steps.run(self._address, script.address, step):
            assert script.checks is not None
            raise script.checks.violation(step)
        return self._spent()

    def _spent(self) -> Spent:
        return Spent(*self._words[steps.SPENT : steps.SPENT + 3])

    def serve(self, script: Script, box: mailbox.Mailbox) -> Done | None:
        """Run and answer the program's steps as they come, until there is another message.

        The end of the last step where its answer found no room in the mailbox. Raises Violation in strict ownership.
        """
        words, reader, writer = self._words, box.reader, box.writer
        words[steps.REQUESTS], words[steps.ANSWERS] = reader.address, writer.address
        words[steps.N_TAKEN] = reader.taken
        words[steps.N_POSTED], words[steps.END] = writer.posted, writer.end
        why = serving.serve(self._address, script.address)
        reader.taken = words[steps.N_TAKEN]
        writer.posted, writer.end = words[steps.N_POSTED], words[steps.END]
        if why == serving.VIOLATED:
            assert script.checks is not None
            raise script.checks.violation(words[steps.THIS_STEP])
        if why != serving.FULL:
            return None
        compute, wait, copy = self._spent()
        step, total = words[steps.THIS_STEP], words[steps.TOTAL]
        return Done(script.number, step, total, compute, wait, copy, script.received_nbytes, ())
