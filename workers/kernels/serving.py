"""Steps as they come in the mailbox (protocol/mailbox.py), from one to the next without Python."""

from __future__ import annotations

from protocol.mailbox import CAPACITY, DONE, HEAD_NBYTES, N_SLOTS, POSTED, SLOT, SLOTS, STEP, TAKEN
from workers.kernels.access import INNER
from workers.kernels.jit import njit
from workers.kernels.simd import load_i64, store_i64
from workers.kernels.stage import entry
from workers.kernels.steps import (
    ANSWERS,
    BOX_DATA,
    CHECKS,
    END,
    IDLE,
    IDLE_NAP,
    IDLE_PATIENCE,
    LINE,
    N_INPUTS,
    N_LAST,
    N_OUTPUTS,
    N_POSTED,
    N_ROWS,
    N_TAKEN,
    NUMBER,
    PLACE_WORDS,
    RECEIVED,
    REQUESTS,
    ROW_NBYTES,
    ROWS,
    SPENT,
    THIS_STEP,
    TOTAL,
    begin,
    get_back,
    meets,
    memmove,
    put32,
    run_rows,
    signed,
    sleep,
    wake,
    word32,
)
from workers.kernels.team import now_ns, poll, store_i32

# Why `serve` returns
MESSAGE = 0  # there is another message, or none for long
FULL = 1  # a step is through, but there is no room for the answer
VIOLATED = 2  # strict ownership found a violation


@njit(**INNER)
def _is_step(control: int, program: int, record: int, size: int) -> bool:
    """Is this record a step of the program, with inputs of the right sizes?"""
    n = load_i64(program + 8 * N_INPUTS)
    start = HEAD_NBYTES + 4 * (1 + n)
    if size < start + 16 or word32(record) != STEP or word32(record + 4) != 1 + n:
        return False
    return word32(record + HEAD_NBYTES) == 16 and load_i64(record + start) == load_i64(program + 8 * NUMBER)


@njit(**INNER)
def _take_inputs(program: int, record: int, size: int) -> bool:
    """Copy a step's inputs to their places; False when they are not of the right sizes."""
    n = load_i64(program + 8 * N_INPUTS)
    lengths = record + HEAD_NBYTES + 4
    at = HEAD_NBYTES + 4 * (1 + n) + 16
    place = program + 8 * ROWS + ROW_NBYTES * load_i64(program + 8 * N_ROWS)
    for k in range(n):
        nbytes = word32(lengths + 4 * k)
        if nbytes != 0:
            if nbytes != load_i64(place + 8) or at + nbytes > size:
                return False
            memmove(load_i64(place), record + at, nbytes)
        at += nbytes
        place += 8 * PLACE_WORDS
    return at == size


@njit(**INNER)
def _begin_checks(program: int, record: int, step: int) -> bool:
    """Strict ownership: mark the inputs that are set, and begin; False on a violation."""
    checks = load_i64(program + 8 * CHECKS)
    n = load_i64(program + 8 * N_INPUTS)
    fine = True
    if checks != 0:
        for k in range(n):
            if word32(record + HEAD_NBYTES + 4 * (1 + k)) != 0:
                fine &= meets(checks, k, k + 1, step)
        fine &= meets(checks, n, n + 1, step)
    return fine


@njit(**INNER)
def _answer(control: int, program: int, step: int) -> bool:
    """Post that the step is through, with its outputs; False when there is no room."""
    box = load_i64(control + 8 * ANSWERS)
    data = box + load_i64(control + 8 * BOX_DATA)
    posted, start = load_i64(control + 8 * N_POSTED), load_i64(control + 8 * END)
    taken = word32(box + 4 * TAKEN)
    if taken == posted:
        start = 0
    elif (posted - taken) & 0xFFFFFFFF >= N_SLOTS:
        return False
    n = load_i64(program + 8 * N_OUTPUTS)
    places = (
        program + 8 * ROWS + ROW_NBYTES * load_i64(program + 8 * N_ROWS)
        + 8 * PLACE_WORDS * load_i64(program + 8 * N_INPUTS)
    )  # fmt: skip
    size = HEAD_NBYTES + 4 * (1 + n) + 56
    for k in range(n):
        size += load_i64(places + 8 * PLACE_WORDS * k + 8)
    if size > CAPACITY - start:
        return False
    record = data + start
    put32(record, DONE)
    put32(record + 4, 1 + n)
    put32(record + HEAD_NBYTES, 56)
    at = record + HEAD_NBYTES + 4 * (1 + n)
    body = at
    at += 56
    for k in range(n):
        place = places + 8 * PLACE_WORDS * k
        nbytes = load_i64(place + 8)
        put32(record + HEAD_NBYTES + 4 * (1 + k), nbytes)
        memmove(at, load_i64(place), nbytes)
        at += nbytes
    store_i64(body, load_i64(program + 8 * NUMBER))
    store_i64(body + 8, step)
    store_i64(body + 16, load_i64(control + 8 * TOTAL))
    for k in range(3):
        store_i64(body + 24 + 8 * k, load_i64(control + 8 * (SPENT + k)))
    store_i64(body + 48, load_i64(program + 8 * RECEIVED))
    store_i64(control + 8 * END, start + ((size + 7) & ~7))
    number = (posted + 1) & 0xFFFFFFFF
    slot = box + 4 * (SLOTS + SLOT * (number % N_SLOTS))
    put32(slot + 4, start)
    put32(slot + 8, size)
    store_i32(slot, number)
    store_i64(control + 8 * N_POSTED, number)
    store_i32(box + 4 * POSTED, number)
    wake(box + 4 * POSTED)
    return True


@entry(2)
def serve(control: int, program: int) -> int:
    """Run steps of one program as they come, until there is another message: MESSAGE, FULL or VIOLATED.

    A step is answered when only lent bytes are still out. Nothing else is done before they are back, and peers' answers
    tell the coordinator that they are.
    """
    box = load_i64(control + 8 * REQUESTS)
    n_rows = load_i64(program + 8 * N_ROWS) - load_i64(program + 8 * N_LAST)
    step = 0
    lent = False
    while True:
        taken = load_i64(control + 8 * N_TAKEN)
        bell = box + 4 * POSTED
        if word32(bell) == taken:
            if not poll(bell, signed(taken), program + 8 * IDLE_PATIENCE):
                sleep(bell, signed(taken), program + 8 * IDLE_PATIENCE, control + 8 * IDLE_NAP)
            continue
        if lent:
            get_back(control, program, signed(step))
            lent = False
        number = (taken + 1) & 0xFFFFFFFF
        slot = box + 4 * (SLOTS + SLOT * (number % N_SLOTS))
        if word32(slot) != number:
            return MESSAGE
        start, size = word32(slot + 4), word32(slot + 8)
        if size < HEAD_NBYTES or start + size > CAPACITY:
            return MESSAGE
        record = box + load_i64(control + 8 * BOX_DATA) + start
        if not _is_step(control, program, record, size):
            return MESSAGE
        step = load_i64(record + HEAD_NBYTES + 4 * (1 + load_i64(program + 8 * N_INPUTS)) + 8)
        begun = begin(control)
        if not _take_inputs(program, record, size):
            return MESSAGE
        fine = _begin_checks(program, record, step)
        store_i64(control + 8 * N_TAKEN, number)
        store_i32(box + 4 * TAKEN, number)
        store_i64(control + 8 * THIS_STEP, step)
        if not fine or not run_rows(control, program, step, n_rows):
            return VIOLATED
        lent = True
        put32(load_i64(control + 8 * LINE) + 12, IDLE)
        store_i64(control + 8 * TOTAL, now_ns() - begun)
        if not _answer(control, program, step):
            get_back(control, program, signed(step))
            return FULL
