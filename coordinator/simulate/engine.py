"""Discrete events: workers run timed programs instruction by instruction, links carry what they exchange."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from coordinator.simulate.fabric import Fabric
from coordinator.simulate.flows import CLOCK_EPS, Flow, FlowNet
from coordinator.simulate.pool import Demands, Pools, Task
from coordinator.simulate.state import Evaluations, Parts, Running, Worker
from coordinator.simulate.timed import Do, Job, Timed
from coordinator.simulate.timeline import Carried, Depth, Ran, Slice, Tally, Timeline
from protocol.errors import PlanError

_RUN, _COPY, _SEND, _RECV, _WAIT, _OUT = (int(do) for do in Do)
_CONTINUE, _LEFT, _ARRIVED, _RELEASE, _COMPUTED = range(5)
_POSTED, _SENT, _GONE, _HERE = 1, 2, 4, 8  # state of a hop, bits


class Engine:
    """One simulation over `is_async` workers (True: copies overlap with computing). Lives as long as one `run`.

    A worker runs the evaluations it is given one after the other; those of a pool share its processors and its memory,
    of which they ask for `demands`. A transfer starts when its sender has reached SEND and its receiver RECV; a
    receiver with asynchronous copies takes all transfers of a split at once, and in buffered programs before it gets
    there. A sender goes on unless neither side is asynchronous. WAIT ends when the bytes have left. `check` asserts
    causality, no medium or worker over 100 %, and bytes in = bytes out; `record` keeps every evaluation, slice and
    transfer, without which memory does not grow with the time simulated.
    """

    def __init__(
        self, is_async: Sequence[bool], fabric: Fabric, *, seed: int = 0, check: bool = False, record: bool = False,
        demands: Demands = (),
    ) -> None:  # fmt: skip
        self.fabric, self.check, self.record = fabric, check, record
        self.workers = [Worker(index, value) for index, value in enumerate(is_async)]
        self.net = FlowNet(fabric, self._when_left, seed=seed, check=check)
        self.pools, self.demands = Pools(fabric, self._when_computed), demands
        for worker in self.workers:
            worker.is_pooled = worker.index in self.pools.of_worker
        self.heap: list[tuple[float, int, int, Any, int]] = []
        self.serial = self.n_jobs = 0
        self.parts: list[Parts] = []
        self.out = Timeline((), fabric, workers=[worker.totals for worker in self.workers])

    def run(self, programs: Sequence[Timed], sequences: Iterable[Iterable[Job]]) -> Timeline:
        """Simulate until everything is done; all sequences start at time 0.

        Raises PlanError when programs wait for each other for ever.
        """
        self.out.programs = tuple(programs)
        self.parts = [
            [(worker, acts) for worker, acts in zip(self.workers, timed.workers, strict=True) if acts]
            for timed in programs
        ]
        everything = [Evaluations(number, iter(jobs)) for number, jobs in enumerate(sequences)]
        for sequence in everything:
            self._release(sequence, 0.0, -1)
        heap, now, n = self.heap, 0.0, 0
        while heap:
            time, _, what, item, extra = heapq.heappop(heap)
            assert not self.check or time >= now, "time ran backwards"
            if what == _LEFT and not self.net.leave(item, extra, time):
                continue
            if what == _COMPUTED and not self.pools.end(item, extra, time):
                continue
            now, n = time, n + 1
            if what == _CONTINUE:
                self._advance(item, now)
            elif what == _LEFT:
                self._left(item, now)
            elif what == _COMPUTED:
                self._computed(self.workers[item.worker], now)
            elif what == _ARRIVED:
                self._arrived(item, now)
            else:
                self._start(item, now)
        self._finish(everything, now, n)
        return self.out

    def _push(self, time: float, what: int, item: Any, extra: int = 0) -> None:
        self.serial += 1
        heapq.heappush(self.heap, (time, self.serial, what, item, extra))

    def _when_left(self, time: float, flow: Flow, version: int) -> None:
        self._push(time, _LEFT, flow, version)

    def _when_computed(self, time: float, task: Task, version: int) -> None:
        self._push(time, _COMPUTED, task, version)

    def _release(self, sequence: Evaluations, now: float, cause: int) -> None:
        """Release the sequence's next evaluations, as many as their windows allow."""
        while (spec := sequence.next) is not None and sequence.running < spec.window:
            timed, parts, released = self.out.programs[spec.program], self.parts[spec.program], now + spec.gap_s
            running = Running(self.n_jobs, spec, timed, sequence, parts, released)
            if self.record:
                self.out.jobs.append(Ran(spec.program, sequence.number, spec.tag, released, -1.0, cause))
            self.n_jobs += 1
            sequence.running += 1
            sequence.next = next(sequence.jobs, None)
            self._push(released, _RELEASE, running)

    def _start(self, job: Running, now: float) -> None:
        """Hand an evaluation to every worker that takes part."""
        if not job.open:
            self._complete(job, now)
            return
        for worker, _ in job.parts:
            worker.queue.append(job)
            if self.record:
                self.out.depths.append(Depth(now, worker.index, len(worker.queue)))
            if worker.job is None:
                self._next_job(worker)
                self._advance(worker, now)

    def _next_job(self, worker: Worker) -> None:
        worker.job = worker.queue[0] if worker.queue else None
        worker.acts = worker.job.timed.workers[worker.index] if worker.job else ()
        worker.pc = 0

    def _advance(self, worker: Worker, now: float) -> None:
        """Run the worker's instructions until one of them takes time."""
        while (job := worker.job) is not None:
            acts, hops = worker.acts, job.hops
            while worker.pc < len(acts):
                do, seconds, hop, split = acts[worker.pc]
                if do <= _COPY:
                    worker.pc += 1
                    if seconds > 0.0 and worker.is_pooled:
                        worker.since = now
                        demand = self.demands[job.program][worker.index] if self.demands else 0.0
                        self.pools.start(worker.index, seconds, demand, now)
                        return
                    if seconds > 0.0:
                        worker.totals.busy_s += seconds
                        if self.record:
                            self.out.slices.append(Slice(worker.index, now, now + seconds, do, job.number, split, -1))
                        self._push(now + seconds, _CONTINUE, worker)
                        return
                elif do in (_SEND, _OUT):
                    self._send(worker, job, hop, now, out=do == _OUT)
                    if do == _SEND and not worker.is_async and not self._is_async_target(job, hop):
                        worker.blocked, worker.since = hop, now
                        return
                    worker.pc += 1
                elif hops[hop] & (_HERE if do == _RECV else _GONE):
                    worker.pc += 1
                else:
                    if do == _RECV:
                        self._post(worker, job, now)
                    worker.blocked, worker.since = hop, now
                    return
            worker.queue.popleft()
            if self.record:
                self.out.depths.append(Depth(now, worker.index, len(worker.queue)))
            self._next_job(worker)
            job.open -= 1
            if not job.open:
                self._complete(job, now)

    def _computed(self, worker: Worker, now: float) -> None:
        """The worker has done its part on shared processors, however long that took."""
        worker.totals.busy_s += now - worker.since
        if self.record:
            assert worker.job is not None
            act = worker.acts[worker.pc - 1]
            self.out.slices.append(Slice(worker.index, worker.since, now, act.do, worker.job.number, act.split, -1))
        self._advance(worker, now)

    def _is_async_target(self, job: Running, hop: int) -> bool:
        return self.workers[job.timed.hops[hop].target].is_async

    def _send(self, worker: Worker, job: Running, hop: int, now: float, *, out: bool) -> None:
        hops = job.hops
        assert not hops[hop] & _SENT, "a transfer was sent twice"
        if out:
            job.open += 1  # the evaluation ends when the coordinator has it
        if out or (job.timed.buffered and self._is_async_target(job, hop)):
            hops[hop] |= _POSTED
        hops[hop] |= _SENT
        if hops[hop] & _POSTED:
            self._carry(job, hop, now, worker.index)

    def _post(self, worker: Worker, job: Running, now: float) -> None:
        """The receiver is ready for the transfer it has come to; with asynchronous copies for all of the split."""
        for act in worker.acts[worker.pc :]:
            if act.do == _WAIT and job.hops[act.hop] & _GONE:
                continue  # a loan that is back
            if act.do != _RECV:
                break
            if not job.hops[act.hop] & _POSTED:
                job.hops[act.hop] |= _POSTED
                if job.hops[act.hop] & _SENT:
                    self._carry(job, act.hop, now, worker.index)
            if not worker.is_async:
                break

    def _carry(self, job: Running, hop: int, now: float, by: int) -> None:
        spec = job.timed.hops[hop]
        self.net.submit(spec.route, spec.nbytes, now, job, hop, by, spec.slower)

    def _left(self, flow: Flow, now: float) -> None:
        """The last byte is on its way: the sender's loan is back."""
        job: Running = flow.job
        spec = job.timed.hops[flow.hop]
        job.hops[flow.hop] |= _GONE
        self._push(now + flow.latency + spec.extra_s, _ARRIVED, flow)
        sender = self.workers[spec.source]
        if sender.blocked == flow.hop and sender.job is job and sender.acts[sender.pc].do != _RECV:
            self._resume(sender, job, now)

    def _arrived(self, flow: Flow, now: float) -> None:
        job: Running = flow.job
        flow.arrived = now
        job.hops[flow.hop] |= _HERE
        if self.record:
            self.out.carried.append(
                Carried(flow.route, flow.ready, flow.start, flow.left, now, job.number, flow.hop, flow.by)
            )
        spec = job.timed.hops[flow.hop]
        if spec.target < 0:
            job.open -= 1
            if not job.open:
                self._complete(job, now)
            return
        receiver = self.workers[spec.target]
        if receiver.blocked == flow.hop and receiver.job is job and receiver.acts[receiver.pc].do == _RECV:
            self._resume(receiver, job, now)

    def _resume(self, worker: Worker, job: Running, now: float) -> None:
        """What the worker waited for has happened."""
        act, waited = worker.acts[worker.pc], now - worker.since
        assert waited >= 0.0, "causality"
        totals = worker.totals
        if act.do == _RECV:
            totals.recv_s += waited
        elif act.do == _SEND:
            totals.send_s += waited
        else:
            totals.wait_s += waited
        if self.record and waited > 0.0:
            self.out.slices.append(Slice(worker.index, worker.since, now, act.do, job.number, act.split, act.hop))
        worker.blocked = -1
        worker.pc += 1
        self._advance(worker, now)

    def _complete(self, job: Running, now: float) -> None:
        tally = self.out.tallies.get(job.tag)
        if tally is None:
            tally = self.out.tallies[job.tag] = Tally()
        tally.add(job.released, now)
        if self.record:
            self.out.jobs[job.number] = self.out.jobs[job.number]._replace(end=now)
        if self.check:
            assert not job.hops.strip(bytes([_POSTED | _SENT | _GONE | _HERE])), "a transfer is not accounted for"
        job.sequence.running -= 1
        self._release(job.sequence, now, job.number)

    def _finish(self, everything: Sequence[Evaluations], now: float, n_events: int) -> None:
        stuck = next((worker for worker in self.workers if worker.job is not None), None)
        if stuck is not None or any(sequence.running for sequence in everything):
            raise PlanError(f"the programs wait for each other for ever{_stuck(stuck)}")
        net, out = self.net, self.out
        out.end_s, out.n_events = now, n_events
        out.route_nbytes, out.route_busy_s, out.route_transfers = net.nbytes, net.busy_s, net.n_transfers
        if self.check:
            self._check(now)

    def _check(self, now: float) -> None:
        assert self.net.idle(), "bytes are still under way"
        net = self.net
        for route, sent, delivered, n in zip(
            self.fabric.routes, net.nbytes, net.delivered, net.n_transfers, strict=True
        ):
            slack = 1e-6 * max(1, sent) + n * route.bandwidth * CLOCK_EPS * now
            assert abs(sent - delivered) <= slack, "bytes in are not bytes out"
        slack = 1e-9 * max(1.0, now) + 1e-6 * now
        for totals in self.out.workers:
            spent = totals.busy_s + totals.recv_s + totals.send_s + totals.wait_s
            assert spent <= now + slack, "a worker was busy over 100 %"
        for busy in self.net.busy_s:
            assert busy <= now + slack, "a link was busy over 100 %"


def _stuck(worker: Worker | None) -> str:
    if worker is None or worker.job is None:
        return ""
    act = worker.acts[worker.pc]
    name = worker.job.timed.hops[act.hop].name if act.hop >= 0 else "?"
    return f": {worker.job.timed.name}: worker {worker.index} is at {Do(act.do).name} of {name!r}, split {act.split}"


def simulate(
    is_async: Sequence[bool],
    fabric: Fabric,
    programs: Sequence[Timed],
    sequences: Iterable[Iterable[Job]],
    *,
    seed: int = 0,
    check: bool = False,
    record: bool = False,
    demands: Demands = (),
) -> Timeline:
    """One simulation from start to end (see Engine)."""
    return Engine(is_async, fabric, seed=seed, check=check, record=record, demands=demands).run(programs, sequences)
