"""The inside of the thread team: atomics, the barrier, and the loops that walk an executor's table without the GIL."""

from __future__ import annotations

import platform
import sys
import time

from workers.kernels import row
from workers.kernels.access import INNER
from workers.kernels.emit import I32, I64, call
from workers.kernels.jit import cgutils, ir, njit, types
from workers.kernels.simd import load_i64, make, store_i64
from workers.kernels.stage import entry

_LONG = types.int64
_X86 = platform.machine().lower() in ("x86_64", "amd64")

FUTEX_NUMBER = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None
"""Linux's system call number of futex on this machine, None where there is none."""

# Words of 32 bits in the control block. Each group has a cache line of its own, for the spinning readers.
JOB = 0  # counts jobs; the futex that idle helpers sleep on
IDLE = 1  # helpers asleep on JOB
STOP = 2  # helpers shall leave
ARRIVED = 16  # threads that reached the barrier
PHASE = 32  # counts barriers; the futex that waiting threads sleep on
ASLEEP = 33  # threads asleep on PHASE
TABLE, FIRST, LAST = 48, 50, 52  # the job: address and row range, 64 bits each
JOB_PATIENCE, PHASE_PATIENCE = 64, 66  # how long threads poll before they sleep on JOB and PHASE: see `poll`
CONTROL_WORDS = 80

POLLS = 50
"""So often a thread polls at least before it sleeps, some microsecond, and as often between two yields: somebody else
may have the processor, perhaps whoever is to ring."""

LEAST_NS, FIRST_NS, MOST_NS = 1_000, 64_000, 300_000
"""How long a thread polls before it sleeps: at least, before it has learnt, and at most. To wake a sleeper up takes 25
us in a virtual machine, for either side, and while both sides sleep each waits for the other's waking up as well."""

SLICE_NS = 300_000
"""A yield that took longer went to somebody who has much to do, or the machine stood still for a moment."""

LEAST_SLEEPS, MOST_SLEEPS = 8, 4096
"""Sleeps before a thread that lost its processor to others polls again."""

NAP_US = 50
"""Sleep between polls where there is no futex."""

_WAIT, _WAKE = 128, 129  # FUTEX_WAIT, FUTEX_WAKE, private to the process

_TIMESPEC = ir.ArrayType(I64, 2)
syscall = types.ExternalFunction("syscall", _LONG(_LONG, _LONG, _LONG, _LONG, _LONG, _LONG, _LONG))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


def _pointer(b: ir.IRBuilder, where: ir.Value) -> ir.Value:
    return b.inttoptr(where, I32.as_pointer())


def _emit_store(b: ir.IRBuilder, where: ir.Value, value: ir.Value) -> None:
    b.store_atomic(b.trunc(value, I32), _pointer(b, where), "seq_cst", 4)


def _emit_add(b: ir.IRBuilder, where: ir.Value, value: ir.Value) -> ir.Value:
    return b.sext(b.atomic_rmw("add", _pointer(b, where), b.trunc(value, I32), "seq_cst"), I64)


def _emit_pause(b: ir.IRBuilder) -> None:
    if _X86:
        call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])


def _emit_call(b: ir.IRBuilder, kernel: ir.Value, *args: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [I64] * len(args))
    b.call(b.inttoptr(kernel, kind.as_pointer()), args)


def _emit_clock(b: ir.IRBuilder) -> ir.Value:
    with b.goto_entry_block():
        now = b.alloca(_TIMESPEC)
    kind = ir.FunctionType(I32, [I32, I64])
    clock_gettime = cgutils.get_or_insert_function(b.module, kind, "clock_gettime")
    b.call(clock_gettime, [I32(time.CLOCK_MONOTONIC), b.ptrtoint(now, I64)])
    return b.add(b.mul(b.extract_value(b.load(now), 0), I64(10**9)), b.extract_value(b.load(now), 1))


load_i32 = make(_LONG, _LONG)(lambda b, where: b.sext(b.load_atomic(_pointer(b, where), "acquire", 4), I64))
"""load_i32(address): 32 bits, with acquire order."""
store_i32 = make(types.void, _LONG, _LONG)(_emit_store)
"""store_i32(address, value): 32 bits, ordered against everything."""
add_i32 = make(_LONG, _LONG, _LONG)(_emit_add)
"""add_i32(address, value): add to 32 bits atomically; what was there before."""
pause = make(types.void)(_emit_pause)
"""Tell the core that this thread is polling."""
now_ns = make(_LONG)(_emit_clock)
"""now_ns(): nanoseconds of the monotonic clock."""
call_kernel = make(types.void, *[_LONG] * 4)(_emit_call)
"""call_kernel(kernel, row, ith, nth): call the kernel at an address."""


@njit(**INNER)
def _sleep(address: int, seen: int, sleepers: int, futex: int) -> None:
    """Sleep until the word at `address` is no longer `seen`; `sleepers` counts who has to be woken."""
    if futex == 0:
        while load_i32(address) == seen:
            _usleep(NAP_US)
        return
    add_i32(sleepers, 1)
    while load_i32(address) == seen:
        syscall(futex, address, _WAIT, seen, 0, 0, 0)
    add_i32(sleepers, -1)


@njit(**INNER)
def _wake(address: int, sleepers: int, futex: int) -> None:
    if futex != 0 and load_i32(sleepers) > 0:
        syscall(futex, address, _WAKE, 0x7FFFFFFF, 0, 0, 0)


@njit(**INNER)
def poll(address: int, seen: int, patience: int) -> bool:
    """Poll for a while; True when the word at `address` is no longer `seen`.

    How long is learnt, in two words at `patience`: nanoseconds, and two halves, how often still to sleep without
    polling (low 16 bits) and how often after the last loss, less the times that polling has helped since. Several
    threads may share what they learn.
    """
    limit = load_i32(patience)
    for _ in range(POLLS):
        if load_i32(address) != seen:
            if limit > LEAST_NS:
                store_i32(patience, max(limit - limit // 16, LEAST_NS))
            return True
        pause()
    if load_i32(patience + 4) & 0xFFFF != 0:
        return load_i32(address) != seen
    since = now_ns()
    now = since
    while now - since < limit:
        _sched_yield()
        before, now = now, now_ns()
        if now - before >= SLICE_NS:
            lost(patience)
            break
        for _ in range(POLLS):
            if load_i32(address) != seen:
                helped(patience, now - since)
                return True
            pause()
    return load_i32(address) != seen


@njit(**INNER)
def helped(patience: int, ns: int) -> None:
    """Polling for so long was enough: be ready to poll twice as long, and a little more sure that it pays."""
    limit, sleeps = load_i32(patience), load_i32(patience + 4)
    store_i32(patience, max(min(2 * ns, MOST_NS), limit - limit // 16, LEAST_NS))
    if sleeps >> 16 != 0:
        store_i32(patience + 4, sleeps - (1 << 16))


@njit(**INNER)
def lost(patience: int) -> None:
    """Polling cost the processor for a while, which somebody who sleeps gets back at once: sleep a few times, and four
    times as often when it is lost again before polling has helped as many times. A machine that stood still soon polls
    again, and next to somebody who computes all the time nearly all waits are slept through."""
    sleeps = load_i32(patience + 4)
    if sleeps & 0xFFFF == 0:  # or another thread has told of the same loss
        sleeps = min(max(4 * (sleeps >> 16), LEAST_SLEEPS), MOST_SLEEPS)
        store_i32(patience + 4, sleeps << 16 | sleeps)


@njit(**INNER)
def slept(patience: int, ns: int) -> None:
    """Polling was not enough, and so long a sleep followed it: poll longer next time, if that had spared it."""
    limit, sleeps = load_i32(patience), load_i32(patience + 4)
    if sleeps & 0xFFFF != 0:
        store_i32(patience + 4, sleeps - 1)
    elif limit + ns >= MOST_NS:
        store_i32(patience, max(limit // 2, LEAST_NS))
    else:
        store_i32(patience, min(4 * limit, MOST_NS))


@njit(**INNER)
def _await_change(address: int, seen: int, sleepers: int, futex: int, patience: int) -> None:
    """Poll for a while, then sleep, until the word at `address` is no longer `seen`."""
    if not poll(address, seen, patience):
        since = now_ns()
        _sleep(address, seen, sleepers, futex)
        slept(patience, now_ns() - since)


@njit(**INNER)
def barrier(control: int, nth: int, futex: int) -> None:
    """Return when all `nth` threads have called."""
    phase = load_i32(control + 4 * PHASE)
    if add_i32(control + 4 * ARRIVED, 1) == nth - 1:
        store_i32(control + 4 * ARRIVED, 0)
        add_i32(control + 4 * PHASE, 1)
        _wake(control + 4 * PHASE, control + 4 * ASLEEP, futex)
    else:
        _await_change(control + 4 * PHASE, phase, control + 4 * ASLEEP, futex, control + 4 * PHASE_PATIENCE)


@njit(**INNER)
def walk(table: int, first: int, last: int, ith: int, nth: int, control: int, futex: int) -> None:
    """Run rows [first, last) as thread `ith` of `nth`."""
    for i in range(first, last):
        address = table + i * row.NBYTES
        flags = load_i64(address + 8 * row.FLAGS)
        again = (flags & row.REPEAT) != 0
        if again and flags >> row.EARLIER >= first:
            continue
        if again and nth > 1:
            barrier(control, nth, futex)
        if (flags & row.ALONE) == 0:
            call_kernel(load_i64(address + 8 * row.KERNEL), address, ith, nth)
        elif ith == 0:
            call_kernel(load_i64(address + 8 * row.KERNEL), address, 0, 1)
        if nth > 1 and (again or (flags & row.BARRIER) != 0):
            barrier(control, nth, futex)


@njit(**INNER)
def _ring(control: int, futex: int) -> None:
    add_i32(control + 4 * JOB, 1)
    _wake(control + 4 * JOB, control + 4 * IDLE, futex)


@njit(**INNER)
def _help_once(table: int, first: int, last: int, ith: int, nth: int, control: int, futex: int) -> None:
    walk(table, first, last, ith, nth, control, futex)
    barrier(control, nth, futex)


@njit(**INNER)
def work(table: int, first: int, last: int, nth: int, control: int, futex: int) -> None:
    """The calling thread's part of a job: wake the helpers in `help_out`, and return when all are through."""
    if nth > 1:
        store_i64(control + 4 * TABLE, table)
        store_i64(control + 4 * FIRST, first)
        store_i64(control + 4 * LAST, last)
        _ring(control, futex)
    walk(table, first, last, 0, nth, control, futex)
    if nth > 1:
        barrier(control, nth, futex)


@entry(2)
def ring(control: int, futex: int) -> int:
    """Tell the helpers that there is a job, or that STOP is set."""
    _ring(control, futex)
    return 0


@entry(6)
def lead(table: int, first: int, last: int, nth: int, control: int, futex: int) -> int:
    """As `work`, for Python. With `nth` 1 there is neither barrier nor wake-up."""
    work(table, first, last, nth, control, futex)
    return 0


@entry(7)
def help_once(table: int, first: int, last: int, ith: int, nth: int, control: int, futex: int) -> int:
    """A helper's part of one job."""
    _help_once(table, first, last, ith, nth, control, futex)
    return 0


@entry(4)
def help_out(control: int, ith: int, nth: int, futex: int) -> int:
    """A helper's life with a futex: job after job until STOP, asleep in between."""
    seen = 0
    while True:
        _await_change(control + 4 * JOB, seen, control + 4 * IDLE, futex, control + 4 * JOB_PATIENCE)
        seen = load_i32(control + 4 * JOB)
        if load_i32(control + 4 * STOP) != 0:
            return 0
        table = load_i64(control + 4 * TABLE)
        first = load_i64(control + 4 * FIRST)
        last = load_i64(control + 4 * LAST)
        _help_once(table, first, last, ith, nth, control, futex)
