"""Programs: every handed-over byte is sent once, received before use, and never overwritten while on loan."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from coordinator.graph.build import Builder
from coordinator.graph.node import BufferRef, Graph, Tensor
from coordinator.schedule.links import sent_bytes
from coordinator.schedule.lower import Home, Keep, Lowered, lower
from coordinator.schedule.plan import Device
from coordinator.schedule.scheduler import Scheduler
from protocol.dtypes import DType
from protocol.errors import PlanError
from protocol.ops import Usage
from protocol.program import Kind

DEVICES = (Device("accel0", buft="accel0", alignment=128), Device("cpu0", kind="cpu", buft="cpu0", is_host=True))
WORKER = {"accel0": 0, "cpu0": 1}


@dataclass
class Homes:
    """Residents in arena 1 of their worker, compute chunks in arena 2 and up."""

    def resident(self, tensor: Tensor) -> Home:
        assert tensor.buffer is not None
        return Home(WORKER[tensor.buffer.buft], 1, 4096 * tensor.id)

    def compute(self, buft: str, chunk: int) -> Home:
        return Home(WORKER[buft], 2 + chunk, 0)


def new_builder() -> Builder:
    return Builder({}, lambda name: BufferRef(name.split(".")[0], Usage.ANY))


def product(b: Builder, device: str, x: Tensor) -> Tensor:
    """x times a matrix that lies on `device`."""
    return b.mul_mat(b.resident(f"{device}.w", DType.F32, 64, 64), x)


def ladder(steps: int) -> Graph:
    """Matrix products that alternate between the accelerator and the host."""
    b = new_builder()
    x = b.input("x", DType.F32, 64, 4)
    for i in range(steps):
        x = b.add(product(b, "cpu0" if i % 2 else "accel0", x), x)
    return finish(b, x)


def forks(branches: int) -> Graph:
    """Branches that begin on the accelerator and end on the host, and need nothing of one another.

    Nothing but a loan keeps the accelerator, free to go on, from reusing what the host has not taken yet.
    """
    b = new_builder()
    x = b.input("x", DType.F32, 64, 4)
    ends = []
    for _ in range(branches):
        ends.append(product(b, "cpu0", product(b, "accel0", product(b, "accel0", x))))
        b.expand(ends[-1])
    total = ends[0]
    for end in ends[1:]:
        total = b.add(total, end)
    return finish(b, total)


def finish(b: Builder, y: Tensor) -> Graph:
    b.expand(b.output(b.name(y, "y")))
    graph = b.graph("test")
    weights = tuple(
        Tensor(t.id, t.name, t.dtype, t.ne, t.nb, buffer=BufferRef(t.buffer.buft, Usage.WEIGHTS)) if t.buffer else t
        for t in graph.tensors
    )
    return Graph(graph.name, weights, graph.expand, graph.nodes, graph.leafs, graph.pins, graph.by_name)


def lowered(steps: int, **options: object) -> Lowered:
    return lowered_graph(ladder(steps), **options)


def lowered_graph(graph: Graph, **options: object) -> Lowered:
    return lower(Scheduler(DEVICES).allocate(graph), Homes(), outputs=("y",), **options)  # type: ignore[arg-type]


def replay(program_set: Lowered) -> None:
    """Run the programs' bookkeeping: who lends what, who writes where. Fails on a write into lent bytes."""
    position = [0] * len(program_set.programs)
    published: set[int] = set()
    acknowledged: set[int] = set()
    lent: dict[int, tuple[int, int, int, int]] = {}

    def written(worker: int, arena: int, start: int, nbytes: int) -> None:
        for transfer, (owner, of, first, last) in lent.items():
            clash = (owner, of) == (worker, arena) and first < start + nbytes and start < last
            assert not clash or transfer in acknowledged, f"transfer {transfer} overwritten while on loan"

    moved = True
    while moved:
        moved = False
        for worker, program in enumerate(program_set.programs):
            while position[worker] < len(program.instructions):
                item = program.instructions[position[worker]]
                if item.kind is Kind.RECV and item.transfer not in published:
                    break
                if item.kind is Kind.WAIT and item.transfer not in acknowledged:
                    break
                if item.kind is Kind.SEND:
                    published.add(item.transfer)
                    lent[item.transfer] = (worker, item.arena, item.offset, item.offset + item.nbytes)
                elif item.kind is Kind.RECV:
                    written(worker, item.arena, item.offset, item.nbytes)
                    acknowledged.add(item.transfer)
                elif item.kind is Kind.RUN:
                    for op in program.ops[item.first : item.last]:
                        written(worker, op.dst.arena, op.dst.offset, op.dst.span)
                position[worker] += 1
                moved = True
    assert position == [len(p.instructions) for p in program_set.programs], "the programs wait for each other"
    assert published == acknowledged == {t.number for t in program_set.transfers}


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 21])
def test_programs_end_and_respect_loans(steps: int) -> None:
    result = lowered(steps)
    replay(result)
    assert len(result.transfers) == sum(len(split.inputs) for split in result.plan.splits)


@pytest.mark.parametrize("branches", [3, 7, 12])
def test_lent_bytes_are_waited_for_before_they_are_overwritten(branches: int) -> None:
    result = lowered_graph(forks(branches))
    replay(result)
    last_run = max(i for i, item in enumerate(result.programs[0].instructions) if item.kind is Kind.RUN)
    waits = [i for i, item in enumerate(result.programs[0].instructions) if item.kind is Kind.WAIT]
    assert min(waits) < last_run, "no memory was reused: the graph tests nothing"


def test_every_loan_is_waited_for() -> None:
    for worker, program in enumerate(lowered(5).programs):
        sent = {i.transfer for i in program.instructions if i.kind is Kind.SEND}
        waited = {i.transfer for i in program.instructions if i.kind is Kind.WAIT}
        assert sent == waited, worker


def test_ops_are_those_of_the_graph_without_views() -> None:
    result = lowered(4)
    nodes = sorted(op.node for program in result.programs for op in program.ops)
    graph = result.plan.graph
    assert nodes == [i for i, ident in enumerate(graph.nodes) if not graph.tensors[ident].is_view_op]


def test_ports_and_links() -> None:
    result = lowered(2)
    assert [port.name for program in result.programs for port in program.inputs] == ["x"]
    assert [port.nbytes for program in result.programs for port in program.outputs] == [64 * 4 * 4]
    assert sum(sent_bytes(result).values()) == sum(t.nbytes for t in result.transfers)


def test_keep_must_be_on_the_tensors_worker() -> None:
    owner = next(i for i, program in enumerate(lowered(1).programs) if program.outputs)
    kept = lowered(1, keeps=(Keep("y", Home(owner, 7, 0)),))
    assert kept.programs[owner].instructions[-1].arena == 7 or any(
        i.arena == 7 for i in kept.programs[owner].instructions
    )
    with pytest.raises(PlanError, match="another worker"):
        lowered(1, keeps=(Keep("y", Home(1 - owner, 7, 0)),))
