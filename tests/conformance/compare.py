"""Ours against real ggml, everything that both decide."""

from __future__ import annotations

from typing import Any

from coordinator.schedule.document import load_document, plan_result
from coordinator.schedule.scheduler import Scheduler
from protocol.errors import CrossdockError


class RescueError(CrossdockError):
    """ggml would crash here or read outside of its tables: what it does then cannot be compared."""


def plan_ours(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """What our scheduler decides, in the form in which the real one is read back."""
    document = load_document(doc)
    scheduler = Scheduler(document.devices, parallel=document.parallel, op_offload=document.op_offload)
    results = []
    for entry in document.entries:
        if entry.reset:
            scheduler.reset()
        if entry.reserve:
            chunks = {k: list(v) for k, v in scheduler.reserve(entry.graph).items()}
            results.append({"n_splits": scheduler.n_splits, "chunks": chunks})
            continue
        plan = scheduler.allocate(entry.graph, reset=False)
        if scheduler.rescues:
            raise RescueError(f"graph {len(results)}")
        out = plan_result(plan, entry.ids)
        names = [*entry.ids, *(c.name for c in plan.copies)]
        out["sources"] = [_trimmed([None if s < 0 else names[s] for s in row]) for row in plan.sources]
        out["chunks"] = {k: list(v) for k, v in plan.buffer_sizes.items()}
        results.append(out)
    return results


def _trimmed(sources: list[Any]) -> list[Any]:
    """Without the absent sources at the end, which ggml does not count."""
    while sources and sources[-1] is None:
        sources.pop()
    return sources


COMPARED = (
    "n_splits", "splits", "nodes", "leafs", "backend", "sources", "offsets", "copies", "chunks", "reallocated",
)  # fmt: skip


def differences(ours: list[dict[str, Any]], real: list[dict[str, Any]], n_devices: int) -> list[str]:
    """One line per difference; empty when everything is the same."""
    out = []
    for k, (a, b) in enumerate(zip(ours, real, strict=True)):
        for key in COMPARED:
            if key == "reallocated" and n_devices == 1:
                continue  # with one device ggml reserves inside the allocator, without a call that could be observed
            left, right = a.get(key), b.get(key)
            if key == "splits" and left:
                left = [{name: s[name] for name in ("backend", "start", "end", "inputs")} for s in left]
            if left != right:
                out.append(f"graph {k}: {key}: {_first(left, right)}")
    return out


def _first(ours: Any, real: Any) -> str:
    if isinstance(ours, dict) and isinstance(real, dict):
        keys = [key for key in {**ours, **real} if ours.get(key) != real.get(key)]
        return "; ".join(f"{key}: ours {ours.get(key)}, ggml {real.get(key)}" for key in keys[:4])
    if isinstance(ours, list) and isinstance(real, list) and len(ours) == len(real):
        where = [k for k in range(len(ours)) if ours[k] != real[k]]
        return "; ".join(f"[{k}]: ours {ours[k]}, ggml {real[k]}" for k in where[:4])
    return f"ours {ours}, ggml {real}"
