"""Loans in lowered programs: bytes that a worker sent may be rewritten only after the receiver has taken them."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.graph.node import Tensor
from coordinator.ownership.facts import Access, Extent, Finding, Kind
from coordinator.ownership.shadow import finding
from coordinator.schedule.lower import Home, Lowered, lower
from coordinator.schedule.plan import Plan
from protocol.errors import PlanError
from protocol.program import Instruction
from protocol.program import Kind as Does


@dataclass(frozen=True, slots=True)
class _Loan:
    transfer: int
    arena: int
    start: int
    end: int


def check_lowered(lowered: Lowered) -> tuple[Finding, ...]:
    """Hazards of the programs of one plan.

    A worker that writes bytes which it has lent, or ends with loans that nobody awaited (the next step would write
    them), overwrites them in flight; a transfer that is received but never sent is read too early.
    """
    found: list[Finding] = []
    sent = {i.transfer for p in lowered.programs for i in p.instructions if i.kind is Does.SEND}
    for worker in range(len(lowered.programs)):
        found += _Ledger(lowered, worker, sent).run()
    return tuple(found)


class _Homes:
    """A worker per device; every resident tensor and chunk in an arena of its own."""

    def __init__(self, plan: Plan) -> None:
        self._worker = {device.buft or device.name: k for k, device in reversed(list(enumerate(plan.devices)))}
        self._arenas: dict[tuple[str, str, int], int] = {}

    def _home(self, buft: str, name: str, chunk: int) -> Home:
        if buft not in self._worker:
            raise PlanError(f"buffer type {buft} belongs to no device")
        return Home(self._worker[buft], self._arenas.setdefault((buft, name, chunk), len(self._arenas)), 0)

    def resident(self, tensor: Tensor) -> Home:
        """A tensor that was allocated before the graph."""
        assert tensor.buffer is not None, tensor.name
        return self._home(tensor.buffer.buft, tensor.name, 0)

    def compute(self, buft: str, chunk: int) -> Home:
        """The start of a chunk of a compute buffer."""
        return self._home(buft, "", chunk)


def check_loans(plan: Plan) -> tuple[Finding, ...]:
    """Hazards of the programs that a plan becomes. Plans that no workers could run (devices that share memory) have
    no programs, and so none."""
    try:
        return check_lowered(lower(plan, _Homes(plan)))
    except PlanError:
        return ()


class _Ledger:
    """The loans of one worker while its program is walked."""

    def __init__(self, lowered: Lowered, worker: int, sent: set[int]) -> None:
        self.lowered, self.worker, self.sent = lowered, worker, sent
        self.loans: dict[int, _Loan] = {}
        self.found: list[Finding] = []

    def run(self) -> list[Finding]:
        program = self.lowered.programs[self.worker]
        for i in program.instructions:
            if i.kind is Does.SEND:
                self.loans[i.transfer] = _Loan(i.transfer, i.arena, i.offset, i.offset + i.nbytes)
            elif i.kind is Does.WAIT:
                self.loans.pop(i.transfer, None)
            elif i.kind is Does.TAP:
                continue
            elif i.kind is Does.RUN:
                for op in program.ops[i.first : i.last]:
                    name = self._node_name(op.node)
                    self._write(op.dst.arena, op.dst.offset, op.dst.span, op.op.name, name, op.node, i.split)
            else:
                self._arrive(i)
        for loan in self.loans.values():
            why = f"the program ends while {self._name(loan)} is still lent: the next step may overwrite it"
            self._tell(loan, why, None)
        return self.found

    def _arrive(self, i: Instruction) -> None:
        """A COPY or RECV writes; a RECV without a SEND finds nothing."""
        name = self.lowered.transfers[i.transfer].name if i.kind is Does.RECV else "a kept tensor or copy"
        if i.kind is Does.RECV and i.transfer not in self.sent:
            why = f"transfer {i.transfer} ({name}) is received but nobody sends it"
            self.found.append(finding(Kind.READ_TOO_EARLY, name, why, reader=self._access("recv", name, -1, i.split)))
        self._write(i.arena, i.offset, i.nbytes, i.kind.name.lower(), name, -1, i.split)

    def _write(self, arena: int, start: int, nbytes: int, what: str, name: str, node: int, split: int) -> None:
        for loan in list(self.loans.values()):
            if loan.arena == arena and loan.start < start + nbytes and start < loan.end:
                del self.loans[loan.transfer]
                extent = Extent(f"arena {arena}", max(start, loan.start), min(start + nbytes, loan.end))
                why = f"{self._name(loan)} is lent to {self._peer(loan)}: nothing waits for it to be taken"
                self._tell(loan, why, self._access(what, name, node, split, extent))

    def _tell(self, loan: _Loan, why: str, over: Access | None) -> None:
        extent = Extent(f"arena {loan.arena}", loan.start, loan.end)
        reader = self._access("recv", self._name(loan), -1, self.lowered.transfers[loan.transfer].split)
        self.found.append(
            finding(
                Kind.OVERWRITTEN_IN_FLIGHT, self._name(loan), why, extent=extent, reader=reader, overwriter=over
            )
        )  # fmt: skip

    def _access(self, what: str, name: str, node: int, split: int, extent: Extent | None = None) -> Access:
        plan = self.lowered.plan
        device = plan.devices[self.worker].name
        return Access(what, name, plan.graph.name, 1, split, node, device, 0, plan.epoch, extent)

    def _name(self, loan: _Loan) -> str:
        return self.lowered.transfers[loan.transfer].name

    def _peer(self, loan: _Loan) -> str:
        return self.lowered.plan.devices[self.lowered.transfers[loan.transfer].target].name

    def _node_name(self, node: int) -> str:
        graph = self.lowered.plan.graph
        return graph.tensors[graph.nodes[node]].name
