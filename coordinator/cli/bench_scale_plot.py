"""The picture of `crossdock bench scaling --simulate`: real and simulated rates over workers. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from coordinator.report.plots import check_matplotlib
from coordinator.report.scaling import Curve, Real, Scaling
from coordinator.simulate.scale import ScalePoint
from protocol.errors import InputError

COLOURS: Final = ("#1f77b4", "#2ca02c", "#d95f02", "#e6ab02")


def plot_scaling(path: Path, name: str, found: Scaling) -> None:
    """Prompts on the left, tokens on the right, both axes logarithmic: lines are simulated, squares are real with their
    least and most. Raises UsageError without matplotlib, InputError when the file cannot be written."""
    check_matplotlib("--plot")
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    with matplotlib.rc_context({"svg.hashsalt": "crossdock", "svg.fonttype": "none"}):
        _draw(left, found, "tokens of prompts per second", lambda p: p.prompt_per_s, lambda r: r.prompt_rates)
        if found.load.n_predict:
            _draw(right, found, "tokens per second after them", lambda p: p.tokens_per_s, lambda r: r.token_rates)
        left.legend(fontsize="small")
        figure.suptitle(f"{name} on workers as in {Path(found.system).name}", fontsize=11)
        try:
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise InputError(f"--plot {path}: cannot be written: {error.strerror}") from None


def _draw(
    axes: Any, found: Scaling, title: str, simulated: Callable[[ScalePoint], float], real: Callable[[Real], list[float]]
) -> None:
    for curve, colour in zip(found.curves, COLOURS, strict=False):
        x = [row.simulated.workers for row in curve.rows]
        axes.plot(x, [simulated(row.simulated) for row in curve.rows], "o-", color=colour, linewidth=1, markersize=3,
                  label=f"{curve.name}, simulated")  # fmt: skip
        _draw_real(axes, curve, colour, real)
    axes.set(xscale="log", yscale="log", xlabel="workers", title=title)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.grid(alpha=0.3)


def _draw_real(axes: Any, curve: Curve, colour: str, real: Callable[[Real], list[float]]) -> None:
    points = [(row.simulated.workers, real(row.real)) for row in curve.rows if row.real is not None]
    if not points:
        return
    x, y = [n for n, _ in points], [statistics.median(rates) for _, rates in points]
    spread = [[m - min(rates) for m, (_, rates) in zip(y, points, strict=True)],
              [max(rates) - m for m, (_, rates) in zip(y, points, strict=True)]]  # fmt: skip
    axes.errorbar(x, y, yerr=spread, fmt="s", color=colour, markerfacecolor="none", markersize=7, capsize=2,
                  label=f"{curve.name}, real")  # fmt: skip
