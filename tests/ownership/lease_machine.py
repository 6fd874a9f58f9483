"""Workers as state machines on real bytes: each goes on by one small act when it is told to, and may rest anywhere.

What they do is what `workers/run.py`, `workers/peers.py` and `protocol/board.py` do, cut into pieces: a copy is made of
two halves, an operation reads its sources one by one and writes its result in two halves, and everything else may
happen in between. Beside the bytes lie the numbers of their writers, which travel with every copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coordinator.graph.node import Graph
from coordinator.schedule.lower import Keep, Lowered, lower
from coordinator.schedule.plan import Device
from coordinator.schedule.scheduler import Scheduler
from protocol.messages import Port
from protocol.ops import WRITES_ONLY
from protocol.program import Instruction, Kind, OpRecord
from tests.ownership.lease_graphs import KEPT, Meaning, Spots, Value, Who, mix, output_names, spots
from tests.ownership.lease_parts import Faults, Homes, Job, Message, Part, Violation, Worker


class Cluster:
    """Workers, their memory, the board, messages under way, and the coordinator that plans for them.

    `plane` is `shared` (a receiver copies out of the sender's arena), `message` (bytes are copied when sent) or `lent`
    (messages, whose bytes are read when they are delivered: until then the slot is on loan).
    """

    def __init__(self, devices: Sequence[Device], plane: str, seed: int, faults: Faults) -> None:
        self.plane, self.faults = plane, faults
        self.meaning = Meaning(seed)
        self.memory: dict[tuple[int, int], Value] = {}
        self.homes = Homes(self.meaning, self.memory, devices)
        self.scheduler = Scheduler(devices)
        self.workers = [Worker() for _ in devices]
        self.published: dict[int, int] = {}
        self.acknowledged: dict[int, int] = {}
        self.wires: dict[tuple[int, int], deque[Message]] = {}
        self.loans: dict[tuple[int, int], tuple[int, Instruction]] = {}  # by step and transfer: lender, SEND
        self.step = 0
        self.reads = 0

    # ---- the coordinator

    def plan(self, graph: Graph, keeps: Mapping[str, str]) -> tuple[Lowered, bool]:
        """Plan and lower as the evaluator does; and whether older programs are void now.

        `keeps` name the residents that get the bytes of outputs. Raises PlanError.
        """
        plan = self.scheduler.allocate(graph)
        replaced = self.homes.fit(plan.buffer_sizes)
        rows = [Keep(name, self.homes.resident(graph.named(kept))) for name, kept in keeps.items()]
        return lower(plan, self.homes, outputs=output_names(graph), keeps=rows), replaced

    def submit(self, lowered: Lowered, keeps: Mapping[str, str]) -> Job:
        """Tell every worker to run a program once, with new inputs."""
        self.step += 1
        graph = lowered.plan.graph
        job = Job(lowered, graph, self.meaning.evaluate(graph, self.step, keeps), self.step)
        for worker in self.workers:
            worker.jobs.append(job)
        return job

    @property
    def idle(self) -> bool:
        """True when every worker has answered."""
        return not any(worker.jobs for worker in self.workers)

    # ---- time

    def can_go_on(self, index: int) -> bool:
        """False when a worker has nothing to do or waits for a peer."""
        worker = self.workers[index]
        return bool(worker.jobs) and (worker.ready is None or worker.ready())

    def go_on(self, index: int) -> bool:
        """One act of a worker; False when it could not."""
        if not self.can_go_on(index):
            return False
        worker = self.workers[index]
        if worker.part is None:
            worker.part = self._step(index, worker.jobs[0])
        worker.acts += 1
        try:
            worker.ready = next(worker.part)
        except StopIteration:
            worker.part = worker.ready = None
            worker.jobs.popleft()
        return True

    def deliver(self, link: tuple[int, int]) -> bool:
        """The oldest message of a link (source, target) arrives; False when there is none."""
        wire = self.wires.get(link)
        if not wire:
            return False
        message = wire.popleft()
        self.workers[link[1]].early[message.step, message.transfer] = message.value()
        self.loans.pop((message.step, message.transfer), None)
        return True

    def finish(self, order: Callable[[int], Sequence[int]] = range) -> None:
        """Let everybody go on, in the order that `order` draws for each round, until all is done.

        Raises Violation when nobody can.
        """
        while not self.idle:
            moved = False
            for link in list(self.wires):
                moved |= self.deliver(link)
            for index in order(len(self.workers)):
                moved |= self.go_on(index)
            if not moved:
                waiting = [k for k, worker in enumerate(self.workers) if worker.jobs]
                raise Violation(f"workers {waiting} wait for each other in steps {self._steps()}")
        if left := list(self.loans):
            raise Violation(f"loans that never came back: {left}")

    def _steps(self) -> list[int]:
        return [worker.jobs[0].step for worker in self.workers if worker.jobs]

    # ---- one step of one worker

    def _step(self, index: int, job: Job) -> Part:
        program = job.lowered.programs[index]
        for port in program.inputs:
            at = np.arange(port.offset, port.offset + port.nbytes)
            yield from self._write(index, port.arena, at, job.meant.inputs[port.name])
        for item in program.instructions:
            yield None
            if item.kind is Kind.RUN:
                for op in program.ops[item.first : item.last]:
                    yield from self._compute(index, op, job)
            elif item.kind is Kind.COPY:
                yield from self._copy(index, (index, item.src[0]), item)
            elif item.kind is Kind.SEND:
                self._send(index, item, job.step)
            elif item.kind is Kind.RECV:
                yield from self._receive(index, item, job.step)
            elif self.plane == "shared":
                yield lambda item=item: self._rung(self.acknowledged, item.transfer, job.step)
            elif self.plane == "lent" and not self.faults.send_late:
                yield lambda item=item: (job.step, item.transfer) not in self.loans
        for (step, transfer), (lender, _) in self.loans.items():
            if lender == index and step == job.step and self.faults.watch_loans:
                raise Violation(f"worker {index} ends step {step} with transfer {transfer} on loan")
        for port in program.outputs:
            yield None
            self._check_output(index, port, job)

    def _rung(self, words: Mapping[int, int], transfer: int, step: int) -> bool:
        """True when the doorbell shows this step."""
        return words.get(transfer) == step or (self.faults.any_step and words.get(transfer, 0) > 0)

    def _send(self, index: int, item: Instruction, step: int) -> None:
        if self.plane != "message":
            self.loans[step, item.transfer] = (index, item)
        if self.plane == "shared":
            self.published[item.transfer] = step
            return
        arena, span = self.memory[index, item.arena], slice(item.offset, item.offset + item.nbytes)

        def fetch() -> Value:
            return Value(arena.data[span].copy(), arena.who[span].copy())

        value = fetch()
        late = fetch if self.plane == "lent" else lambda: value
        self.wires.setdefault((index, item.peer), deque()).append(Message(step, item.transfer, late))

    def _receive(self, index: int, item: Instruction, step: int) -> Part:
        if self.plane != "shared":
            early = self.workers[index].early
            yield lambda: (step, item.transfer) in early
            value = early.pop((step, item.transfer))
            at = np.arange(item.offset, item.offset + item.nbytes)
            yield from self._write(index, item.arena, at, value)
            return
        yield lambda: self._rung(self.published, item.transfer, step)
        if self.faults.acknowledge_early:
            self._acknowledge(item, step)
            yield None
        copying = self._copy(index, (item.peer, item.src[0]), item)
        for _ in copying:
            yield None
            if self.faults.acknowledge_half:
                self._acknowledge(item, step)
                yield None
        self._acknowledge(item, step)

    def _acknowledge(self, item: Instruction, step: int) -> None:
        self.acknowledged[item.transfer] = step
        self.loans.pop((step, item.transfer), None)

    def _copy(self, index: int, source: tuple[int, int], item: Instruction) -> Part:
        """In two halves, each read and written at once."""
        arena = self.memory[source]
        half = item.nbytes // 2
        for first, last in ((0, half), (half, item.nbytes)):
            span = slice(item.src[1] + first, item.src[1] + last)
            at = np.arange(item.offset + first, item.offset + last)
            self._put(index, item.arena, at, Value(arena.data[span].copy(), arena.who[span].copy()))
            yield None

    def _compute(self, index: int, op: OpRecord, job: Job) -> Part:
        sources = []
        for k, ref in enumerate(op.src):
            if ref is None or WRITES_ONLY.get(op.op) == k:
                continue
            arena, at = self.memory[index, ref.arena], spots(ref.ne, ref.nb) + ref.offset
            self._check_read(f"worker {index}: source {k}", arena.who[at], job.meant.reads[op.node, k], job, op.node)
            sources.append(arena.data[at])
            yield None
        at = spots(op.dst.ne, op.dst.nb) + op.dst.offset
        value = Value(mix(op.op, op.node, sources, at.size), np.full(at.size, job.meant.writers[op.node]))
        yield from self._write(index, op.dst.arena, at, value)

    def _write(self, index: int, arena: int, at: Spots, value: Value) -> Part:
        half = at.size // 2
        for span in (slice(0, half), slice(half, None)):
            self._put(index, arena, at[span], Value(value.data[span], value.who[span]))
            yield None

    def _put(self, index: int, arena: int, at: Spots, value: Value) -> None:
        if self.faults.watch_loans:
            for (step, transfer), (lender, item) in self.loans.items():
                if (lender, item.arena) == (index, arena):
                    lent = (at >= item.offset) & (at < item.offset + item.nbytes)
                    if lent.any():
                        raise Violation(f"worker {index} overwrites transfer {transfer} of step {step}, on loan")
        memory = self.memory[index, arena]
        memory.data[at], memory.who[at] = value.data, value.who

    def _check_read(self, what: str, who: Who, right: Value, job: Job, node: int) -> None:
        self.reads += 1
        wrong = np.flatnonzero(who != right.who)
        if wrong.size:
            name = job.graph.tensors[job.graph.nodes[node]].name if node >= 0 else ""
            found, wanted = self.meaning.name(int(who[wrong[0]])), self.meaning.name(int(right.who[wrong[0]]))
            raise Violation(f"step {job.step} {name}: {what} was written by {found}, should be by {wanted}")

    def _check_output(self, index: int, port: Port, job: Job) -> None:
        arena, span = self.memory[index, port.arena], slice(port.offset, port.offset + port.nbytes)
        right = job.meant.outputs[port.name]
        self._check_read(f"output {port.name}", arena.who[span], right, job, -1)
        if not np.array_equal(arena.data[span], right.data):
            raise Violation(f"step {job.step}: output {port.name} has other bytes than in a sequential evaluation")


def kept_of(cluster: Cluster, graph: Graph, wanted: int) -> dict[str, str]:
    """Up to `wanted` outputs of a graph and the residents, unused by it, that may keep them on their device."""
    keeps: dict[str, str] = {}
    plan = cluster.scheduler.allocate(graph)
    used = {graph.tensors[i].name for i in graph.leafs}
    for name in output_names(graph):
        owner = plan.backend[graph.named(name).id]
        kept = f"kept{owner}"
        if len(keeps) < wanted and kept not in used and kept not in keeps.values():
            keeps[name] = kept
    assert KEPT[0] * 4 >= max((graph.named(name).nbytes for name in keeps), default=0)
    return keeps
