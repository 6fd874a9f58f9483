"""Proves workers' programs another way: in every interleaving, who overwrites a lent byte knows that it was taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from coordinator.graph.node import Tensor
from coordinator.schedule.devices import buft_name
from coordinator.schedule.lower import Home, Lowered, WorkerProgram, lower
from coordinator.schedule.plan import Plan
from protocol.errors import PlanError
from protocol.program import Instruction, Kind

_Clock = list[int]
"""Per worker: how many of its instructions are known to be over."""

_Span = tuple[int, int, int]
"""Arena, first byte, byte behind the last."""


@dataclass(slots=True)
class _Worker:
    """Where a worker is, what it knows of the others, and by transfer what it lends."""

    program: WorkerProgram
    clock: _Clock
    at: int = 0
    lent: dict[int, Instruction] = field(default_factory=dict)


@dataclass(slots=True)
class _Bell:
    """A transfer: its SEND with what the sender knew then, and what its receiver knew when it acknowledged."""

    sent: Instruction | None = None
    sender: int = -1
    published: _Clock | None = None
    acknowledged: _Clock | None = None


class Wrong(Enum):
    """Kinds of faults."""

    OVERWRITTEN = auto()  # bytes are overwritten that a peer may still read
    NEVER_BACK = auto()  # a program ends while bytes are on loan
    NEVER_SENT = auto()  # a RECV of what nobody sends
    UNSOUND = auto()  # anything else that no lowering makes


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a worker's program, and about which transfer; bytes [start, end) of `span` and who writes."""

    kind: Wrong
    worker: int
    transfer: int
    what: str
    item: Instruction | None = None
    span: _Span | None = None


def check_leases(lowered: Lowered) -> None:
    """Prove that no interleaving of the programs lets a worker overwrite bytes that a peer may still read.

    What a worker knows at an instruction (its own past, and that of each publication and acknowledgement that it has
    waited for) is the same in every interleaving, so one walk proves it for all. Also: the programs end, each transfer
    is sent and received once, from where it lies, and a program ends with all its loans back.

    Raises PlanError naming graph, device, transfer and tensor.
    """
    for fault in faults(lowered):
        name, device = lowered.transfers[fault.transfer].name, lowered.plan.devices[fault.worker].name
        raise PlanError(f"{lowered.plan.graph.name}: {device}: transfer {fault.transfer} of {name!r}: {fault.what}")


def faults(lowered: Lowered) -> list[Fault]:
    """All that `check_leases` would refuse, each overwritten loan once."""
    walk = _Walk(lowered)
    walk.go()
    return walk.faults


def check_plan_leases(plan: Plan) -> None:
    """Prove a plan's programs without any worker: lowered onto an arena for each resident and each chunk.

    Raises PlanError as `check_leases` and `lower` do: devices must have buffer types of their own.
    """
    check_leases(lower_apart(plan))


def lower_apart(plan: Plan) -> Lowered:
    """A plan's programs on workers whose memory nothing shares. Raises PlanError where there can be none."""
    return lower(plan, _Apart({buft_name(d): k for k, d in reversed(list(enumerate(plan.devices)))}))


@dataclass(slots=True)
class _Apart:
    """`Homes` where nothing overlaps; `workers` by buffer type."""

    workers: dict[str, int]
    arenas: dict[tuple[str, str | int], int] = field(default_factory=dict)

    def resident(self, tensor: Tensor) -> Home:
        """An arena of its own."""
        assert tensor.buffer is not None
        return self._home(tensor.buffer.buft, tensor.name)

    def compute(self, buft: str, chunk: int) -> Home:
        """The chunk's arena."""
        return self._home(buft, chunk)

    def _home(self, buft: str, what: str | int) -> Home:
        if buft not in self.workers:
            raise PlanError(f"buffer type {buft} belongs to no device")
        return Home(self.workers[buft], self.arenas.setdefault((buft, what), len(self.arenas)), 0)


class _Walk:
    """State of one proof."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        n = len(lowered.programs)
        self.workers = [_Worker(program, [0] * n) for program in lowered.programs]
        self.bells = [_Bell() for _ in lowered.transfers]
        self.faults: list[Fault] = []

    def go(self) -> None:
        """Each worker as far as it gets, until nobody moves."""
        moved = True
        while moved:
            moved = False
            for index in range(len(self.workers)):
                while self._step(index):
                    moved = True
        sent = {i.transfer for w in self.workers for i in w.program.instructions if i.kind is Kind.SEND}
        for index, worker in enumerate(self.workers):
            if worker.at < len(worker.program.instructions):
                item = worker.program.instructions[worker.at]
                kind = Wrong.UNSOUND if item.kind is not Kind.RECV or item.transfer in sent else Wrong.NEVER_SENT
                self._tell(kind, index, item.transfer, f"{item.kind.name} in split {item.split} waits for ever", item)
        for transfer, bell in enumerate(self.bells):
            if bell.acknowledged is None:
                what = "is never sent" if bell.sent is None else "is never received"
                self._tell(Wrong.UNSOUND, self.lowered.transfers[transfer].target, transfer, what)
        for index, worker in enumerate(self.workers):
            for transfer in worker.lent if worker.at == len(worker.program.instructions) else ():
                self._tell(Wrong.NEVER_BACK, index, transfer, "the program ends while the bytes are on loan")

    def _step(self, index: int) -> bool:
        """Carry out a worker's next instruction; False when it has to wait, or is through."""
        worker = self.workers[index]
        if worker.at == len(worker.program.instructions):
            return False
        item = worker.program.instructions[worker.at]
        if item.kind in (Kind.RECV, Kind.WAIT) and not self._learn(worker, item):
            return False
        for span in written(worker.program, item):
            self._check_write(index, item, span)
        worker.at += 1
        worker.clock[index] = worker.at
        if item.kind is Kind.SEND:
            self._send(index, item)
        elif item.kind is Kind.RECV:
            self._receive(index, item)
        return True

    def _learn(self, worker: _Worker, item: Instruction) -> bool:
        """Know from now on what the peer knew, and forget loans that it shows to be back; False: not yet."""
        bell = self.bells[item.transfer]
        known = bell.published if item.kind is Kind.RECV else bell.acknowledged
        if known is None:
            return False
        worker.clock[:] = map(max, worker.clock, known)
        for transfer, lent in list(worker.lent.items()):
            taken = self.bells[transfer].acknowledged
            if taken is not None and worker.clock[lent.peer] >= taken[lent.peer]:
                del worker.lent[transfer]
        return True

    def _check_write(self, index: int, item: Instruction, span: _Span) -> None:
        arena, start, end = span
        lent = self.workers[index].lent
        for transfer, loan in list(lent.items()):
            if arena == loan.arena and start < loan.offset + loan.nbytes and loan.offset < end:
                del lent[transfer]
                what = f"{item.kind.name} in split {item.split} overwrites bytes [{start}, {end}) of arena {arena}"
                what += " while they are on loan"
                self._tell(Wrong.OVERWRITTEN, index, transfer, what, item, span)

    def _send(self, index: int, item: Instruction) -> None:
        bell, worker = self.bells[item.transfer], self.workers[index]
        if bell.sent is not None:
            self._tell(Wrong.UNSOUND, index, item.transfer, "is sent twice")
            return
        bell.sent, bell.sender, bell.published = item, index, worker.clock[:]
        worker.lent[item.transfer] = item

    def _receive(self, index: int, item: Instruction) -> None:
        bell = self.bells[item.transfer]
        assert bell.sent is not None, item
        if bell.acknowledged is not None:
            self._tell(Wrong.UNSOUND, index, item.transfer, "is received twice")
            return
        if ((bell.sent.arena, bell.sent.offset), bell.sent.nbytes) != (item.src, item.nbytes):
            self._tell(Wrong.UNSOUND, index, item.transfer, "is not received from where it was sent")
        if bell.sent.peer != index or bell.sender != item.peer:
            self._tell(Wrong.UNSOUND, index, item.transfer, "is received by another worker than it was sent to")
        bell.acknowledged = self.workers[index].clock[:]

    def _tell(
        self,
        kind: Wrong,
        worker: int,
        transfer: int,
        what: str,
        item: Instruction | None = None,
        span: _Span | None = None,
    ) -> None:
        self.faults.append(Fault(kind, worker, transfer, what, item, span))


def written(program: WorkerProgram, item: Instruction) -> Iterator[_Span]:
    """What an instruction writes."""
    if item.kind is Kind.RUN:
        for op in program.ops[item.first : item.last]:
            yield op.dst.arena, op.dst.offset, op.dst.offset + op.dst.span
    elif item.kind in (Kind.COPY, Kind.RECV):
        yield item.arena, item.offset, item.offset + item.nbytes
