"""Reads graph documents: JSON to devices and graphs, with one clear line for each way to get it wrong."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from coordinator.graph.node import ABSENT, BufferRef, Dims, Graph, Tensor, contiguous_nb, make_graph, span_nbytes
from coordinator.schedule.plan import Device
from protocol.dtypes import dtype_of
from protocol.errors import ModelError, PlanError
from protocol.ops import MAX_SRC, VIEW_OPS, Flag, Op, Usage

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One graph of a document. `ids[k]` is the document's id of the tensor that has id k in `graph`."""

    graph: Graph
    ids: tuple[int, ...]
    reserve: bool
    reset: bool


@dataclass(frozen=True, slots=True)
class Document:
    """Devices and the graphs that one scheduler evaluates on them, in order."""

    devices: tuple[Device, ...]
    entries: tuple[Entry, ...]
    parallel: bool
    op_offload: bool


def load_document(source: str | bytes | Mapping[str, Any]) -> Document:
    """Read a document from JSON text or from the parsed object.

    Raises PlanError, in one line, when it is no document: unknown or missing ids, cycles, impossible views, unknown
    types, ops or devices.
    """
    root = _parse(source)
    devices = tuple(_device(d, f"devices[{k}]") for k, d in enumerate(_list(root, "devices", "document")))
    entries = tuple(
        _entry(_object(g, f"graphs[{k}]"), f"graphs[{k}]", devices)
        for k, g in enumerate(_list(root, "graphs", "document"))
    )
    return Document(devices, entries, _flag(root, "parallel"), _flag(root, "op_offload"))


def _parse(source: str | bytes | Mapping[str, Any]) -> Json:
    if isinstance(source, (str, bytes)):
        try:
            source = json.loads(source)
        except (ValueError, UnicodeDecodeError, RecursionError) as error:
            raise PlanError(f"document: not JSON: {error}") from None
    return _object(source, "document")


def _object(value: object, where: str) -> Json:
    if not isinstance(value, Mapping):
        raise PlanError(f"{where}: {type(value).__name__}, expected an object")
    return cast(Json, value)


def _list(value: Json, key: str, where: str, default: list[Any] | None = None) -> list[Any]:
    found = value.get(key)
    if found is None:
        found = default
    if not isinstance(found, list):
        raise PlanError(f"{where}: {key!r} is {_shown(found)}, expected a list")
    return found


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:40]


def _flag(value: Json, key: str, default: bool = False) -> bool:
    found = value.get(key, default)
    if not isinstance(found, bool):
        raise PlanError(f"{key!r} is {_shown(found)}, expected true or false")
    return found


def _int(value: object, what: str, low: int = 0, high: int = 2**62) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise PlanError(f"{what} is {_shown(value)}, expected an integer from {low} to {high}")
    return value


def _text(value: Json, key: str, where: str, default: str | None = None) -> str:
    found = value.get(key)
    if found is None:
        found = default
    if not isinstance(found, str):
        raise PlanError(f"{where}: {key!r} is {_shown(found)}, expected text")
    return found


def _names(value: Json, key: str, where: str) -> tuple[str, ...]:
    found = _list(value, key, where, [])
    if not all(isinstance(name, str) for name in found):
        raise PlanError(f"{where}: {key!r} is {_shown(found)}, expected a list of names")
    return tuple(found)


def _device(value: object, where: str) -> Device:
    d = _object(value, where)
    name = _text(d, "name", where)
    kind = _text(d, "type", where, "gpu")
    limit = d.get("max_size")
    is_host = d.get("is_host")
    return Device(
        name=name,
        kind=kind,
        buft=_text(d, "buft", where, name),
        alignment=_int(32 if d.get("alignment") is None else d["alignment"], f"{where}: 'alignment'", 1),
        max_size=None if limit is None else _int(limit, f"{where}: 'max_size'", 1),
        is_host=kind == "cpu" if is_host is None else _flag(d, "is_host"),
        extra_bufts=_names(d, "extra_bufts", where),
        unsupported_ops=frozenset(_names(d, "unsupported_ops", where)),
        offload_ops=frozenset(_names(d, "offload_ops", where)),
        offload_min_batch=_int(d.get("offload_min_batch", 0), f"{where}: 'offload_min_batch'"),
    )


def _entry(g: Json, where: str, devices: tuple[Device, ...]) -> Entry:
    raw = [_object(t, f"{where}.tensors[{k}]") for k, t in enumerate(_list(g, "tensors", where))]
    ids = [_int(t.get("id"), f"{where}.tensors[{k}]: 'id'") for k, t in enumerate(raw)]
    position = {ident: k for k, ident in enumerate(ids)}
    if len(position) < len(ids):
        twice = next(ident for ident in ids if ids.count(ident) > 1)
        raise PlanError(f"{where}: two tensors have id {twice}, expected different ids")
    order = _order(raw, ids, position, where)
    number = {ids[k]: n for n, k in enumerate(order)}
    tensors = [_tensor(raw[k], n, number, f"{where}: tensor {ids[k]}") for n, k in enumerate(order)]
    for t in tensors:
        _check_view(t, tensors, f"{where}: tensor {ids[order[t.id]]}")
    expand = [_known(i, number, f"{where}: 'expand'") for i in _list(g, "expand", where)]
    pins = _pins(g, number, devices, where)
    graph = make_graph(_text(g, "name", where, where), tensors, expand, pins)
    return Entry(graph, tuple(ids[k] for k in order), _flag(g, "reserve"), _flag(g, "reset", True))


def _known(ident: object, number: Mapping[int, int], where: str) -> int:
    if not isinstance(ident, int) or isinstance(ident, bool) or ident not in number:
        raise PlanError(f"{where} names tensor {_shown(ident)}, which does not exist")
    return number[ident]


def _pins(g: Json, number: Mapping[int, int], devices: tuple[Device, ...], where: str) -> list[tuple[int, str]]:
    pins = []
    for key, device in _object(g.get("pinned") or {}, f"{where}: 'pinned'").items():
        ident = int(key) if str(key).isdecimal() else key
        if device not in [d.name for d in devices]:
            device = devices[_int(device, f"{where}: device of pinned tensor {key}", 0, len(devices) - 1)].name
        pins.append((_known(ident, number, f"{where}: 'pinned'"), device))
    return pins


def _order(raw: list[Json], ids: list[int], position: Mapping[int, int], where: str) -> list[int]:
    """Positions so that sources and roots of views come first; the document's own order where that allows it."""
    users: list[list[int]] = [[] for _ in raw]
    waits = [0] * len(raw)
    for k, t in enumerate(raw):
        needs = [s for s in _list(t, "src", f"{where}: tensor {ids[k]}", []) if s is not None and s != ABSENT]
        if t.get("view_src") is not None:
            needs.append(t["view_src"])
        for s in needs:
            users[_known(s, position, f"{where}: tensor {ids[k]} ({t.get('name', '')!r})")].append(k)
            waits[k] += 1
    ready = [k for k, count in enumerate(waits) if count == 0]
    order = []
    while ready:
        k = heapq.heappop(ready)
        order.append(k)
        for user in users[k]:
            waits[user] -= 1
            if waits[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(raw):
        k = next(k for k, count in enumerate(waits) if count > 0)
        raise PlanError(f"{where}: tensor {ids[k]} ({raw[k].get('name', '')!r}) depends on itself (cycle)")
    return order


def _tensor(t: Json, n: int, number: Mapping[int, int], where: str) -> Tensor:
    try:
        dtype = dtype_of(_text(t, "type", where, "f32"))
    except ModelError as error:
        raise PlanError(f"{where}: {error}") from None
    ne = _dims(t.get("ne"), f"{where}: 'ne'")
    nb = contiguous_nb(dtype, ne) if t.get("nb") is None else _dims(t["nb"], f"{where}: 'nb'")
    op = _text(t, "op", where, "NONE")
    if op not in Op.__members__:
        raise PlanError(f"{where}: unknown op {op!r}, expected ggml's names (MUL_MAT, SOFT_MAX, ...)")
    src = tuple(ABSENT if s in (None, ABSENT) else number[s] for s in _list(t, "src", where, []))
    if len(src) > MAX_SRC:
        raise PlanError(f"{where}: {len(src)} sources, expected at most {MAX_SRC}")
    view_src = t.get("view_src")
    return Tensor(
        id=n,
        name=_text(t, "name", where, ""),
        dtype=dtype,
        ne=ne,
        nb=nb,
        op=Op[op],
        flags=_flags(t, where),
        src=src,
        view_src=None if view_src is None else number[view_src],
        view_offs=_int(t.get("view_offs") or 0, f"{where}: 'view_offs'"),
        buffer=_buffer(t.get("buffer"), where),
    )


def _dims(value: object, what: str) -> Dims:
    if not isinstance(value, list) or not 1 <= len(value) <= 4:
        raise PlanError(f"{what} is {_shown(value)}, expected four integers")
    full = [_int(v, what, 0, 2**48) for v in value] + [1] * (4 - len(value))
    return cast(Dims, tuple(full))


def _flags(t: Json, where: str) -> Flag:
    flags = Flag(0)
    for name in _names(t, "flags", where):
        if name.upper() not in Flag.__members__:
            raise PlanError(f"{where}: unknown flag {name!r}, expected one of input, output, param, loss, compute")
        flags |= Flag[name.upper()]
    return flags


def _buffer(value: object, where: str) -> BufferRef | None:
    if value is None:
        return None
    buffer = _object(value, f"{where}: 'buffer'")
    usage = _text(buffer, "usage", f"{where}: 'buffer'", "any")
    if usage.upper() not in Usage.__members__:
        raise PlanError(f"{where}: buffer usage {usage!r}, expected weights, compute or any")
    return BufferRef(_text(buffer, "buft", f"{where}: 'buffer'"), Usage[usage.upper()])


def _check_view(t: Tensor, tensors: list[Tensor], where: str) -> None:
    if t.view_src is None:
        if t.op in VIEW_OPS:
            raise PlanError(f"{where}: {t.op.name} without a view_src, expected the tensor that it is a view of")
        return
    root = tensors[t.view_src]
    if root.view_src is not None:
        raise PlanError(f"{where}: view_src {root.name!r} is a view itself, expected the tensor at its root")
    have, need = span_nbytes(root.dtype, root.ne, root.nb), t.view_offs + span_nbytes(t.dtype, t.ne, t.nb)
    if need > have:
        raise PlanError(f"{where}: view of {root.name!r} ends at byte {need}, expected at most {have}")
