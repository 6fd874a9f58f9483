"""What `crossdock plan` says: splits with their causes, memory against limits, traffic, what moved, what fits."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from rich.console import Console
from rich.table import Table

from coordinator.report.plan_json import graph_inputs, graph_outputs, layers_by_device
from coordinator.report.plan_why import because, first_node
from coordinator.report.run import model_line
from coordinator.report.text import plain, plural, show_bytes
from coordinator.schedule.diff import Diff, GraphDiff, Moved
from coordinator.schedule.fit import Fit
from coordinator.schedule.links import copied_bytes
from coordinator.schedule.outline import PURPOSES, DeviceMemory, Outline, Planned, allocator_nodes
from coordinator.schedule.plan import Plan

__all__ = ["answer", "fit_line", "model_line", "next_line", "print_diff", "print_fit", "print_outline"]

SHOWN_SPLITS = 12
"""Splits of a graph that are shown without `--why`."""

SHOWN_INPUTS = 3
"""Inputs of a split that are named without `--why`."""

_WIDTH = 1000
"""Columns where nobody's terminal sets them."""

_MIB = 1 << 20
_LAYER = re.compile(r"(v\.global\.blk|v\.blk|blk|cache|cross)[._](?:[kv]_l)?(\d+)")


@contextmanager
def answer() -> Iterator[Console]:
    """A console for stdout: coloured only on a terminal, as wide as the tables need where it is none."""
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(highlight=False, no_color="NO_COLOR" in os.environ or None, width=width)
    with console.capture() as captured:
        yield console
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def mib(nbytes: int) -> str:
    """`2864.12 MiB`, as ggml's logs have it."""
    return f"{nbytes / _MIB:.2f} MiB"


def print_outline(console: Console, outline: Outline, splits: str) -> None:
    """Layers, each graph with "all", "some" or "none" of its splits, memory, links, and what does not fit."""
    _print_layers(console, outline)
    for graph in outline.graphs:
        console.print()
        console.print(f"[bold]{plain(graph_line(graph))}[/]")
        if graph.plan is not None:
            console.print(plain(ends_line(graph.plan)))
        console.print(plain(buffers_line(graph)))
        if graph.plan is not None and splits != "none":
            _print_splits(console, graph.plan, splits == "all")
    console.print()
    console.print(memory_table(outline.memory))
    links = links_table(outline.graphs)
    if links.row_count:
        console.print()
        console.print(links)
    shortage = shortage_line(outline)
    if shortage:
        console.print()
        console.print(f"[bold]{plain(shortage)}[/]")


def _print_splits(console: Console, plan: Plan, why: bool) -> None:
    console.print(splits_table(plan, why))
    hidden = 0 if why else len(plan.splits) - SHOWN_SPLITS
    if hidden > 0:
        console.print(f"  ...  {plural(hidden, 'more split')}: --why shows all")


def print_fit(console: Console, found: Fit) -> None:
    """Where the layers lie then, each graph in a line, and the memory that proves it."""
    outline = found.outline
    _print_layers(console, outline)
    for graph in outline.graphs:
        console.print(f"[bold]{graph.name:<9}[/] {plural(graph.n_splits, 'split')}")
    console.print()
    console.print(memory_table(outline.memory))


def _print_layers(console: Console, outline: Outline) -> None:
    layers = layers_by_device(outline)
    if layers:
        shown = "   ".join(f"{device} {ranges(numbers)}" for device, numbers in layers.items())
        console.print(f"[bold]layers[/]    {plain(shown)}")


def graph_line(graph: Planned) -> str:
    """`prompt of 512: 1030 nodes, 1252 for the allocator, 330 leafs, 93 splits`."""
    name = graph.what if graph.what.startswith(graph.name) else f"{graph.name}, {graph.what}".removesuffix(", ")
    facts = [plural(graph.n_splits, "split")]
    if graph.plan is not None:
        n = len(graph.plan.graph.nodes)
        facts = [plural(n, "node"), f"{allocator_nodes(graph.plan)} for the allocator", *facts]
        facts.insert(2, plural(len(graph.plan.graph.leafs), "leaf"))
    return f"{name}: {', '.join(facts)}"


def buffers_line(graph: Planned) -> str:
    """`compute buffers after it  gpu0 540.31 MiB   CPU 9.01 MiB`: they only grow."""
    sizes = "   ".join(f"{buft} {mib(sum(chunks))}" for buft, chunks in graph.buffer_sizes.items())
    return f"compute buffers after it  {sizes}"


def ends_line(plan: Plan) -> str:
    """`in inp_tokens 2,048 B, inp_pos 2,048 B   out result_output 513,024 B`."""
    ends = [("in", graph_inputs(plan)), ("out", graph_outputs(plan))]
    return "   ".join(
        f"{word} {', '.join(f'{_named(t.name)} {t.nbytes:,} B' for t in tensors)}" for word, tensors in ends if tensors
    )


def splits_table(plan: Plan, why: bool) -> Table:
    """One row per split: number, device, nodes, inputs, bytes of the inputs, what started it."""
    table = _table(("#", "backend", "nodes", "inputs", "bytes", "because"), right=("#", "nodes", "bytes"))
    if why:
        table = _table(
            ("#", "backend", "nodes", "starts with", "inputs", "bytes", "because"), right=("#", "nodes", "bytes")
        )
    shown = range(len(plan.splits)) if why else range(min(SHOWN_SPLITS, len(plan.splits)))
    for number in shown:
        split, node = plan.splits[number], first_node(plan, number)
        inputs = [plan.graph.tensors[ident] for ident in split.inputs]
        names = [_named(t.name) for t in inputs[: None if why else SHOWN_INPUTS]]
        if len(names) < len(inputs):
            names.append(f"{len(inputs) - len(names)} more")
        nbytes = sum(t.nbytes for t in inputs)
        row = [str(number), plan.devices[split.backend].name, str(split.end - split.start)]
        if why:
            row.append("-" if node is None else f"{node.op.name} {node.name}")
        row += [", ".join(names) or "-", show_bytes(nbytes) if inputs else "-", because(plan, number)]
        _add(table, *row)
    return table


def memory_table(memory: Sequence[DeviceMemory]) -> Table:
    """Bytes per device and purpose, against its limit."""
    table = _table(("memory", *PURPOSES, "total", "limit", ""), left=("memory", ""))
    for row in memory:
        parts = [mib(row.parts[purpose]) if row.parts.get(purpose) else "-" for purpose in PURPOSES]
        limit = "-" if row.limit is None else show_bytes(row.limit)
        _add(table, row.device, *parts, mib(row.total), limit, _verdict(row))
    return table


def _verdict(memory: DeviceMemory) -> str:
    if memory.limit is None:
        return ""
    if memory.short:
        return f"{show_bytes(memory.short)} short"
    return f"{show_bytes(memory.limit - memory.total)} free"


def links_table(graphs: Iterable[Planned]) -> Table:
    """Bytes that one evaluation of each graph copies from device to device."""
    plans = [(graph.name, graph.plan) for graph in graphs if graph.plan is not None]
    columns = {"vision": "per image", "prompt": "per prompt", "token": "per token"}
    table = _table(("links", *(columns.get(name, name) for name, _ in plans)), left=("links",))
    bytes_of = [copied_bytes(plan) for _, plan in plans]
    for source, target in dict.fromkeys(link for links in bytes_of for link in links):
        cells = [show_bytes(links[source, target]) if (source, target) in links else "-" for links in bytes_of]
        _add(table, f"{source} -> {target}", *cells)
    return table


def shortage_line(outline: Outline) -> str:
    """`does not fit: gpu0 is 3.2 GiB short`, "" when everything fits."""
    short = [f"{memory.device} is {show_bytes(memory.short)} short" for memory in outline.memory if memory.short]
    return f"does not fit: {', '.join(short)}" if short else ""


def next_line(outline: Outline, n_gpu_layers: int | None, why: bool) -> str:
    """The commands that go on from here."""
    hints = []
    if not why and any(graph.n_splits > SHOWN_SPLITS for graph in outline.graphs):
        hints.append("--why shows every split")
    if outline.placement is not None and len(outline.devices) > 1:
        if any(memory.limit is not None for memory in outline.memory[:-1]):
            hints.append("--fit finds the most that fits")
        n_layer = len(outline.placement.layers) - 1
        other = n_layer // 2 if n_gpu_layers is None else min(n_layer, n_gpu_layers + 6)
        hints.append(f"--diff --n-gpu-layers {other} shows what would move")
    else:
        hints.append("--json gives every tensor's place, --format dot a drawing")
    return f"[bold]next[/]      {'; '.join(hints)}"


def fit_line(found: Fit) -> str:
    """`fits  --n-gpu-layers 36 --tensor-split 20,17   (9 plans tried)`."""
    command = f"--n-gpu-layers {found.n_gpu_layers}"
    if len(found.tensor_split) > 1:
        command += f" --tensor-split {','.join(map(str, found.tensor_split))}"
    proof = "" if found.exhaustive else ", not every split between the devices"
    return f"[bold]fits[/]      {command}   ({plural(found.n_planned, 'plan')} tried{proof})"


def print_diff(console: Console, difference: Diff) -> None:
    """What moved, then splits and traffic of each graph, then memory."""
    moved = _table(("moved", "from -> to", "tensors", "bytes", "which"), right=("tensors", "bytes"))
    for group in difference.moved:
        _add(
            moved, group.purpose, f"{group.source} -> {group.target}", str(len(group.names)), show_bytes(group.nbytes),
            which(group),
        )  # fmt: skip
    if difference.moved:
        console.print(moved)
    else:
        console.print("no weight, cache or kept tensor moves")
    console.print()
    graphs = _table(("graph", "splits", "nodes that move", "bytes per link and evaluation"))
    for graph in difference.graphs:
        _add(graphs, graph.name, _arrow(*map(str, graph.n_splits)), _moved_nodes(graph), _changed_links(graph))
    console.print(graphs)
    console.print()
    memory = _table(("memory", *PURPOSES, "total"), left=("memory",))
    for device, parts in difference.memory.items():
        pairs = [parts.get(purpose, (0, 0)) for purpose in PURPOSES]
        pairs.append((sum(a for a, _ in pairs), sum(b for _, b in pairs)))
        _add(memory, device, *(_arrow(mib(a), mib(b)) if (a, b) != (0, 0) else "-" for a, b in pairs))
    console.print(memory)


def which(moved: Moved) -> str:
    """`blk 4-9, v.blk 4-9, output.weight`: layers as ranges, other names as they are."""
    layers: dict[str, list[int | str]] = {}
    others = []
    for name in moved.names:
        match = _LAYER.match(name)
        if match is None:
            others.append(name)
        elif int(match[2]) not in layers.setdefault(match[1], []):
            layers[match[1]].append(int(match[2]))
    return ", ".join([*(f"{kind} {ranges(numbers)}" for kind, numbers in layers.items()), *others])


def ranges(numbers: Iterable[int | str]) -> str:
    """`0-9, 12, output` of [0, ..., 9, 12, "output"]."""
    whole = sorted(n for n in numbers if isinstance(n, int))
    parts = []
    for _, run in groupby(enumerate(whole), lambda pair: pair[1] - pair[0]):
        members = [n for _, n in run]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join([*parts, *(n for n in numbers if isinstance(n, str))])


def _moved_nodes(graph: GraphDiff) -> str:
    return ", ".join(f"{n} {a} -> {b}" for (a, b), n in graph.moved.items()) or "none"


def _changed_links(graph: GraphDiff) -> str:
    changes = [
        f"{a} -> {b}: {_arrow(show_bytes(before), show_bytes(after))}"
        for (a, b), (before, after) in graph.links.items()
    ]
    return "; ".join(changes) or "-"


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _table(columns: Sequence[str], *, right: Sequence[str] = (), left: Sequence[str] | None = None) -> Table:
    """A plain table; either the `right` columns are the numbers, or all but the `left` ones."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        number = column in right if left is None else column not in left
        table.add_column(column, justify="right" if number else "left", no_wrap=number)
    return table


def _named(name: str) -> str:
    return name.strip() or "(unnamed)"


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(plain, cells))
