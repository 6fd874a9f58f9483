"""The shadow beside the bytes: who wrote each byte last, compared with who should have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from coordinator.ownership.actions import HOST, Action, Do, Operand, Region
from coordinator.ownership.facts import HELP, Access, Extent, Finding, Kind
from coordinator.ownership.order import Conflict
from coordinator.schedule.runs import NOBODY, Run, Runs


class Shadow:
    """Who wrote what, in the order in which acts are shown to it. `actions` is the list that act numbers count."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self._actions = actions
        self._runs: defaultdict[Region, Runs] = defaultdict(Runs)
        self._freed: dict[Region, int] = {}

    def apply(self, action: Action) -> list[Finding]:
        """The act happens now: what it reads is compared, what it writes is noted."""
        found = [action.problem] if action.problem is not None else []
        for operand in action.reads:
            finding = self.compare(action, operand)
            if finding is not None:
                found.append(finding)
        for operand in action.writes:
            if action.do is Do.FREE:
                self._freed[operand.region] = action.number
            elif operand.region in self._freed:
                found.append(self._freed_finding(action, operand))
            self._runs[operand.region].write(operand.start, operand.end, action.number)
        return found

    def compare(self, action: Action, operand: Operand) -> Finding | None:
        """The hazard of one read, or None."""
        found = self._runs[operand.region].read(operand.start, operand.end)
        wrong = _mismatch(operand.wants, found)
        if wrong is None:
            return self._out_of_date(action, operand)
        start, end, wanted, who = wrong
        kind, why = self._classify(action, operand, wanted, who)
        over = None if who == NOBODY else self._actions[who].access()
        if over is not None and over.extent is not None:
            clip = Extent(over.extent.memory, max(start, over.extent.start), min(end, over.extent.end))
            over = _at(over, clip if clip.start < clip.end else over.extent)
        if over is not None and wanted == NOBODY and over.tensor == operand.tensor:
            over = None
        return self._finding(kind, why, action, operand, wanted, over)

    def _out_of_date(self, action: Action, operand: Operand) -> Finding | None:
        """Bytes that are intact, though their memory is somebody else's by now."""
        writers = [w for _, _, w in operand.wants if w != NOBODY]
        if not writers:
            return None
        written = self._epoch(writers[0], operand)
        if operand.region.kind == "compute" and written != operand.epoch:
            why = _epoch_why(operand, written)
            return self._finding(Kind.STALE_READ, why, action, operand, writers[0], None, latent=True)
        return None

    def _classify(self, action: Action, operand: Operand, wanted: int, who: int) -> tuple[Kind, str]:
        """Why the bytes are not those that are wanted: the nearest explanation first."""
        name = _short(operand.tensor)
        if wanted == NOBODY:
            return Kind.UNWRITTEN_READ, f"nobody writes {name}: it holds what the last graph left there"
        writer = self._actions[wanted]
        wrote = [w for w in writer.writes if w.key == operand.key]
        if not any(w.region == operand.region and w.start < operand.end and operand.start < w.end for w in wrote):
            return _elsewhere(operand, writer)
        written = self._epoch(wanted, operand)
        if operand.region.kind == "compute" and written != operand.epoch:
            return Kind.STALE_READ, _epoch_why(operand, written)
        if operand.region in self._freed:
            return Kind.FREED_IN_FLIGHT, f"the {operand.region.label} was freed and replaced before {name} was read"
        if who > action.number:
            return Kind.OVERWRITTEN_IN_FLIGHT, f"nothing waits for the read of {name} before its bytes are reused"
        if who == NOBODY or (who < wanted and action.agent != writer.agent):
            return Kind.READ_TOO_EARLY, f"{name} has not been written yet: nothing waits for its writer"
        return self._within_epoch(action, operand, self._actions[who])

    def _within_epoch(self, action: Action, operand: Operand, over: Action) -> tuple[Kind, str]:
        name, traits = _short(operand.tensor), operand.traits
        if "handle" in traits and any(w.key == operand.key for w in over.writes):
            return Kind.STALE_HANDLE, f"evaluation {over.evaluation} of the graph wrote {name} again"
        same = any(w.key == operand.key for w in over.writes)
        if "input" in traits and same and over.do is Do.NODE:
            return Kind.INPUT_ACCUMULATED, f"{name} is an input that the graph itself writes to: it was not set again"
        if "input" in traits and "released" in traits:
            return Kind.INPUT_CONSUMED, f"an INPUT is only protected until its last planned use: {name} was not kept"
        if "stale-plan" in traits:
            return Kind.STALE_PLAN, "the places are those of another graph with as many nodes of the same sizes"
        if action.agent == HOST and action.graph == "":
            if "output" in traits and "view" in traits and "root-output" not in traits:
                return Kind.UNPROTECTED_OUTPUT, f"OUTPUT on the view {name} does not protect the tensor behind it"
            if "released" in traits and "output" not in traits:
                return Kind.INTERMEDIATE_READ, f"{name} is no OUTPUT: its memory was given on within its own graph"
        return Kind.OVERLAP, f"{name} and {_short(over.tensor)} are alive at once and lie on the same bytes"

    def _epoch(self, number: int, operand: Operand) -> int:
        writes = [w for w in self._actions[number].writes if w.region == operand.region]
        return writes[0].epoch if writes else 0

    def _finding(
        self, kind: Kind, why: str, action: Action, operand: Operand, wanted: int, over: Access | None,
        latent: bool = False,
    ) -> Finding:  # fmt: skip
        writer = None
        if wanted != NOBODY:
            act = self._actions[wanted]
            writer = act.access(next((w for w in act.writes if w.key == operand.key), None))
        return finding(
            kind, operand.tensor, why, extent=operand.extent, epoch=writer.epoch if writer else operand.epoch,
            epoch_now=operand.epoch, writer=writer, overwriter=over, reader=action.access(operand), latent=latent,
        )  # fmt: skip

    def _freed_finding(self, action: Action, operand: Operand) -> Finding:
        why = (
            f"the {operand.region.label} was freed and replaced while {_short(operand.tensor)} was still to be written"
        )
        free = self._actions[self._freed[operand.region]].access()
        return finding(Kind.FREED_IN_FLIGHT, operand.tensor, why, extent=operand.extent, epoch=operand.epoch,
                       epoch_now=operand.epoch, writer=action.access(operand), overwriter=free)  # fmt: skip

    def conflict(self, action: Action, conflict: Conflict) -> Finding:
        """The hazard of two acts on the same bytes that nothing orders."""
        earlier, operand = self._actions[conflict.earlier], conflict.operand
        name, first = _short(operand.tensor), earlier.access(operand)
        if action.do is Do.FREE:
            why = f"the {operand.region.label} is replaced while {name} is still in flight on {earlier.agent}"
            return finding(Kind.FREED_IN_FLIGHT, operand.tensor, why, extent=operand.extent, epoch=operand.epoch,
                           epoch_now=operand.epoch, reader=first, overwriter=action.access())  # fmt: skip
        if conflict.later_writes:
            why = f"{earlier.agent} may not have touched {name} yet: nothing waits for it before its bytes are reused"
            return finding(Kind.OVERWRITTEN_IN_FLIGHT, operand.tensor, why, extent=operand.extent, epoch=operand.epoch,
                           epoch_now=operand.epoch, reader=first, overwriter=action.access())  # fmt: skip
        why = f"{earlier.agent} may not have written {name} yet: nothing waits for it"
        mine = next(o for o in action.reads if o.region == operand.region)
        return finding(Kind.READ_TOO_EARLY, operand.tensor, why, extent=operand.extent, epoch=operand.epoch,
                       epoch_now=operand.epoch, writer=first, reader=action.access(mine))  # fmt: skip


def finding(kind: Kind, tensor: str, why: str, **facts: object) -> Finding:
    """A finding with what would help, in the names of its own actors."""
    reader, writer = facts.get("reader"), facts.get("writer")
    names = {
        "tensor": _short(tensor),
        "reader": _actor(reader) if isinstance(reader, Access) else "the reader",
        "writer": _actor(writer) if isinstance(writer, Access) else "the writer",
    }
    helps = tuple(text.format(**names) for text in HELP[kind])
    return Finding(kind, tensor, why, would_help=helps, **facts)  # type: ignore[arg-type]


def _actor(access: Access) -> str:
    where = f" on {access.device}" if access.device else ""
    return f"the {access.what} of {_short(access.tensor)}{where}"


def _elsewhere(operand: Operand, writer: Action) -> tuple[Kind, str]:
    """The wanted bytes were written, but not here."""
    name = _short(operand.tensor)
    at = f"{writer.writes[0].region.label} [{writer.writes[0].start}, {writer.writes[0].end})"
    if "shared" in operand.traits:
        return Kind.CONFLICTING_PLACES, f"another graph of the scheduler has moved {name}: it was written to {at}"
    if writer.do in (Do.SET, Do.COPY) and writer.graph == "":
        return Kind.WRONG_COPY, f"the host set the copy of {name} in {at}, this plan reads another one"
    return Kind.LOST_WRITE, f"{writer.op} wrote {name} to {at}, a copy that is never copied back"


def _epoch_why(operand: Operand, written: int) -> str:
    return (
        f"epoch {operand.epoch} began when another graph took the scheduler's memory; {_short(operand.tensor)} was "
        f"written in epoch {written} and is not kept, its memory was free to give"
    )


def _mismatch(wants: Sequence[Run], found: Sequence[Run]) -> tuple[int, int, int, int] | None:
    """The first bytes with another writer than wanted, or wanted of nobody: start, end, wanted, found."""
    for a, b, wanted in wants:
        for c, d, who in found:
            if max(a, c) < min(b, d) and (who != wanted or wanted == NOBODY):
                return max(a, c), min(b, d), wanted, who
    return None


def _at(access: Access, extent: Extent) -> Access:
    return Access(
        access.what, access.tensor, access.graph, access.evaluation, access.split, access.node, access.device,
        access.step, access.epoch, extent,
    )  # fmt: skip


def _short(tensor: str) -> str:
    return tensor.partition(".")[2] or tensor
