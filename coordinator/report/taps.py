"""What `--dump-tensor` prints: a line per tensor, and its first and last values."""

from __future__ import annotations

from coordinator.runtime.taps import Statistics, Tap, Values

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
