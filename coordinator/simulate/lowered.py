"""From a plan to timed programs: lowered as for a real run, each instruction with the time its device or link takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coordinator.graph.node import Tensor
from coordinator.schedule.lower import Home, Keep, Lowered, Transfer, lower
from coordinator.schedule.plan import Device, Plan
from coordinator.schedule.residents import Key
from coordinator.simulate.fabric import Fabric
from coordinator.simulate.hardware import DeviceModel, Work
from coordinator.simulate.timed import Act, Do, Hop, Timed
from coordinator.simulate.work import DIGEST, OUTPUT, copy_work, digest_work, output_work, weight_footprint, work_of
from protocol.errors import UsageError
from protocol.ops import Usage
from protocol.program import Kind

_RESIDENT, _COMPUTE = 0, 1
"""Arenas of a simulated worker: what exists before the graphs, and from here on the compute buffer's chunks."""

CHUNKS = 64
"""More than a compute buffer has."""


class PlanHomes:
    """Homes of tensors on workers that do not exist: every device has its resident arena and one per chunk.

    `residents` is all that exists before the graphs. `scheduler` tells compute arenas of several schedulers apart.
    """

    def __init__(self, devices: Sequence[Device], residents: Mapping[Key, Tensor], scheduler: int = 0) -> None:
        self.scheduler = scheduler
        self.workers: dict[str, int] = {}
        for index, device in enumerate(devices):
            self.workers.setdefault(device.buft or device.name, index)
        self.homes: dict[Key, Home] = {}
        ends = [0] * len(devices)
        for key, tensor in residents.items():
            worker = self.workers[key[1]]
            self.homes[key] = Home(worker, _RESIDENT, ends[worker])
            ends[worker] += tensor.nbytes

    def resident(self, tensor: Tensor) -> Home:
        """A tensor that exists before the graph."""
        assert tensor.buffer is not None
        return self.homes[tensor.name, tensor.buffer.buft]

    def compute(self, buft: str, chunk: int) -> Home:
        """The start of a chunk of a compute buffer."""
        return Home(self.workers[buft], _COMPUTE + self.scheduler * CHUNKS + chunk, 0)


def lower_plan(plan: Plan, homes: PlanHomes, keep: tuple[str, Tensor] | None = None) -> Lowered:
    """A plan's programs. `keep` is (name, resident tensor): what is copied out at the end, and where to."""
    keeps = () if keep is None else (Keep(keep[0], homes.resident(keep[1])),)
    outputs = ("result_output",) if "result_output" in plan.graph.by_name else ()
    return lower(plan, homes, outputs=outputs, keeps=keeps)


def time_program(
    lowered: Lowered,
    models: Sequence[DeviceModel],
    fabric: Fabric,
    *,
    name: str = "",
    streams: int = 1,
    buffered: bool = False,
) -> Timed:
    """Each worker's instructions with their durations on `models`, by worker; the last one is the coordinator's host.

    An evaluation costs each device that takes part its `step_s`, and its link's `fixed_s` once; `wake` and `each` of a
    link delay what is received at a split. Weights that are sent from the host's memory lie in a mapped file, which is
    slower than pinned memory where the link says so. Outputs on other workers than the host's travel to it at the end,
    unless it was measured what replies cost. Raises UsageError when two devices have no link.
    """
    return _Timing(lowered, models, fabric, streams).run(name or lowered.plan.graph.name, buffered)


class _Timing:
    """State of one call of `time_program`."""

    def __init__(self, lowered: Lowered, models: Sequence[DeviceModel], fabric: Fabric, streams: int) -> None:
        self.lowered, self.models, self.fabric, self.streams = lowered, models, fabric, streams
        self.host = len(models) - 1
        self.hops = [self._hop(transfer) for transfer in lowered.transfers]
        self.known: dict[tuple[int, Work], float] = {}
        programs = zip(lowered.programs, models, strict=True)
        self.footprints = [weight_footprint(p.ops) if model.cache_nbytes else 0 for p, model in programs]
        self.footprint = sum(self.footprints)

    def run(self, name: str, buffered: bool) -> Timed:
        for worker in range(len(self.models)):
            self._charge(worker)
            self._delay(worker)
        workers = [self._worker(index) for index in range(len(self.lowered.programs))]
        return Timed(name, tuple(map(tuple, workers)), tuple(self.hops), buffered)

    def _worker(self, worker: int) -> list[Act]:
        model, program = self.models[worker], self.lowered.programs[worker]
        missed, lost = model.missed(self.footprint), model.lost(self.footprint - self.footprints[worker])
        overhead = model.first
        acts: list[Act] = []
        if program.instructions and model.step_s:
            more = missed * model.step_missed_s if worker == self.host else 0.0
            acts.append(Act(Do.RUN, model.step_s + more, -1, 0))
        for item in program.instructions:
            if item.kind is Kind.TAP:
                continue
            if item.kind is Kind.RUN:
                ops = program.ops[item.first : item.last]
                seconds = sum(self._seconds(worker, work_of(op, self.streams)) for op in ops)
                seconds += overhead.seconds(missed, lost)
                overhead = model.split
                acts.append(Act(Do.RUN, seconds, -1, item.split))
            elif item.kind is Kind.COPY:
                acts.append(Act(Do.COPY, self._seconds(worker, copy_work(item.nbytes)), -1, item.split))
            else:
                acts.append(Act(int(item.kind), 0.0, item.transfer, item.split))
        acts += self._replies(worker)
        if worker != self.host and OUTPUT not in model.costs:
            for port in program.outputs:
                self.hops.append(
                    Hop(worker, -1, port.nbytes, len(self.lowered.plan.splits), port.name, self._route(worker, -1))
                )
                acts.append(Act(Do.OUT, 0.0, len(self.hops) - 1, len(self.lowered.plan.splits)))
        return acts

    def _replies(self, worker: int) -> list[Act]:
        """Putting outputs and hashes into the reply, where that was measured."""
        costs, program = self.models[worker].costs, self.lowered.programs[worker]
        works = [output_work(port.nbytes) for port in program.outputs if OUTPUT in costs]
        works += [digest_work(port.nbytes) for port in program.digests if DIGEST in costs]
        return [Act(Do.COPY, self._seconds(worker, work), -1, len(self.lowered.plan.splits)) for work in works]

    def _hop(self, transfer: Transfer) -> Hop:
        number = self._route(transfer.source, transfer.target)
        route, slower = self.fabric.routes[number], 1.0
        buffer = self.lowered.plan.graph.tensors[transfer.tensor].buffer
        if route.pageable and transfer.source == self.host and buffer is not None and buffer.usage is Usage.WEIGHTS:
            slower = route.bandwidth / route.pageable
        return Hop(
            transfer.source, transfer.target, transfer.nbytes, transfer.split, transfer.name, number, slower=slower
        )  # fmt: skip

    def _seconds(self, worker: int, work: Work) -> float:
        key = worker, work
        if key not in self.known:
            model = self.models[worker]
            self.known[key] = model.seconds(work, model.missed(self.footprint))
        return self.known[key]

    def _charge(self, worker: int) -> None:
        """A link's fixed cost, once per evaluation: it goes with what a device receives before its first operation.

        A device that takes all of that at once pays on each transfer, so that the last to come is late, whichever that
        is; one that takes them in turn pays on the last.
        """
        if worker == self.host:
            return
        first: list[int] = []
        model = self.models[worker]
        missed = model.missed(self.footprint)
        for item in self.lowered.programs[worker].instructions:
            if item.kind is Kind.RUN and first:
                break
            if item.kind is Kind.RECV and self.fabric.routes[self.hops[item.transfer].route].fixed_s:
                first.append(item.transfer)
        for transfer in first if model.async_copies else first[-1:]:
            hop = self.hops[transfer]
            route = self.fabric.routes[hop.route]
            self.hops[transfer] = hop._replace(extra_s=route.fixed_s + missed * route.fixed_missed_s)

    def _delay(self, worker: int) -> None:
        """What receiving costs a process: to wake up, and to take every transfer of a split, one after the other. Of
        several, each is late by all that still follow it, so that the last to come delays the worker."""
        missed = self.models[worker].missed(self.footprint)
        together: list[int] = []
        for item in (*self.lowered.programs[worker].instructions, None):
            if item is not None and item.kind is Kind.RECV:
                together.append(item.transfer)
            elif item is None or item.kind is not Kind.WAIT:
                rest_s = 0.0
                for transfer in reversed(together):
                    hop = self.hops[transfer]
                    route = self.fabric.routes[hop.route]
                    rest_s += route.each.seconds(missed)
                    self.hops[transfer] = hop._replace(extra_s=hop.extra_s + route.wake.seconds(missed) + rest_s)
                together = []

    def _route(self, source: int, target: int) -> int:
        target = self.host if target < 0 else target
        if (source, target) not in self.fabric.index:
            a, b = self.models[source].name, self.models[target].name
            raise UsageError(f"--network: no link from {a} to {b}, but the plan sends bytes there")
        return self.fabric.index[source, target]
