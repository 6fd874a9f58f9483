"""Plans as drawings of their splits: Graphviz and Mermaid."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.report.text import plural, show_bytes
from coordinator.schedule.outline import Outline
from coordinator.schedule.plan import Plan
from protocol.ops import Usage

COLOURS = ("#8ecae6", "#ffd166", "#a7c957", "#cdb4db", "#f4a261", "#90be6d", "#e5989b", "#b8c0ff")
"""Fill per device, in device order, repeated when there are more devices."""


@dataclass(frozen=True, slots=True)
class _Box:
    ident: str
    label: tuple[str, ...]
    device: int
    round: bool = False


@dataclass(frozen=True, slots=True)
class _Arrow:
    source: str
    target: str
    label: str  # "": nothing is copied, it only comes after


@dataclass(frozen=True, slots=True)
class _Drawing:
    name: str
    boxes: tuple[_Box, ...]
    arrows: tuple[_Arrow, ...]


def draw_dot(outline: Outline) -> str:
    """A Graphviz document: one cluster per graph, one box per split, arrows with the bytes that are copied."""
    lines = ["digraph plan {", "  rankdir=TB;", '  node [shape=box, style="filled", fontname="monospace"];']
    for number, drawing in enumerate(_drawings(outline)):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(drawing.name)};"]
        for box in drawing.boxes:
            shape = ", shape=ellipse" if box.round else ""
            label = _quoted("\\n".join(_dot_text(part) for part in box.label), escaped=True)
            lines.append(f'    {box.ident} [label={label}, fillcolor="{_colour(box.device)}"{shape}];')
        lines += [
            f"    {arrow.source} -> {arrow.target} "
            + (f"[label={_quoted(arrow.label)}];" if arrow.label else '[style="dashed"];')
            for arrow in drawing.arrows
        ]
        lines.append("  }")
    return "\n".join([*lines, "}"])


def draw_mermaid(outline: Outline) -> str:
    """A Mermaid flowchart of the same."""
    lines = ["flowchart TB"]
    for number, drawing in enumerate(_drawings(outline)):
        lines.append(f'  subgraph graph{number}["{_mermaid_text(drawing.name)}"]')
        for box in drawing.boxes:
            label = "<br/>".join(_mermaid_text(part) for part in box.label)
            left, right = ('(["', '"])') if box.round else ('["', '"]')
            lines.append(f"    {box.ident}{left}{label}{right}:::device{box.device}")
        lines += [
            f'    {arrow.source} -->|"{_mermaid_text(arrow.label)}"| {arrow.target}'
            if arrow.label
            else f"    {arrow.source} -.-> {arrow.target}"
            for arrow in drawing.arrows
        ]
        lines.append("  end")
    lines += [f"  classDef device{i} fill:{_colour(i)},color:#000" for i in range(len(outline.devices))]
    return "\n".join(lines)


def _drawings(outline: Outline) -> list[_Drawing]:
    return [
        _drawing(f"{graph.name}: {graph.what}" if graph.what else graph.name, graph.plan, f"g{number}")
        for number, graph in enumerate(outline.graphs)
        if graph.plan is not None
    ]


def _drawing(name: str, plan: Plan, prefix: str) -> _Drawing:
    made_in = {
        ident: number for number, split in enumerate(plan.splits) for ident in plan.graph.nodes[split.start : split.end]
    }
    boxes = [
        _Box(f"{prefix}s{k}", (f"{k}: {plan.devices[s.backend].name}", plural(s.end - s.start, "node")), s.backend)
        for k, s in enumerate(plan.splits)
    ]
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for number, split in enumerate(plan.splits):
        for ident in split.inputs:
            source = f"{prefix}s{made_in[ident]}" if ident in made_in else _leaf_box(plan, ident, prefix, boxes)
            count, nbytes = sums.get((source, boxes[number].ident), (0, 0))
            sums[source, boxes[number].ident] = count + 1, nbytes + plan.graph.tensors[ident].nbytes
    arrows = [_Arrow(a, b, f"{plural(n, 'tensor')}, {show_bytes(nbytes)}") for (a, b), (n, nbytes) in sums.items()]
    for k in range(1, len(plan.splits)):
        if (boxes[k - 1].ident, boxes[k].ident) not in sums:
            arrows.append(_Arrow(boxes[k - 1].ident, boxes[k].ident, ""))
    return _Drawing(name, tuple(boxes), tuple(arrows))


def _leaf_box(plan: Plan, ident: int, prefix: str, boxes: list[_Box]) -> str:
    """The box of what was there before the graph: weights, states or inputs of one device."""
    tensor, backend = plan.graph.tensors[ident], plan.backend[ident]
    kind = "inputs" if tensor.buffer is None else "weights" if tensor.buffer.usage == Usage.WEIGHTS else "states"
    name = f"{prefix}{kind}{backend}"
    if all(box.ident != name for box in boxes):
        boxes.append(_Box(name, (f"{kind} on {plan.devices[backend].name}",), backend, True))
    return name


def _colour(device: int) -> str:
    return COLOURS[device % len(COLOURS)]


def _dot_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _quoted(text: str, *, escaped: bool = False) -> str:
    return '"' + (text if escaped else _dot_text(text)) + '"'


def _mermaid_text(text: str) -> str:
    """Mermaid takes entities for what would end a label."""
    for char, entity in (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(char, entity)
    return text
