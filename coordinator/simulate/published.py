"""Tables of published rates: the rows as they stand, and what test each of them is."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.errors import InputError

REQUIRED: Final = ("hardware", "model", "test", "tps")
DEFAULT_PROMPT: Final = 512
"""Tokens of a prompt whose length is not told."""

MAX_TOKENS: Final = 1 << 20
MAX_DEVICES: Final = 4096

_MAX_ROWS: Final = 100_000
_MAX_BATCHES: Final = 1 << 14
_MAX_NBYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. 0 or "" where the table says nothing; `bandwidth` in bytes/s, `flops` the peak of f16."""

    ident: str
    date: str
    hardware: str
    cls: str
    arch: str
    bandwidth: float
    flops: float
    model: str
    params: float
    file_nbytes: float
    quant: str
    split: str
    n_devices: int
    link: str
    test: str
    tps: float
    notes: str
    group: str

    @property
    def year(self) -> float:
        """The year of the build: the middle of a span, or its start where that is before 2024.

        Long-running tables were mostly filled in when they began.
        """
        parts = [_year(part) for part in self.date.split("..") if part]
        known = [year for year in parts if year is not None]
        if not known:
            return 2025.5
        return known[0] if known[0] < 2024 else sum(known) / len(known)


@dataclass(frozen=True, slots=True)
class Test:
    """What was run: `kind` prompt or decode, `n` tokens beginning at `depth`, `ubatch` tokens at a time."""

    kind: str
    n: int
    depth: int
    ubatch: int


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, columns in any order. Raises InputError naming the line and column."""
    try:
        if path.stat().st_size > _MAX_NBYTES:
            raise InputError(f"{path}: more than {_MAX_NBYTES:,} bytes are no table of rates")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            missing = [name for name in REQUIRED if name not in columns]
            if missing:
                raise InputError(f"{path}: no column {missing[0]!r}: expected at least {', '.join(REQUIRED)}")
            rows = [_row(record, f"{path}: line {reader.line_num}", reader.line_num) for record in reader]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV table in UTF-8: {error}") from None
    if not rows or len(rows) > _MAX_ROWS:
        raise InputError(f"{path}: {len(rows)} rows: expected 1 to {_MAX_ROWS:,}")
    return rows


def test_of(row: Row) -> Test:
    """The test of a row: `pp512`, `tg128`, `pp512 ub64`, `tg128 @ d4096`. Raises InputError for others."""
    text = row.test.strip().lower()
    match = re.match(r"(pp|tg)\s*~?\s*(\d+|prompt)", text)
    if match is None or "+" in text:
        raise InputError(f"test {row.test!r} is neither ppN nor tgN")
    n = DEFAULT_PROMPT if match[2] == "prompt" else int(match[2])
    if not 1 <= n <= MAX_TOKENS:
        raise InputError(f"test {row.test!r}: expected 1 to {MAX_TOKENS:,} tokens")
    said = f"{text} {row.split.lower()} {row.notes.lower()}"
    depth = re.search(r"@\s*d?\s*(\d{1,8})", text)
    ubatch = re.search(r"(?:\bub|-ub|ubatch|n_ubatch)[\s=]*(\d{1,6})", said)
    batch = re.search(r"(?<!\w)-b\s+(\d{1,6})", said)
    size = int(ubatch[1]) if ubatch else DEFAULT_PROMPT
    if batch:
        size = min(size, int(batch[1]))
    if n > _MAX_BATCHES * max(1, size):
        raise InputError(f"test {row.test!r}: {size} tokens at a time: expected at most {_MAX_BATCHES:,} micro-batches")
    return Test("prompt" if match[1] == "pp" else "decode", n, int(depth[1]) if depth else 0, max(1, size))


def _row(record: Mapping[str, str | None], where: str, number: int) -> Row:
    def text(key: str) -> str:
        return (record.get(key) or "").strip()

    def positive(key: str) -> float:
        said = text(key)
        try:
            value = float(said) if said else 0.0
        except ValueError:
            raise InputError(f"{where}: {key} is {said[:40]!r}: expected a number") from None
        if not (math.isfinite(value) and 0 <= value < 1e15):
            raise InputError(f"{where}: {key} is {said[:40]!r}: expected a number from 0 to 1e15")
        return value

    n_devices = positive("n_devices")
    if n_devices > MAX_DEVICES:
        raise InputError(f"{where}: n_devices is {text('n_devices')[:40]}: expected at most {MAX_DEVICES:,}")
    tps = positive("tps")
    if tps <= 0:
        raise InputError(f"{where}: tps is {text('tps')[:40]!r}: expected a positive number")
    return Row(
        ident=text("id") or f"line {number}", date=text("date"), hardware=text("hardware"), cls=text("cls").lower(),
        arch=text("arch").lower(), bandwidth=positive("bw_gbs") * 1e9, flops=positive("peak_fp16_tflops") * 1e12,
        model=text("model"), params=positive("params_b") * 1e9, file_nbytes=positive("file_gib") * (1 << 30),
        quant=text("quant"), split=text("split"), n_devices=max(1, int(n_devices)), link=text("link"),
        test=text("test"), tps=tps, notes=text("notes"), group=text("group"),
    )  # fmt: skip


def _year(text: str) -> float | None:
    match = re.match(r"(20\d\d)(?:-(\d\d))?", text.strip())
    if match is None:
        return None
    return int(match[1]) + ((int(match[2]) - 0.5) / 12 if match[2] else 0.5)
