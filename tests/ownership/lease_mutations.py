"""Programs with one mistake, and orders that are as unkind as can be."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from coordinator.schedule.lower import Lowered
from protocol.program import Instruction, Kind
from tests.ownership.lease_machine import Cluster
from tests.ownership.lease_parts import Violation

Place = tuple[int, int]
"""Worker and instruction."""


def instructions(lowered: Lowered, kind: Kind) -> Iterator[tuple[Place, Instruction]]:
    """All instructions of a kind."""
    for worker, program in enumerate(lowered.programs):
        for number, item in enumerate(program.instructions):
            if item.kind is kind:
                yield (worker, number), item


def changed(lowered: Lowered, worker: int, items: list[Instruction]) -> Lowered:
    """With other instructions for one worker."""
    programs = list(lowered.programs)
    programs[worker] = replace(programs[worker], instructions=tuple(items))
    return replace(lowered, programs=tuple(programs))


def dropped(lowered: Lowered, place: Place) -> Lowered:
    """Without one instruction."""
    worker, number = place
    items = list(lowered.programs[worker].instructions)
    del items[number]
    return changed(lowered, worker, items)


def published_early(lowered: Lowered, place: Place) -> Lowered | None:
    """A SEND before the RUN that made its bytes; None where no such RUN comes before it."""
    worker, number = place
    program = lowered.programs[worker]
    items = list(program.instructions)
    sent = items[number]
    for k in range(number - 1, -1, -1):
        made = items[k].kind is Kind.RUN and any(
            op.dst.arena == sent.arena
            and op.dst.offset < sent.offset + sent.nbytes
            and sent.offset < op.dst.offset + op.dst.span
            for op in program.ops[items[k].first : items[k].last]
        )
        if made:
            items.insert(k, items.pop(number))
            return changed(lowered, worker, items)
    return None


def without_final_waits(lowered: Lowered) -> Lowered:
    """Programs that end with what is still on loan then."""
    for worker, program in enumerate(lowered.programs):
        last = len(lowered.plan.splits)
        items = [i for i in program.instructions if i.kind is not Kind.WAIT or i.split < last]
        lowered = changed(lowered, worker, items)
    return lowered


def hold_back(cluster: Cluster, slow: int, acts: int, rng: random.Random) -> None:
    """Worker `slow` runs ahead for that many acts; from then on it moves only when nobody else can.

    Raises what the cluster raises, and Violation when nobody can go on at all.
    """
    until = cluster.workers[slow].acts + acts
    while not cluster.idle:
        hurry = cluster.workers[slow].acts < until
        if hurry and (_deliver(cluster, slow) or cluster.go_on(slow)):
            continue
        if go_without(cluster, slow, rng, 1) or _deliver(cluster, slow) or cluster.go_on(slow):
            continue
        raise Violation("the workers wait for each other")


def go_without(cluster: Cluster, slow: int, rng: random.Random | None = None, acts: int = 1 << 30) -> bool:
    """Everybody but one worker goes on for up to so many acts, in the order that `rng` draws; False: nobody could."""
    others = [k for k in range(len(cluster.workers)) if k != slow]
    for done in range(acts):
        if rng is not None:
            rng.shuffle(others)
        if not (_deliver(cluster, *others) or any(cluster.go_on(k) for k in others)):
            return done > 0
    return True


def _deliver(cluster: Cluster, *targets: int) -> bool:
    """Everything that is under way to these workers arrives."""
    arrived = [cluster.deliver(link) for link in list(cluster.wires) if link[1] in targets]
    return any(arrived)


def prefer(cluster: Cluster, rng: random.Random, changes: int) -> None:
    """Always the worker of the highest rank that can go on; now and then a rank changes. Messages come late or at once.

    Few changes of rank find bugs that take few coincidences with a fair chance, however long the programs are.
    """
    n = len(cluster.workers)
    ranks = rng.sample(range(n), n)
    total = 1 + sum(len(w.jobs) * 400 for w in cluster.workers)
    at = {rng.randrange(total) for _ in range(changes)}
    late = {(a, b) for a in range(n) for b in range(n) if rng.random() < 0.5}
    acts = 0
    while not cluster.idle:
        for link in list(cluster.wires):
            if link not in late:
                cluster.deliver(link)
        acts += 1
        if acts in at:
            rng.shuffle(ranks)
        if not (any(cluster.go_on(k) for k in ranks) or _deliver(cluster, *ranks)):
            raise Violation("the workers wait for each other")
