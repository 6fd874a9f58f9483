"""A plan becomes one program per worker: who computes what, and who hands which bytes to whom, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.graph.node import ABSENT, Tensor
from coordinator.schedule.plan import Plan
from protocol.errors import CapacityError, PlanError
from protocol.limits import MAX_TRANSFERS
from protocol.messages import Port
from protocol.ops import Flag
from protocol.program import N_SRC, Instruction, Kind, OperandRef, OpRecord


@dataclass(frozen=True, slots=True)
class Home:
    """Where bytes really lie: worker (its device's index), arena of that worker, offset in bytes."""

    worker: int
    arena: int
    offset: int


class Homes(Protocol):
    """From the plan's buffers to the arenas of worker processes."""

    def resident(self, tensor: Tensor) -> Home:
        """A tensor that was allocated before the graph."""

    def compute(self, buft: str, chunk: int) -> Home:
        """The start of a chunk of a compute buffer."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Copy tensor `name` to `home` at the end: bytes that must outlive their graph (safe ownership)."""

    name: str
    home: Home


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that go from one worker to another in each step."""

    number: int
    source: int
    target: int
    name: str
    nbytes: int
    split: int
    arena: int  # of the source
    tensor: int  # its number in the graph


@dataclass(frozen=True, slots=True)
class TapPoint:
    """A tensor whose bytes go into a step's reply as they are when `graph.nodes[node]` is done.

    `worker` holds the bytes. Inputs are looked at before anything is computed: `node` and `split` are -1.
    """

    tensor: int
    node: int
    split: int
    worker: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WorkerProgram:
    """One worker's share."""

    ops: tuple[OpRecord, ...]
    instructions: tuple[Instruction, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    digests: tuple[Port, ...]


@dataclass(frozen=True, slots=True)
class Lowered:
    """Programs by worker, every transfer between them, and where tensors lie (copies: `len(tensors) + index`).

    `taps` are in the plan's order; those of one worker are in the order of its program.
    """

    plan: Plan
    programs: tuple[WorkerProgram, ...]
    transfers: tuple[Transfer, ...]
    homes: Mapping[int, Home] = field(default_factory=dict)
    taps: tuple[TapPoint, ...] = ()

    def home(self, name: str) -> Home:
        """Where the tensor of a port lies."""
        return self.homes[self.plan.graph.named(name).id]


@dataclass(slots=True)
class _Draft:
    """A program that is being written."""

    ops: list[OpRecord] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    digests: list[Port] = field(default_factory=list)
    run_start: int = 0
    lent: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)  # transfer: peer, arena, first, last byte

    def end_run(self, split: int) -> None:
        """Close the current run of operations."""
        if len(self.ops) > self.run_start:
            self.instructions.append(Instruction(Kind.RUN, self.run_start, len(self.ops), split))
            self.run_start = len(self.ops)

    def before_write(self, arena: int, start: int, end: int, split: int) -> None:
        """Wait for every peer that may still read bytes of [start, end)."""
        for transfer, (peer, lent_arena, lent_start, lent_end) in list(self.lent.items()):
            if lent_arena == arena and lent_start < end and start < lent_end:
                self.end_run(split)
                self.instructions.append(Instruction(Kind.WAIT, transfer, peer, split))
                del self.lent[transfer]


def lower(
    plan: Plan,
    homes: Homes,
    *,
    outputs: Sequence[str] = (),
    digests: Sequence[str] = (),
    keeps: Sequence[Keep] = (),
    taps: Callable[[Tensor], bool] | None = None,
) -> Lowered:
    """Programs for all workers of a plan; worker i runs what was assigned to device i.

    `outputs` are the tensors whose bytes go back to the coordinator after each step, `digests` those whose SHA-256
    does. Splits are walked in the plan's order; a split's inputs are sent where they lie and received at the split's
    start, as ggml copies them. Sent bytes are on loan until the receiver acknowledges: whoever would overwrite them
    waits first, and a program ends only when all its loans are back.

    `taps` chooses nodes, views among them, and inputs whose bytes go into the reply as well: the plan stays as it is,
    only runs of operations end where somebody looks.

    Raises PlanError when a node works on memory of another worker, CapacityError for too many transfers.
    """
    return _Lowering(plan, homes, taps).run(outputs, digests, keeps)


class _Lowering:
    """State of one call of `lower`."""

    def __init__(self, plan: Plan, homes: Homes, taps: Callable[[Tensor], bool] | None) -> None:
        self.plan = plan
        self.homes = homes
        self.tensors = plan.graph.tensors
        self.drafts = [_Draft() for _ in plan.devices]
        self.transfers: list[Transfer] = []
        self.copies = {(copy.tensor, copy.backend): k for k, copy in enumerate(plan.copies)}
        self.homes_of: dict[int, Home] = {}
        self.wanted = taps
        self.taps: list[TapPoint] = []

    def run(self, outputs: Sequence[str], digests: Sequence[str], keeps: Sequence[Keep]) -> Lowered:
        self._inputs()
        for number, split in enumerate(self.plan.splits):
            for tensor in split.inputs:
                self._hand_over(tensor, split.backend, number)
            draft = self.drafts[split.backend]
            for index in range(split.start, split.end):
                self._node(draft, split.backend, index, number)
                self._tap(self.plan.graph.nodes[index], index, number)
            draft.end_run(number)
        self._ports(outputs, digests)
        for keep in keeps:
            self._keep(keep)
        for draft in self.drafts:
            for transfer, (peer, *_) in draft.lent.items():
                draft.instructions.append(Instruction(Kind.WAIT, transfer, peer, len(self.plan.splits)))
        programs = tuple(
            WorkerProgram(tuple(d.ops), tuple(d.instructions), tuple(d.inputs), tuple(d.outputs), tuple(d.digests))
            for d in self.drafts
        )
        return Lowered(self.plan, programs, tuple(self.transfers), self.homes_of, tuple(self.taps))

    def _home(self, ident: int) -> Home:
        """Home of a tensor, or of a copy (`len(tensors) + index`)."""
        if ident not in self.homes_of:
            self.homes_of[ident] = self._find_home(ident)
        return self.homes_of[ident]

    def _find_home(self, ident: int) -> Home:
        if ident >= len(self.tensors):
            place = self.plan.copies[ident - len(self.tensors)].place
            name = self.plan.copies[ident - len(self.tensors)].name
        else:
            tensor = self.tensors[ident]
            root = tensor if tensor.view_src is None else self.tensors[tensor.view_src]
            if root.buffer is not None:
                home = self.homes.resident(root)
                return Home(home.worker, home.arena, home.offset + tensor.view_offs)
            found = self.plan.places[root.id]
            if found is None:
                raise PlanError(f"{self.plan.graph.name}: {root.name!r} has no memory: nothing allocated it")
            place, name = found, root.name
            if tensor is not root:
                base = self._home(root.id)
                return Home(base.worker, base.arena, base.offset + tensor.view_offs)
        assert place.chunk is not None, name
        assert place.offset is not None, name
        base = self.homes.compute(place.buft, place.chunk)
        return Home(base.worker, base.arena, base.offset + place.offset)

    def _operand(self, ident: int) -> OperandRef:
        home = self._home(ident)
        copied = ident >= len(self.tensors)
        tensor = self.tensors[self.plan.copies[ident - len(self.tensors)].tensor if copied else ident]
        return OperandRef(home.arena, home.offset, tensor.dtype, tensor.ne, tensor.nb)

    def _inputs(self) -> None:
        for ident in self.plan.graph.leafs:
            tensor = self.tensors[ident]
            if tensor.flags & Flag.INPUT and tensor.buffer is None and self.plan.places[ident] is not None:
                home = self._home(ident)
                self.drafts[home.worker].inputs.append(Port(tensor.name, home.arena, home.offset, tensor.nbytes))
                self._tap(ident, -1, -1)

    def _tap(self, ident: int, node: int, split: int) -> None:
        """Look at a tensor where it lies. Its writers are in that worker's program already: sources come first."""
        tensor = self.tensors[ident]
        if self.wanted is None or 0 in tensor.ne or not self.wanted(tensor):
            return
        home = self._home(ident)
        draft = self.drafts[home.worker]
        draft.end_run(split)
        draft.instructions.append(
            Instruction(Kind.TAP, ident, 0, max(split, 0), home.arena, home.offset, tensor.nbytes)
        )
        self.taps.append(TapPoint(ident, node, split, home.worker, tensor.nbytes))

    def _hand_over(self, ident: int, backend: int, split: int) -> None:
        """Copy a split's input to the split's backend: on one worker at once, between workers as a loan."""
        tensor = self.tensors[ident]
        source, target = self._home(ident), self._home(len(self.tensors) + self.copies[ident, backend])
        receiver = self.drafts[target.worker]
        receiver.end_run(split)
        receiver.before_write(target.arena, target.offset, target.offset + tensor.nbytes, split)
        span = {"split": split, "arena": target.arena, "offset": target.offset, "nbytes": tensor.nbytes}
        origin = (source.arena, source.offset)
        if source.worker == target.worker:
            receiver.instructions.append(Instruction(Kind.COPY, ident, src=origin, **span))
            return
        number = len(self.transfers)
        if number >= MAX_TRANSFERS:
            raise CapacityError(
                f"{self.plan.graph.name}: more than {MAX_TRANSFERS} transfers between workers in one step"
            )
        self.transfers.append(
            Transfer(number, source.worker, target.worker, tensor.name, tensor.nbytes, split, source.arena, ident)
        )
        sender = self.drafts[source.worker]
        sender.end_run(split)
        sender.instructions.append(
            Instruction(Kind.SEND, number, target.worker, split, source.arena, source.offset, tensor.nbytes)
        )
        sender.lent[number] = (target.worker, source.arena, source.offset, source.offset + tensor.nbytes)
        receiver.instructions.append(Instruction(Kind.RECV, number, source.worker, src=origin, **span))

    def _node(self, draft: _Draft, backend: int, index: int, split: int) -> None:
        node = self.tensors[self.plan.graph.nodes[index]]
        if node.is_view_op or 0 in node.ne:
            return
        sources = self.plan.sources[index]
        if len(sources) > N_SRC:
            raise PlanError(f"{node.name!r} ({node.op.name}) has {len(sources)} sources: workers take up to {N_SRC}")
        for ident in (node.id, *(s for s in sources if s != ABSENT)):
            if self._home(ident).worker != backend:
                where = self.plan.devices[self._home(ident).worker].name
                raise PlanError(
                    f"{self.plan.graph.name}: {node.name!r} runs on {self.plan.devices[backend].name} "
                    f"but works on memory of {where}"
                )
        dst = self._operand(node.id)
        draft.before_write(dst.arena, dst.offset, dst.offset + node.nbytes, split)
        src = tuple(None if s == ABSENT else self._operand(s) for s in sources)
        draft.ops.append(OpRecord(index, node.op, node.params, dst, src))

    def _port(self, name: str) -> tuple[int, Port]:
        tensor = self.plan.graph.named(name)
        home = self._home(tensor.id)
        return home.worker, Port(name, home.arena, home.offset, tensor.nbytes)

    def _ports(self, outputs: Sequence[str], digests: Sequence[str]) -> None:
        for name in outputs:
            worker, port = self._port(name)
            self.drafts[worker].outputs.append(port)
        for name in digests:
            worker, port = self._port(name)
            self.drafts[worker].digests.append(port)

    def _keep(self, keep: Keep) -> None:
        worker, port = self._port(keep.name)
        if keep.home.worker != worker:
            raise PlanError(f"{keep.name!r} lies on another worker than the memory that keeps it")
        draft, start = self.drafts[worker], keep.home.offset
        draft.before_write(keep.home.arena, start, start + port.nbytes, len(self.plan.splits))
        ident, end = self.plan.graph.named(keep.name).id, len(self.plan.splits)
        target, source = (keep.home.arena, keep.home.offset), (port.arena, port.offset)
        self.drafts[worker].instructions.append(Instruction(Kind.COPY, ident, 0, end, *target, port.nbytes, source))
