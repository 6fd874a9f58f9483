"""Hazards of a program before anything runs, and what would hide or show them: planned, not guessed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from coordinator.graph.debug import SUFFIX, add_debug_inputs
from coordinator.graph.node import Graph
from coordinator.ownership.facts import Finding, Kind
from coordinator.ownership.host import walk
from coordinator.ownership.sequence import GraphSpec, Sequence
from coordinator.schedule.plan import Plan
from protocol.errors import CrossdockError
from protocol.ops import Flag

BY_PLACE = frozenset({
    Kind.STALE_READ, Kind.STALE_PLAN, Kind.INPUT_CONSUMED, Kind.INTERMEDIATE_READ, Kind.UNPROTECTED_OUTPUT,
})  # fmt: skip
"""Kinds whose symptom depends on where tensors happen to lie."""

MAX_ALTERNATIVES = 16
"""Debug inputs and pins that are tried for one program."""

Alternative = tuple[str, Sequence]
"""A changed program, and what was changed in words."""


def check_sequence(sequence: Sequence) -> tuple[Finding, ...]:
    """Hazards of a program: one per kind, tensor and reader's graph, manifest ones first, costs last.

    Raises InputError for steps that cannot be meant, PlanError for graphs that cannot be planned.
    """
    return check_plans(sequence)[1]


def check_plans(sequence: Sequence) -> tuple[tuple[Plan, ...], tuple[Finding, ...]]:
    """The plans of a program, and its hazards as `check_sequence` lists them."""
    machine = walk(sequence)
    found: dict[tuple[str, ...], Finding] = {}
    for finding in machine.findings:
        reader = finding.reader.graph if finding.reader else ""
        key = (finding.kind, finding.tensor, reader)
        if key not in found or (found[key].latent and not finding.latent):
            found[key] = finding
    return tuple(machine.plans), tuple(sorted(found.values(), key=lambda f: (f.is_cost, f.latent)))


def explain(findings: Iterable[Finding], alternatives: Iterable[Alternative]) -> tuple[Finding, ...]:
    """The findings with the alternatives that would hide them, or show those that are hidden now."""
    findings = tuple(findings)
    if not any(f.kind in BY_PLACE for f in findings):
        return findings
    hides: list[list[str]] = [[] for _ in findings]
    shows: list[list[str]] = [[] for _ in findings]
    for label, sequence in alternatives:
        try:
            others = check_sequence(sequence)
        except CrossdockError:
            continue  # no program at all
        for k, finding in enumerate(findings):
            if finding.kind not in BY_PLACE:
                continue
            same = [f for f in others if f.kind == finding.kind and f.tensor == finding.tensor]
            if any(not f.latent for f in same):
                shows[k].append(label)
            else:
                hides[k].append(label + _moved(finding, same))
    return tuple(
        replace(f, shown_by=tuple(shows[k])) if f.latent else replace(f, hidden_by=tuple(hides[k]))
        for k, f in enumerate(findings)
    )


def alternatives(sequence: Sequence) -> Iterator[Alternative]:
    """The program with a debug input more, one unused input less, or a pin less; at most MAX_ALTERNATIVES."""
    count = 0
    for name, spec in sequence.graphs.items():
        for label, changed in _variants(spec):
            if count == MAX_ALTERNATIVES:
                return
            count += 1
            yield label, replace(sequence, graphs={**sequence.graphs, name: changed})


def _variants(spec: GraphSpec) -> Iterator[tuple[str, GraphSpec]]:
    graph = spec.graph
    used = {s for t in graph.tensors for s in t.src}
    for ident in graph.leafs:
        tensor = graph.tensors[ident]
        if not tensor.flags & Flag.INPUT or tensor.buffer is not None:
            continue
        if ident not in used:
            yield f"without {tensor.name}", replace(spec, graph=_without(graph, ident))
        elif tensor.name + SUFFIX not in graph.by_name:
            added = add_debug_inputs(graph, (tensor.name + SUFFIX,))
            yield f"{tensor.name}{SUFFIX} (+{tensor.nbytes:,} B)", replace(spec, graph=added)
    for pin in graph.pins:
        name = graph.tensors[pin[0]].name
        pins = tuple(p for p in graph.pins if p != pin)
        yield f"{name} not pinned to {pin[1]}", replace(spec, graph=replace(graph, pins=pins))


def _without(graph: Graph, ident: int) -> Graph:
    """The graph without an unused leaf; its tensor stays, so that ids do."""
    expand = tuple(t for t in graph.expand if t != ident)
    return replace(graph, expand=expand, leafs=tuple(t for t in graph.leafs if t != ident))


def _moved(finding: Finding, same: list[Finding]) -> str:
    """Where an alternative puts the tensor, if it is still read."""
    extent = same[0].extent if same else None
    if extent is None or finding.extent is None or extent == finding.extent:
        return ""
    return f": then at [{extent.start}, {extent.end})"
