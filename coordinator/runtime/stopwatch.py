"""Clocks of a run: when each worker did what, by the wall clock and, with a model of hardware, by a virtual one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.schedule.lower import Lowered
from coordinator.simulate.lowered import time_program
from coordinator.simulate.machine import Machine
from coordinator.simulate.timed import Act, Do, Hop
from protocol.errors import UsageError
from protocol.program import Instruction, Kind
from protocol.timing import AHEAD, BLOCKS, PS, RESULT, Cost, Times


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation: its program, the wall clock around it in ns, when it began by the virtual clock in ps, and the
    times of each worker's instructions with one more row for the whole step; `costs` as they were shipped."""

    name: str
    lowered: Lowered
    start_ns: int
    end_ns: int
    start_ps: int
    times: Mapping[int, Sequence[Times]]
    costs: Sequence[Sequence[Cost]] = ()

    @property
    def title(self) -> str:
        """`vision`, `prompt of 15`, `token`."""
        graph = self.lowered.plan.graph
        if "inp_tokens" not in graph.by_name:
            return self.name
        n = graph.named("inp_tokens").ne[0]
        return "token" if n == 1 else f"prompt of {n}"

    @property
    def virtual_ps(self) -> int:
        """How long it took by the virtual clock, results on their way to the coordinator included; 0 without one."""
        return max((rows[-1].end_ps for rows in self.times.values()), default=0)


class Stopwatch:
    """Takes the times of a session's evaluations. Lives as long as the session.

    `machine` are the modelled devices, one for each worker (None: only the wall clock is read); with `pace` workers
    sleep until the wall clock is where the virtual one is. `taken` grows only with `keep`.
    """

    def __init__(self, machine: Machine | None = None, *, pace: bool = False, keep: bool = False) -> None:
        self.machine, self.keep = machine, keep
        self.timing = "trace" if machine is None else "pace" if pace else "clock"
        self.now_ps = 0
        self.taken: list[Evaluation] = []

    def costs(self, lowered: Lowered) -> list[list[Cost]]:
        """What the model says of each worker's instructions; nothing without a model.

        Raises UsageError when bytes go where the model has no link.
        """
        return [] if self.machine is None else instruction_costs(lowered, self.machine)

    def took(self, evaluation: Evaluation) -> int:
        """An evaluation is through; the next one begins when its results are there. How long it took in ps."""
        self.now_ps += evaluation.virtual_ps
        if self.keep:
            self.taken.append(evaluation)
        return evaluation.virtual_ps


def check_machine(machine: Machine, workers: Sequence[str], system: str) -> None:
    """Raise UsageError unless there is one modelled device for each worker."""
    if len(machine.models) != len(workers):
        raise UsageError(
            f"--simulate {system}: {len(machine.models)} devices ({', '.join(machine.names)}): expected one for each "
            f"of the {len(workers)} workers, in their order: {', '.join(workers)}"
        )


def instruction_costs(lowered: Lowered, machine: Machine) -> list[list[Cost]]:
    """By worker: a row for what comes before its instructions, one for each, and those for what comes after them.

    Raises UsageError when bytes go where the model has no link.
    """
    timed = time_program(lowered, machine.models, machine.fabric)
    return [_Costs(machine, timed.hops, worker).of(lowered, acts) for worker, acts in enumerate(timed.workers)]


class _Costs:
    """The rows of one worker."""

    def __init__(self, machine: Machine, hops: Sequence[Hop], worker: int) -> None:
        self.machine, self.hops = machine, hops
        self.is_async = [model.async_copies for model in machine.models]
        self.worker = worker

    def of(self, lowered: Lowered, acts: Sequence[Act]) -> list[Cost]:
        """Acts are what happens before the instructions, the instructions without TAPs, and what happens after."""
        instructions = lowered.programs[self.worker].instructions
        timed = [item for item in instructions if item.kind is not Kind.TAP]
        first = 1 if timed and self.machine.models[self.worker].step_s else 0
        rest = iter(acts[first:])
        rows = [Cost(sum(_ps(act.seconds) for act in acts[:first]))]
        rows += [Cost(0) if item.kind is Kind.TAP else self._row(item, next(rest)) for item in instructions]
        return rows + [self._after(act) for act in rest]

    def _row(self, item: Instruction, act: Act) -> Cost:
        assert act.do == int(item.kind), (act, item)
        if item.kind in (Kind.RUN, Kind.COPY):
            return Cost(_ps(act.seconds))
        hop = self.hops[act.hop]
        if item.kind is Kind.SEND:
            blocks = not self.is_async[hop.source] and not self.is_async[hop.target]
            return Cost(0, 0, hop.route, BLOCKS if blocks else 0)
        if item.kind is Kind.WAIT:
            return Cost(0, 0, hop.route)
        return self._carried(hop, AHEAD if self.is_async[hop.target] else 0)

    def _after(self, act: Act) -> Cost:
        return self._carried(self.hops[act.hop], RESULT) if act.do == Do.OUT else Cost(_ps(act.seconds))

    def _carried(self, hop: Hop, flags: int) -> Cost:
        """A transfer that has its link, and what the link shares with others, to itself."""
        fabric = self.machine.fabric
        route = fabric.routes[hop.route]
        rate = min((route.bandwidth / hop.slower, *(fabric.capacity[medium] for medium in route.media)))
        return Cost(_ps(hop.nbytes / rate), _ps(route.latency_s + hop.extra_s), hop.route, flags)


def _ps(seconds: float) -> int:
    return round(seconds * PS)
