"""Graphs of scenarios: the tensors of plan documents, named instead of numbered, with what can be guessed left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from coordinator.ownership.sequence import GraphSpec
from coordinator.ownership.tinyops import SOURCES
from coordinator.schedule.document_reader import load_document
from coordinator.schedule.plan import Device
from protocol.errors import InputError

Json = dict[str, Any]

_KINDS: dict[str, type] = {
    "name": str, "op": str, "src": list, "ne": list, "flags": list, "view": str, "offs": int, "inplace": bool,
    "buffer": dict, "resident": str, "borrow": str, "shared": str, "params": list, "value": float, "place": int,
}  # fmt: skip
_VIEWS = ("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")


def read_graphs(
    devices: Sequence[Any], graphs: Sequence[Any]
) -> tuple[tuple[Device, ...], frozenset[str], dict[str, GraphSpec]]:
    """Devices, the asynchronous ones among them, and graphs by name.

    Devices and tensors have the keys of plan documents. Devices may be `async`. Tensors are named in `src`, `view`,
    `expand` and `pinned`; `ne` is that of the first source (16 without one). Instead of `buffer`: `resident` (a
    buffer type; `weights = true` is written as a buffer). `inplace` results and CPY to a tensor are views. `borrow`,
    `shared`, `value` and `place` fill a GraphSpec. Raises InputError, PlanError.
    """
    if not all(isinstance(d, dict) for d in devices) or not all(isinstance(g, dict) for g in graphs):
        raise InputError("devices and graphs: expected tables")
    queues = frozenset(str(d.get("name")) for d in devices if d.get("async"))
    plain = [{k: v for k, v in d.items() if k != "async"} for d in devices]
    names = [str(d.get("name")) for d in devices]
    document = load_document({"devices": plain, "graphs": [_numbered(g, names) for g in graphs]})
    specs: dict[str, GraphSpec] = {}
    for raw, entry in zip(graphs, document.entries, strict=True):
        by_name = entry.graph.by_name
        rows = {by_name[t["name"]]: t for t in raw["tensors"]}
        tensors = tuple(replace(t, params=tuple(rows[t.id].get("params", ()))) for t in entry.graph.tensors)
        specs[entry.graph.name] = GraphSpec(
            replace(entry.graph, tensors=tensors),
            {i: t["borrow"] for i, t in rows.items() if "borrow" in t},
            {i: t["shared"] for i, t in rows.items() if "shared" in t},
            {i: float(t["value"]) for i, t in rows.items() if "value" in t},
            {i: int(t["place"]) for i, t in rows.items() if "place" in t},
        )
    return document.devices, queues, specs


def _numbered(graph: Json, devices: list[str]) -> Json:
    """A graph as plan documents have it."""
    name = graph.get("name")
    rows = graph.get("tensors")
    if not isinstance(name, str) or not isinstance(rows, list):
        raise InputError("graphs: expected 'name' and a list 'tensors'")
    ids: dict[str, int] = {}
    tensors: list[Json] = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise InputError(f"graph {name}: every tensor is a table with a 'name'")
        where = f"graph {name}: tensor {row['name']!r}"
        if unknown := sorted(set(row) - set(_KINDS)):
            raise InputError(f"{where}: unknown key {unknown[0]!r}: expected {', '.join(sorted(_KINDS))}")
        for key, value in row.items():
            _check_kind(value, _KINDS[key], f"{where}: {key}")
        if row["name"] in ids:
            raise InputError(f"{where}: there are two of that name")
        tensors.append(_tensor(row, ids, tensors, where))
        ids[row["name"]] = len(ids)
    _check_kind(graph.get("expand", []), list, f"graph {name}: expand")
    _check_kind(graph.get("pinned", {}), dict, f"graph {name}: pinned")
    expand = [_id(ids, t, f"graph {name}: expand") for t in graph.get("expand", [rows[-1]["name"] if rows else ""])]
    pinned = {}
    for tensor, device in graph.get("pinned", {}).items():
        if device not in devices:
            raise InputError(f"graph {name}: {tensor} is pinned to unknown device {device!r}")
        pinned[str(_id(ids, tensor, f"graph {name}: pinned"))] = devices.index(device)
    return {"name": name, "tensors": tensors, "expand": expand, "pinned": pinned}


def _tensor(row: Json, ids: Mapping[str, int], tensors: list[Json], where: str) -> Json:
    src = [_id(ids, s, where) for s in row.get("src", [])]
    op = row.get("op", "NONE")
    viewed = _id(ids, row["view"], where) if "view" in row else None
    if viewed is not None and not src:
        src = [viewed]
    if op in _VIEWS and viewed is None and src:
        viewed = src[0]
    if row.get("inplace"):
        if not src:
            raise InputError(f"{where}: inplace without a source")
        viewed = src[0]
    low, high = SOURCES.get(op, (0, len(src)))
    if not low <= len(src) <= high:
        raise InputError(f"{where}: {op} of {len(src)} sources, expected {low if low == high else f'{low} to {high}'}")
    for value in row.get("params", []):
        _check_kind(value, float, f"{where}: params")
    if op == "CPY" and len(src) == 2:
        viewed = src[1]
    like = tensors[viewed if viewed is not None else src[0]] if src else None
    out: Json = {
        "id": len(tensors),
        "name": row["name"],
        "op": op,
        "src": src,
        "ne": row.get("ne", like["ne"] if like else [16]),
        "flags": row.get("flags", []),
        "buffer": row.get("buffer"),
    }
    if viewed is not None:
        root = tensors[viewed]
        first = root.get("view_src")
        out["view_src"] = viewed if first is None else first
        out["view_offs"] = root.get("view_offs", 0) + row.get("offs", 0)
    if "resident" in row:
        out["buffer"] = {"buft": row["resident"], "usage": "any"}
    if "borrow" in row:
        out["buffer"] = {"buft": "?", "usage": "compute"}
    return out


def _check_kind(value: object, kind: type, where: str) -> None:
    """Integers are floats too, truth values are neither."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        expected = {dict: "table", float: "number"}.get(kind, kind.__name__)
        raise InputError(f"{where} is {value!r:.40}, expected {expected}")


def _id(ids: Mapping[str, int], name: object, where: str) -> int:
    if not isinstance(name, str) or name not in ids:
        raise InputError(f"{where}: unknown tensor {name!r}")
    return ids[name]
