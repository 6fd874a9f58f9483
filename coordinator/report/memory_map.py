"""A picture of compute memory: offsets over time, a colour for each tensor, red where what is wanted is lost."""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coordinator.ownership.spans import Buffer, Occupancy, Overwrite, Span, occupancy
from coordinator.report.plots import check_matplotlib
from coordinator.report.text import show_bytes
from coordinator.schedule.outline import Outline
from coordinator.schedule.plan import Plan
from protocol.errors import InputError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES: Final = (".svg", ".png")
MAX_BUFFERS: Final = 32

_LABEL_HEIGHT: Final = 0.035
_LABEL_WIDTH: Final = 0.005
"""Of a buffer's row, the latter per letter: smaller rectangles have no name on them."""

_TICKS: Final = 6
_MOSTLY: Final = 2
"""A buffer of which less than one part in so many is used is drawn up to its last used byte."""
_NAMES: Final = 4

_RASTER: Final = 4000
"""From this many rectangles on a vector picture holds them as an image: a long run has a hundred thousand."""

Color = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class View:
    """What stands around the rectangles: titles with the span each is for, the time axis' label and what its ticks are
    divided by (1: nodes), and what red means."""

    titles: Sequence[tuple[str, int, int]]
    label: str
    unit: float = 1.0
    lost: str = "red: overwritten though a later graph still reads it"


def draw_memory_map(path: Path, outline: Outline, *, apart: bool) -> Occupancy:
    """Draw the planned graphs of an outline in turn; `apart`: the first one has a scheduler of its own.

    A row per buffer. A tensor is drawn from the node that makes it to the last that reads it, and pale from there on,
    until somebody writes over it. Raises UsageError without matplotlib, for a kind of file that it does not write, or
    for too many buffers; InputError when the file cannot be written.
    """
    check_map(path)
    planned = [graph for graph in outline.graphs if graph.plan is not None]
    plans = [graph.plan for graph in planned if graph.plan is not None]
    found = occupancy(plans, [int(apart and number > 0) for number in range(len(plans))])
    names = [graph.what or graph.name for graph in planned]
    titles = list(zip(names, found.starts, found.starts[1:], strict=False))
    draw(path, found, plans, View(titles, "nodes in order"))
    return found


def draw(path: Path, found: Occupancy, plans: Sequence[Plan], view: View) -> None:
    """Draw who holds which bytes when, by the clock of `found`. Raises UsageError, InputError as `draw_memory_map`."""
    used = {span.buffer for span in found.spans}
    buffers = [b for b in sorted(found.sizes) if b in used]
    if not 0 < len(buffers) <= MAX_BUFFERS:
        raise UsageError(
            f"--memory-map {path}: this plan has {len(buffers)} compute buffers, expected 1 to {MAX_BUFFERS}"
        )
    _draw(path, found, _in_device_order(plans, buffers), view)


def check_map(path: Path) -> None:
    """Raise UsageError for a kind of file that is not written, or without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--memory-map {path}: expected a file that ends in {' or '.join(SUFFIXES)}")
    check_matplotlib(f"--memory-map {path}")


def map_line(path: Path, found: Occupancy, then: str = "safe ownership copies them first, faithful does not") -> str:
    """What the picture shows, in a line; `then` says what becomes of bytes that are lost."""
    n = len({span.buffer for span in found.spans})
    text = f"{path}: {n} buffer{'s' if n != 1 else ''}"
    if not found.overwrites:
        return text
    first = found.overwrites[0]
    lost = sum(loss.end - loss.start for loss in found.overwrites if loss.tensor == first.tensor)
    held = next(span for span in found.spans if span.tensor == first.tensor)
    return (
        f"{text}; {lost:,} of the {held.end - held.start:,} bytes of {first.tensor} are overwritten while they are "
        f"wanted ({_writers(found.overwrites)}): {then}"
    )


def _writers(losses: Sequence[Overwrite]) -> str:
    names = list(dict.fromkeys(loss.by for loss in losses))
    return ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")


def _in_device_order(plans: Sequence[Plan], buffers: Sequence[Buffer]) -> list[Buffer]:
    order = {device.buft or device.name: number for number, device in reversed(list(enumerate(plans[0].devices)))}
    return sorted(buffers, key=lambda buffer: (buffer[0], order.get(buffer[1], len(order)), buffer[2]))


def _draw(path: Path, found: Occupancy, buffers: Sequence[Buffer], view: View) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "crossdock", "hatch.linewidth": 0.6, "path.simplify": False}):
        figure = Figure(figsize=(13, 1.2 + 2.6 * len(buffers)), layout="constrained")
        rows = figure.subplots(len(buffers), 1, sharex=True, squeeze=False)[:, 0]
        several = len({buffer[0] for buffer in buffers}) > 1
        for axes, buffer in zip(rows, buffers, strict=True):
            _draw_buffer(axes, found, buffer, several)
        for title, start, end in view.titles:
            rows[0].annotate(title, ((start + end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
                             textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
        if view.unit != 1.0:
            rows[-1].xaxis.set_major_formatter(lambda value, _: f"{value / view.unit:g}")
        rows[-1].set_xlabel(
            f"{view.label}; solid: still to be read, pale: left behind"
            + (f", {view.lost}" if found.overwrites else "")
        )  # fmt: skip
        try:
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise InputError(f"--memory-map {path}: {error.strerror}") from None


def _draw_buffer(axes: Axes, found: Occupancy, buffer: Buffer, several: bool) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    spans = [span for span in found.spans if span.buffer == buffer]
    size, until = found.sizes[buffer], found.starts[-1]
    top = max(span.end for span in spans)
    shown, of = (size, "") if top * _MOSTLY > size else (top, f", {show_bytes(top)} used")
    patches, colors = [], []
    for span in spans:  # by birth: whoever comes later is painted over what lay there
        color = _color(span.tensor)
        for first, last, shade in ((span.birth, span.death, color), (span.death, until, _pale(color))):
            if first < last:
                patches.append(Rectangle((first, span.start), last - first, span.end - span.start))
                colors.append(shade)
    many = len(patches) >= _RASTER
    made = PatchCollection(patches, facecolor=colors, edgecolor="white", linewidth=0.0 if many else 0.15)
    made.set_rasterized(many)
    axes.add_collection(made)
    here = [loss for loss in found.overwrites if loss.buffer == buffer]
    for loss in here:
        lost = Rectangle((loss.at, loss.start), loss.until - loss.at, loss.end - loss.start)
        lost.set(facecolor=(1, 0, 0, 0.15), edgecolor="red", hatch="////", linewidth=0.5)
        axes.add_patch(lost)
    _name_spans(axes, spans, shown, until)
    _name_losses(axes, here)
    for node in found.splits:
        axes.axvline(node, color="black", linewidth=0.25, linestyle=":")
    for node in found.starts[1:-1]:
        axes.axvline(node, color="black", linewidth=1)
    chunk = f" chunk {buffer[2]}" if buffer[2] else ""
    owner = f" (scheduler {buffer[0]})" if several else ""
    ticks = range(0, shown + 1, 1 << (shown // _TICKS).bit_length())
    label = f"{buffer[1]}{chunk}{owner}\n{show_bytes(size)}{of}"
    axes.set(xlim=(0, until), ylim=(0, shown), yticks=ticks, ylabel=label)
    axes.yaxis.set_major_formatter(lambda value, _: show_bytes(int(value)))


def _name_spans(axes: Axes, spans: Sequence[Span], size: int, until: int) -> None:
    named = {(span.start, span.end, span.death): span for span in spans}  # of those in one place the last, which shows
    for span in named.values():
        nodes, nbytes = span.death - span.birth, span.end - span.start
        if nbytes < _LABEL_HEIGHT * size or nodes < _LABEL_WIDTH * until * len(span.tensor):
            continue
        axes.text((span.birth + span.death) / 2, (span.start + span.end) / 2, span.tensor, fontsize=6,
                  ha="center", va="center", clip_on=True)  # fmt: skip


def _name_losses(axes: Axes, here: Sequence[Overwrite]) -> None:
    """One arrow per tensor that is lost: from its name to the first bytes that go."""
    for name in dict.fromkeys(loss.tensor for loss in here):
        lost = [loss for loss in here if loss.tensor == name]
        total = sum(loss.end - loss.start for loss in lost)
        axes.annotate(f"{name}: {total:,} bytes overwritten by\n{_writers(lost)}",
                      (lost[0].at, lost[0].end), xytext=(0.02, 0.93), textcoords="axes fraction", va="top", fontsize=8,
                      color="#b00000", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
                      arrowprops={"arrowstyle": "->", "color": "#b00000"})  # fmt: skip


def _color(name: str) -> Color:
    """A colour that a name always has; none is red."""
    mixed = zlib.crc32(name.encode())
    return colorsys.hsv_to_rgb(
        0.07 + 0.84 * (mixed & 0xFFFF) / 0x10000, 0.35 + 0.3 * ((mixed >> 16 & 0xFF) / 255), 0.88
    )


def _pale(color: Color) -> Color:
    red, green, blue = (0.82 + 0.18 * part for part in color)
    return red, green, blue
