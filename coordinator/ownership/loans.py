"""What the proof of leases refuses, as findings: bytes that a worker sent were rewritten before they were taken."""

from __future__ import annotations

from coordinator.ownership.facts import Access, Extent, Finding, Kind
from coordinator.ownership.leases import Fault, Wrong, faults, lower_apart
from coordinator.ownership.shadow import finding
from coordinator.schedule.lower import Lowered, Transfer
from coordinator.schedule.plan import Plan
from protocol.errors import PlanError
from protocol.program import Kind as Does


def check_loans(plan: Plan) -> tuple[Finding, ...]:
    """Hazards of the programs that a plan becomes. Plans that no workers could run (devices that share memory) have
    no programs, and so none."""
    try:
        return check_lowered(lower_apart(plan))
    except PlanError:
        return ()


def check_lowered(lowered: Lowered) -> tuple[Finding, ...]:
    """Hazards of the programs of one plan.

    A worker that writes bytes which it has lent, or ends with loans that nobody awaited (the next step would write
    them), overwrites them in flight; a transfer that is received but never sent is read too early.
    """
    return tuple(_finding(lowered, fault) for fault in faults(lowered))


def _finding(lowered: Lowered, fault: Fault) -> Finding:
    transfer = lowered.transfers[fault.transfer]
    if fault.kind is Wrong.NEVER_SENT:
        why = f"transfer {fault.transfer} ({transfer.name}) is received but nobody sends it"
        return finding(Kind.READ_TOO_EARLY, transfer.name, why, reader=_reader(lowered, transfer))
    if fault.kind is Wrong.UNSOUND:
        device = lowered.plan.devices[fault.worker].name
        why = f"{device}: transfer {fault.transfer} ({transfer.name}): {fault.what}"
        return finding(Kind.CANNOT_RUN, transfer.name, why)
    if fault.kind is Wrong.NEVER_BACK:
        why = f"the program ends while {transfer.name} is still lent: the next step may overwrite it"
    else:
        why = (
            f"{transfer.name} is lent to {lowered.plan.devices[transfer.target].name}: nothing waits for it to be taken"
        )
    lent = next(
        item
        for item in lowered.programs[fault.worker].instructions
        if item.kind is Does.SEND and item.transfer == fault.transfer
    )
    extent = Extent(f"arena {lent.arena}", lent.offset, lent.offset + lent.nbytes)
    return finding(
        Kind.OVERWRITTEN_IN_FLIGHT, transfer.name, why, extent=extent, reader=_reader(lowered, transfer),
        overwriter=_overwriter(lowered, fault, extent),
    )  # fmt: skip


def _reader(lowered: Lowered, transfer: Transfer) -> Access:
    return _access(lowered, transfer.target, "recv", transfer.name, -1, transfer.split)


def _overwriter(lowered: Lowered, fault: Fault, lent: Extent) -> Access | None:
    """Who writes there, and which of the lent bytes."""
    if fault.item is None or fault.span is None:
        return None
    item, (arena, start, end) = fault.item, fault.span
    extent = Extent(f"arena {arena}", max(start, lent.start), min(end, lent.end))
    if item.kind is Does.RUN:
        program, graph = lowered.programs[fault.worker], lowered.plan.graph
        op = next(
            op
            for op in program.ops[item.first : item.last]
            if (op.dst.arena, op.dst.offset, op.dst.offset + op.dst.span) == fault.span
        )
        name = graph.tensors[graph.nodes[op.node]].name
        return _access(lowered, fault.worker, op.op.name, name, op.node, item.split, extent)
    name = lowered.transfers[item.transfer].name if item.kind is Does.RECV else "a kept tensor or copy"
    return _access(lowered, fault.worker, item.kind.name.lower(), name, -1, item.split, extent)


def _access(
    lowered: Lowered, worker: int, what: str, name: str, node: int, split: int, extent: Extent | None = None
) -> Access:
    plan = lowered.plan
    return Access(what, name, plan.graph.name, 1, split, node, plan.devices[worker].name, 0, plan.epoch, extent)
