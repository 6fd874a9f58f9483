"""Programs of what people have: a document's graphs on one scheduler, or a model's vision and language graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from coordinator.graph.node import Graph
from coordinator.model.presets import Blueprint
from coordinator.ownership.check import Alternative
from coordinator.ownership.sequence import MAIN, GraphSpec, Sequence, Step
from coordinator.schedule.document_reader import Document
from coordinator.schedule.outline import Setting, build_graphs, fit_setting
from coordinator.schedule.placement import PlacementOptions, plan_placement
from protocol.errors import CrossdockError
from protocol.ops import Flag, Usage

HANDED_OVER = ("vision.vision_output", "cross_states")
"""What the language graph takes from the vision graph, and under which name."""


def document_sequence(document: Document) -> Sequence:
    """Every graph allocated, its inputs set, computed and its outputs read, in order on one scheduler.

    A leaf in a COMPUTE buffer that has the name of an earlier graph's own tensor is that tensor.
    """
    specs: dict[str, GraphSpec] = {}
    steps: list[Step] = []
    for number, entry in enumerate(document.entries):
        name = entry.graph.name.replace(".", "_")
        if name in specs or name.startswith("graphs["):
            name = f"graph {number}"
        graph = _named(entry.graph)
        specs[name] = GraphSpec(replace(graph, name=name), _borrowed(graph, specs))
        steps += [Step("reserve", graph=name)] if entry.reserve else _evaluation(name, graph)
    return Sequence(
        document.devices, specs, tuple(steps), parallel=document.parallel, op_offload=document.op_offload
    )  # fmt: skip


def model_sequence(blueprint: Blueprint, setting: Setting, *, safe: bool) -> Sequence:
    """A model's phases in order, after a reservation for the prompt as llama.cpp makes it. With `safe` the vision
    output is kept, as `crossdock run` does; otherwise the language graph reads it where the vision graph left it.

    Raises UsageError, ModelError for a setting that does not go with the model.
    """
    setting = fit_setting(blueprint.params, setting)
    placement = plan_placement(setting.devices, setting.limits, blueprint.params.text.n_layer, setting.placement)
    specs: dict[str, GraphSpec] = {}
    steps: list[Step] = []
    for name, graph in build_graphs(blueprint, setting, placement).items():
        graph = _named(graph)
        borrows = {}
        if "vision" in specs:
            borrows = {graph.by_name[n]: HANDED_OVER[0] for n in HANDED_OVER[1:] if n in graph.by_name}
        specs[name] = GraphSpec(graph, borrows)
        own = name == "vision" and not setting.share_scheduler
        steps += _evaluation(name, graph, "vision" if own else MAIN)
        if name == "vision" and safe:
            steps.append(Step("keep", tensor=HANDED_OVER[0]))
    if "prompt" in specs:
        steps.insert(0, Step("reserve", graph="prompt"))
    return Sequence(setting.devices, specs, tuple(steps), parallel=setting.parallel, op_offload=setting.op_offload)


def model_alternatives(
    blueprint: Blueprint, setting: Setting, layers: Iterator[int] | None = None
) -> Iterator[Alternative]:
    """The same run with other numbers of offloaded layers (all, unless `layers` says which)."""
    n_layer = blueprint.params.text.n_layer
    now = n_layer + 1 if setting.placement.n_gpu_layers is None else setting.placement.n_gpu_layers
    for n in layers if layers is not None else range(n_layer + 2):
        if n == now:
            continue
        options: PlacementOptions = replace(setting.placement, n_gpu_layers=n)
        try:
            yield f"n-gpu-layers {n}", model_sequence(blueprint, replace(setting, placement=options), safe=False)
        except CrossdockError:
            continue


def _evaluation(name: str, graph: Graph, on: str = MAIN) -> list[Step]:
    inputs = [t.name for t in graph.tensors if t.flags & Flag.INPUT and t.view_src is None and t.buffer is None]
    visited = [graph.tensors[i] for i in (*graph.leafs, *graph.nodes)]
    outputs = [t.name for t in visited if t.flags & Flag.OUTPUT]
    return [
        Step("allocate", graph=name, on=on),
        *(Step("set", tensor=f"{name}.{tensor}") for tensor in inputs),
        Step("compute", graph=name),
        *(Step("read", tensor=f"{name}.{tensor}") for tensor in outputs),
    ]


def _named(graph: Graph) -> Graph:
    """The graph with a name of its own for every tensor; those that exist before it are known by theirs."""
    seen: set[str] = set()
    tensors = []
    for t in graph.tensors:
        if not t.name or t.name in seen:
            t = replace(t, name=f"{t.name or t.op.name}#{t.id}")
        seen.add(t.name)
        tensors.append(t)
    return replace(graph, tensors=tuple(tensors), by_name={t.name: t.id for t in tensors})


def _borrowed(graph: Graph, specs: dict[str, GraphSpec]) -> dict[int, str]:
    borrows = {}
    for ident in graph.leafs:
        tensor = graph.tensors[ident]
        if tensor.buffer is None or tensor.buffer.usage is not Usage.COMPUTE:
            continue
        for name, spec in specs.items():
            other = spec.graph.by_name.get(tensor.name)
            if other is not None and spec.graph.tensors[other].buffer is None:
                borrows[ident] = f"{name}.{tensor.name}"
    return borrows
