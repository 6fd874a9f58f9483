"""One evaluation of a planned graph as acts: copies before splits, nodes, waits, as ggml's scheduler issues them."""

from __future__ import annotations

from dataclasses import replace

from coordinator.graph.node import ABSENT, Tensor
from coordinator.ownership.actions import HOST, Do, Operand
from coordinator.ownership.facts import Finding, Kind
from coordinator.ownership.machine import Machine
from coordinator.ownership.shadow import finding
from coordinator.ownership.tenancy import Instance
from coordinator.schedule.plan import Device, Split
from protocol.ops import WRITES_ONLY, Flag, Op


def evaluate(machine: Machine, instance: Instance, *, asynchronous: bool = False) -> None:
    """Issue the acts of one evaluation, and wait for them unless `asynchronous`."""
    machine.take(instance)
    instance.evaluation += 1
    if instance.problem is not None:
        machine.note(instance.problem)
    if instance.is_homeless:
        why = f"a buffer that {instance.name} was planned in was replaced since: its tensors point to freed memory"
        machine.note(finding(Kind.STALE_PLAN, instance.name, why))
    _begin(machine, instance)
    copies = _copies(instance)
    previous: Split | None = None
    for number, split in enumerate(instance.plan.splits):
        _enter_split(machine, instance, number, copies, previous)
        for index in range(split.start, split.end):
            _node(machine, instance, number, index)
        previous = split
    if not asynchronous:
        machine.wait()


def _begin(machine: Machine, instance: Instance) -> None:
    """What the graph computes is unwritten again; its inputs are what the host set last."""
    graph = instance.graph
    for ident in (*graph.leafs, *graph.nodes):
        tensor = graph.tensors[ident]
        if tensor.view_src is None and tensor.buffer is None and ident not in instance.spec.borrows:
            operand = machine.operand(instance, ident)
            if operand is None:
                continue
            given = instance.set_contents.get(operand.key)
            if given is not None:
                machine.contents[operand.key] = given.copy()
            else:
                machine.contents.pop(operand.key, None)
    if instance.evaluation > 1:
        for ident, kept in instance.given.items():  # safe ownership: the host kept what it was given
            target = machine.operand(instance, ident)
            if target is not None:
                name = graph.tensors[ident].name
                machine.emit(
                    Do.COPY, tensor=f"{instance.name}.{name}", reads=(machine.reading(kept),), writes=(target,)
                )


def _copies(instance: Instance) -> dict[tuple[int, int], int]:
    """The copy of each (tensor, backend) that this plan's nodes read."""
    n = len(instance.graph.tensors)
    used = {s for row in instance.plan.sources for s in row if s >= n}
    return {(instance.plan.copies[c - n].tensor, instance.plan.copies[c - n].backend): c for c in sorted(used)}


def _enter_split(
    machine: Machine, instance: Instance, number: int, copies: dict[tuple[int, int], int], previous: Split | None
) -> None:
    plan = instance.plan
    split = plan.splits[number]
    device = plan.devices[split.backend].name
    if not split.inputs and previous is not None and previous.backend != split.backend:
        if "no-split-wait" not in machine.quirks:
            machine.wait(plan.devices[previous.backend].name)
        return
    for ident in split.inputs:
        tensor = instance.graph.tensors[ident]
        source, target = machine.operand(instance, ident), machine.operand(instance, copies[ident, split.backend])
        assert target is not None, tensor.name
        if source is None:
            continue
        owner = plan.devices[plan.backend[ident]].name
        agent = HOST
        after: tuple[int, ...] = ()
        if not machine.sequence.parallel or tensor.flags & Flag.INPUT or machine.agent(device) == HOST:
            machine.wait(device)  # no copy to a slot that is still read
        else:
            after = machine.last(device)  # with several copies the slot's event is waited for instead
        if not tensor.flags & Flag.INPUT:
            agent = _copier(machine, owner, device)
            if agent == HOST:
                machine.wait(owner)
        copy = machine.emit(
            Do.COPY, agent=agent, after=after, tensor=source.tensor, reads=(machine.reading(source),),
            writes=(target,), graph=instance.name, instance=instance.number, evaluation=instance.evaluation,
            split=number, device=device,
        )  # fmt: skip
        if agent not in (HOST, device):
            machine.hold(device, copy.number)


def _copier(machine: Machine, owner: str, device: str) -> str:
    """Who copies a tensor that is no INPUT: the queue that it lies on, the queue that fetches it from the host, or,
    when the receiver is the host itself, the host after waiting for its owner."""
    if machine.agent(device) == HOST:
        return HOST
    return device if machine.agent(owner) == HOST else owner


def _node(machine: Machine, instance: Instance, number: int, index: int) -> None:
    plan = instance.plan
    node = instance.graph.tensors[plan.graph.nodes[index]]
    ref = f"{instance.name}.{node.name}"
    device = plan.devices[plan.splits[number].backend]
    target = machine.operand(instance, node.id)
    if target is None:
        return
    if not node.is_view_op and node.op != Op.NONE and 0 not in node.ne:
        _compute(machine, instance, number, index, node, target)
    if machine.safe and ref in machine.wanted and not node.flags & Flag.INPUT and node.buffer is None:
        machine.keep(ref, target, agent=machine.agent(device.name), device=device.name)


def _compute(machine: Machine, instance: Instance, number: int, index: int, node: Tensor, target: Operand) -> None:
    plan = instance.plan
    device = plan.devices[plan.splits[number].backend]
    sources = plan.sources[index]
    reads = []
    for j, ident in enumerate(sources):
        if ident == ABSENT or (WRITES_ONLY.get(node.op) == j):
            continue
        operand = machine.operand(instance, ident)
        if operand is not None:
            reads.append(machine.reading(operand))
    written, problem = target, overflow(instance, target)
    if not _usable(device, target):
        written, problem = _redirected(machine, instance, index, node, target)
    facts = {
        "graph": instance.name, "instance": instance.number, "evaluation": instance.evaluation, "split": number,
        "node": index, "device": device.name, "tensor": target.tensor,
    }  # fmt: skip
    agent = machine.agent(device.name)
    machine.emit(
        Do.NODE, agent=agent, op=node.op.name, params=node.params, reads=tuple(reads), writes=(written,),
        problem=problem, **facts,
    )  # fmt: skip
    if machine.safe and written is not target:  # the result is copied back to where it belongs
        machine.emit(Do.COPY, agent=agent, reads=(machine.reading(written),), writes=(target,), **facts)


def _usable(device: Device, operand: Operand) -> bool:
    return operand.region.buft in ((device.buft or device.name), *device.extra_bufts)


def _redirected(
    machine: Machine, instance: Instance, index: int, node: Tensor, target: Operand
) -> tuple[Operand, Finding | None]:
    """A result that lies in memory which the device cannot use goes to the device's copy of what it is a view of."""
    n = len(instance.graph.tensors)
    for ident in instance.plan.sources[index]:
        if ident < n:
            continue
        seen = instance.graph.tensors[instance.plan.copies[ident - n].tensor]
        root = seen.id if seen.view_src is None else seen.view_src
        if root == node.view_src:
            copy = machine.operand(instance, ident)
            assert copy is not None, node.name
            start = copy.start + node.view_offs - seen.view_offs
            if machine.safe:
                return replace(copy, start=start, end=start + node.nbytes), None
            why = f"{node.op.name} writes to a copy of {seen.name} on {copy.region.buft}, which is never copied back"
            written = replace(
                target, region=copy.region, start=start, end=start + node.nbytes, base=start - node.view_offs
            )
            return written, finding(Kind.LOST_WRITE, target.tensor, why, extent=copy.extent)
    why = f"{node.op.name} writes to the {target.region.label}, which its device cannot use"
    return target, finding(Kind.LOST_WRITE, target.tensor, why, extent=target.extent)


def overflow(instance: Instance, target: Operand) -> Finding | None:
    """The hazard of a tensor that ends behind its chunk, or None."""
    for region, first, size in instance.chunks.values():
        if target.region == region and first <= target.start < first + size < target.end:
            why = f"ends at byte {target.end - first} of a chunk of {size}: the buffer was not replaced"
            return finding(Kind.OVERFLOW, target.tensor, why, extent=target.extent, epoch=target.epoch)
    return None
