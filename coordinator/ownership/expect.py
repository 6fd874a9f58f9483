"""What strict ownership demands of a lowered plan: by identity of tensors, for workers that see only places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.graph.node import ABSENT, Tensor
from coordinator.schedule.lower import Home, Lowered
from coordinator.schedule.runs import NOBODY, Runs
from protocol.ops import WRITES_ONLY
from protocol.program import Instruction, OperandRef, Table
from protocol.program import Kind as Does
from protocol.shadow import GRANULE, Kind, shadow_table


class Owners(Protocol):
    """What the lowered plan does not say about memory."""

    def shadowed(self, worker: int, arena: int) -> bool:
        """False for weights, which no program can write to."""

    def epochs(self, worker: int) -> tuple[int, ...]:
        """A worker's compute arenas of the plan's scheduler: an evaluation opens a new epoch of each."""

    def number(self, home: Home) -> int:
        """From 1, of the tensor that has memory of its own there."""

    def slot(self, tensor: Tensor) -> int | None:
        """Of a tensor that lies where an earlier graph left it, else None."""

    def may_be_empty(self, tensor: Tensor) -> bool:
        """True for caches that fill up: what was not written yet is masked."""


@dataclass(frozen=True, slots=True)
class Act:
    """A read or write for stories: `tensor` by its number (copies: `len(tensors) + index`), `node` -1 for copies.

    `what` is the op, "copy", "send", "set" or "read"; bytes [start, end) of `arena`.
    """

    what: str
    tensor: int
    node: int
    split: int
    arena: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class WorkerExpectations:
    """One worker's table (see protocol.shadow), who reads or writes in each of its rows, and its numbered writes."""

    table: Table
    rows: tuple[Act, ...]
    writes: tuple[Act, ...]

    def write(self, number: int) -> Act:
        """A write by its number, from 1."""
        return self.writes[number - 1]


def expect(lowered: Lowered, owners: Owners, takes: Mapping[str, int]) -> tuple[WorkerExpectations, ...]:
    """Expectations of each worker's program. `takes`: slots for tensors that later graphs read where they lie."""
    sent: dict[int, tuple[tuple[int, int, int], ...]] = {}
    drafts = [_Draft(lowered, owners, worker, sent) for worker in range(len(lowered.programs))]
    for draft in drafts:
        draft.walk(takes)
    return tuple(draft.result() for draft in drafts)


@dataclass(slots=True)
class _Draft:
    """The expectations of one worker while its program is walked.

    Which write is the last of which granule is kept by tensor, not by place: reuse of memory cannot confuse it.
    """

    lowered: Lowered
    owners: Owners
    worker: int
    sent: dict[int, tuple[tuple[int, int, int], ...]]  # transfer: granules of the source and the write that is meant
    rows: list[list[int]] = field(default_factory=list)
    acts: list[Act] = field(default_factory=list)
    writes: list[Act] = field(default_factory=list)
    last: defaultdict[int, Runs] = field(default_factory=lambda: defaultdict(Runs))
    received: list[tuple[int, Act, Instruction]] = field(default_factory=list)

    def walk(self, takes: Mapping[str, int]) -> None:
        graph, program = self.lowered.plan.graph, self.lowered.programs[self.worker]
        for group, port in enumerate(program.inputs):
            ident = graph.named(port.name).id
            self._write(group, Act("set", ident, -1, -1, port.arena, port.offset, port.offset + port.nbytes))
        group = len(program.inputs)
        for arena in self.owners.epochs(self.worker):
            self._row(group, Kind.EPOCH, Act("begin", -1, -1, -1, arena, 0, 0), 0, 0, 0)
        for item in program.instructions:
            group += 1
            self._instruction(group, item)
        group += 1
        for port in (*program.outputs, *program.digests):
            ident = graph.named(port.name).id
            self._read(group, Act("read", ident, -1, -1, port.arena, port.offset, port.offset + port.nbytes))
        for name, slot in takes.items():
            ident = graph.named(name).id
            home = self.lowered.homes[ident]
            if home.worker == self.worker:
                act = Act("take", ident, -1, -1, home.arena, home.offset, home.offset + graph.tensors[ident].nbytes)
                self._row(group, Kind.TAKE, act, home.offset // GRANULE, home.offset // GRANULE + 1, slot)

    def result(self) -> WorkerExpectations:
        """The finished table; what peers send is known now."""
        for group, act, item in self.received:
            for first, last, write in self.sent.get(item.transfer, ()):
                self._row(group, Kind.READ_PEER, act, first, last, write, arena=item.src[0], peer=item.peer)
        order = sorted(range(len(self.rows)), key=lambda k: self.rows[k][1])
        rows = [(*self.rows[k][:7], number) for number, k in enumerate(order)]
        return WorkerExpectations(shadow_table(rows), tuple(self.acts[k] for k in order), tuple(self.writes))

    def _instruction(self, group: int, item: Instruction) -> None:
        plan = self.lowered.plan
        if item.kind is Does.RUN:
            for op in self.lowered.programs[self.worker].ops[item.first : item.last]:
                node = plan.graph.tensors[plan.graph.nodes[op.node]]
                for k, (ident, ref) in enumerate(zip(plan.sources[op.node], op.src, strict=True)):
                    if ident != ABSENT and ref is not None and WRITES_ONLY.get(op.op) != k:
                        self._read(group, _act(op.op.name, ident, op.node, item.split, ref))
                self._write(group, _act(op.op.name, node.id, op.node, item.split, op.dst))
            return
        if item.kind in (Does.WAIT, Does.TAP):  # a tap is a look from outside: what it finds is what it is to find
            return
        ident = item.first if item.kind is Does.COPY else self.lowered.transfers[item.transfer].tensor
        here = Act("copy", ident, -1, item.split, item.arena, item.offset, item.offset + item.nbytes)
        if item.kind is Does.SEND:
            self.sent[item.transfer] = self._read(group, here)
            return
        target = self._target(ident, here)
        if item.kind is Does.COPY:
            arena, offset = item.src
            self._read(group, Act("copy", ident, -1, item.split, arena, offset, offset + item.nbytes))
        else:
            self.received.append(
                (group, Act("copy", ident, -1, item.split, *item.src, item.src[1] + item.nbytes), item)
            )
        self._write(group, Act("copy", target, -1, item.split, item.arena, item.offset, item.offset + item.nbytes))

    def _target(self, ident: int, act: Act) -> int:
        """The copy that a split's input becomes on this worker; a kept tensor stays itself."""
        n = len(self.lowered.plan.graph.tensors)
        for k, copy in enumerate(self.lowered.plan.copies):
            if copy.tensor == ident and self.lowered.homes.get(n + k) == Home(self.worker, act.arena, act.start):
                return n + k
        return ident

    def _root(self, ident: int) -> tuple[int, Tensor | None]:
        """Whose bytes a tensor's are: its own number or its root's, and the tensor if it is no copy."""
        tensors = self.lowered.plan.graph.tensors
        if ident >= len(tensors):
            return ident, None
        root = tensors[ident].view_src
        return (ident, tensors[ident]) if root is None else (root, tensors[root])

    def _read(self, group: int, act: Act) -> tuple[tuple[int, int, int], ...]:
        """Demand that bytes are what they are meant to be; the granules of this graph's own writes."""
        if act.start >= act.end or not self.owners.shadowed(self.worker, act.arena):
            return ()
        first, last = act.start // GRANULE, -(-act.end // GRANULE)
        root, tensor = self._root(act.tensor)
        if tensor is not None and tensor.buffer is not None:
            slot = self.owners.slot(tensor)
            if slot is not None:
                self._row(group, Kind.READ_HANDLE, act, first, last, slot)
            else:
                loose = self.owners.may_be_empty(tensor)
                kind = Kind.READ_OWN_OR_EMPTY if loose else Kind.READ_OWN
                self._row(group, kind, act, first, last, self.owners.number(self._home(act)))
            return ()
        parts = tuple(self.last[root].read(first, last))
        for start, end, write in parts:
            if write == NOBODY:
                self._row(group, Kind.READ_NOBODY, act, start, end, 0)
            else:
                self._row(group, Kind.READ, act, start, end, write)
        return tuple(part for part in parts if part[2] != NOBODY)

    def _write(self, group: int, act: Act) -> None:
        if act.start >= act.end or not self.owners.shadowed(self.worker, act.arena):
            return
        first, last = act.start // GRANULE, -(-act.end // GRANULE)
        root, tensor = self._root(act.tensor)
        if act.split == len(self.lowered.plan.splits) or (tensor is not None and tensor.buffer is not None):
            self._row(group, Kind.OWN, act, first, last, self.owners.number(self._home(act)))
            return
        self.writes.append(act)
        self.last[root].write(first, last, len(self.writes))
        self._row(group, Kind.MARK, act, first, last, len(self.writes))

    def _home(self, act: Act) -> Home:
        return Home(self.worker, act.arena, act.start)

    def _row(
        self, group: int, kind: Kind, act: Act, first: int, last: int, value: int, *, arena: int = -1, peer: int = 0
    ) -> None:
        self.rows.append([kind, group, act.arena if arena < 0 else arena, first, last, value, peer, 0])
        self.acts.append(act)


def _act(what: str, ident: int, node: int, split: int, ref: OperandRef) -> Act:
    return Act(what, ident, node, split, ref.arena, ref.offset, ref.offset + ref.span)
