"""Operands in memory of their own between pages that nobody may touch, and ops run on them in a child process."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import signal
import struct
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.dtypes import DType
from protocol.errors import CrossdockError
from protocol.ops import Op
from protocol.program import OperandRef, OpRecord, check_operands
from workers.execute import ResolvedOp, Table, build_table
from workers.kernels import row
from workers.kernels.stage import Operand

ROOM = 1 << 21
"""Bytes of the arena that operands are said to lie in."""

THREADS = 3
_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
_TABLES = (DType.I32, DType.I64)


@dataclass(frozen=True)
class Case:
    """An op on operands; with `alias` (k, shift) the result starts `shift` bytes behind the start of source k."""

    op: Op
    params: tuple[int | float, ...]
    dst: Operand
    src: tuple[Operand | None, ...]
    alias: tuple[int, int] | None = None
    arithmetic: str = "exact"

    @property
    def record(self) -> OpRecord:
        """As it would be shipped."""
        return OpRecord(
            0, self.op, self.params, _ref(self.dst), tuple(None if s is None else _ref(s) for s in self.src)
        )


def _ref(operand: Operand) -> OperandRef:
    return OperandRef(0, 0, *operand)


class Memory:
    """Bytes whose first or last one lies at the edge of a page that must not be touched."""

    def __init__(self, nbytes: int, at_end: bool) -> None:
        inner = -(-max(nbytes, 1) // _PAGE) * _PAGE
        self.length = inner + 2 * _PAGE
        self.base = _LIBC.mmap(None, self.length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert self.base not in (None, ctypes.c_void_p(-1).value)
        assert _LIBC.mprotect(self.base + _PAGE, inner, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        self.address = self.base + _PAGE + (inner - nbytes if at_end else 0)
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))

    def free(self) -> None:
        """Give the pages back; the array must not be used any more."""
        _LIBC.munmap(self.base, self.length)


def run(case: Case, seed: int) -> str:
    """Refuse the case, or compute it in any order of threads; "refused" or "ran". Dies where a kernel leaves its room.

    A result must depend neither on the number of threads nor on whether it is computed in place.
    """
    try:
        check_operands([case.record], {0: ROOM})
    except CrossdockError:
        return "outside"
    rng = np.random.default_rng(seed)
    memories: list[Memory] = []

    def place(nbytes: int) -> Memory:
        memories.append(Memory(nbytes, bool(rng.integers(4))))
        return memories[-1]

    try:
        return _run(case, rng, place)
    except CrossdockError as error:
        return _refused(str(error))
    finally:
        for memory in memories:
            memory.free()


def _refused(line: str) -> str:
    assert "\n" not in line, line
    return "refused"


def _run(case: Case, rng: np.random.Generator, place: Callable[[int], Memory]) -> str:
    spans = [0 if s is None else _ref(s).span for s in case.src]
    under, shift = case.alias or (-1, 0)
    sources: list[int | None] = []
    result = (0, 0)
    content: NDArray[np.uint8]
    for k, s in enumerate(case.src):
        if s is None:
            sources.append(None)
            continue
        before = max(0, -shift) if k == under else 0
        after = max(0, shift + _ref(case.dst).span - spans[k]) if k == under else 0
        memory = place(before + spans[k] + after)
        memory.bytes[:] = _content(s.dtype, len(memory.bytes), rng)
        sources.append(memory.address + before)
        if k == under:
            result = (memory.address + before + shift, before + shift)
            content = memory.bytes
    span = _ref(case.dst).span
    if not result[0]:
        memory = place(span)
        memory.bytes[:] = _content(case.dst.dtype, span, rng)
        content, result = memory.bytes, (memory.address, 0)
    before_all = content.copy()
    answers = []
    for threads in (1, THREADS):
        content[:] = before_all
        _compute(_table(case, result[0], sources, threads), threads, place)
        answers.append(content.tobytes())
    assert answers[0] == answers[1], "the result depends on the number of threads"
    if case.alias is not None:
        content[:] = before_all
        apart = place(span)
        apart.bytes[:] = before_all[result[1] : result[1] + span]
        _compute(_table(case, apart.address, sources, 1), 1, place)
        assert apart.bytes.tobytes() == answers[0][result[1] : result[1] + span], "in place the result is another one"
    return "ran"


def _content(dtype: DType, nbytes: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Numbers of moderate size; indices within and just outside of most tables, some far away."""
    count = nbytes // dtype.block_nbytes + 1
    if dtype in (DType.F32, DType.F16):
        values = rng.standard_normal(count).astype(np.float32 if dtype == DType.F32 else np.float16)
    elif dtype in _TABLES:
        far = rng.integers(-(1 << 31), 1 << 31, count)
        values = np.where(rng.random(count) < 0.2, far, rng.integers(-2, 12, count))
        values = values.astype(np.int32 if dtype == DType.I32 else np.int64)
    else:
        values = rng.integers(0, 256, count * dtype.block_nbytes, np.uint8)
    return values.view(np.uint8)[:nbytes]


def _table(case: Case, result: int, sources: Sequence[int | None], threads: int) -> Table:
    bound = tuple(
        None if s is None or address is None else (address, s) for s, address in zip(case.src, sources, strict=True)
    )
    return build_table([ResolvedOp(case.op, case.params, (result, case.dst), bound)], threads, case.arithmetic)


def _compute(table: Table, threads: int, place: Callable[[int], Memory]) -> None:
    """Every stage by all threads, the last one first, with scratch memory that is as large as the stages say."""
    if not len(table.rows):
        return
    room = -(-int(table.rows[:, row.WORK_NBYTES].max()) // 64) * 64
    table.rows[:, row.WORK] = place(room).address
    for k, line in enumerate(table.rows):
        kernel = _CALL(int(line[row.KERNEL]))
        for ith in reversed(range(threads)):
            kernel(table.address + k * row.NBYTES, ith, threads)


def survive(cases: Sequence[Case], seed: int = 0, seconds: int = 60) -> Counter[str]:
    """Run cases in a forked child; how many ended in which way.

    Raises AssertionError with the case that killed the child, made it hang, or raised anything but a CrossdockError.
    """
    board = mmap.mmap(-1, 4096 + (1 << 16))
    child = os.fork()
    if child == 0:
        _live(cases, seed, seconds, board)
    _, status = os.waitpid(child, 0)
    at, *counts = struct.unpack_from("<4q", board)
    told = board[4096:].rstrip(b"\0").decode()
    board.close()
    if status:
        why = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "error"
        raise AssertionError(f"{why} at case {at}, seed {seed + at}: {cases[at]}\n{told}")
    return Counter(dict(zip(_OUTCOMES, counts, strict=True)))


_OUTCOMES = ("outside", "refused", "ran")


def _live(cases: Sequence[Case], seed: int, seconds: int, board: mmap.mmap) -> None:
    faulthandler.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    counts = dict.fromkeys(_OUTCOMES, 0)
    status = 1
    try:
        with np.errstate(all="ignore"):
            for at, case in enumerate(cases):
                struct.pack_into("<4q", board, 0, at, *counts.values())
                signal.alarm(seconds)
                counts[run(case, seed + at)] += 1
        struct.pack_into("<4q", board, 0, len(cases), *counts.values())
        status = 0
    except BaseException:
        with contextlib.suppress(BaseException):
            text = traceback.format_exc()[-60000:].encode()
            board[4096 : 4096 + len(text)] = text
    finally:
        os._exit(status)
