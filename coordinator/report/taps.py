"""What becomes of tensors that are looked at: a line, a file, an entry of a recording."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from coordinator.report.text import plain
from coordinator.runtime.recording import Header, RecordingFile, entry_of
from coordinator.runtime.taps import DumpFolder, Statistics, Tap, Values, statistics

_ENDS = 3
"""Values shown of each end."""


def tap_line(tap: Tap, values: Values, stats: Statistics, sha256: str) -> str:
    """`language 1  split 0  node 30  cpu0  MUL_MAT  Kcross-1  f32 [64, 40]  min ... sha256 cb70d16b3850  1 2 3 ...`."""
    where = "input" if tap.node < 0 else f"split {tap.split}  node {tap.node}"
    name = f"{tap.name} ({tap.occurrence + 1})" if tap.occurrence else tap.name
    return (
        f"{tap.graph} {tap.evaluation}  step {tap.step}  {where}  {tap.worker}  {tap.op}  {name}  "
        f"{tap.dtype.label} {shape(tap.ne)}  {statistics_text(stats)}  sha256 {sha256[:12]}  {ends(values)}"
    )


def shape(ne: tuple[int, ...]) -> str:
    """Extents as ggml counts them, innermost first, without ones at the end: `[64, 40]`."""
    n = len(ne)
    while n > 1 and ne[n - 1] == 1:
        n -= 1
    return f"[{', '.join(map(str, ne[:n]))}]"


def statistics_text(stats: Statistics) -> str:
    """`min -1.5 max 2 mean 0.1 std 0.4`, and NaN and inf where there are any."""
    parts = []
    if stats.min is not None and stats.max is not None and stats.mean is not None and stats.std is not None:
        parts.append(f"min {stats.min:.5g} max {stats.max:.5g} mean {stats.mean:.5g} std {stats.std:.5g}")
    if stats.n_nan:
        parts.append(f"{stats.n_nan:,} NaN")
    if stats.n_inf:
        parts.append(f"{stats.n_inf:,} inf")
    return " ".join(parts)


def ends(values: Values) -> str:
    """`0.1 0.2 0.3 ... 0.7 0.8 0.9`, innermost extent first."""
    flat = values.flat
    n = values.size
    if n <= 2 * _ENDS:
        return " ".join(f"{flat[i]:.5g}" for i in range(n))
    first = " ".join(f"{flat[i]:.5g}" for i in range(_ENDS))
    return f"{first} ... {' '.join(f'{flat[i]:.5g}' for i in range(n - _ENDS, n))}"


class Looking:
    """Shows, saves and records each tensor that a session hands it; each is optional.

    Raises InputError at once for a folder or file that cannot be written.
    """

    def __init__(self, console: Console, *, show: bool, folder: Path | None, record: Path | None) -> None:
        self.console, self.show = console, show
        self.folder = None if folder is None else DumpFolder(folder)
        self.record = None if record is None else RecordingFile(record)
        self.stack = ExitStack()

    def __enter__(self) -> Looking:
        if self.record is not None:
            self.stack.enter_context(self.record)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def begin(self, head: Header) -> None:
        """The run is known."""
        if self.record is not None:
            self.record.begin(head)

    def __call__(self, tap: Tap) -> None:
        """A session's `on_tensor`."""
        values = tap.values()
        stats, sha256 = statistics(values), tap.sha256()
        if self.show:
            self.console.print(plain(tap_line(tap, values, stats, sha256)))
        if self.folder is not None:
            self.folder.write(tap)
        if self.record is not None and not tap.unread:
            self.record.add(entry_of(tap, stats, sha256))

    def finish(self, tokens: list[tuple[int, str]], stopped: str = "") -> None:
        """The run is over; `tokens` as `generate` yields them."""
        if self.record is not None:
            self.record.finish(tokens, stopped)
