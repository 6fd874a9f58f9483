"""Plans for programs: the facts of the tables (`--json`), and the stages of planning (`--dump`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.graph.node import Tensor
from coordinator.model.hparams import ModelParams
from coordinator.report.plan_why import because, first_node
from coordinator.schedule.diff import Diff
from coordinator.schedule.document import dump_document, plan_result
from coordinator.schedule.fit import Fit
from coordinator.schedule.links import copied_bytes
from coordinator.schedule.outline import DeviceMemory, Outline, Planned, allocator_nodes
from coordinator.schedule.plan import Plan
from protocol.ops import Flag

Json = dict[str, Any]

STAGES = {
    "assign": ("nodes", "leafs", "backend", "cause"),
    "splits": ("n_splits", "splits", "nodes"),
    "alloc": ("offsets", "copies", "buffer_sizes", "reallocated"),
}
"""What `--dump STAGE` keeps of a plan's document."""


def outline_document(outline: Outline, params: ModelParams | None) -> Json:
    """Everything that the tables say."""
    return {
        "model": None if params is None else {"name": params.name, "arch": params.arch},
        "devices": [
            {"name": d.name, "type": d.kind, "buft": d.buft or d.name, "alignment": d.alignment}
            for d in outline.devices
        ],
        "layers": layers_by_device(outline),
        "graphs": [_graph(graph) for graph in outline.graphs],
        "memory": [_memory(memory) for memory in outline.memory],
    }


def layers_by_device(outline: Outline) -> dict[str, list[int | str]]:
    """Layer numbers, and "output", by device name; empty without a model."""
    layers: dict[str, list[int | str]] = {}
    if outline.placement is not None:
        *numbered, output = outline.placement.layers
        for layer, device in enumerate(numbered):
            layers.setdefault(outline.devices[device].name, []).append(layer)
        layers.setdefault(outline.devices[output].name, []).append("output")
    return layers


def fit_document(found: Fit, params: ModelParams) -> Json:
    """The answer of `--fit`, and the outline that proves it."""
    return {
        "n_gpu_layers": found.n_gpu_layers,
        "tensor_split": list(found.tensor_split),
        "plans_tried": found.n_planned,
        "exhaustive": found.exhaustive,
        **outline_document(found.outline, params),
    }


def diff_document(difference: Diff) -> Json:
    """What changed between two plans."""
    return {
        "moved": [
            {"purpose": m.purpose, "from": m.source, "to": m.target, "tensors": list(m.names), "bytes": m.nbytes}
            for m in difference.moved
        ],
        "graphs": [
            {
                "name": graph.name,
                "nodes": list(graph.n_nodes),
                "splits": list(graph.n_splits),
                "moved": [{"from": a, "to": b, "nodes": n} for (a, b), n in graph.moved.items()],
                "links": [{"from": a, "to": b, "bytes": list(pair)} for (a, b), pair in graph.links.items()],
            }
            for graph in difference.graphs
        ],
        "memory": {
            device: {part: list(pair) for part, pair in parts.items()} for device, parts in difference.memory.items()
        },
    }


def planned_result(graph: Planned, ids: Sequence[int]) -> Json:
    """The result for one graph of a document, under the document's `ids`."""
    if graph.plan is not None:
        return plan_result(graph.plan, ids)
    return {"n_splits": graph.n_splits, "buffer_sizes": {b: sum(chunks) for b, chunks in graph.buffer_sizes.items()}}


def dump_stage(outline: Outline, stage: str) -> Json | list[Json]:
    """The document of one stage: `graph` is the input of `--graph`, the others one entry per graph."""
    plans = [graph.plan for graph in outline.graphs if graph.plan is not None]
    if stage == "graph":
        return dump_document(
            outline.devices, [plan.graph for plan in plans], parallel=outline.parallel, op_offload=outline.op_offload
        )
    documents = [plan_result(plan) for plan in plans]
    if stage == "plan":
        return documents
    return [{key: document[key] for key in STAGES[stage]} for document in documents]


def graph_inputs(plan: Plan) -> list[Tensor]:
    """What is filled before each evaluation, in visit order."""
    return [t for t in (plan.graph.tensors[i] for i in plan.graph.leafs) if t.flags & Flag.INPUT]


def graph_outputs(plan: Plan) -> list[Tensor]:
    """What is read after each evaluation, in visit order."""
    return [t for t in (plan.graph.tensors[i] for i in plan.graph.nodes) if t.flags & Flag.OUTPUT]


def _graph(graph: Planned) -> Json:
    plan = graph.plan
    sizes = {buft: sum(chunks) for buft, chunks in graph.buffer_sizes.items()}
    summary: Json = {"name": graph.name, "what": graph.what, "n_splits": graph.n_splits, "buffer_sizes": sizes}
    if plan is None:
        return summary
    return summary | {
        "nodes": len(plan.graph.nodes),
        "leafs": len(plan.graph.leafs),
        "allocator_nodes": allocator_nodes(plan),
        "inputs": [{"name": t.name, "bytes": t.nbytes} for t in graph_inputs(plan)],
        "outputs": [{"name": t.name, "bytes": t.nbytes} for t in graph_outputs(plan)],
        "splits": [_split(plan, number) for number in range(len(plan.splits))],
        "links": [{"from": a, "to": b, "bytes": n} for (a, b), n in copied_bytes(plan).items()],
    }


def _split(plan: Plan, number: int) -> Json:
    split, node = plan.splits[number], first_node(plan, number)
    inputs = [plan.graph.tensors[ident] for ident in split.inputs]
    return {
        "backend": plan.devices[split.backend].name,
        "start": split.start,
        "end": split.end,
        "first": None if node is None else node.name,
        "inputs": [{"name": t.name, "from": plan.devices[plan.backend[t.id]].name, "bytes": t.nbytes} for t in inputs],
        "bytes": sum(t.nbytes for t in inputs),
        "cause": split.cause,
        "because": because(plan, number),
    }


def _memory(memory: DeviceMemory) -> Json:
    return {"device": memory.device, **memory.parts, "total": memory.total, "limit": memory.limit,
            "short": memory.short}  # fmt: skip
