"""Acts out a program on real bytes: what was asked of a late device happens as late as the program allows."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.ownership.actions import HOST, Action, Do, Operand, Region
from coordinator.ownership.facts import Finding
from coordinator.ownership.shadow import Shadow
from coordinator.ownership.tinyops import Floats, compute

POISON = np.float32(777.0)
"""What memory holds that nobody has written, or that was freed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a read of the host found: lowest and highest element, and what is right."""

    tensor: str
    low: float
    high: float
    right: float | None

    @property
    def is_right(self) -> bool:
        """True when nothing else was expected."""
        return self.right is None or (_same(self.low, self.right) and _same(self.high, self.right))


@dataclass(frozen=True, slots=True)
class Run:
    """One run: what was read, whether it crashed, and the first violation that the shadow map saw."""

    seen: tuple[Seen, ...]
    crashed: bool = False
    violation: Finding | None = None

    @property
    def is_right(self) -> bool:
        """True when it ended, and every read was right."""
        return not self.crashed and self.violation is None and all(s.is_right for s in self.seen)


def run(actions: Sequence[Action], *, strict: bool = False, late: frozenset[str] | None = None) -> Run:
    """Carry out the acts. Devices of `late` (None: all) start when somebody waits, others at once.

    With `strict` each read is compared with a shadow map and the first violation ends the run.
    """
    return _Run(actions, strict, late).go()


class _Run:
    """Memory, queues and shadow of one run."""

    def __init__(self, actions: Sequence[Action], strict: bool, late: frozenset[str] | None) -> None:
        self.actions, self.strict, self.late = actions, strict, late
        self.shadow = Shadow(actions)
        self.memory: dict[Region, Floats] = {}
        self.sizes: defaultdict[Region, int] = defaultdict(int)
        for action in actions:
            for operand in (*action.reads, *action.writes):
                self.sizes[operand.region] = max(self.sizes[operand.region], operand.end)
        self.queues: defaultdict[str, deque[Action]] = defaultdict(deque)
        self.done: set[int] = set()
        self.seen: list[Seen] = []

    def go(self) -> Run:
        for action in self.actions:
            if action.agent != HOST:
                self.queues[action.agent].append(action)
                waiting = [action.agent] if self.late is not None and action.agent not in self.late else []
            else:
                waiting = [action.device] if action.do is Do.WAIT else []
            for queue in waiting:
                if (stop := self._drain(queue)) is not None:
                    return stop
            if action.agent == HOST and (stop := self._do(action)) is not None:
                return stop
        for queue in sorted(self.queues):
            if (stop := self._drain(queue)) is not None:
                return stop
        return Run(tuple(self.seen))

    def _drain(self, queue: str, until: int | None = None) -> Run | None:
        """Carry out a queue in order, to its end or up to an act."""
        waiting = self.queues[queue]
        while waiting and (until is None or until not in self.done):
            action = waiting.popleft()
            for number in action.after:
                other = self.actions[number]
                if number not in self.done and (stop := self._drain(other.agent, number)) is not None:
                    return stop
            if (stop := self._do(action)) is not None:
                return stop
        return None

    def _do(self, action: Action) -> Run | None:
        self.done.add(action.number)
        if self.strict and (found := self.shadow.apply(action)):
            return Run(tuple(self.seen), violation=found[0])
        if action.do is Do.CRASH:
            return Run(tuple(self.seen), crashed=True)
        if action.do is Do.READ:
            data = self._bytes(action.reads[0])
            self.seen.append(Seen(action.tensor, float(data.min()), float(data.max()), action.right))
        elif action.do in (Do.SET, Do.LOAD, Do.FREE):
            for operand in action.writes:
                self._bytes(operand)[:] = POISON if action.do is Do.FREE else np.float32(action.value)
        elif action.do is Do.COPY:
            self._bytes(action.writes[0])[:] = np.resize(
                self._bytes(action.reads[0]), self._bytes(action.writes[0]).size
            )
        elif action.do is Do.NODE:
            out = self._bytes(action.writes[0])
            out[:] = compute(action.op, action.params, [self._bytes(r).copy() for r in action.reads], out.size)
        return None

    def _bytes(self, operand: Operand) -> Floats:
        """The elements of an operand, in place."""
        if operand.region not in self.memory:
            self.memory[operand.region] = np.full(-(-self.sizes[operand.region] // 4), POISON, np.float32)
        return self.memory[operand.region][operand.start // 4 : -(-operand.end // 4)]


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(1.0, abs(b))
