"""Proves a plan another way: walks what would be executed and keeps, for every byte, who wrote it last."""

from __future__ import annotations

from collections import defaultdict

from coordinator.graph.node import ABSENT, Tensor
from coordinator.schedule.devices import buft_name
from coordinator.schedule.plan import Device, Place, Plan, Split
from coordinator.schedule.runs import Run, Runs
from protocol.errors import PlanError
from protocol.ops import WRITES_ONLY, Flag, Op


def check_plan(plan: Plan) -> None:
    """Prove that a plan computes what its graph says, in the plan's own memory.

    Splits cover all nodes in order, on the devices of their nodes. Devices read and write only buffers that they can
    use. Copies are made before they are read and not after their source has changed. Every read finds the bytes that
    its producer, or a node that wrote into a view of them, wrote last; outputs survive to the end. The measure is
    evaluation in node order on one device. Raises PlanError with the story of the first violation.
    """
    _check_splits(plan)
    _Walk(plan).run()


def plan_place(plan: Plan, ident: int) -> Place | None:
    """Place of a tensor, or of a copy (ids from `len(plan.graph.tensors)` on)."""
    n = len(plan.graph.tensors)
    return plan.places[ident] if ident < n else plan.copies[ident - n].place


def _check_splits(plan: Plan) -> None:
    at = 0
    for k, s in enumerate(plan.splits):
        if s.start != at or s.end < s.start:
            raise PlanError(f"split {k} covers nodes {s.start} to {s.end}, expected from {at}: in order, without gaps")
        for node in (plan.graph.tensors[t] for t in plan.graph.nodes[s.start : s.end]):
            if not node.is_view_op and plan.backend[node.id] != s.backend:
                owner, where = plan.devices[plan.backend[node.id]].name, plan.devices[s.backend].name
                raise PlanError(f"node {node.name!r} belongs to {owner} but lies in split {k} on {where}")
        at = s.end
    if at != len(plan.graph.nodes):
        raise PlanError(f"splits end at node {at}, expected all {len(plan.graph.nodes)} nodes")


def _can_use(device: Device, place: Place) -> bool:
    return place.buft == buft_name(device) or place.buft in device.extra_bufts


class _Walk:
    """One evaluation of a plan, with the writers of all bytes in place of the bytes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tensors = plan.graph.tensors
        self.n = len(self.tensors)
        self.memory: defaultdict[tuple[str, int], Runs] = defaultdict(Runs)
        # What each root tensor or copy should hold, as the graph orders the writes.
        self.contents: defaultdict[int, Runs] = defaultdict(Runs)
        self.stories: list[str] = []
        self.snapshots: dict[int, list[Run]] = {}  # per copy: what its source held when it was made
        used = {s for row in plan.sources for s in row if s >= self.n}
        self.copies = {(plan.copies[c - self.n].tensor, plan.copies[c - self.n].backend): c for c in used}

    def run(self) -> None:
        """Walk the splits in order."""
        plan = self.plan
        visited = [self.tensors[t] for t in (*plan.graph.leafs, *plan.graph.nodes)]
        for t in visited:
            if t.op == Op.NONE and t.view_src is None and plan.places[t.id] is not None:
                self._write(t.id, f"the user's data of {t.name!r}")
        for k, s in enumerate(plan.splits):
            for source in s.inputs:
                self._copy(k, s, source)
            for i in range(s.start, s.end):
                self._compute(k, s, i)
        for t in visited:
            if t.flags & Flag.OUTPUT and t.op != Op.NONE:
                self._read(t.id, f"the user, after the last node, the output {t.name!r}:")

    def _copy(self, k: int, s: Split, t: int) -> None:
        device = self.plan.devices[s.backend].name
        c = self.copies.get((t, s.backend))
        if c is None:
            raise PlanError(f"split {k} on {device}: nothing reads a copy of its input {self._label(t)}")
        self._read(t, f"the copy to {device} before split {k}")
        owner, start, end = self._extent(t)
        self.snapshots[c] = self.contents[owner].read(start, end)
        self._write(c, f"the copy {self._label(c)} before split {k}")

    def _compute(self, k: int, s: Split, i: int) -> None:
        node = self.tensors[self.plan.graph.nodes[i]]
        if node.is_view_op or node.op == Op.NONE:
            return
        device = self.plan.devices[s.backend]
        story = f"node {node.name!r} ({node.op.name}) in split {k} on {device.name}"
        sources = self.plan.sources[i]
        if len(sources) != len(node.src):
            raise PlanError(f"{story} has {len(sources)} planned sources, expected {len(node.src)}")
        for j, (original, source) in enumerate(zip(node.src, sources, strict=True)):
            if (source == ABSENT) != (original == ABSENT):
                raise PlanError(f"{story}: source {j} is {source}, expected {original}")
            if source == ABSENT or WRITES_ONLY.get(node.op) == j:
                continue
            if source >= self.n:
                self._check_copy(story, original, source, s)
            elif source != original:
                raise PlanError(f"{story}: source {j} is {self._label(source)}, expected {self._label(original)}")
            self._read(source, story, device)
        place = self.plan.places[node.id]
        if place is None or not _can_use(device, place):
            where = "nowhere" if place is None else f"in {place.buft}"
            raise PlanError(f"{story} writes its result {where}, expected memory of its device")
        self._write(node.id, story)

    def _check_copy(self, story: str, original: int, c: int, s: Split) -> None:
        copy = self.plan.copies[c - self.n]
        if copy.tensor != original or copy.backend != s.backend:
            raise PlanError(f"{story} reads {copy.name}, expected a copy of {self._label(original)} on its device")
        if c not in self.snapshots:
            raise PlanError(f"{story} reads {copy.name} before it has been made")
        owner, start, end = self._extent(original)
        now = self.contents[owner].read(start, end)
        if now != self.snapshots[c]:
            late = next(run for run in now if run not in self.snapshots[c])
            raise PlanError(f"{story} reads {copy.name}, which was made before {self._story(late[2])}")

    def _extent(self, ident: int) -> tuple[int, int, int]:
        """Root (or copy) whose contents `ident` shows, and the bytes [start, end) of it."""
        if ident >= self.n:
            return ident, 0, self.tensors[self.plan.copies[ident - self.n].tensor].nbytes
        t: Tensor = self.tensors[ident]
        if t.view_src is None:
            return ident, 0, t.nbytes
        return t.view_src, t.view_offs, t.view_offs + t.nbytes

    def _write(self, ident: int, story: str) -> None:
        writer = len(self.stories)
        self.stories.append(story)
        owner, start, end = self._extent(ident)
        self.contents[owner].write(start, end, writer)
        place = plan_place(self.plan, ident)
        if place is None or place.offset is None or place.chunk is None:
            return  # allocated before the graph: nothing of the plan lies there
        last = place.offset + end - start
        sizes = self.plan.buffer_sizes.get(place.buft, ())
        if place.chunk >= len(sizes) or last > sizes[place.chunk]:
            have = sizes[place.chunk] if place.chunk < len(sizes) else 0
            raise PlanError(f"{story} ends at byte {last} of {place.buft} chunk {place.chunk}, which has {have}")
        self.memory[place.buft, place.chunk].write(place.offset, last, writer)

    def _read(self, ident: int, reader: str, device: Device | None = None) -> None:
        place = plan_place(self.plan, ident)
        if place is None:
            raise PlanError(f"{reader} reads {self._label(ident)}, which has no memory")
        if device is not None and not _can_use(device, place):
            raise PlanError(f"{reader} reads {self._label(ident)} in {place.buft}, which its device cannot use")
        if place.offset is None or place.chunk is None:
            return
        owner, start, end = self._extent(ident)
        wanted = self.contents[owner].read(start, end)
        found = self.memory[place.buft, place.chunk].read(place.offset, place.offset + end - start)
        shift = place.offset - start
        for a, b, who in found:
            for c, d, right in wanted:
                if max(a, c + shift) < min(b, d + shift) and who != right:
                    raise PlanError(
                        f"{reader} reads {self._label(ident)} at {place.buft} chunk {place.chunk} byte "
                        f"{max(a, c + shift)}: expected {self._story(right)}, found {self._story(who)}"
                    )

    def _story(self, who: int) -> str:
        return "nothing written" if who < 0 else f"what was written by {self.stories[who]}"

    def _label(self, ident: int) -> str:
        name = self.plan.copies[ident - self.n].name if ident >= self.n else self.tensors[ident].name
        return repr(name)
