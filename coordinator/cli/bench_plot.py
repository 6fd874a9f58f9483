"""The picture of `crossdock bench scaling`: rates by placement, and where the time goes. Needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.report.bench import Point, Subject
from coordinator.report.plots import check_matplotlib
from protocol.errors import InputError, UsageError

SUFFIXES = (".svg", ".png", ".pdf")
COLOURS = ("blue", "orange", "purple", "brown", "grey")


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises UsageError for another kind of file, or when matplotlib is not installed."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path}: expected a name that ends with {', '.join(SUFFIXES)}")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--plot {path}: no such folder")
    _matplotlib()


def plot(path: Path, subject: Subject, points: Sequence[Point]) -> None:
    """One row of panels per test: rates on the left, shares of the time on the right. Raises InputError."""
    plt = _matplotlib()
    plt.rcParams["svg.fonttype"] = "none"
    names = [test.name for test in points[0].tests]
    size = (11, 1.2 + len(names) * (0.9 + 0.22 * len(points)))
    figure, axes = plt.subplots(len(names), 2, figsize=size, squeeze=False, layout="constrained")
    labels = [_label(point) for point in points]
    places = list(range(len(points)))[::-1]
    for (left, right), name in zip(axes, names, strict=True):
        tests = [next(t for t in p.tests if t.name == name) for p in points]
        threads = [p.setting.threads for p in points]
        shades = [COLOURS[sorted(set(threads)).index(n) % len(COLOURS)] for n in threads]
        left.barh(places, [t.rate for t in tests], xerr=[t.spread for t in tests], color=shades)
        left.set_yticks(places, labels, fontsize=7)
        left.set_title(f"{name}: {'images' if name == 'image' else 'tokens'} per second", fontsize=9)
        kernels = [100 * min(1.0, t.kernel_share) for t in tests]
        right.barh(places, kernels, color="tab:green")
        right.barh(places, [100 - k for k in kernels], left=kernels, color="tab:red")
        right.set_yticks([])
        right.set_xlim(0, 100)
        right.set_title(f"{name}: per cent of the time", fontsize=9)
    colours = ", ".join(f"{c} {n}" for n, c in zip(sorted({p.setting.threads for p in points}), COLOURS, strict=False))
    title = f"{subject.name} {subject.dtype}; threads of a worker: {colours}; time: green in kernels, red outside"
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    plt.close(figure)


def _label(point: Point) -> str:
    s = point.setting
    layers = "" if s.layers == "-" else f" -ngl {s.layers}"
    return f"{s.workers}{layers} -t {s.threads} -ub {s.ubatch}"


def _matplotlib() -> Any:
    """pyplot, drawing into files. Raises UsageError."""
    check_matplotlib("--plot")
    importlib.import_module("matplotlib").use("agg")
    return importlib.import_module("matplotlib.pyplot")
