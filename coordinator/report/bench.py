"""Rates of prompts, tokens and images as tables, Markdown and JSON, and how they scale."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from coordinator.model.gguf_file import ModelFile
from coordinator.model.hparams import ModelParams
from coordinator.report.text import plain, show_bytes


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination: workers as on the command line, `layers` a number, half or all ("-": without accelerators)."""

    workers: str
    n_workers: int
    threads: int
    layers: str
    ubatch: int


@dataclass(frozen=True, slots=True)
class Repetition:
    """One run of a test: seconds in all, in kernels (sum over workers), and of waiting (mean over workers)."""

    wall_s: float
    kernel_s: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class Test:
    """A test's repetitions. `name`: pp512, tg128, image; `n` tokens or images each; `nbytes` cross between workers."""

    name: str
    n: int
    nbytes: int
    repetitions: tuple[Repetition, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens or images per second, by repetition."""
        return [self.n / r.wall_s for r in self.repetitions]

    @property
    def rate(self) -> float:
        """Their median."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """Their standard deviation; 0 for one repetition."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def kernel_share(self) -> float:
        """Part of the time in kernels: above 1 when workers compute at the same time."""
        return statistics.median(r.kernel_s / r.wall_s for r in self.repetitions)

    @property
    def wait_share(self) -> float:
        """Part of the time that the mean worker waits for others."""
        return statistics.median(r.wait_s / r.wall_s for r in self.repetitions)


@dataclass(frozen=True, slots=True)
class Point:
    """A setting and its tests."""

    setting: Setting
    tests: tuple[Test, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that was measured."""

    name: str
    arch: str
    dtype: str
    n_params: int
    nbytes: int

    @classmethod
    def of(cls, model: ModelFile, params: ModelParams) -> Subject:
        """What a file and its parameters say."""
        count, by_type = 0, dict[str, int]()
        for info in model.weights.values():
            n = info.ne[0] * info.ne[1] * info.ne[2] * info.ne[3]
            count += n
            by_type[info.dtype.label] = by_type.get(info.dtype.label, 0) + n
        main = max(by_type, key=lambda label: by_type[label])
        nbytes = sum(info.nbytes for info in model.weights.values())
        return cls(params.name or model.path.name, params.arch, main, count, nbytes)

    def line(self) -> str:
        """`crossdock-demo q8_0, mllama, 1.6 M parameters, 1.8 MiB`."""
        size = f"{self.n_params / 1e9:.2f} B" if self.n_params >= 1e9 else f"{self.n_params / 1e6:.1f} M"
        return f"{plain(self.name)} {self.dtype}, {self.arch}, {size} parameters, {show_bytes(self.nbytes)}"


def machine() -> dict[str, Any]:
    """Where and how busy, for documents."""
    return {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


_SETTING = ("workers", "threads", "ngl", "ubatch")


def _of_setting(setting: Setting) -> tuple[str, ...]:
    return setting.workers, str(setting.threads), setting.layers, str(setting.ubatch)


def rate_rows(points: Sequence[Point]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of rates; columns after the fifth are numbers."""
    header = (*_SETTING, "test", "per second", "± sd", "least", "most")
    rows = [
        (*_of_setting(p.setting), t.name, *map(_figure, (t.rate, t.spread, min(t.rates), max(t.rates))))
        for p in points
        for t in p.tests
    ]
    return header, rows


def scaling_rows(points: Sequence[Point]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of scaling.

    Test by test. Speed-up is over the first setting with the same micro-batch; efficiency is speed-up per thread of a
    worker, since workers take turns with a model's layers; outside is the part of the time in no kernel; waiting that
    which the mean worker waits for others; bytes cross between workers for one token or image.
    """
    header = (*_SETTING, "test", "per second", "speed-up", "efficiency", "outside", "waiting", "bytes")
    rows = [
        (
            *_of_setting(p.setting), t.name, _figure(t.rate), *map(_factor, gain(points, p, t)),
            f"{max(0.0, 1 - t.kernel_share):.0%}", f"{t.wait_share:.0%}", show_bytes(t.nbytes / t.n),
        )
        for tests in zip(*(p.tests for p in points), strict=True)
        for p, t in zip(points, tests, strict=True)
    ]  # fmt: skip
    return header, rows


def gain(points: Sequence[Point], point: Point, test: Test) -> tuple[float, float]:
    """Speed-up and efficiency of a test against that of the first point with the same micro-batch."""
    base = next(p for p in points if p.setting.ubatch == point.setting.ubatch)
    speedup = test.rate / next(t for t in base.tests if t.name == test.name).rate
    return speedup, speedup * base.setting.threads / point.setting.threads


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For people."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        made.add_column(name, justify="left" if i in (0, 4) else "right")
    for row in rows:
        made.add_row(*map(plain, row))
    return made


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For documents."""
    rule = ["---" if i in (0, 4) else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def document(subject: Subject, points: Sequence[Point], scaling: bool) -> dict[str, Any]:
    """For programs (`--json`)."""
    return {
        "model": {
            "name": subject.name, "arch": subject.arch, "type": subject.dtype, "parameters": subject.n_params,
            "bytes": subject.nbytes,
        },
        "machine": machine(),
        "points": [
            {
                "workers": p.setting.workers, "threads": p.setting.threads, "n_gpu_layers": p.setting.layers,
                "ubatch": p.setting.ubatch, "tests": [_test(points, p, t, scaling) for t in p.tests],
            }
            for p in points
        ],
    }  # fmt: skip


def _test(points: Sequence[Point], point: Point, test: Test, scaling: bool) -> dict[str, Any]:
    out: dict[str, Any] = {
        "test": test.name, "n": test.n, "per_second": test.rate, "stdev": test.spread,
        "seconds": [r.wall_s for r in test.repetitions], "kernel_seconds": [r.kernel_s for r in test.repetitions],
        "wait_seconds": [r.wait_s for r in test.repetitions], "bytes": test.nbytes,
    }  # fmt: skip
    if scaling:
        out["speedup"], out["efficiency"] = gain(points, point, test)
    return out


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _factor(value: float) -> str:
    return f"{value:.2f}"
