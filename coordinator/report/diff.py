"""What `crossdock diff` says: the first tensor that differs, by how much, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from coordinator.report.taps import shape, statistics_text
from coordinator.report.text import plain
from coordinator.runtime.compare import Change, Comparison, First, Part, TokenChange
from coordinator.runtime.recording import Entry, Recording
from protocol.schema import to_plain

_SHOWN = 8
"""Evaluations and layers that are named."""


def print_comparison(console: Console, found: Comparison) -> None:
    """A few lines for people."""
    a, b = found.a, found.b
    for letter, run in (("A", a), ("B", b)):
        console.print(f"[bold]{letter}[/]         {plain(run.label) or '(no options)'}")
    changed = _options(a, b)
    if changed:
        console.print(f"[bold]options[/]   {plain(changed)}")
    if a.header.model != b.header.model:
        models = f"{a.header.model_file} and {b.header.model_file} are not the same model"
        console.print(f"[bold]models[/]    {plain(models)}")
    if found.first is None:
        console.print(f"[bold]tensors[/]   all {found.n_common:,} that both have are equal")
    else:
        _print_first(console, found.first)
        _print_spread(console, found)
    for letter, n in (("A", found.only_a), ("B", found.only_b)):
        if n:
            console.print(f"[bold]only {letter}[/]    {n:,} {'tensor' if n == 1 else 'tensors'}")
    console.print(f"[bold]answer[/]    {plain(_answer(found.token))}")
    for letter, run in (("A", a), ("B", b)):
        if run.end.stopped:
            console.print(f"[bold]stopped[/]   {letter}: {plain(run.end.stopped)}")


def _options(a: Recording, b: Recording) -> str:
    """`n_gpu_layers: 3, not set`: what was asked for in one run and not in the other."""
    x, y = a.header.options, b.header.options
    names = [name for name in sorted({*x, *y}) if x.get(name) != y.get(name)]
    return "; ".join(f"{name} {x.get(name, 'not set')} (A), {y.get(name, 'not set')} (B)" for name in names)


def _print_first(console: Console, first: First) -> None:
    a, b = first.a, first.b
    place = f"{a.graph} graph, evaluation {a.evaluation}: {a.name}"
    if a.occurrence:
        place += f" ({a.occurrence + 1})"
    console.print(
        f"[bold]first[/]     {plain(place)}   {a.op} {plain(f'{a.type} {shape(a.ne)}')}, behind "
        f"{first.n_equal:,} equal {'tensor' if first.n_equal == 1 else 'tensors'}"
    )
    for letter, entry in (("A", a), ("B", b)):
        console.print(f"          {letter}  {plain(_entry(entry, a))}")
    if a.sources:
        console.print(f"          reads {plain(', '.join(a.sources))}")
    if first.change is not None:
        console.print(f"[bold]size[/]      {plain(_size(first.change))}")


def _entry(entry: Entry, like: Entry) -> str:
    where = "input of" if entry.node < 0 else f"split {entry.split} on"
    other = "" if (entry.type, entry.ne) == (like.type, like.ne) else f"   {entry.type} {shape(entry.ne)}"
    stats = statistics_text(entry.statistics)
    return f"{where} {entry.worker}   sha256 {entry.sha256[:12]}   {stats}{other}"


def _size(change: Change) -> str:
    if not change.n_differ:
        return "the same numbers in other bits (0 and -0, or another NaN)"
    at = f"at [{', '.join(map(str, reversed(change.at)))}]: {change.a:.6g} and {change.b:.6g}"
    count = f"{change.n_differ:,} of {change.n_values:,} {'value' if change.n_values == 1 else 'values'}"
    return f"{count}, {at}" if change.distance is None else f"{count}, at most by {change.distance:.4g} ({at})"


def _print_spread(console: Console, found: Comparison) -> None:
    console.print(f"[bold]spread[/]    {found.n_later_differ:,} of {found.n_later:,} later tensors differ")
    for what, parts in (("evaluations", found.evaluations), ("layers", found.layers)):
        touched = [part for part in parts if part.n_differ]
        if touched:
            console.print(f"          {what}: {plain(_parts(touched))}")


def _parts(parts: Sequence[Part]) -> str:
    shown = ", ".join(f"{part.label} ({part.n_differ:,} of {part.n:,})" for part in parts[:_SHOWN])
    return shown if len(parts) <= _SHOWN else f"{shown}, ... {parts[-1].label}, {len(parts)} in all"


def _answer(token: TokenChange | None) -> str:
    if token is None:
        return "the same tokens"
    sides = ", ".join(
        f"{letter} {'has ended' if side is None else f'{side[1]!r} ({side[0]})'}"
        for letter, side in (("A", token.a), ("B", token.b))
    )
    return f"differs from output token {token.number} on: {sides}"


def comparison_document(found: Comparison) -> dict[str, Any]:
    """The same facts for programs."""
    first = found.first
    return {
        "differs": found.differs,
        "runs": [
            {"label": run.label, "header": to_plain(run.header), "stopped": run.end.stopped,
             "tokens": list(run.end.tokens), "text": "".join(run.end.texts)}
            for run in (found.a, found.b)
        ],
        "common": found.n_common,
        "only": [found.only_a, found.only_b],
        "first": None if first is None else {
            "a": to_plain(first.a), "b": to_plain(first.b), "equal_before": first.n_equal,
            "change": None if first.change is None else _change_document(first.change),
        },
        "later": found.n_later,
        "later_differ": found.n_later_differ,
        "evaluations": to_plain(found.evaluations),
        "layers": to_plain(found.layers),
        "token": to_plain(found.token),
    }  # fmt: skip


def _change_document(change: Change) -> dict[str, Any]:
    """JSON has no NaN and no infinity: such values are text."""
    document: dict[str, Any] = to_plain(change)
    for side in ("a", "b"):
        if not abs(document[side]) < float("inf"):
            document[side] = str(document[side])
    return document
