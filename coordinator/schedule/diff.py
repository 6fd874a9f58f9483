"""What moves between two plans of the same model: weights, caches, nodes, splits, memory and traffic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coordinator.schedule.links import copied_bytes
from coordinator.schedule.outline import Outline
from coordinator.schedule.plan import Plan
from coordinator.schedule.residents import purpose_of, residents

Link = tuple[str, str]
"""Names of two devices: from, to."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Resident tensors of one purpose that went from one device to another; bytes are those of all of them."""

    purpose: str
    source: str
    target: str
    names: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class GraphDiff:
    """One graph in both plans: pairs are (before, after). `moved` counts nodes by (from, to)."""

    name: str
    n_nodes: tuple[int, int]
    n_splits: tuple[int, int]
    moved: Mapping[Link, int]
    links: Mapping[Link, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Diff:
    """Everything that changed. `memory` has bytes by device and purpose, (before, after)."""

    moved: tuple[Moved, ...]
    graphs: tuple[GraphDiff, ...]
    memory: Mapping[str, Mapping[str, tuple[int, int]]]


def diff(before: Outline, after: Outline) -> Diff:
    """Compare two outlines. Graphs are matched by name, nodes by name and how often it occurred before."""
    pairs = {graph.name: graph.plan for graph in before.graphs if graph.plan is not None}
    graphs = tuple(
        _graph_diff(graph.name, pairs[graph.name], graph.plan)
        for graph in after.graphs
        if graph.plan is not None and graph.name in pairs
    )
    return Diff(_moved(before, after), graphs, _memory(before, after))


def _graph_diff(name: str, before: Plan, after: Plan) -> GraphDiff:
    was, now = _node_devices(before), _node_devices(after)
    moved: dict[Link, int] = {}
    for node, device in now.items():
        if node in was and was[node] != device:
            link = (was[node], device)
            moved[link] = moved.get(link, 0) + 1
    old, new = copied_bytes(before), copied_bytes(after)
    return GraphDiff(
        name,
        (len(before.graph.nodes), len(after.graph.nodes)),
        (len(before.splits), len(after.splits)),
        moved,
        {link: (old.get(link, 0), new.get(link, 0)) for link in dict.fromkeys((*old, *new))},
    )


def _node_devices(plan: Plan) -> dict[tuple[str, int], str]:
    """Device by a node's name and occurrence; views run nowhere and are left out."""
    seen: dict[str, int] = {}
    devices = {}
    for ident in plan.graph.nodes:
        tensor = plan.graph.tensors[ident]
        if not tensor.is_view_op:
            number = seen.get(tensor.name, 0)
            seen[tensor.name] = number + 1
            devices[tensor.name, number] = plan.devices[plan.backend[ident]].name
    return devices


def _moved(before: Outline, after: Outline) -> tuple[Moved, ...]:
    was, now = _homes(before), _homes(after)
    groups: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    for name, (purpose, bufts, nbytes) in now.items():
        if name in was and was[name][1] != bufts:
            key = (purpose, "+".join(was[name][1]), "+".join(bufts))
            groups.setdefault(key, []).append((name, nbytes))
    return tuple(
        Moved(purpose, source, target, tuple(name for name, _ in items), sum(nbytes for _, nbytes in items))
        for (purpose, source, target), items in groups.items()
    )


def _homes(outline: Outline) -> dict[str, tuple[str, tuple[str, ...], int]]:
    """Purpose, devices and bytes of each resident tensor by name; a few lie on several devices."""
    owners: dict[str, str] = {}
    for device in outline.devices:
        owners.setdefault(device.buft or device.name, device.name)
    homes: dict[str, tuple[str, tuple[str, ...], int]] = {}
    found = residents(graph.plan.graph for graph in outline.graphs if graph.plan is not None)
    for (name, buft), tensor in found.items():
        owner = owners.get(buft, buft)
        _, devices, _ = homes.get(name, ("", (), 0))
        homes[name] = (purpose_of(tensor), tuple(sorted({*devices, owner})), tensor.nbytes)
    return homes


def _memory(before: Outline, after: Outline) -> dict[str, dict[str, tuple[int, int]]]:
    was = {memory.device: memory.parts for memory in before.memory}
    now = {memory.device: memory.parts for memory in after.memory}
    result = {}
    for device in _union(was, now):
        old, new = was.get(device, {}), now.get(device, {})
        result[device] = {part: (old.get(part, 0), new.get(part, 0)) for part in _union(old, new)}
    return result


def _union(a: Iterable[str], b: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*a, *b)))
