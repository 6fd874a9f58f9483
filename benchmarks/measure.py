"""Interleaved timing of rivals, and rows that hold the ratio with its spread."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llvmlite import binding as llvm

Timed = Callable[[], float]
"""Does its work once and says how many seconds it took."""

LEAST_S = 0.004
"""A sample lasts at least this long: short work is repeated within it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `ratio` is the peer's time over ours: above 1 ours is faster.

    `low` and `high` are the quartiles of the ratios of neighbouring samples; `ours` and `peer` medians in `unit`.
    `cpu_ratio` compares the processor time of all processes instead: what neighbours take is not in it, nor is waiting.
    """

    bench: str
    name: str
    ours: float
    unit: str
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    note: str = ""
    others: dict[str, float] = field(default_factory=dict)
    cpu_ratio: float | None = None

    def line(self) -> str:
        """The row as people read it."""
        text = f"{self.name:58} {_number(self.ours):>9} {self.unit}"
        if self.peer is not None and self.ratio is not None and self.low is not None and self.high is not None:
            text += f"  {self.peer_name} {_number(self.peer)}  ratio {self.ratio:.2f} ({self.low:.2f}-{self.high:.2f})"
        if self.cpu_ratio is not None:
            text += f"  of CPU time {self.cpu_ratio:.2f}"
        others = ", ".join(f"{name} {_number(value)}" for name, value in self.others.items())
        return text + (f"  [{others}]" if others else "") + (f"  {self.note}" if self.note else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def call_timer(work: Callable[[], Any], threads: int = 0, least_s: float = LEAST_S) -> Timed:
    """Seconds per call of `work`, over as many calls as `least_s` holds; the first calls only warm up and count.

    What runs on the calling thread alone (`threads` 1) is timed by that thread's processor time: what neighbours take
    of the machine is left out. Everything else by the wall.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    took = 0.0
    for _ in range(2):
        if took < 1.0:  # a second look at what is short: the first one may have loaded something
            start = clock()
            work()
            took = clock() - start
    calls = max(1, min(10_000, int(least_s / max(took, 1e-7))))

    def timed() -> float:
        begin = clock()
        for _ in range(calls):
            work()
        return (clock() - begin) / calls

    return timed


def interleave(rivals: Mapping[str, Timed], rounds: int, budget_s: float = 60.0) -> dict[str, list[float]]:
    """`rounds` samples of each, one after the other in an order drawn anew each round.

    Ends early, after at least three rounds, when `budget_s` is used up.
    """
    out: dict[str, list[float]] = {name: [] for name in rivals}
    order, draw, start = list(rivals), random.Random(0), time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > budget_s:
            break
        draw.shuffle(order)
        for name in order:
            out[name].append(rivals[name]())
    return out


def compare(
    bench: str,
    name: str,
    samples: Mapping[str, Sequence[float]],
    unit: str,
    figure: Callable[[float], float],
    note: str = "",
    against: str = "",
) -> Row:
    """A row from seconds by rival: "ours" against the fastest (by median) of the others, or the one named `against`.

    `figure` turns seconds into `unit`.
    """
    ours = samples["ours"]
    rivals = {k: statistics.median(v) for k, v in samples.items() if k != "ours"}
    best = against or min(rivals, key=lambda k: rivals[k])
    ratios = sorted(b / a for a, b in zip(ours, samples[best], strict=True))
    low, high = quartiles(ratios)
    return Row(
        bench, name, figure(statistics.median(ours)), unit, figure(rivals[best]), best,
        statistics.median(ratios), low, high, len(ratios), note,
        {k: figure(v) for k, v in rivals.items() if k != best},
    )  # fmt: skip


def single(bench: str, name: str, samples: Sequence[float], unit: str, note: str = "") -> Row:
    """A row without a peer: median and quartiles of values that are in `unit` already."""
    low, high = quartiles(sorted(samples))
    spread = f"quartiles {_number(low)}-{_number(high)}, n={len(samples)}"
    return Row(
        bench,
        name,
        statistics.median(samples),
        unit,
        samples=len(samples),
        note=f"{spread}; {note}" if note else spread,
    )


def quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; both the value itself when there is one only."""
    if len(ordered) < 2:
        return ordered[0], ordered[0]
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return low, high


def environment() -> dict[str, Any]:
    """The machine, and how busy it is."""
    features = llvm.get_host_cpu_features()
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512vnni", "avxvnni")
    return {
        "cpu": _cpu_name(),
        "processors": os.cpu_count(),
        "features": [name for name in wanted if features.get(name)],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        name = ""
    return f"{name} ({llvm.get_host_cpu_name()})"


def document(rows: Sequence[Row], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Everything for `--json`."""
    return {"before": dict(before), "after": dict(after), "rows": [asdict(row) for row in rows]}
