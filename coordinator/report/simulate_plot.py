"""A sweep as a picture: rates over the key with the most values, a line for each combination of the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coordinator.report.plots import check_matplotlib
from coordinator.simulate.sweep import Point, Values, varied
from protocol.errors import InputError, UsageError

SUFFIXES = (".svg", ".png", ".pdf")


def plot_sweep(path: Path, values: Values, points: Sequence[Point], title: str) -> None:
    """Tokens per second and time to the first token; what does not fit is hollow.

    Raises UsageError without matplotlib or for a kind of file that it does not write, InputError when it cannot.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    check_matplotlib(f"--plot {path}")
    from matplotlib.figure import Figure

    axis, *others = varied(values)
    figure = Figure(figsize=(9, 4), layout="constrained")
    rates, waits = figure.subplots(1, 2)
    lines: dict[tuple[int, ...], list[Point]] = {}
    for point in points:
        lines.setdefault(tuple(point.values[key] for key in others), []).append(point)
    for chosen, line in lines.items():
        label = ", ".join(f"{key} {value}" for key, value in zip(others, chosen, strict=True))
        x = [point.values[axis] for point in line]
        for axes, y in (
            (rates, [p.decode_rate for p in line]),
            (waits, [p.first_token_s for p in line]),
        ):  # fmt: skip
            (drawn,) = axes.plot(x, y, linewidth=1, label=label or None)
            fits = [not point.short for point in line]
            for hollow in (False, True):
                kept = [k for k, fit in enumerate(fits) if fit != hollow]
                axes.plot([x[k] for k in kept], [y[k] for k in kept], "o", markersize=4, color=drawn.get_color(),
                          markerfacecolor="none" if hollow else drawn.get_color())  # fmt: skip
    rates.set(xlabel=axis, ylabel="tokens/s after the prompt", title=f"{title}, simulated")
    waits.set(xlabel=axis, ylabel="seconds to the first token", title="hollow: does not fit the memory")
    for axes in (rates, waits):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if others:
        rates.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise InputError(f"--plot {path}: {error.strerror}") from None
