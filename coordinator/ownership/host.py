"""The host's own acts: allocate, set, copy, keep handles, read; walks a whole program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from coordinator.ownership.actions import Do, Operand, Region
from coordinator.ownership.evaluation import evaluate, overflow
from coordinator.ownership.facts import Access, Finding, Kind
from coordinator.ownership.machine import Machine
from coordinator.ownership.sequence import Sequence, Step
from coordinator.ownership.shadow import finding
from coordinator.ownership.tenancy import Instance
from protocol.errors import InputError, PlanError
from protocol.ops import Flag

HOST_NBYTES = 256
"""Bytes of a host buffer whose size nothing says."""


@dataclass(slots=True)
class State:
    """A fact that the host remembers; `lives` as long as a call or a sequence."""

    value: float
    lives: str
    dropped: bool = False


@dataclass(slots=True)
class Program:
    """A program that is being walked."""

    machine: Machine
    states: dict[str, State] = field(default_factory=dict)
    buffers: dict[str, Operand] = field(default_factory=dict)
    refused: Finding | None = None


def walk(sequence: Sequence, *, safe: bool = False) -> Machine:
    """All acts and findings of a program. A graph that cannot be planned ends it, as a finding.

    Raises InputError for steps that name what does not exist, PlanError for graphs that no ggml could plan.
    """
    program = Program(Machine(sequence, safe=safe))
    for number, step in enumerate(sequence.steps):
        program.machine.step = number
        act = ACTS.get(step.do)
        if act is None:
            raise InputError(f"step {number}: unknown act {step.do!r}: expected {', '.join(ACTS)}")
        act(program, step)
        if program.refused is not None:
            break
    return program.machine


def _allocate(p: Program, step: Step) -> None:
    m, name = p.machine, step.graph
    if step.state:
        name = _choose(p, step)
    try:
        instance = m.adopt(name, step.reuse) if step.reuse else m.allocate(name, step.on)
    except PlanError as error:
        if "cannot run" not in str(error):
            raise
        p.refused = finding(Kind.CANNOT_RUN, _named(str(error), name), str(error))
        m.emit(Do.CRASH, tensor=name, problem=p.refused)
        return
    m.instances[step.graph] = instance


def _choose(p: Program, step: Step) -> str:
    """The graph that a remembered fact asks for."""
    state = p.states.get(step.state)
    if state is None:
        raise InputError(f"step {p.machine.step}: no state {step.state!r} was set")
    if not state.dropped:
        return step.graph if state.value else step.otherwise
    reader = Access("allocate", step.state, step.otherwise, 0, -1, -1, "", p.machine.step, 0, None)
    why = f"{step.state} lived for one call and was gone: {step.otherwise} is evaluated instead of {step.graph}"
    p.machine.note(finding(Kind.LOST_STATE, step.state, why, reader=reader))
    return step.otherwise


def _reserve(p: Program, step: Step) -> None:
    p.machine.reserve(step.graph, step.on)


def _compute(p: Program, step: Step) -> None:
    evaluate(p.machine, _instance(p, step.graph), asynchronous=step.asynchronous)


def _set(p: Program, step: Step) -> None:
    instance, ident, target = _input(p, step)
    if target is not None:
        _fill(p, instance, ident, target, step, Do.SET, ())


def _copy(p: Program, step: Step) -> None:
    m = p.machine
    source = m.reading(m.resolve(step.source))
    instance, ident, target = _input(p, step)
    if target is not None:
        _fill(p, instance, ident, target, step, Do.COPY, (source,))


def _upload(p: Program, step: Step) -> None:
    """The device fetches from host memory when it comes to it."""
    m = p.machine
    instance, ident, target = _input(p, step)
    if target is None:
        return
    source = m.reading(replace(_buffer(p, step.source), end=target.end - target.start))
    device = instance.plan.devices[instance.plan.backend[ident]].name
    m.emit(Do.COPY, agent=m.agent(device), device=device, tensor=source.tensor, reads=(source,), writes=(target,))
    instance.set_contents[target.key] = m.contents[target.key].copy()


def _fill(
    p: Program, instance: Instance, ident: int, target: Operand, step: Step, do: Do, reads: tuple[Operand, ...]
) -> None:
    m = p.machine
    problem = overflow(instance, target)
    m.emit(do, tensor=step.tensor, reads=reads, writes=(target,), value=step.value, problem=problem)
    instance.set_contents[target.key] = m.contents[target.key].copy()
    if m.safe and target.region.kind == "compute":
        kept = m.own_memory(f"{instance.name}.{instance.graph.tensors[ident].name}", target)
        m.emit(do, tensor=step.tensor, reads=reads, writes=(kept,), value=step.value)
        instance.given[ident] = kept
        m.redirect[kept.region.owner] = kept


def _input(p: Program, step: Step) -> tuple[Instance, int, Operand | None]:
    """The tensor that the host fills, and where; nowhere for one that no node uses."""
    m = p.machine
    name, _, tensor = step.tensor.partition(".")
    instance = _instance(p, name)
    ident = instance.graph.by_name.get(tensor)
    if ident is None:
        raise InputError(f"step {m.step}: graph {name!r} has no tensor {tensor!r}")
    if instance.graph.tensors[ident].flags & Flag.INPUT:
        m.take(instance)
    target = m.operand(instance, ident)
    if target is None:
        _set_nowhere(p, step, instance, ident)
    elif step.copy is not None and not m.safe:
        target = _copy_slot(m, instance, ident, step.copy, target)
    return instance, ident, target


def _set_nowhere(p: Program, step: Step, instance: Instance, ident: int) -> None:
    """An input that no node uses has no memory: writing to it crashes; safe ownership gives it some."""
    m, tensor = p.machine, instance.graph.tensors[ident]
    if m.safe:
        region = Region("kept", step.tensor)
        own = Operand(region, 0, tensor.nbytes, step.tensor, ("kept", step.tensor, "", 0))
        m.emit(Do.SET, tensor=step.tensor, writes=(own,), value=step.value)
        m.redirect[step.tensor] = own
        return
    why = f"no node uses {tensor.name}: it was never allocated, setting it writes to nowhere"
    m.emit(Do.CRASH, tensor=step.tensor, problem=finding(Kind.UNPLACED_INPUT, step.tensor, why))


def _copy_slot(m: Machine, instance: Instance, ident: int, index: int, target: Operand) -> Operand:
    """The memory of copy `index` of an input, where the host believes that the plan reads it."""
    plan, n = instance.plan, len(instance.graph.tensors)
    for k, copy in enumerate(plan.copies):
        if copy.tensor == ident and copy.backend == plan.backend[ident] and copy.index == index:
            slot = m.operand(instance, n + k)
            assert slot is not None, copy.name
            return replace(target, region=slot.region, start=slot.start, end=slot.end, base=slot.start)
    return target


def _host(p: Program, step: Step) -> None:
    whole = _buffer(p, step.tensor)
    p.machine.emit(Do.SET, tensor=whole.tensor, writes=(whole,), value=step.value)


def _buffer(p: Program, name: str) -> Operand:
    region = Region("host", name)
    return Operand(region, 0, HOST_NBYTES, f"host.{name}", ("host", name, "", 0))


def _read(p: Program, step: Step) -> None:
    m = p.machine
    m.emit(Do.READ, tensor=step.tensor, reads=(m.reading(m.resolve(step.tensor)),), right=step.right)


def _pointer(p: Program, step: Step) -> None:
    """Remember where a tensor lies, and what it holds now."""
    m = p.machine
    now = m.resolve(step.tensor)
    if m.safe:
        m.keep(step.name, now)
        return
    m.redirect[step.name] = replace(m.reading(now), traits=now.traits | {"handle"})


def _keep(p: Program, step: Step) -> None:
    p.machine.keep(step.name or step.tensor, p.machine.resolve(step.tensor))


def _sync(p: Program, step: Step) -> None:
    p.machine.wait(step.device)


def _state(p: Program, step: Step) -> None:
    p.states[step.name] = State(step.value, step.lives)


def _end_call(p: Program, step: Step) -> None:
    for state in p.states.values():
        state.dropped = state.dropped or (state.lives == "call" and not p.machine.safe)


def _instance(p: Program, name: str) -> Instance:
    if name not in p.machine.instances:
        raise InputError(f"step {p.machine.step}: graph {name!r} has not been allocated")
    return p.machine.instances[name]


def _named(message: str, default: str) -> str:
    """The tensor that the scheduler's message quotes."""
    return message.split("(")[1].split(")")[0] if "(" in message else default


ACTS: dict[str, Callable[[Program, Step], None]] = {
    "allocate": _allocate,
    "reserve": _reserve,
    "set": _set,
    "copy": _copy,
    "upload": _upload,
    "host": _host,
    "compute": _compute,
    "read": _read,
    "pointer": _pointer,
    "keep": _keep,
    "sync": _sync,
    "state": _state,
    "end_call": _end_call,
}
"""What a step may do."""
