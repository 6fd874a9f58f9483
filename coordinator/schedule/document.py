"""Graphs and plans as JSON documents: planned and written; `document_reader` reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coordinator.graph.node import ABSENT, Graph, Tensor
from coordinator.schedule.document_reader import Document, Entry, Json, load_document
from coordinator.schedule.plan import Device, Place, Plan
from coordinator.schedule.scheduler import Scheduler
from protocol.ops import Flag

__all__ = ["Document", "Entry", "dump_document", "load_document", "plan_document", "plan_result"]


def plan_document(source: str | bytes | Mapping[str, Any] | Document) -> list[Json]:
    """Plan every graph of a document on one scheduler; one result per graph, as in docs on plan documents.

    Raises PlanError when the document or one of its graphs cannot be planned.
    """
    document = source if isinstance(source, Document) else load_document(source)
    scheduler = Scheduler(document.devices, parallel=document.parallel, op_offload=document.op_offload)
    results: list[Json] = []
    for entry in document.entries:
        if entry.reset:
            scheduler.reset()
        if entry.reserve:
            scheduler.reserve(entry.graph)
            results.append({"n_splits": scheduler.n_splits, "buffer_sizes": _totals(scheduler.buffer_sizes)})
        else:
            results.append(plan_result(scheduler.allocate(entry.graph, reset=False), entry.ids))
    return results


def plan_result(plan: Plan, ids: Sequence[int] | None = None) -> Json:
    """A plan as the document's result; `ids` translates tensor ids to the document's."""
    ids = range(len(plan.graph.tensors)) if ids is None else ids
    return {
        "n_splits": len(plan.splits),
        "splits": [
            {
                "backend": plan.devices[s.backend].name,
                "start": s.start,
                "end": s.end,
                "inputs": [ids[t] for t in s.inputs],
                "cause": s.cause,
            }
            for s in plan.splits
        ],
        "nodes": [ids[t] for t in plan.graph.nodes],
        "leafs": [ids[t] for t in plan.graph.leafs],
        "backend": {str(ids[t]): b for t, b in enumerate(plan.backend) if b >= 0},
        "cause": {str(ids[t]): c for t, c in enumerate(plan.cause) if c and plan.backend[t] >= 0},
        "offsets": {str(ids[t]): _place(p) for t, p in enumerate(plan.places)},
        "copies": {c.name: _place(c.place) for c in plan.copies},
        "buffer_sizes": _totals(plan.buffer_sizes),
        "reallocated": plan.reallocated,
    }


def dump_document(
    devices: Iterable[Device], graphs: Iterable[Graph], *, parallel: bool = False, op_offload: bool = False
) -> Json:
    """Write graphs and devices as a document that `load_document` reads."""
    devices = tuple(devices)
    index = {d.name: k for k, d in enumerate(devices)}
    return {
        "devices": [_dump_device(d) for d in devices],
        "parallel": parallel,
        "op_offload": op_offload,
        "graphs": [
            {
                "reserve": False,
                "reset": True,
                "tensors": [_dump_tensor(t) for t in g.tensors],
                "expand": list(g.expand),
                "pinned": {str(t): index[d] for t, d in g.pins},
            }
            for g in graphs
        ],
    }


def _place(place: Place | None) -> list[str | int | None] | None:
    return None if place is None else [place.buft, place.chunk, place.offset]


def _totals(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {buft: sum(chunks) for buft, chunks in sizes.items()}


def _dump_device(d: Device) -> Json:
    out: Json = {
        "name": d.name,
        "type": d.kind,
        "buft": d.buft or d.name,
        "alignment": d.alignment,
        "max_size": d.max_size,
        "is_host": d.is_host,
        "extra_bufts": list(d.extra_bufts),
        "unsupported_ops": sorted(d.unsupported_ops),
        "offload_ops": sorted(d.offload_ops),
    }
    if d.offload_min_batch:
        out["offload_min_batch"] = d.offload_min_batch
    return out


def _dump_tensor(t: Tensor) -> Json:
    return {
        "id": t.id,
        "name": t.name,
        "type": t.dtype.label,
        "ne": list(t.ne),
        "nb": list(t.nb),
        "op": t.op.name,
        "flags": [f.name.lower() for f in Flag if f in t.flags and f.name],
        "src": [None if s == ABSENT else s for s in t.src],
        "view_src": t.view_src,
        "view_offs": t.view_offs,
        "buffer": None if t.buffer is None else {"buft": t.buffer.buft, "usage": t.buffer.usage.name.lower()},
    }
