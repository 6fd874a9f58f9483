"""Turns a host program into acts on memory, in program order, as ggml would carry it out or with safe ownership."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from coordinator.graph.node import BufferRef
from coordinator.ownership.actions import HOST, Action, Do, Key, Operand, Region
from coordinator.ownership.facts import Finding, Kind
from coordinator.ownership.lifetimes import identity, released, topology
from coordinator.ownership.order import Order
from coordinator.ownership.sequence import GraphSpec, Sequence
from coordinator.ownership.shadow import Shadow, finding
from coordinator.ownership.tenancy import Dock, Instance, chunks_of, difference, traits_of
from coordinator.schedule.check import check_plan
from coordinator.schedule.plan import Place, Plan
from coordinator.schedule.runs import Run, Runs
from coordinator.schedule.scheduler import Scheduler
from protocol.errors import InputError, PlanError
from protocol.ops import Usage


class Machine:
    """Memory, schedulers and acts of one program; lives as long as it takes to walk it.

    `actions` are the acts so far, `plans` those of every allocation, `findings` the hazards that show in program order
    or because nothing orders two acts.
    With `safe`, tensors that are read after their graph get memory of their own, inputs are set again before each
    evaluation, whoever overwrites waits for readers, and plans are used for their own graph alone.
    """

    def __init__(self, sequence: Sequence, *, safe: bool = False) -> None:
        self.sequence, self.safe = sequence, safe
        self.quirks = frozenset() if safe else sequence.quirks
        self.actions: list[Action] = []
        self.findings: list[Finding] = []
        self.plans: list[Plan] = []
        self.reallocations = 0
        self.step = 0
        self.docks: dict[str, Dock] = {}
        self.instances: dict[str, Instance] = {}
        self.contents: defaultdict[Key, Runs] = defaultdict(Runs)
        self.redirect: dict[str, Operand] = {}
        self.shared_places: dict[str, tuple[Region, int]] = {}
        self.wanted = _outliving(sequence)
        self._order = Order(sequence.queues)
        self._shadow = Shadow(self.actions)
        self._loaded: dict[Region, int] = {}
        self._held: dict[str, tuple[int, ...]] = {}
        self._n_instances = 0

    # -- acts

    def emit(self, do: Do, **facts: Any) -> Action:
        """Issue an act: waits are added in safe ownership, hazards noted otherwise."""
        agent = facts.pop("agent", HOST)
        held = self._held.pop(agent, ())
        action = Action(len(self.actions), do, agent, self.step, **facts)
        action = replace(action, after=(*action.after, *held)) if held else action
        conflicts = self._order.conflicts(action)
        if conflicts and self.safe:
            if action.agent == HOST:
                for queue in dict.fromkeys(self.actions[c.earlier].agent for c in conflicts):
                    self.wait(queue)
                action = replace(action, number=len(self.actions))
            else:
                action = replace(action, after=(*action.after, *(c.earlier for c in conflicts)))
            conflicts = []
        self._order.enter(action)
        self.actions.append(action)
        self.findings += self._shadow.apply(action)
        self.findings += [self._shadow.conflict(action, c) for c in conflicts]
        for w in action.writes:
            self.contents[w.key].write(w.start - w.base, w.end - w.base, action.number)
        return action

    def wait(self, queue: str = "") -> None:
        """The host waits for a device, or for all."""
        for device in [queue] if queue else sorted(self.sequence.queues):
            if device in self.sequence.queues:
                self.emit(Do.WAIT, device=device)

    def last(self, device: str) -> tuple[int, ...]:
        """The last act on a device's queue."""
        return self._order.last(device) if device in self.sequence.queues else ()

    def hold(self, queue: str, act: int) -> None:
        """The next act on a queue waits for `act` on another."""
        self._held[queue] = (*self._held.get(queue, ()), act)

    def agent(self, device: str) -> str:
        """Who computes for a device: itself, or the host."""
        return device if device in self.sequence.queues else HOST

    def note(self, problem: Finding) -> None:
        """A hazard that no byte shows happens here."""
        self.emit(Do.NOTE, problem=problem)

    # -- schedulers

    def dock(self, name: str) -> Dock:
        """A scheduler by name, made when it is first used."""
        if name not in self.docks:
            self.docks[name] = Dock(name, self._scheduler())
        return self.docks[name]

    def _scheduler(self) -> Scheduler:
        s = self.sequence
        return Scheduler(s.devices, parallel=s.parallel, op_offload=s.op_offload)

    def take(self, instance: Instance) -> None:
        """The graph takes over its scheduler's memory, if another had it; planned again when safe and it is gone."""
        if self.safe and instance.is_homeless:
            instance.plan = self._planned(instance.dock, instance.spec)
            instance.chunks = chunks_of(instance.dock)
            instance.evaluation += 1  # what was set before is set again
        if instance.dock.tenant != instance.number:
            instance.dock.tenant = instance.number
            instance.dock.epoch += 1

    def allocate(self, name: str, on: str) -> Instance:
        """Plan a graph. Raises PlanError as the scheduler does."""
        dock, spec = self.dock(on), self._spec(name)
        plan = self._planned(dock, spec)
        stale = dock.reserved_by != topology(spec.graph)
        dock.epoch += 1
        instance = Instance(self._n_instances, name, spec, plan, dock, chunks_of(dock), released(plan), stale)
        dock.tenant = instance.number
        self._n_instances += 1
        self.instances[name] = instance
        for ident, ref in spec.shared.items():
            self._share(instance, ident, ref)
        return instance

    def _planned(self, dock: Dock, spec: GraphSpec) -> Plan:
        """A plan on a scheduler whose buffers are as the plan needs them."""
        before = dock.scheduler.buffer_sizes
        plan = dock.scheduler.allocate(spec.graph)
        kind = topology(spec.graph)
        self.reallocations += plan.reallocated
        if plan.reallocated:
            self._note_cost(spec.graph.name, dock, kind, before == plan.buffer_sizes)
            dock.reserved_by = kind
            self.wait()
        if self.safe and dock.reserved_by != kind:
            plan = self._plan_own(dock, spec, plan)
            dock.reserved_by = kind
        self.plans.append(plan)
        dock.seen.add(kind)
        self._resize(dock, plan.buffer_sizes)
        return plan

    def _plan_own(self, dock: Dock, spec: GraphSpec, plan: Plan) -> Plan:
        """The plan, or one made for this very graph where places of another do not do."""
        try:
            check_plan(plan)
        except PlanError:
            dock.scheduler = self._scheduler()
            return dock.scheduler.allocate(spec.graph)
        return plan

    def reserve(self, name: str, on: str) -> None:
        """Size buffers for a graph."""
        dock, spec = self.dock(on), self._spec(name)
        graph = spec.graph
        if "reserve-drops-pins" in self.quirks and graph.pins:
            dock.dropped.add(topology(graph))
            graph = replace(graph, pins=())
        if "reserve-in-flight" not in self.quirks and not self.safe:
            self.wait()
        sizes = dock.scheduler.reserve(graph)
        dock.reserved_by = topology(graph)
        if sizes != dock.sizes:
            self._resize(dock, sizes)
            dock.epoch += 1
            dock.tenant = -1

    def _note_cost(self, name: str, dock: Dock, kind: tuple[object, ...], same_size: bool) -> None:
        if kind in dock.dropped:
            why = f"reserve planned {name} without its pins: each allocation finds other buffers and reserves again"
            self.findings.append(finding(Kind.DROPPED_PINS, name, why))
        elif kind in dock.seen and same_size:
            why = f"{name} has the topology of a graph before it and needs no more bytes, but lies elsewhere"
            self.findings.append(finding(Kind.NEEDLESS_REALLOC, name, why))

    def _resize(self, dock: Dock, sizes: dict[str, tuple[int, ...]]) -> None:
        """Replace the buffers that changed: their contents are lost."""
        for buft, size in sizes.items():
            old = dock.sizes.get(buft, ())
            if size == old or ("grow-by-total" in self.quirks and sum(size) <= sum(old)):
                continue
            generation = dock.generations.get(buft, 0)
            if old:
                region = Region("compute", dock.name, buft, generation)
                key = ("freed", dock.name, buft, generation)
                whole = Operand(region, 0, sum(old), f"{buft} compute buffer", key, epoch=dock.epoch + 1)
                self.emit(Do.FREE, tensor=f"the {buft} compute buffer", writes=(whole,))
            dock.generations[buft] = generation + 1
            dock.sizes[buft] = size

    def _spec(self, name: str) -> GraphSpec:
        """The graph with what it borrows in place, and what it shares in memory of its own when safe."""
        if name not in self.sequence.graphs:
            raise InputError(f"step {self.step}: unknown graph {name!r}: expected {', '.join(self.sequence.graphs)}")
        spec = self.sequence.graphs[name]
        tensors = list(spec.graph.tensors)
        for ident, ref in spec.borrows.items():
            if ref in self.redirect or ref.partition(".")[0] in self.instances:  # else only reserved, before its time
                buft = self.resolve(ref).region.buft
                tensors[ident] = replace(tensors[ident], buffer=BufferRef(buft, Usage.COMPUTE))
        shared = spec.shared
        if self.safe:
            host = self.sequence.devices[-1]
            for ident, ref in shared.items():
                own = BufferRef(host.buft or host.name, Usage.ANY)
                tensors[ident] = replace(tensors[ident], name=f"shared {ref}", buffer=own)
            shared = {}
        graph = replace(spec.graph, tensors=tuple(tensors))
        return replace(spec, graph=graph, shared=shared)

    def _share(self, instance: Instance, ident: int, ref: str) -> None:
        """The tensor lies where the last graph that has it was planned, for all of them."""
        place = instance.plan.places[ident]
        if place is not None and place.chunk is not None and place.offset is not None:
            region, first, _ = instance.chunks[place.buft, place.chunk]
            self.shared_places[ref] = (region, first + place.offset)

    def adopt(self, name: str, other: str) -> Instance:
        """Use the plan of graph `other` for `name`; a different graph is a hazard that shows when it is evaluated."""
        old, spec = self.instances[other], self._spec(name)
        if identity(spec.graph) != identity(old.graph):
            if self.safe:
                return self.allocate(name, old.dock.name)
            why = f"the plan of {other} is used for {name}: the shapes are the same, what it reads is not"
            old.problem = finding(Kind.STALE_PLAN, difference(name, spec.graph, old.graph), why)
        else:
            old.problem = None
        self.instances[name] = old
        return old

    # -- tensors

    def resolve(self, ref: str) -> Operand:
        """A tensor by `graph.tensor`, or a handle or kept tensor by its name. Raises InputError."""
        if ref in self.redirect:
            return self.redirect[ref]
        name, _, tensor = ref.partition(".")
        instance = self.instances.get(name)
        if instance is None:
            raise InputError(f"step {self.step}: {ref!r} names no allocated graph and no handle")
        if tensor not in instance.graph.by_name:
            raise InputError(f"step {self.step}: graph {name!r} has no tensor {tensor!r}")
        operand = self.operand(instance, instance.graph.by_name[tensor])
        if operand is None:
            raise InputError(f"step {self.step}: {ref!r} has no memory: nothing allocated it")
        return operand

    def operand(self, instance: Instance, ident: int) -> Operand | None:
        """A tensor or copy in memory as it is now; None when it has none."""
        graph, n = instance.graph, len(instance.graph.tensors)
        if ident >= n:
            copy = instance.plan.copies[ident - n]
            key = ("copy", instance.name, copy.name, instance.number)
            traits = frozenset({"stale-plan"} if instance.stale else ())
            size = graph.tensors[copy.tensor].nbytes
            return self._placed(instance, copy.place, size, f"{instance.name}.{copy.name}", key, 0, traits)
        tensor = graph.tensors[ident]
        root = tensor if tensor.view_src is None else graph.tensors[tensor.view_src]
        label, size, offs = f"{instance.name}.{tensor.name}", tensor.nbytes, tensor.view_offs
        if root.id in instance.spec.borrows:
            base = self.resolve(instance.spec.borrows[root.id])
            return replace(base, start=base.start + offs, end=base.start + offs + size)
        traits = traits_of(instance, ident)
        if root.id in instance.spec.shared:
            ref = instance.spec.shared[root.id]
            region, start = self.shared_places[ref]
            key = ("shared", ref, "", 0)
            epoch = instance.dock.epoch
            return Operand(region, start + offs, start + offs + size, label, key, start, epoch, traits=traits)
        if root.buffer is not None:
            region = Region("resident", root.name, root.buffer.buft)
            whole = Operand(region, 0, root.nbytes, root.name, ("resident", root.name, root.buffer.buft, 0))
            have = self._loaded.get(region, 0)
            if have < root.nbytes:  # another graph may know a longer part of it
                self._loaded[region] = root.nbytes
                value = instance.spec.values.get(root.id, 0.0)
                self.emit(Do.LOAD, tensor=root.name, writes=(replace(whole, start=have),), value=value)
            return replace(whole, start=offs, end=offs + size, tensor=label, traits=traits)
        place = instance.plan.places[root.id]
        if place is None or place.offset is None:
            return None
        if root.id in instance.spec.places and not self.safe:
            place = replace(place, offset=instance.spec.places[root.id])
        key = ("tensor", instance.name, root.name, instance.number << 32 | root.id)
        return self._placed(instance, place, size, label, key, offs, traits)

    def _placed(
        self, instance: Instance, place: Place, size: int, label: str, key: Key, offs: int, traits: frozenset[str]
    ) -> Operand:
        assert place.chunk is not None, label
        assert place.offset is not None, label
        region, first, _ = instance.chunks[place.buft, place.chunk]
        base = first + place.offset
        return Operand(region, base + offs, base + offs + size, label, key, base, instance.dock.epoch, (), traits)

    def reading(self, operand: Operand) -> Operand:
        """The operand with who should have written it, in program order."""
        start = operand.base
        runs = self.contents[operand.key].read(operand.start - start, operand.end - start)
        wants: tuple[Run, ...] = tuple((a + start, b + start, who) for a, b, who in runs)
        if "handle" in operand.traits:  # wants what was there when the handle was taken
            wants = operand.wants or wants
        epoch = self.docks[operand.region.owner].epoch if operand.region.kind == "compute" else 0
        return replace(operand, wants=wants, epoch=epoch)

    def own_memory(self, ref: str, like: Operand) -> Operand:
        """Memory outside all buffers for a tensor, on the side where it lies."""
        region = Region("kept", ref, like.region.buft)
        return Operand(region, 0, like.end - like.start, ref, ("kept", ref, "", 0))

    def keep(self, ref: str, source: Operand, **facts: Any) -> None:
        """Copy a tensor to memory of its own; whoever asks for it from now on gets that."""
        target = self.own_memory(ref, source)
        self.emit(Do.COPY, tensor=source.tensor, reads=(self.reading(source),), writes=(target,), **facts)
        self.redirect[ref] = target


def _outliving(sequence: Sequence) -> frozenset[str]:
    """Tensors that the host or another graph reads after the graph that makes them."""
    refs = {s.tensor for s in sequence.steps if s.do in ("read", "pointer")}
    refs |= {s.source for s in sequence.steps if s.do == "copy"}
    refs |= {ref for spec in sequence.graphs.values() for ref in spec.borrows.values()}
    return frozenset(refs)
