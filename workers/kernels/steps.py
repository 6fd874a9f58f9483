"""The compiled half of a worker's steps: walks a program's instructions, with peers' doorbells on the board.

Nothing here allocates, raises or returns to Python before a step is through.
"""

from __future__ import annotations

from protocol.board import State
from protocol.program import Kind
from protocol.timing import TIME_WORDS
from workers.kernels.access import INNER
from workers.kernels.emit import I32, I64
from workers.kernels.jit import ir, njit, types
from workers.kernels.shadow import MEET
from workers.kernels.simd import load_i64, make, store_i64
from workers.kernels.stage import entry
from workers.kernels.team import FUTEX_NUMBER, load_i32, now_ns, poll, slept, store_i32, syscall, work

# Words of 64 bits in a worker's control block, and in it
LINE = 0  # address of its line of progress on the board
THREADS, TEAM, TEAM_FUTEX = 1, 2, 3  # the team's number of threads, control block, and futex or 0
NAP, IDLE_NAP = 7, 21  # timespecs: how long it sleeps at most for a peer, for the coordinator
TOTAL, SPENT = 9, 10  # out: nanoseconds of the last step; in computing, waiting and copying
REQUESTS, ANSWERS = 13, 14  # addresses of the mailbox's boxes, which the worker reads and writes
BOX_DATA = 15  # bytes from a box's address to its records
N_TAKEN, N_POSTED, END = 16, 17, 18  # in and out: the reader's and the writer's counts, the end of the last record
THIS_STEP = 19  # out: number of the last step
CONTROL_WORDS = 32

# Words of a program's block, then its rows, the places of its inputs and those of its outputs
NUMBER, N_ROWS, N_INPUTS, N_OUTPUTS, RECEIVED, N_LAST = 0, 1, 2, 3, 4, 5  # N_LAST: how many of the rows are last WAITs
CHECKS = 6  # address of strict ownership's block of checks (kernels/shadow.py), 0 without
TIMES = 7  # address of a table (protocol/timing.py) of when each row began and ended, and the step; 0: nobody asks
IDLE_PATIENCE = 8  # how long it polls for the next step: two words of 32 bits, see `poll`
ROWS = 9

# Words of a row: what it does, its number and split for the board, addresses, and how long it polls: each wait of
# a program takes about as long in each step
KIND, INDEX, SPLIT, WORD, TARGET, SOURCE, SIZE, ACKNOWLEDGED, PATIENCE = 0, 1, 2, 3, 4, 5, 6, 7, 8
ROW_WORDS = 9
PLACE_WORDS = 2  # of an input or output: address, bytes

_RUN, _COPY, _SEND, _RECV, _WAIT = (int(kind) for kind in (Kind.RUN, Kind.COPY, Kind.SEND, Kind.RECV, Kind.WAIT))
IDLE, _BUSY, _WAITING = int(State.IDLE), int(State.BUSY), int(State.WAITING)
_FUTEX = FUTEX_NUMBER or 0
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1  # between processes
_COMPUTE, _WAITED, _COPIED = 0, 1, 2  # of SPENT
ROW_NBYTES = 8 * ROW_WORDS

_LONG = types.int64
put32 = make(types.void, _LONG, _LONG)(
    lambda b, where, value: b.store_atomic(b.trunc(value, I32), b.inttoptr(where, I32.as_pointer()), "release", 4)
)
"""put32(address, value): 32 bits; what was stored before is seen before."""
memmove = types.ExternalFunction("memmove", _LONG(_LONG, _LONG, _LONG))
_MEET = ir.FunctionType(I64, [I64] * 4)
_meet = make(_LONG, *[_LONG] * 5)(lambda b, function, *args: b.call(b.inttoptr(function, _MEET.as_pointer()), args))
"""_meet(function, checks, first group, last group, step): call kernels/shadow.py's function at an address."""


@njit(**INNER)
def word32(address: int) -> int:
    """An unsigned word of 32 bits."""
    return load_i32(address) & 0xFFFFFFFF


@njit(**INNER)
def signed(value: int) -> int:
    """The low 32 bits as doorbells are loaded."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@njit(**INNER)
def wake(word: int) -> None:
    """Wake who sleeps on a doorbell."""
    if load_i32(word + 4) != 0:
        syscall(_FUTEX, word, _FUTEX_WAKE, 0x7FFFFFFF, 0, 0, 0)


@njit(**INNER)
def sleep(word: int, seen: int, patience: int, at_most: int) -> None:
    """Until a doorbell's value is not `seen`, or for a time: the address of a timespec. `patience` as for `poll`."""
    since = now_ns()
    store_i32(word + 4, 1)
    syscall(_FUTEX, word, _FUTEX_WAIT, seen, at_most, 0, 0)
    store_i32(word + 4, 0)
    slept(patience, now_ns() - since)


@njit(**INNER)
def await_value(control: int, row: int, value: int) -> None:
    """Return when the row's doorbell has this value: polls for a while, then sleeps."""
    word = load_i64(row + 8 * WORD)
    while True:
        seen = load_i32(word)
        if seen == value:
            return
        if poll(word, seen, row + 8 * PATIENCE):
            continue
        sleep(word, seen, row + 8 * PATIENCE, control + 8 * NAP)


@njit(**INNER)
def is_value(word: int, value: int) -> bool:
    """A doorbell has this value."""
    return load_i32(word) == value


@njit(**INNER)
def is_past(word: int, value: int) -> bool:
    """A doorbell has this value, or one of a later step: a program of other workers may have used it since."""
    return signed(load_i32(word) - value) >= 0


@njit(**INNER)
def await_past(control: int, row: int, value: int) -> None:
    """Return when the row's doorbell has this value, or a later one: polls for a while, then sleeps."""
    word = load_i64(row + 8 * WORD)
    while not is_past(word, value):
        seen = load_i32(word)
        if signed(seen - value) >= 0:
            return
        if poll(word, seen, row + 8 * PATIENCE):
            continue
        sleep(word, seen, row + 8 * PATIENCE, control + 8 * NAP)


@njit(**INNER)
def _note(control: int, times: int, row: int, end: int) -> None:
    """Note when a row began (`end` 0) or ended (1), where somebody asks for it."""
    if times != 0:
        store_i64(times + 8 * (TIME_WORDS * row + end), now_ns())


@njit(**INNER)
def _acknowledge(first: int, last: int, step: int) -> None:
    """Tell the peers of RECVs [first, last) that their bytes were taken; all of it before any of them wakes up."""
    for row in range(first, last, ROW_NBYTES):
        if load_i64(row + 8 * KIND) == _RECV:
            store_i32(load_i64(row + 8 * ACKNOWLEDGED), step)
    for row in range(first, last, ROW_NBYTES):
        if load_i64(row + 8 * KIND) == _RECV:
            wake(load_i64(row + 8 * ACKNOWLEDGED))


@njit(**INNER)
def _latest(row: int, end: int, step: int) -> int:
    """The row whose doorbell most likely rings last, among WAITs in a row from `row` on and a RECV behind them.

    All of them have to ring before anything else can happen, so that one sleep may do for all.
    """
    late = row
    while row < end and load_i64(row + 8 * KIND) == _WAIT:
        if not is_value(load_i64(row + 8 * WORD), step):
            late = row
        row += ROW_NBYTES
    if row < end and load_i64(row + 8 * KIND) == _RECV:
        late = row
    return late


@njit(**INNER)
def meets(checks: int, first: int, last: int, step: int) -> bool:
    """Groups [first, last) of strict ownership's expectations are met; where not, the report says what was found."""
    return checks == 0 or _meet(load_i64(checks + 8 * MEET), checks, first, last, step) == 0


@njit(**INNER)
def run_rows(control: int, program: int, full_step: int, n_rows: int) -> bool:
    """The first instructions of a step, behind which are only WAITs; False where strict ownership found a violation.

    SENDs in a row are all published before the peer is woken. RECVs in a row are acknowledged together, at the latest
    before this worker sleeps or computes.
    """
    step = signed(full_step)
    checks, times = load_i64(program + 8 * CHECKS), load_i64(program + 8 * TIMES)
    group = load_i64(program + 8 * N_INPUTS) + 1  # of the row's expectations
    line = load_i64(control + 8 * LINE)
    row = program + 8 * ROWS
    end = row + ROW_NBYTES * n_rows
    owed = row  # RECVs from here on were not acknowledged
    phase = _COPIED
    fine = True
    before = now_ns()
    put32(line, full_step & 0xFFFFFFFF)
    _note(control, times, n_rows, 0)
    while row < end:
        kind = load_i64(row + 8 * KIND)
        now_in = _COMPUTE if kind == _RUN else (_COPIED if kind in (_COPY, _SEND) else _WAITED)
        if now_in != phase:
            now = now_ns()
            spent = control + 8 * (SPENT + phase)
            store_i64(spent, load_i64(spent) + now - before)
            phase, before = now_in, now
        if phase != _WAITED:
            _acknowledge(owed, row, step)
            owed = row
        put32(line + 4, load_i64(row + 8 * INDEX))
        put32(line + 8, load_i64(row + 8 * SPLIT))
        put32(line + 12, _WAITING if phase == _WAITED else _BUSY)
        word = load_i64(row + 8 * WORD)
        target, source, size = load_i64(row + 8 * TARGET), load_i64(row + 8 * SOURCE), load_i64(row + 8 * SIZE)
        last = row + ROW_NBYTES
        while kind == _SEND and last < end and load_i64(last + 8 * KIND) == _SEND:
            last += ROW_NBYTES
        groups, index = (last - row) // ROW_NBYTES, load_i64(row + 8 * INDEX)
        _note(control, times, index, 0)
        if kind != _RECV and not meets(checks, group, group + groups, full_step):
            fine = False
            break
        if kind == _RUN:  # a table, from row `target` to `source`
            work(
                word, target, source, load_i64(control + 8 * THREADS), load_i64(control + 8 * TEAM),
                load_i64(control + 8 * TEAM_FUTEX),
            )  # fmt: skip
        elif kind == _COPY:
            memmove(target, source, size)
        elif kind == _SEND:
            for sent in range(row, last, ROW_NBYTES):
                _note(control, times, load_i64(sent + 8 * INDEX), 0)
                store_i32(load_i64(sent + 8 * WORD), step)
                _note(control, times, load_i64(sent + 8 * INDEX), 1)
            for sent in range(row, last, ROW_NBYTES):
                wake(load_i64(sent + 8 * WORD))
        else:
            if not is_value(word, step):
                _acknowledge(owed, row, step)
                owed = row
                await_value(control, _latest(row, end, step), step)
                await_value(control, row, step)
            if kind == _RECV:
                memmove(target, source, size)
                if not meets(checks, group, group + 1, full_step):
                    fine = False
                    break
        _note(control, times, index + groups - 1, 1)
        row, group = last, group + groups
    _acknowledge(owed, row, step)
    if fine:  # what is left are WAITs, and reads of what the program leaves
        rest = load_i64(program + 8 * N_ROWS) - n_rows
        fine = meets(checks, group, group + rest + 1, full_step)
    _note(control, times, n_rows, 1)
    spent = control + 8 * (SPENT + phase)
    store_i64(spent, load_i64(spent) + now_ns() - before)
    return fine


@njit(**INNER)
def begin(control: int) -> int:
    """A step begins: nothing was spent yet. When."""
    for k in range(3):
        store_i64(control + 8 * (SPENT + k), 0)
    return now_ns()


@entry(3)
def run(control: int, program: int, step: int) -> int:
    """One step: its inputs are in place, nobody is told of its end. Leaves SPENT. 1 on a violation, else 0."""
    begin(control)
    fine = run_rows(control, program, step, load_i64(program + 8 * N_ROWS))
    return 0 if fine else 1


@njit(**INNER)
def get_back(control: int, program: int, step: int) -> None:
    """Wait for what the last step has lent and not got back yet."""
    n = load_i64(program + 8 * N_ROWS)
    first = program + 8 * ROWS
    for k in range(n - load_i64(program + 8 * N_LAST), n):
        row = first + ROW_NBYTES * k
        if not is_past(load_i64(row + 8 * WORD), step):
            put32(load_i64(control + 8 * LINE) + 12, _WAITING)
            await_past(control, row, step)
    put32(load_i64(control + 8 * LINE) + 12, IDLE)
