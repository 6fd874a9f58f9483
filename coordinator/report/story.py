"""Hazards in words: who wants what, what lies there, why, what hides it, what would help; scenarios as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from coordinator.ownership.facts import Access, Extent, Finding
from coordinator.ownership.scenario import Report
from coordinator.report.text import plural

_MARGIN = 11
_LAYERS = re.compile(r"n-gpu-layers (\d+)(.*)")


def story(finding: Finding) -> list[str]:
    """The lines of a finding: a title, then what, found, why, hidden, help, each under its own word."""
    kind = str(finding.kind).replace("-", " ")
    lines = [f"{kind:<{_MARGIN + 2}}{_heading(finding)}" if len(kind) < _MARGIN + 2 else f"{kind}  {_heading(finding)}"]
    if finding.extent is not None or finding.writer is not None:
        lines.append(_line("wants", _wants(finding)))
    if finding.latent:
        lines.append(_line("finds", "its own bytes still: right by luck"))
    elif finding.overwriter is not None:
        lines.append(_line("finds", _found(finding.overwriter)))
    lines.append(_line("why", finding.why))
    if finding.hidden_by:
        lines.append(_line("hidden by", "; ".join(_merge(finding.hidden_by))))
    if finding.shown_by:
        lines.append(_line("shown by", "; ".join(_merge(finding.shown_by))))
    if finding.would_help:
        lines.append(_line("would help", _listed(finding.would_help)))
    return lines


def finding_document(finding: Finding) -> dict[str, Any]:
    """The same facts for programs."""
    return {**asdict(finding), "kind": str(finding.kind), "cost": finding.is_cost, "story": story(finding)}


def print_findings(console: Console, findings: Iterable[Finding]) -> None:
    """One story after the other."""
    for number, finding in enumerate(findings):
        if number:
            console.print()
        first, *rest = story(finding)
        console.print(f"[bold]{_safe(first)}[/]")
        for line in rest:
            console.print(_safe(line))


def scenario_document(report: Report) -> dict[str, Any]:
    """A scenario with what was expected and what came, for programs."""
    s = report.scenario
    return {
        "id": s.ident,
        "title": s.title,
        "source": s.source,
        "twin_of": s.twin_of,
        "expect": dict(s.expect),
        "static": [finding_document(f) for f in report.static],
        "modes": {
            o.mode: {
                "result": o.result,
                "reallocations": o.reallocations,
                "finding": None if o.finding is None else finding_document(o.finding),
                "reads": [] if o.run is None else [asdict(seen) for seen in o.run.seen],
            }
            for o in report.outcomes
        },
        "as_documented": report.as_documented,
    }


def print_scenarios(console: Console, reports: Sequence[Report]) -> None:
    """A row per scenario, and how many behave as documented."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    modes = [o.mode for o in reports[0].outcomes] if reports else []
    for column in ("scenario", "static", *modes, "", "what happens"):
        table.add_column(column, no_wrap=True)
    for r in reports:
        cells = [_safe(r.scenario.ident), r.static_result, *(o.result for o in r.outcomes)]
        table.add_row(*cells, "" if r.as_documented else "<- not as documented", _safe(r.scenario.title))
    console.print(table)
    console.print()
    good, twins = sum(r.as_documented for r in reports), [r for r in reports if r.scenario.twin_of]
    alarms = sum(r.static_result != "none" for r in twins)
    console.print(
        f"{good} of {plural(len(reports), 'scenario')} as documented; "
        f"{plural(len(twins), 'innocent twin')}, {plural(alarms, 'false alarm')}"
    )


def print_scenario(console: Console, report: Report) -> None:
    """One scenario: what is read in each mode, and the story that strict tells."""
    s = report.scenario
    console.print(f"[bold]{_safe(s.ident)}[/]  {_safe(s.title)}")
    for text in (s.source, s.about):
        if text:
            console.print(_safe(text))
    console.print()
    for o in report.outcomes:
        wrong = [seen for seen in o.run.seen if not seen.is_right] if o.run is not None else []
        values = ", ".join(f"{seen.tensor} is {_value(seen.low, seen.high)}, right {seen.right:g}" for seen in wrong)
        again = f"  {plural(o.reallocations, 'reallocation')}" if s.reallocations else ""
        console.print(f"{o.mode:<{_MARGIN}}{o.result}{'  ' + _safe(values) if values else ''}{again}")
    told = report.static or tuple(o.finding for o in report.outcomes if o.finding is not None)
    if told:
        console.print()
        print_findings(console, told)
    if not report.as_documented:
        expected = ", ".join(f"{mode} {result}" for mode, result in s.expect.items())
        console.print(f"\nnot as documented: expected {expected}; the static check says {report.static_result}")


def summary(findings: Sequence[Finding], n_graphs: int) -> str:
    """One line: how many hazards, how many of them hidden, how many costs."""
    if not findings:
        return f"{plural(n_graphs, 'graph')}, no hazard found"
    hazards, costs = [f for f in findings if not f.is_cost], [f for f in findings if f.is_cost]
    latent = sum(f.latent for f in hazards)
    text = f"{plural(n_graphs, 'graph')}, {plural(len(hazards), 'hazard')}"
    if latent:
        text += f" ({latent} hidden in this plan)"
    return text + (f", {plural(len(costs), 'cost')}" if costs else "")


def _heading(finding: Finding) -> str:
    if finding.reader is not None:
        return _actor(finding.reader)
    actor = finding.overwriter or finding.writer
    return finding.tensor if actor is None else _actor(actor)


def _actor(a: Access) -> str:
    """`language graph, split 1, node 14 (MUL_MAT cross_k-1) on accel0`; `the host, step 6 (read language.result)`."""
    if not a.graph:
        where = f" on {a.device}" if a.device else ""
        return f"the host{where}, step {a.step} ({a.what} {a.tensor})"
    parts = [f"{a.graph} graph"]
    if a.evaluation > 1:
        parts.append(f"evaluation {a.evaluation}")
    if a.split >= 0:
        parts.append(f"split {a.split}")
    if a.node >= 0:
        parts.append(f"node {a.node}")
    where = f" on {a.device}" if a.device else ""
    return f"{', '.join(parts)} ({a.what} {_short(a.tensor)}){where}"


def _wants(f: Finding) -> str:
    text = _short(f.tensor)
    if f.writer is not None:
        text += f", written by the {_actor(f.writer).removeprefix('the ')}"
        if f.writer.epoch:
            text += f", epoch {f.writer.epoch}"
    return text + (f", {_extent(f.extent)}" if f.extent is not None else "")


def _found(a: Access) -> str:
    if a.what == "free":
        return f"{a.tensor} was replaced by the host, step {a.step}: its contents are lost"
    at = f" [{a.extent.start}, {a.extent.end})" if a.extent is not None else ""
    epoch = f" in epoch {a.epoch}" if a.epoch else ""
    return f"{_short(a.tensor)}{at}, written{epoch} by the {_actor(a).removeprefix('the ')}"


def _extent(extent: Extent) -> str:
    return f"{extent.memory} [{extent.start}, {extent.end})"


def _merge(labels: Sequence[str]) -> list[str]:
    """Numbers of layers as ranges: `n-gpu-layers 0 to 3, 7`."""
    numbers = [int(m[1]) for label in labels if (m := _LAYERS.match(label))]
    out = [label for label in labels if not _LAYERS.match(label)]
    ranges: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if ranges and ranges[-1][1] == n - 1:
            ranges[-1] = (ranges[-1][0], n)
        else:
            ranges.append((n, n))
    if ranges:
        out.append("n-gpu-layers " + ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in ranges))
    return out


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, or {items[-1]}"


def _line(word: str, text: str) -> str:
    return f"  {word:<{_MARGIN}}{text}"


def _value(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _short(tensor: str) -> str:
    return tensor.partition(".")[2] or tensor


def _safe(text: str) -> str:
    """Text that rich does not take for markup."""
    return text.replace("[", "\\[")
