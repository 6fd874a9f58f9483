"""From a worker's report of a broken expectation to its story: who wants what, who wrote what lies there instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from coordinator.ownership.expect import Act, WorkerExpectations
from coordinator.ownership.facts import Access, Extent, Finding, Kind
from coordinator.ownership.shadow import finding
from coordinator.schedule.lower import Lowered
from protocol.errors import CrossdockError, Exit
from protocol.messages import Violated
from protocol.ops import Flag
from protocol.shadow import GRANULE, STEP_SHIFT
from protocol.shadow import Kind as Expects


class OwnershipError(CrossdockError):
    """Strict ownership has ended the run: somebody would have read bytes that are not theirs."""

    exit = Exit.FOUND
    code = "ownership"

    def __init__(self, found: Finding) -> None:
        where = found.reader.tensor if found.reader is not None else found.tensor
        super().__init__(f"{str(found.kind).replace('-', ' ')}: {where} would read {found.tensor}: {found.why}")
        self.finding = found


class Evaluated(Protocol):
    """A program that ran: its graph's name, its lowered plan, and what each worker's share expects."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def lowered(self) -> Lowered: ...  # noqa: D102
    @property
    def expectations(self) -> tuple[WorkerExpectations, ...]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class _Teller:
    """Turns acts of programs into accesses of stories. Steps count evaluations on all schedulers, from 1."""

    program_at: Callable[[int], Evaluated]

    def access(self, step: int, worker: int, act: Act, extent: Extent | None = None) -> Access:
        """An act of the program that ran in a step."""
        program = self.program_at(step)
        plan = program.lowered.plan
        where = _extent(worker, act, program.lowered) if extent is None else extent
        return Access(
            act.what, self.result_of(program, act), program.name, 0, act.split, act.node, plan.devices[worker].name,
            step, step, where,
        )  # fmt: skip

    def result_of(self, program: Evaluated, act: Act) -> str:
        """The tensor that an act makes: a node's own, for copies what is copied."""
        plan = program.lowered.plan
        if act.node >= 0:
            return plan.graph.tensors[plan.graph.nodes[act.node]].name
        return _name(program.lowered, act.tensor)

    def writer(self, tag: int, worker: int) -> Access | None:
        """Who left a tag, None for nobody and for tensors with memory of their own."""
        if tag <= 0:
            return None
        step, number = tag >> STEP_SHIFT, tag & ((1 << STEP_SHIFT) - 1)
        return self.access(step, worker, self.program_at(step).expectations[worker].write(number))


def tell(report: Violated, worker: int, program_at: Callable[[int], Evaluated]) -> Finding:
    """The finding behind a worker's report; `program_at` says which program ran in a step."""
    teller = _Teller(program_at)
    program = program_at(report.step)
    expectations = program.expectations[worker]
    act = expectations.rows[report.row]
    kind = Expects(int(expectations.table[report.row, 0]))
    owner = int(expectations.table[report.row, 6]) if kind is Expects.READ_PEER else worker
    reader = teller.access(report.step, worker, act, _extent(owner, act, program.lowered))
    writer = teller.writer(report.expected, owner)
    over = teller.writer(report.found, owner) if report.granule >= 0 else None
    tensor = _name(program.lowered, act.tensor)
    if kind is Expects.READ_HANDLE and writer is not None:
        tensor = writer.tensor
        writer = replace(writer, extent=_extent(owner, act, program.lowered))
    if _late_input(program, act, report):
        writer = None  # nobody has set it in this step
    if over is not None:
        over = replace(over, extent=_clip(over.extent, act, report.granule))
    what, why = _classify(program, act, kind, report, tensor, over)
    return finding(
        what, tensor, why, extent=_extent(owner, act, program.lowered), epoch=writer.epoch if writer else report.step,
        epoch_now=report.step, writer=writer, overwriter=over, reader=reader, latent=report.granule < 0,
    )  # fmt: skip


def _classify(
    program: Evaluated, act: Act, kind: Expects, report: Violated, tensor: str, over: Access | None
) -> tuple[Kind, str]:
    if kind is Expects.READ_HANDLE:
        if report.expected == 0:
            return Kind.UNWRITTEN_READ, f"no graph has left {tensor} behind"
        opened = f"epoch {report.epoch} began when the {program.name} graph was allocated on the same scheduler"
        return Kind.STALE_READ, f"{opened}; {tensor} is not pinned, its memory was free to give"
    if kind is Expects.READ_NOBODY or (kind in (Expects.READ_OWN, Expects.READ_OWN_OR_EMPTY) and report.found == 0):
        return Kind.UNWRITTEN_READ, f"nobody writes {tensor}: it holds what the last graph left there"
    if kind is Expects.READ_PEER:
        if report.found >> STEP_SHIFT < report.step:
            return Kind.READ_TOO_EARLY, f"{tensor} has not been written yet: nothing waits for its writer"
        return Kind.OVERWRITTEN_IN_FLIGHT, f"nothing waits for the read of {tensor} before its bytes are reused"
    if _late_input(program, act, report):
        if over is not None and over.what != "set":
            return (
                Kind.INPUT_CONSUMED,
                f"an INPUT is only protected until its last planned use: {tensor} was not set again",
            )
        return Kind.INPUT_CONSUMED, f"{tensor} was not set for this evaluation"
    return Kind.OVERLAP, f"{tensor} and {over.tensor if over else 'something else'} are alive at once on the same bytes"


def _late_input(program: Evaluated, act: Act, report: Violated) -> bool:
    """True for an input whose bytes are those of an earlier step: it was not set for this one."""
    tensors = program.lowered.plan.graph.tensors
    if act.tensor >= len(tensors) or report.found >> STEP_SHIFT >= report.step:
        return False
    root = tensors[act.tensor].view_src
    return bool((tensors[act.tensor] if root is None else tensors[root]).flags & Flag.INPUT)


def _name(lowered: Lowered, ident: int) -> str:
    plan = lowered.plan
    n = len(plan.graph.tensors)
    return plan.graph.tensors[ident].name if ident < n else plan.copies[ident - n].name


def _extent(worker: int, act: Act, lowered: Lowered) -> Extent:
    return Extent(f"{lowered.plan.devices[worker].name} arena {act.arena}", act.start, act.end)


def _clip(extent: Extent | None, act: Act, granule: int) -> Extent | None:
    """The part of what lies there that the reader would get."""
    if extent is None:
        return None
    start, end = max(extent.start, act.start), min(extent.end, act.end)
    return replace(extent, start=start, end=end) if start <= granule * GRANULE + GRANULE and start < end else extent
