"""Historic faults that a run can be asked to have, one for each cause behind llama.cpp discussion 10780."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum

from coordinator.graph.node import Graph, Tensor, contiguous_nb, make_graph
from coordinator.ownership.facts import Finding, Kind
from coordinator.ownership.shadow import finding
from protocol.errors import UsageError
from protocol.ops import Flag


class Quirk(StrEnum):
    """What is done wrong; S1, reading where the vision graph left its output, is faithful ownership itself, and S3 a
    pin, which is nothing wrong."""

    LEAF_CACHE = "leaf-cache"  # S2: decoding reads K and V through new leafs instead of the caches
    FORGET_IMAGE = "forget-image"  # S4: that the sequence has an image lives for one call
    KEEP_INPUTS = "keep-inputs"  # S5: inputs that a graph accumulates into are set once, not before each evaluation


def with_leaf_caches(graph: Graph) -> Graph:
    """The graph with new leafs, which nobody writes, where nodes read the caches of cross-attention."""
    read = {s for node in graph.nodes if not graph.tensors[node].is_view_op for s in graph.tensors[node].src}
    tensors = list(graph.tensors)
    for t in graph.tensors:
        if t.id in read and t.view_src is not None and _is_cross_cache(graph.tensors[t.view_src].name):
            nb = contiguous_nb(t.dtype, t.ne)
            tensors[t.id] = Tensor(t.id, f"{graph.tensors[t.view_src].name} (new leaf)", t.dtype, t.ne, nb)
    return make_graph(graph.name, tensors, graph.expand, graph.pins)


def check_pinned_devices(pins: Iterable[tuple[str, str]], devices: Sequence[str]) -> None:
    """Raises UsageError for a pin to a device that is not there."""
    for name, device in pins:
        if device not in devices:
            raise UsageError(f"--pin {name}={device}: unknown device {device!r}: expected {', '.join(devices)}")


def check_pinned_tensors(pins: Iterable[tuple[str, str]], graphs: Sequence[Graph]) -> None:
    """Raises UsageError for a pin that no graph has the tensor for: it would do nothing."""
    for name, device in pins:
        if not any(name in graph.by_name for graph in graphs):
            where = " or ".join(dict.fromkeys(graph.name for graph in graphs))
            last = graphs[0].tensors[graphs[0].nodes[-1]].name
            raise UsageError(
                f"--pin {name}={device}: unknown tensor in {where}: expected its whole name, such as {last}"
            )


def with_pins(graph: Graph, pins: Iterable[tuple[str, str]]) -> Graph:
    """The graph with tensors (by name) pinned to devices; names that it does not have are left out."""
    found = tuple((graph.by_name[name], device) for name, device in pins if name in graph.by_name)
    return replace(graph, pins=(*graph.pins, *found)) if found else graph


def unwritten(graph: Graph, sources: tuple[tuple[int, ...], ...]) -> Finding | None:
    """The first leaf that a node reads and that nobody writes: no buffer before the graph, no INPUT flag; or None."""
    tensors = graph.tensors
    loose = {
        i for i in graph.leafs if tensors[i].buffer is None and not tensors[i].flags & Flag.INPUT and tensors[i].nbytes
    }
    if not loose:
        return None
    for node, row in zip(graph.nodes, sources, strict=True):
        for ident in row:
            if 0 <= ident < len(tensors) and (ident in loose or tensors[ident].view_src in loose):
                root = tensors[ident].view_src
                name, reader = tensors[ident if root is None else root].name, tensors[node]
                why = f"nobody writes {name}: {reader.op.name} {reader.name} would read what was left there"
                return finding(Kind.UNWRITTEN_READ, name, why)
    return None


def lost_image(graph: str) -> Finding:
    """The finding of a sequence with an image whose graph leaves cross-attention out."""
    why = f"the sequence has an image, but the {graph} graph leaves its cross-attention layers out"
    return finding(Kind.LOST_STATE, "has_image", why)


def _is_cross_cache(name: str) -> bool:
    return name.startswith(("cross_k_l", "cross_v_l"))
