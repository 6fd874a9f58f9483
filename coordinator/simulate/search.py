"""The best placement under memory limits: device order, number of offloaded layers, their split between devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from coordinator.model.presets import Blueprint
from coordinator.simulate.machine import Machine
from coordinator.simulate.predict import Prediction, predict
from coordinator.simulate.series import Load, Options, Series, make_series
from protocol.errors import CapacityError, UsageError

GOALS = ("tokens", "first-token", "total")
"""What is best: most tokens per second after the prompt, the earliest first token, the earliest end."""

STEPS = (8, 4, 2, 1)
"""Layers that a try moves from one device to another."""

GAIN = 1e-3
"""Relative gain from which one placement is better than another."""

MAX_TRIES = 400
MAX_ORDERS = 6
"""Orders of the accelerators that are tried; those of alike ones are the same."""

Counts = tuple[int, ...]
"""Layers (the output counts as one) of each accelerator in order; the host has the rest."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A device that is full: one layer more would be faster, but takes `needed` bytes more, and `free` are left."""

    device: str
    needed: int
    free: int


@dataclass(frozen=True, slots=True)
class Found:
    """The best placement for `goal`, what it comes to, how many were simulated, and which memories keep it from being
    better."""

    order: tuple[str, ...]
    counts: Counts
    prediction: Prediction
    n_tried: int
    limits: tuple[Limit, ...]
    goal: str = "tokens"

    @property
    def n_gpu_layers(self) -> int:
        """Layers on accelerators."""
        return sum(self.counts)


def search(blueprint: Blueprint, machine: Machine, options: Options, load: Load, goal: str = "tokens") -> Found:
    """The best placement by simulating: from several starts, layers are moved between devices as long as that helps.

    A local search: it is not proved that no other placement is better. Placements that do not fit are worse than all
    that do. Raises UsageError without accelerators, CapacityError when nothing fits.
    """
    if len(machine.models) < 2:
        raise UsageError("--search: the system has no device but the host: there is nothing to place")
    best: _Climb | None = None
    n_tried = 0
    for order in _orders(machine):
        climb = _Climb(blueprint, reorder(machine, order), options, load, goal, MAX_TRIES - n_tried)
        climb.run()
        n_tried += climb.n_tried
        if best is None or _better(climb.best_cost, best.best_cost):
            best = climb
        if n_tried >= MAX_TRIES:
            break
    assert best is not None
    found = best.known[best.best][1]
    if found.series.short:
        short = max(found.series.short, key=lambda memory: memory.short)
        raise CapacityError(f"--search: nothing fits: at best {short.device} is {short.short:,} bytes short")
    return Found(best.machine.names[:-1], best.best, found, n_tried, _limits(best, found), goal)


def reorder(machine: Machine, order: Sequence[int]) -> Machine:
    """The machine with its accelerators in another order: `order` lists the old indices, the host stays last."""
    order = (*order, len(machine.models) - 1)
    new = {old: k for k, old in enumerate(order)}
    index = {(new[a], new[b]): route for (a, b), route in machine.fabric.index.items()}
    pools = tuple(replace(p, workers=frozenset(new[k] for k in p.workers)) for p in machine.fabric.pools)
    fabric = replace(machine.fabric, index=index, pools=pools)
    return Machine(tuple(machine.models[k] for k in order), tuple(machine.devices[k] for k in order), fabric)


def _orders(machine: Machine) -> Iterator[tuple[int, ...]]:
    """Orders of the accelerators that differ in more than names, the given one first."""
    seen: set[object] = set()
    n, host = len(machine.models) - 1, len(machine.models) - 1
    for order in permutations(range(n)):
        kinds = [replace(machine.models[k], name="", sources={}) for k in order]
        pairs = [(a, b) for a in (*order, host) for b in (*order, host) if a != b]
        routes = [machine.fabric.index.get(pair) for pair in pairs]
        links = [None if k is None else replace(machine.fabric.routes[k], name="", media=()) for k in routes]
        key = repr((kinds, links))
        if key not in seen:
            seen.add(key)
            yield order
        if len(seen) >= MAX_ORDERS:
            return


class _Climb:
    """A local search over counts in one order of the devices; every placement is simulated once."""

    def __init__(
        self, blueprint: Blueprint, machine: Machine, options: Options, load: Load, goal: str, tries: int
    ) -> None:
        self.blueprint, self.machine, self.options, self.load = blueprint, machine, options, load
        self.goal, self.tries = goal, tries
        self.n_units = blueprint.params.text.n_layer + 1
        self.n = len(machine.models) - 1
        self.known: dict[Counts, tuple[tuple[float, float], Prediction]] = {}
        self.best: Counts = ()
        self.best_cost = (float("inf"), float("inf"))

    @property
    def n_tried(self) -> int:
        return len(self.known)

    def run(self) -> None:
        for start in dict.fromkeys(self._starts()):
            self._cost(start)
        here = self.best
        for step in STEPS:
            moved = True
            while moved and self.n_tried < self.tries:
                moved = False
                for there in self._moves(here, step):
                    if _better(self._cost(there), self.known[here][0]):
                        here, moved = there, True
                        break

    def _starts(self) -> Iterator[Counts]:
        """Everything by memory, everything by bandwidth, as much as may fit in order of speed, and nothing."""
        models = self.machine.models[:-1]
        memory = [float(model.memory_nbytes or 1 << 60) for model in models]
        yield self._shared([model.bandwidth for model in models], self.n_units)
        yield self._shared(memory, self.n_units)
        unit = self._unit_nbytes()
        rooms = [min(self.n_units, int(0.9 * m / unit)) for m in memory]
        counts, left = [0] * self.n, self.n_units
        for k in sorted(range(self.n), key=lambda k: (-models[k].bandwidth, k)):
            counts[k] = min(rooms[k], left)
            left -= counts[k]
        yield tuple(counts)
        yield (0,) * self.n

    def _unit_nbytes(self) -> float:
        weights = sum(w.nbytes for w in self.blueprint.weights.values())
        return weights / self.n_units

    def _shared(self, shares: Sequence[float], n: int) -> Counts:
        bounds = [round(n * sum(shares[: k + 1]) / sum(shares)) for k in range(self.n)]
        return tuple(b - a for a, b in zip([0, *bounds[:-1]], bounds, strict=True))

    def _moves(self, counts: Counts, step: int) -> Iterator[Counts]:
        """Layers from one device to another, the host included (index n)."""
        full = [*counts, self.n_units - sum(counts)]
        for a in range(self.n + 1):
            for b in range(self.n + 1):
                n = min(step, full[a])
                if a != b and n:
                    moved = full[:]
                    moved[a] -= n
                    moved[b] += n
                    yield tuple(moved[:-1])

    def _cost(self, counts: Counts) -> tuple[float, float]:
        """Bytes short, then seconds: less is better."""
        if counts not in self.known:
            found = predict(self.series(counts))
            cost = (float(sum(memory.short for memory in found.series.memory)), self._seconds(found))
            self.known[counts] = cost, found
            if _better(cost, self.best_cost):
                self.best, self.best_cost = counts, cost
        return self.known[counts][0]

    def _seconds(self, found: Prediction) -> float:
        if self.goal == "tokens" and found.decode_rate:
            return 1.0 / found.decode_rate
        return found.end_s if self.goal == "total" else found.first_token_s

    def series(self, counts: Counts) -> Series:
        total = sum(counts)
        split = tuple(map(float, counts)) if total else ()
        placement = replace(self.options.placement, n_gpu_layers=total, tensor_split=split)
        return make_series(self.blueprint, self.machine, replace(self.options, placement=placement), self.load)


def _better(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Fewer bytes short, or as few and clearly less time: what differs less than the models are exact is the same."""
    return one[0] < other[0] or (one[0] == other[0] and one[1] < other[1] * (1 - GAIN))


def _limits(climb: _Climb, found: Prediction) -> tuple[Limit, ...]:
    """Which devices could not take a layer more though that would be faster."""
    free = {row.device: row.limit - row.total for row in found.series.memory if row.limit is not None}
    base = climb.known[climb.best][0]
    limits: dict[str, Limit] = {}
    for counts, (cost, other) in climb.known.items():
        near = sum(abs(a - b) for a, b in zip(counts, climb.best, strict=True)) <= 2
        if not (near and cost[0] and _better((0.0, cost[1]), base)):
            continue
        for row in other.series.short:
            room = free.get(row.device, 0)
            limit = Limit(row.device, room + row.short, room)
            if row.device not in limits or limit.needed < limits[row.device].needed:
                limits[row.device] = limit
    return tuple(limits.values())
