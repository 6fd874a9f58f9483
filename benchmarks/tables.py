"""From the file of `--json` to Markdown tables and a picture: `python -m benchmarks.tables FILE... [--plot FILE]`.

Later files replace the rows of earlier ones.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def rows_of(files: Sequence[Path]) -> list[Json]:
    """All rows, the last one of each name, in the order in which names first came; with the load at their start."""
    found: dict[tuple[str, str], Json] = {}
    for file in files:
        for document in json.loads(file.read_text(encoding="utf-8")):
            for row in document["rows"]:
                found[row["bench"], row["name"]] = row | {"load": document["before"]["load"][0]}
    return list(found.values())


def number(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(rows: Sequence[Json]) -> str:
    """One table per benchmark."""
    lines: list[str] = []
    for bench in dict.fromkeys(row["bench"] for row in rows):
        chosen = [row for row in rows if row["bench"] == bench]
        pairs = any(row["ratio"] is not None for row in chosen)
        cpu = any(row["cpu_ratio"] is not None for row in chosen)
        header = [bench, "ours", "unit"] + (["peer", "ratio", "quartiles"] if pairs else ["note"])
        header += ["of CPU time"] if cpu else []
        lines += ["", _line(header), _line(["---" if name in (bench, "note") else "---:" for name in header])]
        for row in chosen:
            cells = [row["name"], number(row["ours"]), row["unit"]]
            if pairs:
                cells += [f"{number(row['peer'])} ({row['peer_name']})", f"{row['ratio']:.2f}"]
                cells.append(f"{row['low']:.2f} to {row['high']:.2f}")
            else:
                cells.append(row["note"])
            if cpu:
                cells.append("" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.2f}")
            lines.append(_line(cells))
    return "\n".join(lines).strip()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(path: Path, rows: Sequence[Json]) -> None:
    """Ratios with their quartiles, on a logarithmic axis; CPU time's as hollow marks."""
    importlib.import_module("matplotlib").use("agg")
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmarks"})
    chosen = [row for row in rows if row["ratio"] is not None][::-1]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.17 * len(chosen)), layout="constrained")
    for i, row in enumerate(chosen):
        colour = "tab:green" if row["ratio"] >= 1 else "tab:red"
        axes.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=1)
        axes.plot(row["ratio"], i, "o", color=colour, markersize=3.5)
        if row["cpu_ratio"] is not None:
            axes.plot(row["cpu_ratio"], i, "o", markerfacecolor="none", color="black", markersize=4)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    ticks = (0.25, 0.5, 1, 2, 4, 8)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(chosen)), [row["name"] for row in chosen], fontsize=6)
    axes.set_ylim(-1, len(chosen))
    axes.set_title("peer's time over ours: median and quartiles; hollow: of CPU time", fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--bench", default="", metavar="NAME,...", help="only these")
    parser.add_argument("--match", default="", metavar="TEXT", help="only rows whose name contains it")
    chosen = parser.parse_args()
    rows = [row for row in rows_of(chosen.files) if not chosen.bench or row["bench"] in chosen.bench.split(",")]
    rows = [row for row in rows if chosen.match.lower() in row["name"].lower()]
    print(markdown(rows))
    if chosen.plot is not None:
        plot(chosen.plot, rows)


if __name__ == "__main__":
    main()
