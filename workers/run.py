"""Compiled programs: a worker's share of a graph, checked and bound to addresses, run once per step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from protocol.board import Board, State
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
from protocol.sharedmem import copy
from workers.arena import Arenas
from workers.peers import Plane
from workers.shadow import Expectations, Shadows


class Engine(Protocol):
    """Computes operations: built into something runnable once, run in pieces."""

    def build(self, ops: Sequence[OpRecord], arenas: Arenas, *, overlaps: bool = False) -> Any:
        """Bind checked operations to addresses. Raises CapacityError for an op without a kernel."""

    def run(self, built: Any, first: int, last: int) -> None:
        """Compute operations [first, last)."""

    def close(self) -> None:
        """End the threads."""


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
    """A program that may run: every range was checked; `built` is the engine's. It works in `arenas`.

    `expectations` are those of strict ownership, by groups: one per input port, one before and one per instruction,
    one after the last.
    """

    message: ProgramMessage
    instructions: tuple[Instruction, ...]
    built: Any
    arenas: frozenset[int]
    expectations: Expectations | None = None


def compile_program(
    message: ProgramMessage,
    buffers: Sequence[memoryview],
    arenas: Arenas,
    plane: Plane,
    engine: Engine,
    n_workers: int,
    unsupported: frozenset[Op],
    shadows: Shadows | None = None,
) -> Compiled:
    """Check a program against this worker's memory and bind it to addresses.

    Raises ProtocolError for anything out of range, CapacityError for an op that this backend does not have.
    """
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
    tapped = sum(item.nbytes for item in instructions if item.kind is Kind.TAP)
    if tapped > MAX_BUFFER_NBYTES:
        raise CapacityError(f"program {message.name!r}: {tapped} bytes of taps, at most {MAX_BUFFER_NBYTES}")
    for port in (*message.inputs, *message.outputs, *message.digests):
        check_range(sizes, port.arena, port.offset, port.nbytes, f"port {port.name!r}")
    used = {operand.arena for op in ops for operand in (op.dst, *op.src) if operand is not None}
    used |= {arena for item in instructions for arena in (item.arena, item.src[0])}
    used |= {port.arena for port in (*message.inputs, *message.outputs, *message.digests)}
    built = engine.build(ops, arenas, overlaps=message.overlaps)
    expectations = None
    if shadows is not None and len(buffers) == 3:
        n_groups = len(message.inputs) + len(instructions) + 2
        peers = [(p.peer, p.arena) for p in message.peer_arenas]
        expectations = shadows.bind(table_from(buffers[2], WORDS, "expectations"), n_groups, peers)
    return Compiled(message, tuple(instructions), built, frozenset(used), expectations)


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


_WAITS = frozenset({Kind.RECV, Kind.WAIT})


class Runner:
    """Runs compiled programs one step at a time."""

    def __init__(self, index: int, arenas: Arenas, plane: Plane, board: Board, engine: Engine) -> None:
        self.index, self.arenas, self.plane, self.board, self.engine = index, arenas, plane, board, engine
        self.shadows: Shadows | None = None

    def run(self, program: Compiled, step: int, inputs: Sequence[memoryview]) -> tuple[Done, list[bytes | bytearray]]:
        """One evaluation: inputs in, instructions in order, outputs, taps and digests out.

        Raises ProtocolError when the inputs are not those of the program's ports, in strict ownership Violation.
        """
        start = time.perf_counter_ns()
        self._set_inputs(program.message.inputs, inputs)
        check = self._checker(program, step, inputs)
        compute = wait = copying = received = 0
        tapped = bytearray()
        for number, item in enumerate(program.instructions):
            state = State.WAITING if item.kind in _WAITS else State.BUSY
            self.board.show(self.index, step, number, item.split, state)
            before = time.perf_counter_ns()
            if check is not None and item.kind is not Kind.RECV:
                check(number)
            if item.kind is Kind.RUN:
                self.engine.run(program.built, item.first, item.last)
                compute += time.perf_counter_ns() - before
            elif item.kind is Kind.SEND:
                self.plane.send(program.message.program, step, item, self.arenas.address(item.arena))
                copying += time.perf_counter_ns() - before
            elif item.kind is Kind.RECV:
                late = None if check is None else partial(check, number)
                self.plane.receive(program.message.program, step, item, self.arenas.address(item.arena), late)
                received += item.nbytes
                wait += time.perf_counter_ns() - before
            elif item.kind is Kind.WAIT:
                self.plane.wait(step, item)
                wait += time.perf_counter_ns() - before
            elif item.kind is Kind.TAP:
                tapped += self.arenas.read(item.arena, item.offset, item.nbytes)
                copying += time.perf_counter_ns() - before
            elif not self.arenas.virtual:
                target, source = self.arenas.address(item.arena), self.arenas.address(item.src[0])
                copy(target + item.offset, source + item.src[1], item.nbytes)
                copying += time.perf_counter_ns() - before
        if check is not None:
            check(len(program.instructions))
        outputs: list[bytes | bytearray] = [
            self.arenas.read(port.arena, port.offset, port.nbytes) for port in program.message.outputs
        ]
        if tapped:
            outputs.append(tapped)
        digests = tuple(self._digest(port) for port in program.message.digests)
        self.board.rest(self.index)
        total = time.perf_counter_ns() - start
        done = Done(program.message.program, step, total, compute, wait, copying, received, digests)
        return done, outputs

    def _checker(self, program: Compiled, step: int, inputs: Sequence[memoryview]) -> Callable[[int], None] | None:
        """Mark what was set and begin; the check of an instruction's expectations, None without strict ownership."""
        if self.shadows is None or program.expectations is None:
            return None
        shadows, expectations, n_ports = self.shadows, program.expectations, len(inputs)
        for port in range(n_ports):
            if len(inputs[port]):
                shadows.check(expectations, port, step)
        shadows.check(expectations, n_ports, step)
        return lambda number: shadows.check(expectations, n_ports + 1 + number, step)

    def _set_inputs(self, ports: Sequence[Port], inputs: Sequence[memoryview]) -> None:
        if len(ports) != len(inputs):
            raise ProtocolError(f"step with {len(inputs)} inputs: the program has {len(ports)}")
        for port, data in zip(ports, inputs, strict=True):
            if len(data) not in (0, port.nbytes):
                raise ProtocolError(f"input {port.name!r}: expected {port.nbytes} bytes, got {len(data)}")
            if len(data):
                self.arenas.write(port.arena, port.offset, data)

    def _digest(self, port: Port) -> str:
        return hashlib.sha256(self.arenas.read(port.arena, port.offset, port.nbytes)).hexdigest()
