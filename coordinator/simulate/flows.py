"""Bytes on the wire: transfers queue on their route and share media fairly, by progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from coordinator.simulate.fabric import Fabric
from coordinator.simulate.medium import Medium

_EPS = 1e-9
CLOCK_EPS = 1e-14
"""Times are doubles: two of them differ by so much of their size at least, which is all that some transfers take."""

_MASK = (1 << 64) - 1


class Flow:
    """One transfer on its way: `ready` when both sides were, `start` when its route was free, `left` when its last byte
    was sent, `arrived`; all in seconds. `job` and `by` belong to the engine."""

    __slots__ = (
        "arrived", "by", "cap", "hop", "job", "last", "latency", "left", "nbytes", "rate", "ready", "remaining",
        "route", "serial", "slower", "start", "version",
    )  # fmt: skip

    def __init__(
        self, serial: int, route: int, nbytes: int, ready: float, job: Any, hop: int, by: int, slower: float
    ) -> None:
        self.serial, self.route, self.nbytes, self.ready = serial, route, nbytes, ready
        self.job, self.hop, self.by, self.slower = job, hop, by, slower
        self.start = self.left = self.arrived = self.last = 0.0
        self.remaining, self.rate, self.cap, self.latency = float(nbytes), 0.0, 0.0, 0.0
        self.version = 0


Schedule = Callable[[float, Flow, int], None]
"""Asks to be called back at a time for a flow with its version; a callback with an old version is void."""


class FlowNet:
    """Every transfer under way. Lives as long as a simulation.

    A route carries one transfer at a time, in the order in which they became ready. Routes that share media get
    max-min fair rates, computed anew among those who share whenever a transfer starts or ends: by `Medium` where a
    medium has its routes to itself, for all that are joined by routes over several media otherwise.
    """

    def __init__(self, fabric: Fabric, schedule: Schedule, *, seed: int = 0, check: bool = False) -> None:
        self.fabric, self.schedule, self.seed, self.check = fabric, schedule, seed, check
        self.queues: list[deque[Flow]] = [deque() for _ in fabric.routes]
        self.active: list[Flow | None] = [None] * len(fabric.routes)
        self.on_medium: list[dict[Flow, None]] = [{} for _ in fabric.capacity]
        joint = {m for route in fabric.routes if len(route.media) > 1 for m in route.media}
        self.alone = {m: Medium(c) for m, c in enumerate(fabric.capacity) if m not in joint}
        self.soonest: dict[int, Flow] = {}
        self.nbytes = [0] * len(fabric.routes)
        self.delivered = [0.0] * len(fabric.routes)
        self.busy_s = [0.0] * len(fabric.routes)
        self.n_transfers = [0] * len(fabric.routes)
        self.serial = 0

    def submit(self, route: int, nbytes: int, now: float, job: Any, hop: int, by: int, slower: float = 1.0) -> None:
        """Both sides are ready, `by` last: queue `nbytes` on the route, which carries them `slower` than others."""
        flow = Flow(self.serial, route, nbytes, now, job, hop, by, slower)
        self.serial += 1
        self.nbytes[route] += nbytes
        self.n_transfers[route] += 1
        if self.active[route] is None:
            self._start(flow, now)
        else:
            self.queues[route].append(flow)

    def leave(self, flow: Flow, version: int, now: float) -> bool:
        """The last byte may have left; False when the rate changed meanwhile. The route's next transfer starts."""
        if version != flow.version:
            return False
        route, media = flow.route, self.fabric.routes[flow.route].media
        flow.left = now
        if media and media[0] in self.alone:
            moved = self.alone[media[0]].remove(flow, now)
            self._await_first(media[0])
        else:
            moved = flow.rate * (now - flow.last) + (flow.nbytes - flow.remaining)
            for medium in media:
                del self.on_medium[medium][flow]
            self._share(media, now)
        self.delivered[route] += moved
        self.busy_s[route] += now - flow.start
        if self.check:
            self._check_left(flow, moved, now)
        queue = self.queues[route]
        self.active[route] = None
        if queue:
            self._start(queue.popleft(), now)
        return True

    def idle(self) -> bool:
        """True when nothing is under way or waiting."""
        return not any(self.active) and not any(self.queues)

    def _start(self, flow: Flow, now: float) -> None:
        route = self.fabric.routes[flow.route]
        slower = 1.0 + route.jitter * uniform(self.seed, flow.serial) if route.jitter else 1.0
        flow.start = flow.last = now
        flow.cap, flow.latency = route.bandwidth / (slower * flow.slower), route.latency_s * slower
        self.active[flow.route] = flow
        if not route.media:
            flow.rate = flow.cap
            self.schedule(now + flow.nbytes / flow.cap, flow, flow.version)
            return
        if route.media[0] in self.alone:
            self.alone[route.media[0]].add(flow, now)
            self._await_first(route.media[0])
            return
        for medium in route.media:
            self.on_medium[medium][flow] = None
        self._share(route.media, now)

    def _await_first(self, medium: int) -> None:
        """Of a medium of its own only the next end is awaited."""
        before = self.soonest.pop(medium, None)
        if before is not None:
            before.version += 1
        first = self.alone[medium].first()
        if first is not None:
            time, flow = first
            flow.version += 1
            self.soonest[medium] = flow
            self.schedule(time, flow, flow.version)
        if self.check:
            assert self.alone[medium].used() <= self.fabric.capacity[medium] * (1 + 1e-6), "a medium over 100 %"

    def _share(self, media: Iterable[int], now: float) -> None:
        """New rates for all flows that share a medium with one on `media`, directly or through others."""
        seen: dict[int, None] = dict.fromkeys(media)
        flows: dict[Flow, None] = {}
        stack = list(seen)
        while stack:
            for flow in self.on_medium[stack.pop()]:
                if flow not in flows:
                    flows[flow] = None
                    for medium in self.fabric.routes[flow.route].media:
                        if medium not in seen:
                            seen[medium] = None
                            stack.append(medium)
        if not flows:
            return
        for flow, rate in self._fair(list(flows)):
            if rate != flow.rate or not flow.version:
                flow.remaining = max(0.0, flow.remaining - flow.rate * (now - flow.last))
                flow.last, flow.rate = now, rate
                flow.version += 1
                self.schedule(now + flow.remaining / rate, flow, flow.version)
        if self.check:
            self._check_media(seen)

    def _fair(self, flows: list[Flow]) -> list[tuple[Flow, float]]:
        """Max-min fair rates (bytes/s): raise all together, stop those who meet their own limit or a full medium."""
        routes = self.fabric.routes
        left = {m: self.fabric.capacity[m] for flow in flows for m in routes[flow.route].media}
        users = dict.fromkeys(left, 0)
        for flow in flows:
            for m in routes[flow.route].media:
                users[m] += 1
        rates: list[tuple[Flow, float]] = []
        while flows:
            level = min(min(flow.cap for flow in flows), min(left[m] / users[m] for m in users if users[m]))
            full = {m for m in users if users[m] and left[m] / users[m] <= level * (1 + _EPS)}
            rest = []
            for flow in flows:
                media = routes[flow.route].media
                if flow.cap > level and full.isdisjoint(media):
                    rest.append(flow)
                    continue
                rates.append((flow, level))
                for m in media:
                    left[m] -= level
                    users[m] -= 1
            flows = rest
        return rates

    def _check_left(self, flow: Flow, moved: float, now: float) -> None:
        least, clock = flow.nbytes / flow.cap, CLOCK_EPS * now
        assert flow.start >= flow.ready, "a transfer started before it was ready"
        assert now - flow.start >= least * (1 - _EPS) - clock, "a transfer was faster than its link"
        slack = 1e-6 * max(1, flow.nbytes) + flow.cap * clock
        assert abs(moved - flow.nbytes) <= slack, "bytes in are not bytes out"

    def _check_media(self, media: Iterable[int]) -> None:
        for medium in media:
            used = sum(flow.rate for flow in self.on_medium[medium])
            assert used <= self.fabric.capacity[medium] * (1 + 1e-6), f"{self.fabric.media[medium]} over 100 %"


def uniform(seed: int, serial: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + (serial + 1) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)
