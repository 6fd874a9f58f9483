"""Hunts for an interleaving that breaks a lease: `python -m tests.ownership.lease_hunt MINUTES [FIRST_SEED]`."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter

from coordinator.ownership.leases import check_leases
from coordinator.schedule.lower import Lowered
from tests.ownership.lease_graphs import random_devices, random_graph
from tests.ownership.lease_machine import Cluster, kept_of
from tests.ownership.lease_mutations import hold_back, prefer
from tests.ownership.lease_parts import Faults

SOUND = Faults()


def hunt(seed: int, count: Counter[str]) -> None:
    """Several programs on one cluster, each in an order of its own. Raises Violation."""
    rng = random.Random(seed)
    cluster = Cluster(random_devices(rng, rng.randint(2, 4)), rng.choice(("shared", "message")), seed, SOUND)
    programs: list[tuple[Lowered, dict[str, str]]] = []
    for _ in range(rng.randint(1, 4)):
        graph = random_graph(rng, cluster.scheduler.devices)
        keeps = kept_of(cluster, graph, rng.randint(0, 2))
        lowered, replaced = cluster.plan(graph, keeps)
        check_leases(lowered)
        programs = [(lowered, keeps)] if replaced else [*programs, (lowered, keeps)]
        for chosen in (programs[-1], rng.choice(programs)):
            for _ in range(rng.randint(1, 3)):
                cluster.submit(*chosen)
                count["evaluations"] += 1
                count["transfers"] += len(chosen[0].transfers)
            _run(cluster, rng)
        count["programs"] += 1
    cluster.finish()
    count["acts"] += sum(worker.acts for worker in cluster.workers)
    count["reads compared"] += cluster.reads


def _run(cluster: Cluster, rng: random.Random) -> None:
    kind = rng.randrange(3)
    if kind == 0:
        cluster.finish(lambda n: rng.sample(range(n), n))
    elif kind == 1:
        prefer(cluster, rng, rng.randint(0, 5))
    else:
        hold_back(cluster, rng.randrange(len(cluster.workers)), rng.randrange(200), rng)


def main(minutes: float, seed: int) -> None:
    """Until the time is over; the first violation ends it, with its seed."""
    end = time.monotonic() + 60 * minutes
    count: Counter[str] = Counter()
    first = seed
    while time.monotonic() < end:
        try:
            hunt(seed, count)
        except Exception:
            print(f"seed {seed}:", file=sys.stderr)
            raise
        seed += 1
    print(f"{seed - first} clusters, seeds {first} to {seed - 1}: {dict(count)}, no violation")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
