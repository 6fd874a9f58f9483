"""Workers on one machine: those that compute at once share its processors, and what its memory can deliver."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordinator.schedule.lower import Lowered
from coordinator.simulate.fabric import Fabric
from coordinator.simulate.hardware import DeviceModel, Pool
from coordinator.simulate.timed import Do, Timed
from coordinator.simulate.work import weight_footprint

Demands = Sequence[tuple[float, ...]]
"""Bytes/s of weights out of memory, by program and worker, while a worker computes on a processor of its own."""


class Task:
    """What a worker computes: seconds on a processor of its own that are left, the bytes/s it asks memory for then, and
    at which share of that speed it goes on."""

    __slots__ = ("demand", "left", "pool", "serial", "speed", "version", "worker")

    def __init__(self, serial: int, worker: int, pool: int, seconds: float, demand: float) -> None:
        self.serial, self.worker, self.pool, self.left, self.demand = serial, worker, pool, seconds, demand
        self.speed, self.version = 1.0, 0


Schedule = Callable[[float, Task, int], None]
"""Asks to be called back at a time for a task with its version; a callback with an old version is void."""


class Pools:
    """Everything that is being computed on shared processors. Lives as long as a simulation.

    Of n busy workers on p processors each goes on at p / n of its speed, and at full speed where n is at most p. What
    they then ask of the memory and it cannot deliver slows down those who ask for most, until each gets the same.
    """

    def __init__(self, fabric: Fabric, schedule: Schedule) -> None:
        self.schedule = schedule
        self.pools = [_Busy(pool) for pool in fabric.pools]
        self.of_worker = {worker: k for k, pool in enumerate(fabric.pools) for worker in pool.workers}
        self.serial = 0

    def start(self, worker: int, seconds: float, demand: float, now: float) -> None:
        """A worker of `of_worker` begins to compute."""
        task = Task(self.serial, worker, self.of_worker[worker], seconds, demand)
        self.serial += 1
        busy = self.pools[task.pool]
        busy.advance(now)
        busy.tasks[task] = None
        self._await_first(busy)

    def end(self, task: Task, version: int, now: float) -> bool:
        """It may be done; False when its speed changed meanwhile."""
        if version != task.version:
            return False
        busy = self.pools[task.pool]
        busy.advance(now)
        del busy.tasks[task]
        busy.first = None
        self._await_first(busy)
        return True

    def _await_first(self, busy: _Busy) -> None:
        """Only the next end is awaited."""
        if busy.first is not None:
            busy.first.version += 1
        busy.share()
        busy.first = min(busy.tasks, key=lambda task: (task.left / task.speed, task.serial), default=None)
        if busy.first is not None:
            busy.first.version += 1
            self.schedule(busy.last + busy.first.left / busy.first.speed, busy.first, busy.first.version)


class _Busy:
    """The tasks of a pool, and which of them ends first."""

    __slots__ = ("first", "last", "pool", "tasks")

    def __init__(self, pool: Pool) -> None:
        self.pool, self.last = pool, 0.0
        self.tasks: dict[Task, None] = {}
        self.first: Task | None = None

    def advance(self, now: float) -> None:
        for task in self.tasks:
            task.left = max(0.0, task.left - task.speed * (now - self.last))
        self.last = now

    def share(self) -> None:
        """New speeds: the processors' share, and of the memory those with the smallest demands first."""
        if not self.tasks:
            return
        users = len(self.tasks)
        share = min(1.0, self.pool.processors / users)
        left = self.pool.memory
        for task in sorted(self.tasks, key=lambda task: task.demand) if left else self.tasks:
            task.speed = share
            if left and task.demand:
                given = min(share * task.demand, left / users)
                task.speed = given / task.demand
                left -= given
            users -= 1


def demands_of(lowered: Sequence[Lowered], programs: Sequence[Timed], models: Sequence[DeviceModel]) -> Demands:
    """What each worker asks of the memory while it computes, on average over a program: weights that its cache lost."""
    found = []
    for plan, timed in zip(lowered, programs, strict=True):
        weights = [weight_footprint(program.ops) for program in plan.programs]
        kept = sum(n for n, model in zip(weights, models, strict=True) if model.cache_nbytes)
        found.append(
            tuple(
                n * model.missed(kept) / busy if (busy := sum(a.seconds for a in acts if a.do == Do.RUN)) else 0.0
                for n, model, acts in zip(weights, models, timed.workers, strict=True)
            )
        )
    return found
