"""Who holds which bytes of compute memory from when to when, over the graphs of one run in sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.graph.node import ABSENT
from coordinator.schedule.plan import Place, Plan
from coordinator.schedule.runs import NOBODY, Runs
from protocol.ops import Flag

HANDED_ON: Mapping[str, str] = {"cross_states": "vision_output"}
"""Leafs of a later graph by the tensor of an earlier one that they stand for: without memory of their own (faithful
ownership) they are read where the earlier graph left that tensor."""

Buffer = tuple[int, str, int]
"""A piece of compute memory: number of the scheduler, buffer type, chunk."""


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor's bytes [start, end) of a buffer, held from node `birth` up to `death`; nodes count through all graphs.

    An input is held from its graph's beginning, an output to its end; others up to the last node that reads them.
    """

    buffer: Buffer
    graph: int
    tensor: str
    start: int
    end: int
    birth: int
    death: int


@dataclass(frozen=True, slots=True)
class Overwrite:
    """Bytes [start, end) of a tensor that a later graph still reads, up to node `until`, written over at node `at`."""

    buffer: Buffer
    tensor: str
    by: str
    start: int
    end: int
    at: int
    until: int


@dataclass(frozen=True, slots=True)
class Occupancy:
    """All spans by birth, what is written over though it is wanted, the first node of each graph (and behind the last),
    the nodes at which splits begin, and the bytes of each buffer."""

    spans: tuple[Span, ...]
    overwrites: tuple[Overwrite, ...]
    starts: tuple[int, ...]
    splits: tuple[int, ...]
    sizes: Mapping[Buffer, int]


def occupancy(plans: Sequence[Plan], schedulers: Sequence[int]) -> Occupancy:
    """What the plans, evaluated in turn, put where; `schedulers` numbers the scheduler of each.

    Buffers have their last size from the beginning, as in a run, which reserves for its largest graphs first. What
    `HANDED_ON` names is followed to its last reader in a later graph.
    """
    starts, splits = [0], list[int]()
    spans: list[Span] = []
    sizes: dict[Buffer, int] = {}
    for number, plan in enumerate(plans):
        spans += _spans(plan, number, schedulers[number], starts[-1])
        splits += [starts[-1] + split.start for split in plan.splits]
        for buft, chunks in plan.buffer_sizes.items():
            sizes |= {(schedulers[number], buft, chunk): nbytes for chunk, nbytes in enumerate(chunks) if nbytes}
        starts.append(starts[-1] + len(plan.graph.nodes))
    spans.sort(key=lambda span: span.birth)
    lost = [loss for later in range(len(plans)) for loss in _overwrites(plans, later, starts[later], spans)]
    return Occupancy(tuple(spans), tuple(lost), tuple(starts), tuple(splits), sizes)


def _spans(plan: Plan, number: int, scheduler: int, base: int) -> Iterator[Span]:
    birth, death = _lives(plan)
    tensors, n = plan.graph.tensors, len(plan.graph.tensors)
    made = set(plan.graph.nodes)
    for ident, born in sorted(birth.items(), key=lambda item: (item[1], item[0] in made)):  # copies come before nodes
        copied = ident >= n
        place: Place | None = plan.copies[ident - n].place if copied else plan.places[ident]
        if place is None or place.chunk is None or place.offset is None:
            continue
        tensor = tensors[plan.copies[ident - n].tensor if copied else ident]
        name = plan.copies[ident - n].name if copied else tensor.name
        yield Span(
            (scheduler, place.buft, place.chunk), number, name, place.offset, place.offset + tensor.nbytes,
            base + born, base + death[ident],
        )  # fmt: skip


def _lives(plan: Plan) -> tuple[dict[int, int], dict[int, int]]:
    """First node, and behind the last, by tensor (copies: `len(tensors) + index`); what nobody reads is held to the
    end, as in the allocator."""
    tensors, n, end = plan.graph.tensors, len(plan.graph.tensors), len(plan.graph.nodes)
    birth: dict[int, int] = {ident: 0 for ident in plan.graph.leafs if tensors[ident].buffer is None}
    death: dict[int, int] = {}

    def read(ident: int, node: int) -> None:
        owner = ident if ident >= n else _root(plan, ident)
        death[owner] = max(death.get(owner, 0), node + 1)

    for index, ident in enumerate(plan.graph.nodes):
        birth.setdefault(_root(plan, ident), index)
        for source in plan.sources[index]:
            if source != ABSENT:
                read(source, index)
    used = {source for row in plan.sources for source in row if source >= n}
    made = {(plan.copies[ident - n].tensor, plan.copies[ident - n].backend): ident for ident in used}
    for split in plan.splits:
        for ident in split.inputs:
            read(ident, split.start)
            birth[made[ident, split.backend]] = split.start
    for ident, born in birth.items():
        kept = ident < n and tensors[ident].flags & Flag.OUTPUT
        death[ident] = end if kept else max(death.get(ident, end), born + 1)
    return birth, death


def _root(plan: Plan, ident: int) -> int:
    view = plan.graph.tensors[ident].view_src
    return ident if view is None else view


def _overwrites(plans: Sequence[Plan], later: int, base: int, spans: Sequence[Span]) -> Iterator[Overwrite]:
    """What plan number `later` reads of earlier graphs, and who writes there before it has."""
    for leaf, wanted in HANDED_ON.items():
        until = base + _last_read(plans[later], leaf)
        held = next((span for span in reversed(spans) if span.tensor == wanted and span.graph < later), None)
        if until == base or held is None:
            continue
        gone = Runs()
        for span in spans:
            if span.graph > held.graph and span.buffer == held.buffer and span.birth < until:
                first, last = max(span.start, held.start), min(span.end, held.end)
                if first < last:
                    for start, end, who in gone.read(first, last):
                        if who == NOBODY:
                            yield Overwrite(held.buffer, wanted, span.tensor, start, end, span.birth, until)
                    gone.write(first, last, 0)


def _last_read(plan: Plan, leaf: str) -> int:
    """Behind the last node, or copy before a split, that reads a leaf or a view of it; 0 where nobody does."""
    ident = plan.graph.by_name.get(leaf)
    if ident is None:
        return 0
    n = len(plan.graph.tensors)
    reads = [split.start + 1 for split in plan.splits if any(_root(plan, t) == ident for t in split.inputs)]
    reads += [
        index + 1
        for index, row in enumerate(plan.sources)
        if any(s != ABSENT and s < n and _root(plan, s) == ident for s in row)
    ]
    return max(reads, default=0)
