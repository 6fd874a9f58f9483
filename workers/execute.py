"""Executes resolved operations: builds the table of kernel rows, and keeps the team of threads that runs it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.errors import PlanError, WorkerError
from protocol.features import disabled
from protocol.ops import VIEW_OPS, Op
from workers.barriers import Step, plan_flags
from workers.kernels import row, shapes, table, team
from workers.kernels.stage import Operand

Resolved = tuple[int, Operand]
"""An operand and the address of its first element in this process."""

_ALIGNMENT = 64

_FLOATS: dict[Op, frozenset[int]] = {
    Op.RMS_NORM: frozenset({0}),
    Op.NORM: frozenset({0}),
    Op.SCALE: frozenset({0, 1}),
    Op.CLAMP: frozenset({0, 1}),
    Op.SOFT_MAX: frozenset({0, 1}),
    Op.FLASH_ATTN_EXT: frozenset({0, 1, 2}),
    Op.ROPE: frozenset(range(5, 11)),
}
"""Positions of the op parameters that are 32-bit floats (protocol/ops.py); all others are integers."""


@dataclass(frozen=True, slots=True)
class ResolvedOp:
    """One operation whose operands have addresses. A source that the op does without is None."""

    op: Op
    params: tuple[int | float, ...]
    dst: Resolved
    src: tuple[Resolved | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A runnable program: `rows` int64 [n, row.WORDS]; op i of its list of ops is rows starts[i]:starts[i+1].

    `work` is the scratch memory that the rows point into, sized for `threads` threads; `address` is that of `rows`.
    """

    rows: NDArray[np.int64]
    starts: tuple[int, ...]
    work: NDArray[np.uint8]
    threads: int
    address: int


def encode_params(op: Op, params: Sequence[int | float]) -> NDArray[np.int32]:
    """The op parameters as ggml lays them out: up to sixteen 32-bit words, floats by their bits."""
    assert len(params) <= 16, (op, params)
    words = np.zeros(16, np.int32)
    floats = _FLOATS.get(op, frozenset())
    for i, value in enumerate(params):
        words[i] = np.float32(value).view(np.int32) if i in floats else int(value)
    return words


def is_computed(op: ResolvedOp) -> bool:
    """False for what needs no kernel: leafs, views, and results without elements."""
    return op.op is not Op.NONE and op.op not in VIEW_OPS and 0 not in op.dst[1].ne


def build_table(
    ops: Sequence[ResolvedOp], threads: int, arithmetic: str = table.EXACT, *, overlaps: bool = False
) -> Table:
    """Choose kernels for `ops` and lay them out for a team of `threads`.

    With `overlaps` a result may lie on bytes that its op still reads: what comes of it is the plan's own fault.
    Raises a CrossdockError that names op, types and shapes where operands do not agree or no kernel fits, and
    CapacityError where the machine does not have the arithmetic.
    """
    table.check_arithmetic(arithmetic)
    lines: list[NDArray[np.int64]] = []
    steps: list[Step] = []
    starts = [0]
    work_nbytes = 0
    for number, op in enumerate(ops):
        if is_computed(op):
            sources = tuple(None if s is None else s[1] for s in op.src)
            _check_shapes(number, op, sources, overlaps)
            for stage in table.select(op.op, op.dst[1], sources, op.params, threads, arithmetic):
                line = _operand_words(op)
                line[row.KERNEL] = stage.kernel.address()
                line[row.WORK_NBYTES] = stage.work_nbytes
                line[row.AUX : row.AUX + len(stage.aux)] = stage.aux
                work_nbytes = max(work_nbytes, stage.work_nbytes)
                lines.append(line)
                steps.append(Step(stage, op.op, op.dst, op.src))
        starts.append(len(lines))
    rows = np.stack(lines) if lines else np.zeros((0, row.WORDS), np.int64)
    work = np.zeros(work_nbytes + _ALIGNMENT, np.uint8)
    rows[:, row.WORK] = scratch = -(-work.ctypes.data // _ALIGNMENT) * _ALIGNMENT
    rows[:, row.FLAGS] = [flags | earlier << row.EARLIER for flags, earlier in plan_flags(steps, scratch, threads)]
    return Table(rows, tuple(starts), work, threads, int(rows.ctypes.data))


def _check_shapes(number: int, op: ResolvedOp, sources: Sequence[Operand | None], overlaps: bool) -> None:
    try:
        shapes.check(op.op, op.dst[1], sources, op.params)
        if not overlaps:
            shapes.check_overlaps(op.op, op.dst, op.src)
    except PlanError as error:
        raise PlanError(f"operation {number}: {error}") from None


def _operand_words(op: ResolvedOp) -> NDArray[np.int64]:
    """A row with parameters and operands filled in."""
    line = np.zeros(row.WORDS, np.int64)
    line[row.PARAMS : row.PARAMS + 8] = encode_params(op.op, op.params).view(np.int64)
    _put_operand(line, row.DST, op.dst)
    for at, source in zip(row.SRC, op.src, strict=False):
        if source is not None:
            _put_operand(line, at, source)
    return line


def _put_operand(line: NDArray[np.int64], at: int, resolved: Resolved) -> None:
    address, operand = resolved
    line[at + row.ADDRESS] = address
    line[at + row.DTYPE] = operand.dtype
    line[at + row.NE : at + row.NE + 4] = operand.ne
    line[at + row.NB : at + row.NB + 4] = operand.nb


class Executor:
    """A team of threads that runs tables; it ends with `close()` or a `with` block.

    Idle threads sleep and cost nothing. With one thread there are no helpers and no barriers. Without a futex
    (`CROSSDOCK_DISABLE=futex`, or not on Linux) helpers are woken by semaphores and wait at barriers in short naps.
    """

    def __init__(self, threads: int = 1) -> None:
        assert threads >= 1, threads
        self.threads = threads
        self._futex = 0 if "futex" in disabled() else team.FUTEX_NUMBER or 0
        self._memory = np.zeros(team.CONTROL_WORDS + 16, np.int32)
        skip = -self._memory.ctypes.data % _ALIGNMENT // 4
        self._control = self._memory[skip : skip + team.CONTROL_WORDS]
        self._control[[team.JOB_PATIENCE, team.PHASE_PATIENCE]] = team.FIRST_NS
        self._address = int(self._control.ctypes.data)
        self._lock = threading.Lock()
        self._closed = False
        self._bells = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._helpers = [
            threading.Thread(target=self._help, args=(i + 1, bell), name=f"crossdock-kernel-{i + 1}", daemon=True)
            for i, bell in enumerate(self._bells)
        ]
        if self._helpers:
            team.help_out.address(), team.help_once.address()  # one thread compiles, if anybody has to
        for helper in self._helpers:
            helper.start()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def team(self) -> tuple[int, int, int]:
        """What compiled code needs to run tables on the team: number of threads, control block, futex (0: none)."""
        return self.threads, self._address, self._futex

    def run(self, program: Table, first: int = 0, last: int | None = None) -> None:
        """Run rows [first, last) of a table built for this many threads; returns when all of it is done.

        Raises WorkerError after `close()`.
        """
        last = len(program.rows) if last is None else last
        assert 0 <= first <= last <= len(program.rows), (first, last, len(program.rows))
        assert program.threads == self.threads, (program.threads, self.threads)
        with self._lock:
            if self._closed:
                raise WorkerError("cannot run a program: the worker's threads have been closed")
            if first == last:
                return
            if self._helpers and not self._futex:
                self._control[team.TABLE : team.TABLE + 6].view(np.int64)[:] = program.address, first, last
                for bell in self._bells:
                    bell.release()
            team.lead(program.address, first, last, self.threads, self._address, self._futex)

    def close(self) -> None:
        """End the threads, after the job they are at; later calls do nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._control[team.STOP] = 1
            if self._futex:
                team.ring(self._address, self._futex)
            for bell in self._bells:
                bell.release()
        for helper in self._helpers:
            helper.join()

    def _help(self, ith: int, bell: threading.Semaphore) -> None:
        """A helper thread's life."""
        if self._futex:
            team.help_out(self._address, ith, self.threads, self._futex)
            return
        while True:
            bell.acquire()
            if self._control[team.STOP]:
                return
            address, first, last = (int(x) for x in self._control[team.TABLE : team.TABLE + 6].view(np.int64))
            team.help_once(address, first, last, ith, self.threads, self._address, 0)
