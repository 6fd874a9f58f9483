"""Where a table's threads have to wait for each other, and which of its rows need not run: a pass over rows.

Threads share a row or, where it is small, leave it to the first of them. A barrier stands only between rows that share
bytes, unless the first thread runs both. Activations that several products use are quantised once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.ops import Op
from workers.kernels import row
from workers.kernels.stage import Operand, Stage

Resolved = tuple[int, Operand]
Span = tuple[int, int]

_SMALL = 1 << 14
"""Elements of a result that one thread computes faster than several agree on it; a few microseconds."""

_SMALL_PRODUCT = 1 << 17
"""The same for products and attention, in multiplications."""


@dataclass(frozen=True, slots=True)
class Step:
    """A row to be: the stage, its op and operands."""

    stage: Stage
    op: Op
    dst: Resolved
    src: tuple[Resolved | None, ...]


@dataclass(frozen=True, slots=True)
class _Use:
    """Bytes that a row reads and writes, and scratch that each thread has to itself; rows with equal `key` share it
    out in the same way. `alone`: only the first thread runs it."""

    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    private: Span
    key: tuple[int, ...]
    alone: bool


def plan_flags(steps: Sequence[Step], work: int, threads: int) -> list[tuple[int, int]]:
    """For each row its FLAGS, and for one with REPEAT the number of the row that does the same before it.

    `work` is the address of the scratch memory that all rows share.
    """
    repeats = _repeats(steps)
    if threads == 1:
        return [(row.REPEAT, first) if first >= 0 else (0, 0) for first in repeats]
    flags: list[int] = []
    since: list[_Use] = []
    last = -1
    for number, step in enumerate(steps):
        use = _use(step, work)
        flags.append(row.ALONE if use.alone else 0)
        if repeats[number] >= 0:
            flags[number] |= row.REPEAT
            continue
        if any(_conflict(earlier, use) for earlier in since):
            flags[last] |= row.BARRIER
            since = []
        since.append(use)
        last = number
    return list(zip(flags, [max(first, 0) for first in repeats], strict=True))


def _repeats(steps: Sequence[Step]) -> list[int]:
    """For each row the earlier one that left the same in scratch memory, -1 where there is none."""
    found: list[int] = []
    made, source = -1, (0, 0)  # the row whose shared scratch is still there, and what it was made of
    for number, step in enumerate(steps):
        same = made >= 0 and step.stage.makes > 0 and _same_making(steps[made], step)
        found.append(made if same else -1)
        if step.stage.makes:
            if not same:
                made, source = number, _span(step.src[1])
            continue
        if made >= 0:
            keeps = step.stage.work_nbytes == 0 or step.stage.takes == steps[made].stage.makes
            if not keeps or _overlap(_span(step.dst), source):
                made = -1
    return found


def _same_making(a: Step, b: Step) -> bool:
    """Both quantise the same activations to the same place."""
    return (
        a.stage.kernel is b.stage.kernel
        and a.stage.makes == b.stage.makes
        and a.src[1] == b.src[1]
        and a.stage.aux[:2] == b.stage.aux[:2]
    )


def _use(step: Step, work: int) -> _Use:
    stage = step.stage
    reads = tuple(_span(source) for source in step.src if source is not None)
    shared, end = (work, work + max(stage.makes, stage.takes)), work + stage.work_nbytes
    alone = _is_small(step)
    if stage.makes:
        return _Use(reads, (shared,), (0, 0), (), alone)
    if stage.takes:
        return _Use((*reads, shared), (_span(step.dst),), (shared[1], end), stage.aux, alone)
    return _Use(reads, (_span(step.dst), (work, end)), (0, 0), (), alone)


def _is_small(step: Step) -> bool:
    elements = math.prod(step.dst[1].ne)
    if step.stage.makes:
        source = step.src[1]
        return source is not None and math.prod(source[1].ne) <= _SMALL
    if step.op is Op.MUL_MAT and step.src[0] is not None:
        return elements * step.src[0][1].ne[0] <= _SMALL_PRODUCT
    if step.op is Op.FLASH_ATTN_EXT and step.src[1] is not None:
        return elements * step.src[1][1].ne[1] <= _SMALL_PRODUCT
    read = max((math.prod(source[1].ne) for source in step.src[:1] if source is not None), default=0)
    return max(elements if step.op is not Op.SET_ROWS else 0, read) <= _SMALL


def _span(operand: Resolved | None) -> Span:
    if operand is None:
        return (0, 0)
    address, tensor = operand
    blocks = (-(-tensor.ne[0] // tensor.dtype.block), *tensor.ne[1:])
    size = tensor.dtype.block_nbytes + sum((n - 1) * nb for n, nb in zip(blocks, tensor.nb, strict=True))
    return (address, address + size) if 0 not in tensor.ne else (0, 0)


def _conflict(a: _Use, b: _Use) -> bool:
    """True when b must not start before all threads are through with a."""
    if a.alone and b.alone:
        return False
    ours, theirs = (*a.writes, a.private), (*b.writes, b.private)
    private = _overlap(a.private, b.private) and (a.key != b.key or a.alone or b.alone)
    return (
        private
        or any(_overlap(w, r) for w in ours for r in b.reads)
        or any(_overlap(w, r) for w in theirs for r in a.reads)
        or any(_overlap(w, x) for w in a.writes for x in theirs)
        or any(_overlap(w, a.private) for w in b.writes)
    )


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[0] < a[1] and b[0] < b[1]
