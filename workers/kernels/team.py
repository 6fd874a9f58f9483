"""The inside of the thread team: atomics, the barrier, and the loops that walk an executor's table without the GIL."""

from __future__ import annotations

import platform
import sys

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from workers.kernels import row
from workers.kernels.access import INNER
from workers.kernels.stage import OPTIONS

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
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
CONTROL_WORDS = 64

SPINS = 2000
"""Polls before a thread sleeps: some ten microseconds, longer than most ops, far shorter than a scheduler's slice."""

NAP_US = 50
"""Sleep between polls where there is no futex."""

_WAIT, _WAKE = 128, 129  # FUTEX_WAIT, FUTEX_WAKE, private to the process

_syscall = types.ExternalFunction("syscall", _LONG(_LONG, _LONG, _LONG, _LONG, _LONG, _LONG, _LONG))
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@intrinsic
def load_i32(typingctx, address):
    """Read 32 bits with acquire order."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I32.as_pointer())
        return builder.sext(builder.load_atomic(pointer, "acquire", 4), _I64)

    return _LONG(_LONG), codegen


@intrinsic
def store_i32(typingctx, address, value):
    """Write 32 bits, ordered against everything: a sleeper's count is read right after a store."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I32.as_pointer())
        builder.store_atomic(builder.trunc(args[1], _I32), pointer, "seq_cst", 4)
        return context.get_dummy_value()

    return types.void(_LONG, _LONG), codegen


@intrinsic
def add_i32(typingctx, address, value):
    """Add to 32 bits atomically and return what was there before."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I32.as_pointer())
        old = builder.atomic_rmw("add", pointer, builder.trunc(args[1], _I32), "seq_cst")
        return builder.sext(old, _I64)

    return _LONG(_LONG, _LONG), codegen


@intrinsic
def load_i64(typingctx, address):
    """Read 64 bits."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], _I64.as_pointer()), align=8)

    return _LONG(_LONG), codegen


@intrinsic
def pause(typingctx):
    """Tell the core that this thread is polling."""

    def codegen(context, builder, signature, args):
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_kernel(typingctx, kernel, row_address, ith, nth):
    """Call the `void(int64, int64, int64)` function at an address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), list(args[1:]))
        return context.get_dummy_value()

    return types.void(_LONG, _LONG, _LONG, _LONG), codegen


@njit(**INNER)
def _sleep(address, seen, sleepers, futex):
    """Sleep until the word at `address` is no longer `seen`; `sleepers` counts who has to be woken."""
    if futex == 0:
        while load_i32(address) == seen:
            _usleep(NAP_US)
        return
    add_i32(sleepers, 1)
    while load_i32(address) == seen:
        _syscall(futex, address, _WAIT, seen, 0, 0, 0)
    add_i32(sleepers, -1)


@njit(**INNER)
def _wake(address, sleepers, futex):
    if futex != 0 and load_i32(sleepers) > 0:
        _syscall(futex, address, _WAKE, 0x7FFFFFFF, 0, 0, 0)


@njit(**INNER)
def _await_change(address, seen, sleepers, futex):
    """Poll for a while, then sleep, until the word at `address` is no longer `seen`."""
    for _ in range(SPINS):
        if load_i32(address) != seen:
            return
        pause()
    _sleep(address, seen, sleepers, futex)


@njit(**INNER)
def barrier(control, nth, futex):
    """Return when all `nth` threads have called."""
    phase = load_i32(control + 4 * PHASE)
    if add_i32(control + 4 * ARRIVED, 1) == nth - 1:
        store_i32(control + 4 * ARRIVED, 0)
        add_i32(control + 4 * PHASE, 1)
        _wake(control + 4 * PHASE, control + 4 * ASLEEP, futex)
    else:
        _await_change(control + 4 * PHASE, phase, control + 4 * ASLEEP, futex)


@njit(**INNER)
def walk(table, first, last, ith, nth, control, futex):
    """Run rows [first, last) as thread `ith` of `nth`."""
    for i in range(first, last):
        address = table + i * row.NBYTES
        call_kernel(load_i64(address + 8 * row.KERNEL), address, ith, nth)
        if nth > 1 and (load_i64(address + 8 * row.FLAGS) & row.BARRIER) != 0:
            barrier(control, nth, futex)


@njit(**OPTIONS)
def ring(control, futex):
    """Tell the helpers that there is a job, or that STOP is set."""
    add_i32(control + 4 * JOB, 1)
    _wake(control + 4 * JOB, control + 4 * IDLE, futex)


@njit(**OPTIONS)
def lead(table, first, last, nth, control, futex):
    """The calling thread's part of a job: wake the helpers in `help_out`, and leave when all are through.

    The job's fields are written by the caller (TABLE, FIRST, LAST). With `nth` 1 there is neither barrier nor wake-up.
    """
    if nth > 1:
        ring(control, futex)
    walk(table, first, last, 0, nth, control, futex)
    if nth > 1:
        barrier(control, nth, futex)


@njit(**OPTIONS)
def help_once(table, first, last, ith, nth, control, futex):
    """A helper's part of one job."""
    walk(table, first, last, ith, nth, control, futex)
    barrier(control, nth, futex)


@njit(**OPTIONS)
def help_out(control, ith, nth, futex):
    """A helper's life with a futex: job after job until STOP, asleep in between."""
    seen = 0
    while True:
        _await_change(control + 4 * JOB, seen, control + 4 * IDLE, futex)
        seen = load_i32(control + 4 * JOB)
        if load_i32(control + 4 * STOP) != 0:
            return
        table = load_i64(control + 4 * TABLE)
        first = load_i64(control + 4 * FIRST)
        last = load_i64(control + 4 * LAST)
        help_once(table, first, last, ith, nth, control, futex)


def prepare() -> None:
    """Compile what an executor calls from Python, or load it from numba's cache."""
    for function, count in ((lead, 6), (ring, 2), (help_once, 7), (help_out, 4)):
        function.compile((_LONG,) * count)
