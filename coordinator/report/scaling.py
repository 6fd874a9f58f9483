"""Scaling on one scale: what few processes of this machine reach, and where simulated workers go on from there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table

from coordinator.report.bench import machine
from coordinator.report.simulate import percent, rate
from coordinator.report.text import plain
from coordinator.simulate.scale import ScalePoint
from coordinator.simulate.series import Load


@dataclass(frozen=True, slots=True)
class Real:
    """Requests that processes of this machine ran: seconds that prompts and tokens took, by repetition.

    `sequences` of `n_prompt` and `n_predict` tokens each were under way at once.
    """

    sequences: int
    n_prompt: int
    n_predict: int
    prompt_s: tuple[float, ...]
    token_s: tuple[float, ...]

    @property
    def prompt_rates(self) -> list[float]:
        """Tokens of prompts per second, of all sequences, by repetition."""
        return [self.sequences * self.n_prompt / seconds for seconds in self.prompt_s]

    @property
    def token_rates(self) -> list[float]:
        """Tokens after the prompt per second, of all sequences, by repetition; none where none were asked for."""
        return [self.sequences * self.n_predict / seconds for seconds in self.token_s if self.n_predict]


@dataclass(frozen=True, slots=True)
class Row:
    """One number of workers: simulated, and real where that was measured."""

    simulated: ScalePoint
    real: Real | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """A way to use more workers: its name, what it means in a sentence, and its rows."""

    name: str
    about: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Scaling:
    """All curves of a model on a machine; `load` is a sequence's."""

    model: str
    system: str
    load: Load
    curves: tuple[Curve, ...]
    note: str = ""


HEADER: Final = (
    "curve", "workers", "sequences", "real prompt/s", "simulated", "ratio", "real tokens/s", "simulated", "ratio",
    "speed-up", "efficiency", "busy", "host", "busiest link",
)  # fmt: skip
_WORDS: Final = ("curve", "busiest link")


def table_rows(found: Scaling) -> list[tuple[str, ...]]:
    """Rows for HEADER. A ratio is simulated over real, 1.00 a perfect prediction; speed-up and efficiency are
    simulated ones, over the curve's first row; busy is the mean share of the time that the workers compute."""
    return [_cells(curve, row) for curve in found.curves for row in curve.rows]


def _cells(curve: Curve, row: Row) -> tuple[str, ...]:
    point, real = row.simulated, row.real
    prompt = statistics.median(real.prompt_rates) if real else None
    token = statistics.median(real.token_rates) if real and real.n_predict else None
    return (
        curve.name, f"{point.workers:,}" + ("" if point.fits else " (too small)"), f"{point.requests:,}",
        *_compared(prompt, point.prompt_per_s), *_compared(token, point.tokens_per_s),
        f"{point.speedup:.2f}", percent(point.efficiency), percent(point.busy), percent(point.host_busy),
        f"{percent(point.link_busy)} {point.link}" if point.link else "-",
    )  # fmt: skip


def _compared(real: float | None, simulated: float) -> tuple[str, str, str]:
    if not simulated:
        return "-", "-", "-"
    return ("-", rate(simulated), "-") if real is None else (rate(real), rate(simulated), f"{simulated / real:.2f}")


def table(rows: Sequence[Sequence[str]]) -> Table:
    """For people."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEADER:
        made.add_column(name, justify="left" if name in _WORDS else "right")
    for row in rows:
        made.add_row(*map(plain, row))
    return made


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """For documents."""
    rule = ["---" if name in _WORDS else "---:" for name in HEADER]
    return "\n".join(f"| {' | '.join(line)} |" for line in (HEADER, rule, *rows))


def cost_line(found: Scaling, peak_nbytes: int) -> str:
    """What the simulations themselves took: all of them, and the largest."""
    points = [row.simulated for curve in found.curves for row in curve.rows]
    largest = max(points, key=lambda point: point.n_events)
    peak = f"; peak memory {peak_nbytes / (1 << 20):.0f} MiB" if peak_nbytes else ""
    return (
        f"{sum(p.n_events for p in points):,} events in {sum(p.wall_s for p in points):.1f} s, at most "
        f"{largest.n_events:,} of {largest.workers:,} workers in {largest.wall_s:.1f} s{peak}"
    )


def document(found: Scaling, peak_nbytes: int) -> dict[str, Any]:
    """For programs (`--json`)."""
    load = found.load
    return {
        "model": found.model,
        "machine": machine(),
        "system": found.system,
        "request": {
            "prompt": load.n_prompt, "predict": load.n_predict, "images": load.n_images, "ubatch": load.n_ubatch,
        },
        "note": found.note,
        "peak_bytes": peak_nbytes,
        "curves": [
            {"curve": curve.name, "about": curve.about, "points": [_document(row) for row in curve.rows]}
            for curve in found.curves
        ],
    }  # fmt: skip


def _document(row: Row) -> dict[str, Any]:
    p = row.simulated
    out: dict[str, Any] = {
        "workers": p.workers, "pipelines": p.pipelines, "sequences": p.requests,
        "simulated": {
            "prompt_per_s": p.prompt_per_s, "tokens_per_s": p.tokens_per_s, "seconds": p.end_s, "speedup": p.speedup,
            "efficiency": p.efficiency, "busy": p.busy, "host_busy": p.host_busy, "link": p.link,
            "link_busy": p.link_busy, "fits": p.fits, "events": p.n_events, "wall_s": p.wall_s,
        },
    }  # fmt: skip
    if row.real is not None:
        out["real"] = _measured(row.real, p)
    return out


def _measured(real: Real, point: ScalePoint) -> dict[str, Any]:
    prompt = statistics.median(real.prompt_rates)
    out: dict[str, Any] = {
        "prompt_per_s": prompt, "prompt_seconds": list(real.prompt_s), "token_seconds": list(real.token_s),
        "prompt_ratio": point.prompt_per_s / prompt,
    }  # fmt: skip
    if real.n_predict:
        token = statistics.median(real.token_rates)
        out |= {"tokens_per_s": token, "token_ratio": point.tokens_per_s / token}
    return out


def notes(curves: Sequence[Curve]) -> list[str]:
    """What each curve means."""
    return [f"{curve.name}: {curve.about}" for curve in curves]
