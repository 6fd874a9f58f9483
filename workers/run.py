"""Compiled programs: a worker's share of a graph, checked and bound to addresses, run once per step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from protocol.board import Board
from protocol.errors import CapacityError, ProtocolError
from protocol.limits import MAX_BUFFER_NBYTES
from protocol.messages import Done, Port, ProgramMessage
from protocol.ops import Op
from protocol.program import (
    INSTRUCTION_WORDS,
    OP_WORDS,
    Instruction,
    Kind,
    OpRecord,
    check_operands,
    check_range,
    check_transfers,
    table_from,
    unpack_instructions,
    unpack_ops,
)
from protocol.shadow import WORDS
from protocol.wire import Buffer
from workers.actions import Action, Acts, Check, Engine, Scripting, checked, join
from workers.arena import Arenas
from workers.peers import Plane
from workers.shadow import Expectations, Shadows
from workers.timing import Timing, separate, timing_of


class NullEngine:
    """Computes nothing."""

    def build(self, ops: Sequence[OpRecord], arenas: Arenas, *, overlaps: bool = False) -> None:
        """Nothing to bind."""

    def run(self, built: None, first: int, last: int) -> None:
        """Nothing to compute."""

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A program that may run: every range was checked, everything is bound to addresses. It works in `arenas`.

    `inputs` and `outputs` are the ports' bytes, None where there is no memory. `begin` is strict ownership's: it marks
    the inputs that were set and starts checking. What TAPs read is put into `tapped`. `script` is what compiled code
    walks instead of the actions; where it takes times, too, their table comes behind the outputs.
    """

    message: ProgramMessage
    actions: tuple[Action, ...]
    arenas: frozenset[int]
    inputs: tuple[memoryview | None, ...]
    outputs: tuple[memoryview, ...]
    digests: tuple[memoryview, ...]
    received_nbytes: int
    tapped: bytearray
    begin: Callable[[int, Sequence[Buffer]], None] | None = None
    timing: Timing | None = None
    script: Any = None

    @property
    def repeats(self) -> bool:
        """True when compiled code may take its steps from the mailbox."""
        return self.script is not None and not self.digests


def compile_program(
    message: ProgramMessage,
    buffers: Sequence[memoryview],
    arenas: Arenas,
    plane: Plane,
    engine: Engine,
    n_workers: int,
    unsupported: frozenset[Op],
    shadows: Shadows | None = None,
    board: Board | None = None,
) -> Compiled:
    """Check a program against this worker's memory and bind it to addresses.

    Raises ProtocolError for anything out of range, CapacityError for an op that this backend does not have.
    """
    costs: memoryview | None = None
    if message.timing in ("clock", "pace") and buffers:
        *buffers, costs = buffers
    if len(buffers) not in (2, 3) or (len(buffers) == 3 and shadows is None):
        expected = "2 buffers" if shadows is None else "2 or 3 buffers"
        raise ProtocolError(f"program {message.name!r}: expected {expected}, got {len(buffers)}")
    check_transfers(message.n_transfers)
    ops = unpack_ops(table_from(buffers[0], OP_WORDS, "operations"))
    instructions = unpack_instructions(
        table_from(buffers[1], INSTRUCTION_WORDS, "instructions"), len(ops), n_workers, message.n_transfers
    )
    sizes = arenas.sizes
    check_operands(ops, sizes)
    for op in ops:
        if op.op in unsupported:
            raise CapacityError(f"program {message.name!r}: this worker does not support {op.op.name}")
        if op.dst.arena in arenas.read_only | arenas.loaded:
            what = "a mapped file" if op.dst.arena in arenas.read_only else "weights"
            raise ProtocolError(f"program {message.name!r}: {op.op.name} would write into {what}")
    plane.open(message.peer_arenas)
    for item in instructions:
        _check_instruction(item, arenas, plane)
    n_tapped = sum(item.nbytes for item in instructions if item.kind is Kind.TAP)
    if n_tapped > MAX_BUFFER_NBYTES:
        raise CapacityError(f"program {message.name!r}: {n_tapped} bytes of taps, at most {MAX_BUFFER_NBYTES}")
    for port in (*message.inputs, *message.outputs, *message.digests):
        check_range(sizes, port.arena, port.offset, port.nbytes, f"port {port.name!r}")
    used = {operand.arena for op in ops for operand in (op.dst, *op.src) if operand is not None}
    used |= {arena for item in instructions for arena in (item.arena, item.src[0])}
    used |= {port.arena for port in (*message.inputs, *message.outputs, *message.digests)}
    for port in message.inputs:
        if port.arena in arenas.read_only:
            raise ProtocolError(f"port {port.name!r}: arena {port.arena} is a mapped file")
    built = engine.build(ops, arenas, overlaps=message.overlaps)
    check: Check | None = None
    checks: Expectations | None = None
    if shadows is not None and len(buffers) == 3:
        n_groups = len(message.inputs) + len(instructions) + 2
        peers = [(p.peer, p.arena) for p in message.peer_arenas]
        checks = shadows.bind(table_from(buffers[2], WORDS, "expectations"), n_groups, peers)
        check = partial(shadows.check, checks)
    tapped = bytearray()
    acts = Acts(message.program, arenas, plane, engine, built, tapped)
    timing = None
    if message.timing:
        assert board is not None
        timing = timing_of(message.timing, costs, instructions, board)
    outputs = tuple(_bytes(arenas, port) for port in message.outputs)
    script, times = None, None if timing is None or timing.clock is not None else timing.table
    if (timing is None or times is not None) and isinstance(engine, Scripting):
        script = engine.script(message, instructions, arenas, plane, built, checks, times)
    if script is not None and times is not None:  # compiled code takes them
        outputs, timing = (*outputs, times.data.cast("B")), None
    return Compiled(
        message,
        _actions(instructions, acts, check, len(message.inputs), timing),
        frozenset(used),
        tuple(None if arenas.virtual else _bytes(arenas, port) for port in message.inputs),
        outputs,
        tuple(_bytes(arenas, port) for port in message.digests),
        sum(item.nbytes for item in instructions if item.kind is Kind.RECV),
        tapped,
        None if check is None else partial(_begin, check),
        timing,
        script,
    )


def _actions(
    instructions: Sequence[Instruction], acts: Acts, check: Check | None, n_ports: int, timing: Timing | None
) -> tuple[Action, ...]:
    if check is not None:
        actions = checked(instructions, acts, check, n_ports)
    else:
        actions = join(instructions, acts) if timing is None else separate(instructions, acts)
    return actions if timing is None else timing.watch(actions)


def _bytes(arenas: Arenas, port: Port) -> memoryview:
    """A port's memory; zeros where there is none."""
    if arenas.virtual:
        return memoryview(bytes(port.nbytes))
    return arenas.segments[port.arena].view[port.offset : port.offset + port.nbytes].data


def _check_instruction(item: Instruction, arenas: Arenas, plane: Plane) -> None:
    if item.kind in (Kind.COPY, Kind.SEND, Kind.RECV, Kind.TAP):
        check_range(arenas.sizes, item.arena, item.offset, item.nbytes, item.kind.name)
    if item.kind in (Kind.COPY, Kind.RECV) and item.arena in arenas.read_only | arenas.loaded:
        what = "a mapped file" if item.arena in arenas.read_only else "weights"
        raise ProtocolError(f"{item.kind.name} would write into {what}")
    if item.kind is Kind.COPY:
        check_range(arenas.sizes, item.src[0], item.src[1], item.nbytes, item.kind.name)
    if item.kind is Kind.RECV:
        plane.check(item)


def _begin(check: Check, step: int, inputs: Sequence[Buffer]) -> None:
    """Mark what was set, and begin."""
    for port, data in enumerate(inputs):
        if len(data):
            check(port, step)
    check(len(inputs), step)


class Runner:
    """Runs compiled programs one step at a time."""

    def __init__(self, index: int, arenas: Arenas, plane: Plane, board: Board, engine: Engine) -> None:
        self.index, self.arenas, self.plane, self.board, self.engine = index, arenas, plane, board, engine
        self.shadows: Shadows | None = None
        self.walker = engine.walker(board, index) if isinstance(engine, Scripting) else None

    def run(self, program: Compiled, step: int, inputs: Sequence[memoryview]) -> tuple[Done, list[Buffer]]:
        """One evaluation: inputs in, instructions in order, outputs, taps and digests out.

        Raises ProtocolError when the inputs are not those of the program's ports, in strict ownership Violation.
        """
        start = time.perf_counter_ns()
        _set_inputs(program, inputs)
        if program.begin is not None:
            program.begin(step, inputs)
        program.tapped.clear()
        if program.timing is not None:
            program.timing.begin(step)
        if program.script is not None and self.walker is not None:
            compute, wait, copying = self.walker.run(program.script, step)
        else:
            compute, wait, copying = self._act(program, step)
        outputs: list[Buffer] = [bytes(data) for data in program.outputs]
        if program.tapped:
            outputs.append(bytes(program.tapped))
        if program.timing is not None:
            outputs.append(program.timing.finish())
        digests = tuple([hashlib.sha256(data).hexdigest() for data in program.digests])
        self.board.rest(self.index)
        message = program.message.program
        total = time.perf_counter_ns() - start
        done = Done(message, step, total, compute, wait, copying, program.received_nbytes, digests)
        return done, outputs

    def _act(self, program: Compiled, step: int) -> tuple[int, int, int]:
        """The program's actions in Python. Nanoseconds of computing, waiting and copying."""
        clock, show, index = time.perf_counter_ns, self.board.show, self.index
        spent = [0, 0, 0]
        now = clock()
        for number, split, state, phase, act in program.actions:
            show(index, step, number, split, state)
            act(step)
            before, now = now, clock()
            spent[phase] += now - before
        return spent[0], spent[1], spent[2]


def _set_inputs(program: Compiled, inputs: Sequence[memoryview]) -> None:
    ports = program.message.inputs
    if len(ports) != len(inputs):
        raise ProtocolError(f"step with {len(inputs)} inputs: the program has {len(ports)}")
    for port, target, data in zip(ports, program.inputs, inputs, strict=True):
        if not len(data):
            continue
        if len(data) != port.nbytes:
            raise ProtocolError(f"input {port.name!r}: expected {port.nbytes} bytes, got {len(data)}")
        if target is not None:
            target[:] = data
