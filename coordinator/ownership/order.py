"""Which acts happen before which: one clock per agent, and conflicts between acts that nothing orders."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from coordinator.ownership.actions import HOST, Action, Do, Operand, Region


@dataclass(frozen=True, slots=True)
class Conflict:
    """An earlier act touches bytes that a later one touches too, one of them writes, and neither waits."""

    earlier: int
    operand: Operand
    earlier_writes: bool
    later_writes: bool


@dataclass(frozen=True, slots=True)
class _Touch:
    number: int
    agent: str
    tick: int
    operand: Operand
    writes: bool


class Order:
    """Vector clocks over the host and the asynchronous devices. Without such devices everything is ordered."""

    def __init__(self, queues: frozenset[str]) -> None:
        self._queues = queues
        self._clocks: dict[str, dict[str, int]] = {agent: {} for agent in (HOST, *queues)}
        self._made: dict[int, dict[str, int]] = {}
        self._touches: defaultdict[Region, list[_Touch]] = defaultdict(list)
        self._last: dict[str, int] = {}

    def last(self, queue: str) -> tuple[int, ...]:
        """The last act on a queue, if there was one."""
        return (self._last[queue],) if queue in self._last else ()

    def conflicts(self, action: Action) -> list[Conflict]:
        """Earlier acts that `action` is not ordered after and whose bytes it touches, most recent first."""
        if not self._queues:
            return []
        clock = self._clock(action)
        found = []
        for writes, operands in ((False, action.reads), (True, action.writes)):
            for mine in operands:
                for t in reversed(self._touches[mine.region]):
                    apart = t.operand.end <= mine.start or mine.end <= t.operand.start
                    if apart or not (writes or t.writes) or clock.get(t.agent, 0) >= t.tick:
                        continue
                    found.append(Conflict(t.number, t.operand, t.writes, writes))
        return found

    def enter(self, action: Action) -> None:
        """The act has been issued."""
        if not self._queues:
            return
        clock = self._clock(action)
        tick = clock[action.agent] = clock.get(action.agent, 0) + 1
        self._clocks[action.agent] = clock
        self._made[action.number] = clock
        if action.agent != HOST:
            self._last[action.agent] = action.number
        for writes, operands in ((False, action.reads), (True, action.writes)):
            for operand in operands:
                self._touches[operand.region].append(_Touch(action.number, action.agent, tick, operand, writes))

    def _clock(self, action: Action) -> dict[str, int]:
        """What is known to be over when `action` starts."""
        known = [self._clocks[HOST], self._clocks[action.agent]]
        known += [self._made[number] for number in action.after if number in self._made]
        if action.do is Do.WAIT:
            known.append(self._clocks[action.device])
        clock: dict[str, int] = {}
        for other in known:
            for agent, tick in other.items():
                clock[agent] = max(clock.get(agent, 0), tick)
        return clock
