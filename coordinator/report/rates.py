"""Tables and the plot of published rates against predicted ones, and of the models of devices and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from coordinator.report.plots import check_matplotlib
from coordinator.simulate.claims import NO_CLAIM, PROMISES
from coordinator.simulate.judge import Judged, Verdict
from coordinator.simulate.verdicts import GroupFigures, Outcome
from protocol.errors import UsageError

_COLOURS: Final = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f",
                   "#bcbd22")  # fmt: skip


def row_record(outcome: Outcome) -> dict[str, Any]:
    """A row as JSON shows it."""
    record: dict[str, Any] = {
        "id": outcome.row.ident, "predicted": outcome.predicted, "measured": outcome.row.tps, "error": outcome.error,
        "group": outcome.group,
    }  # fmt: skip
    if outcome.why:
        record["why"] = outcome.why
    return record


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """A promise as JSON shows it."""
    return {
        "group": verdict.promise.group, "promised": verdict.promise.limit, "rows": verdict.n_rows,
        "devices": verdict.n_devices, "median": verdict.median, "worst": verdict.worst, "within_15": verdict.within,
        "kept": verdict.kept,
    }  # fmt: skip


def rows_table(outcomes: Sequence[Outcome]) -> Table:
    """Each row: what, where, measured, predicted, error."""
    table = _table("id", "hardware", "model", "test", "measured", "predicted", "error", "group")
    for o in outcomes:
        split = "" if o.row.split == "ngl=all" else f" {o.row.split}"
        count = f" x{o.row.n_devices}" if o.row.n_devices > 1 else ""
        told = (f"{o.predicted:,.2f}", f"{o.error:+.1%}") if o.predicted and o.error is not None else ("", "none")
        why = o.group if o.predicted is not None else o.why
        table.add_row(o.row.ident, f"{o.row.hardware}{count}", f"{o.row.model} {o.row.quant}", f"{o.row.test}{split}",
                      f"{o.row.tps:,.2f}", *told, why)  # fmt: skip
    return table


def groups_table(groups: Sequence[GroupFigures]) -> Table:
    """How the groups of a table came out."""
    limits = {promise.group: promise.limit for promise in PROMISES}
    table = _table("group", "rows", "mean |error|", "bias", "within 15 %", "promised")
    for g in groups:
        limit = f"{limits[g.group]:.0%}" if g.group in limits else "nothing"
        table.add_row(g.group, str(g.n), f"{g.mape:.1%}", f"{g.bias:+.1%}", f"{g.within:.0%}", limit)
    return table


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """The promises against the splits."""
    table = _table("group", "rows", "devices", "median", "worst split", "within 15 %", "promised", "")
    for v in verdicts:
        if not v.n_rows:
            table.add_row(v.promise.group, "0", "0", "", "", "", f"{v.promise.limit:.0%}", "no rows to judge it by")
            continue
        said = "kept" if v.kept else "NOT SUPPORTED by these rows"
        table.add_row(v.promise.group, str(v.n_rows), str(v.n_devices), f"{v.median:.1%}", f"{v.worst:.1%}",
                      f"{v.within:.0%}", f"{v.promise.limit:.0%}", said)  # fmt: skip
    return table


def reasons_table(reasons: Mapping[str, int]) -> Table:
    """Rows that were left out, or for which nothing is promised."""
    table = _table("rows", "why they count for nothing")
    for why, count in reasons.items():
        table.add_row(str(count), why)
    return table


def devices_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Models of devices."""
    table = _table("device", "class", "memory", "bandwidth", "f16 peak", "decode", "prompt", "launch", "source")
    for r in records:
        table.add_row(
            r["name"], r["class"], f"{r['memory_gib']:g} GiB", f"{r['bandwidth_gbs']:g} GB/s",
            f"{r['fp16_tflops']:g} T", f"{r['decode_gbs']:.0f} GB/s", f"{r['prompt_tflops']:.3g} T",
            f"{r['launch_us']:.2g} us", r["source"],
        )  # fmt: skip
    return table


def links_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Models of links."""
    table = _table("link", "bandwidth", "latency", "duplex", "segment", "RPC per token", "sources")
    for r in records:
        fixed = f"{r['fixed_ms_per_token']:g} ms" if r["fixed_ms_per_token"] else ""
        sources = "; ".join(f"{key.split('_')[0]}: {text}" for key, text in r["sources"].items())
        table.add_row(r["name"], f"{r['bandwidth_gbs']:g} GB/s", f"{r['latency_us']:g} us",
                      "yes" if r["duplex"] else "no", r["segment"] or "its own", fixed, sources)  # fmt: skip
    return table


def plot_rates(path: Path, points: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    """Measured against predicted tokens/s by group, on logarithmic axes, with lines at 15 %.

    Raises UsageError without matplotlib, or for a file name that it cannot write.
    """
    check_matplotlib(f"--plot {path}")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    if path.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise UsageError(f"--plot {path}: expected a name that ends in .svg, .png or .pdf")
    mpl.rcParams["svg.hashsalt"] = "crossdock"  # the same figure from the same rows
    figure, axes = plt.subplots(figsize=(8, 7))
    for (group, pairs), colour in zip(points.items(), _COLOURS * 4, strict=False):
        axes.scatter([m for m, _ in pairs], [p for _, p in pairs], s=9, alpha=0.6, color=colour, linewidths=0,
                     label=f"{group} ({len(pairs)})")  # fmt: skip
    every = [x for pairs in points.values() for pair in pairs for x in pair]
    ends = [min(every, default=1.0) / 1.3, max(every, default=10.0) * 1.3]
    for factor, style in ((1.0, "-"), (1.15, ":"), (1 / 1.15, ":")):
        axes.plot(ends, [x * factor for x in ends], color="black", linewidth=0.7, linestyle=style)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, tokens/s",
             ylabel="predicted, tokens/s", title=title)  # fmt: skip
    axes.legend(fontsize=7, loc="upper left", framealpha=0.9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None, dpi=130)
    plt.close(figure)


def judged_points(rows: Sequence[Judged]) -> dict[str, list[tuple[float, float]]]:
    """Each judged row once, with the median of its predictions."""
    found: dict[str, dict[str, list[Judged]]] = {}
    for row in rows:
        if row.group not in NO_CLAIM:
            found.setdefault(row.group, {}).setdefault(row.ident, []).append(row)
    return {
        group: [(same[0].measured, sorted(r.predicted for r in same)[len(same) // 2]) for same in by_id.values()]
        for group, by_id in sorted(found.items())
    }


def outcome_points(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[float, float]]]:
    """Each predicted row that something is promised for."""
    found: dict[str, list[tuple[float, float]]] = {}
    for o in outcomes:
        if o.predicted is not None and o.group not in NO_CLAIM and o.group != "fault":
            found.setdefault(o.group, []).append((o.row.tps, o.predicted))
    return dict(sorted(found.items()))


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        table.add_column(header, overflow="fold", no_wrap=i == 0)
    return table
