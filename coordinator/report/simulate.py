"""What `crossdock simulate` says: times and rates, memory, devices and links, and what the time went into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from coordinator.report.plan import memory_table, ranges
from coordinator.report.text import plain, plural, show_bytes
from coordinator.simulate.hardware import Pool
from coordinator.simulate.machine import Machine
from coordinator.simulate.predict import Cause, Phase, Prediction, causes
from coordinator.simulate.series import Load, Series
from coordinator.simulate.sweep import Point

SHOWN_CAUSES = 4
"""Parts of a phase's critical path that are shown."""

SWEPT = 10
"""Steps in which a sweep of all layers is proposed."""

_NAMES = {"vision": "image", "prompt": "prompt", "token": "token"}
_SMALL = 0.005


def seconds(value: float) -> str:
    """`312 us`, `6.42 ms`, `1.25 s`."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def rate(value: float) -> str:
    """`0.42`, `108.8`, `5,007`: per second."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float) -> str:
    """`41 %`; less than a half, but something, is `<1 %`."""
    return "<1 %" if 0 < share < _SMALL else f"{100 * share:.0f} %"


def print_prediction(console: Console, found: Prediction, *, quiet: bool = False) -> None:
    """Times first, then, unless `quiet`, memory, devices, links and the critical path of each phase."""
    series = found.series
    console.print(f"[bold]machine[/]   {plain(machine_line(series.machine))}")
    console.print(f"[bold]layers[/]    {plain(layers_line(series))}")
    console.print(f"[bold]request[/]   {load_line(series.load)}")
    console.print()
    console.print(f"[bold]{times_line(found)}[/]")
    if not quiet:
        _print_details(console, found)
    if series.short:
        console.print()
        console.print(f"[bold]{plain(short_line(series))}[/]")


def _print_details(console: Console, found: Prediction) -> None:
    series = found.series
    console.print()
    console.print(memory_table(series.memory))
    console.print()
    console.print(devices_table(found))
    links = links_table(found)
    if links.row_count:
        console.print()
        console.print(links)
    for phase in found.phases:
        console.print()
        console.print(f"[bold]{phase_line(phase)}[/]")
        for line in cause_lines(found, phase):
            console.print(f"  {plain(line)}")


def machine_line(machine: Machine) -> str:
    """`gpu0 24 GiB at 1,008 GB/s, cpu0 64 GiB at 60 GB/s`, and what some of them share."""
    parts = []
    for model in machine.models:
        memory = f"{model.memory_nbytes / (1 << 30):g} GiB " if model.memory_nbytes else ""
        parts.append(f"{model.name} {memory}at {model.bandwidth / 1e9:,.4g} GB/s")
    shared = [f"; {pool_text(pool)} for {len(pool.workers)} of them" for pool in machine.fabric.pools]
    return ", ".join(parts) + "".join(shared)


def pool_text(pool: Pool) -> str:
    """`1.9 processors and 21 GB/s of weights`."""
    memory = f" and {pool.memory / 1e9:,.4g} GB/s of weights" if pool.memory else ""
    return f"{pool.processors:g} processors{memory}"


def layers_line(series: Series) -> str:
    """`gpu0 0-20   gpu1 21-39, output`."""
    found: dict[str, list[int | str]] = {}
    names, last = series.machine.names, len(series.placement.layers) - 1
    for layer, device in enumerate(series.placement.layers):
        found.setdefault(names[device], []).append("output" if layer == last else layer)
    return "   ".join(f"{name} {ranges(layers)}" for name, layers in found.items())


def load_line(load: Load) -> str:
    """`1 image, prompt of 512, 128 tokens`, and what is more than one of it."""
    parts = [plural(load.n_images, "image")] if load.n_images else []
    parts.append(f"prompt of {plural(load.n_prompt, 'token')} in micro-batches of {load.n_ubatch}")
    parts.append(f"{plural(load.n_predict, 'token')} after it")
    if load.batch > 1:
        parts.append(f"{load.batch} sequences in a batch")
    if load.n_requests > 1:
        parts.append(f"{load.n_requests} requests at once")
    return ", ".join(parts)


def times_line(found: Prediction) -> str:
    """`first token after 328 ms · image 226 ms · prompt 102 ms (5,007/s) · 108.8 tokens/s`."""
    parts = [f"first token after {seconds(found.first_token_s)}"]
    if found.encode_s:
        parts.append(f"image {seconds(found.encode_s)}")
    parts.append(f"prompt {rate(found.prompt_rate)} tokens/s")
    if found.decode_rate:
        parts.append(f"then {rate(found.decode_rate)} tokens/s")
    return " · ".join(parts)


def devices_table(found: Prediction) -> Table:
    """The share of each phase that a device computes."""
    table = _table(("busy", *(phase.tag for phase in found.phases), "all"))
    for worker, name in enumerate(found.series.machine.names):
        total = found.timeline.workers[worker].busy_s / found.end_s if found.end_s else 0.0
        cells = [percent(phase.busy[worker]) for phase in found.phases]
        table.add_row(plain(name), *cells, percent(total))
    return table


def links_table(found: Prediction) -> Table:
    """Bytes that one evaluation of each phase sends over a link, and the share of the phase that it is busy."""
    columns = [c for phase in found.phases for c in (f"per {_NAMES[phase.tag]}", "busy")]
    table = _table(("link", *columns, "all"))
    for route in sorted({use.route for phase in found.phases for use in phase.links}):
        cells = []
        for phase in found.phases:
            use = next((use for use in phase.links if use.route == route), None)
            cells += ["-", "-"] if use is None else [show_bytes(use.nbytes), percent(use.busy)]
        total = found.timeline.route_busy_s[route] / found.end_s if found.end_s else 0.0
        table.add_row(plain(found.series.machine.fabric.routes[route].name), *cells, percent(total))
    return table


def phase_line(phase: Phase) -> str:
    """`token: 128 evaluations, 1.18 s; critical path`."""
    return f"{phase.tag}: {plural(phase.n, 'evaluation')}, {seconds(phase.seconds)}; its critical path"


def cause_lines(found: Prediction, phase: Phase) -> list[str]:
    """`41 %  waiting for 10gbe gpu0 -> gpu1 at split 7 (l_out-20)`, the most expensive first."""
    total = sum(part.seconds for part in phase.path)
    shown = [cause for cause in causes(phase.path) if total and cause.seconds >= _SMALL * total]
    lines = [f"{percent(c.seconds / total):>5}  {cause_text(found.series, c)}" for c in shown[:SHOWN_CAUSES]]
    rest = total - sum(cause.seconds for cause in shown[:SHOWN_CAUSES])
    if total and rest >= _SMALL * total:
        lines.append(f"{percent(rest / total):>5}  the rest")
    return lines


def cause_text(series: Series, cause: Cause) -> str:
    """A part of the critical path in words."""
    if cause.kind == "compute":
        return f"{series.machine.names[cause.where]} computes"
    if cause.kind == "host":
        return "the host between evaluations"
    name = series.machine.fabric.routes[cause.where].name
    split, _, tensor = cause.splits[0]
    where = f"at split {split} ({tensor})" if tensor else f"at split {split}"
    if len(cause.splits) > 1:
        where = f"at {plural(len(cause.splits), 'split')}, most {where}"
    words = {
        "bytes": "waiting for", "latency": "the latency of", "fixed": "the fixed cost of", "queue": "queueing for",
    }  # fmt: skip
    return f"{words[cause.kind]} {name} {where}"


def short_line(series: Series) -> str:
    """`does not fit: gpu0 is 3.2 GiB short`."""
    return "does not fit: " + ", ".join(f"{m.device} is {show_bytes(m.short)} short" for m in series.short)


def prediction_document(found: Prediction) -> dict[str, Any]:
    """The same facts for programs; seconds and bytes."""
    series, load = found.series, found.series.load
    names, routes = series.machine.names, series.machine.fabric.routes
    return {
        "devices": [
            {"name": m.name, "class": m.cls, "memory": m.memory_nbytes or None, "bandwidth": m.bandwidth}
            for m in series.machine.models
        ],
        "layers": [names[device] for device in series.placement.layers],
        "request": {
            "images": load.n_images, "prompt": load.n_prompt, "predict": load.n_predict, "ubatch": load.n_ubatch,
            "batch": load.batch, "requests": load.n_requests,
        },
        "image_s": found.encode_s,
        "first_token_s": found.first_token_s,
        "prompt_tokens_per_s": found.prompt_rate,
        "tokens_per_s": found.decode_rate,
        "total_s": found.end_s,
        "fits": found.fits,
        "memory": [
            {"device": m.device, "bytes": dict(m.parts), "total": m.total, "limit": m.limit, "short": m.short}
            for m in series.memory
        ],
        "phases": {phase.tag: _phase_document(found, phase, names) for phase in found.phases},
        "links": [
            {"name": routes[k].name, "bytes": found.timeline.route_nbytes[k],
             "transfers": found.timeline.route_transfers[k], "busy_s": found.timeline.route_busy_s[k]}
            for k in range(len(routes)) if found.timeline.route_transfers[k]
        ],
        "events": found.timeline.n_events,
    }  # fmt: skip


def _phase_document(found: Prediction, phase: Phase, names: Sequence[str]) -> dict[str, Any]:
    routes = found.series.machine.fabric.routes
    return {
        "evaluations": phase.n,
        "seconds": phase.seconds,
        "busy": dict(zip(names, phase.busy, strict=True)),
        "links": [
            {"name": routes[u.route].name, "bytes": u.nbytes, "transfers": u.transfers, "busy": u.busy}
            for u in phase.links
        ],
        "critical_path": [
            {"kind": c.kind, "where": _where(found.series, c), "seconds": c.seconds, "split": c.splits[0][0],
             "tensor": c.splits[0][2], "splits": len(c.splits)}
            for c in causes(phase.path)
        ],
    }  # fmt: skip


def _where(series: Series, cause: Cause) -> str:
    if cause.kind == "compute":
        return series.machine.names[cause.where]
    return "host" if cause.kind == "host" else series.machine.fabric.routes[cause.where].name


def _table(columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    """A plain table of numbers, but for the first column and the `left` ones."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if not number or column in left else "right", no_wrap=True)
    return table


def next_line(found: Prediction, traced: bool) -> str:
    """The commands that go on from here."""
    hints = []
    if len(found.series.machine.models) > 1:
        hints.append("--search finds the best placement")
        hints.append(f"--sweep n-gpu-layers={_all_layers(len(found.series.placement.layers))} shows all")
    if not traced:
        hints.append("--trace FILE shows every copy")
    return f"[bold]next[/]      {'; '.join(hints)}"


def _all_layers(most: int) -> str:
    """`0..31:3`: a dozen numbers of layers, the output counted as one, or all of few."""
    return f"0..{most}" if most <= SWEPT else f"0..{most}:{round(most / SWEPT)}"


def sweep_table(points: Sequence[Point]) -> Table:
    """A row for each combination."""
    keys = list(points[0].values) if points else []
    table = _table((*keys, "first token", "prompt tokens/s", "tokens/s", "busiest link", "memory"), left=("memory",))
    for point in points:
        link, share = point.busiest_link
        short = ", ".join(f"{m.device} {show_bytes(m.short)} short" for m in point.short)
        table.add_row(
            *(str(value) for value in point.values.values()), seconds(point.first_token_s), rate(point.prompt_rate),
            rate(point.decode_rate), f"{percent(share)} {plain(link)}" if link else "-", plain(short) or "fits",
        )  # fmt: skip
    return table


def point_document(point: Point) -> dict[str, Any]:
    """A combination for programs."""
    return {
        **{key.replace("-", "_"): value for key, value in point.values.items()},
        "image_s": point.encode_s,
        "first_token_s": point.first_token_s,
        "prompt_tokens_per_s": point.prompt_rate,
        "tokens_per_s": point.decode_rate,
        "fits": not point.short,
        "short": {memory.device: memory.short for memory in point.short},
        "busiest_link": {"name": point.busiest_link[0], "busy": point.busiest_link[1]},
    }
