"""The compiled half of strict ownership: walks a program's expectations over the tags beside the arenas."""

from __future__ import annotations

from protocol.shadow import STEP_SHIFT, WORDS, Kind
from workers.kernels.access import INNER
from workers.kernels.jit import njit
from workers.kernels.simd import load_i64, store_i64
from workers.kernels.stage import entry

ADDRESS = 2
"""Word of a bound row: `arena` becomes the address of the arena's shadow."""

REPORT_WORDS = 5
"""Words of a report: row, granule, tag found, tag expected, epoch of the arena."""

# Words of a program's block of checks; behind them the first row of each group, and the end of the last
MEET, TABLE, HANDLES, REPORT = 0, 1, 2, 3  # addresses: of the function `meet`, rows, the handles' tags, a report
STARTS = 4

_MARK, _OWN, _EPOCH, _TAKE = int(Kind.MARK), int(Kind.OWN), int(Kind.EPOCH), int(Kind.TAKE)
_READ, _READ_PEER, _READ_HANDLE = int(Kind.READ), int(Kind.READ_PEER), int(Kind.READ_HANDLE)
_READ_NOBODY, _OR_EMPTY = int(Kind.READ_NOBODY), int(Kind.READ_OWN_OR_EMPTY)
_NBYTES = 8 * WORDS


@njit(**INNER)
def _fill(address: int, first: int, last: int, tag: int) -> None:
    for g in range(first, last):
        store_i64(address + 8 * (1 + g), tag)


@njit(**INNER)
def _differs(address: int, first: int, last: int, tag: int, empty: int) -> int:
    """The first granule whose tag is neither `tag` nor `empty`; `last` when there is none."""
    wrong = 0
    for g in range(first, last):  # no way out of the loop: this vectorises
        found = load_i64(address + 8 * (1 + g))
        wrong |= int((found != tag) & (found != empty))
    if wrong == 0:
        return last
    for g in range(first, last):
        found = load_i64(address + 8 * (1 + g))
        if (found != tag) & (found != empty):
            return g
    return last


@njit(**INNER)
def _report(to: int, row: int, granule: int, found: int, expected: int, epoch: int) -> None:
    store_i64(to, row)
    store_i64(to + 8, granule)
    store_i64(to + 16, found)
    store_i64(to + 24, expected)
    store_i64(to + 32, epoch)


@entry(4)
def meet(checks: int, first_group: int, last_group: int, step: int) -> int:
    """Groups [first, last) of a block of checks, in order; 1 at the first read that finds another tag, else 0.

    The block's report is filled in on a violation.
    """
    start, end = load_i64(checks + 8 * (STARTS + first_group)), load_i64(checks + 8 * (STARTS + last_group))
    table, slots, report = load_i64(checks + 8 * TABLE), load_i64(checks + 8 * HANDLES), load_i64(checks + 8 * REPORT)
    mine = step << STEP_SHIFT
    for i in range(start, end):
        row = table + _NBYTES * i
        kind, shadow = load_i64(row), load_i64(row + 16)
        first, last, value = load_i64(row + 24), load_i64(row + 32), load_i64(row + 40)
        if kind == _MARK:
            _fill(shadow, first, last, mine | value)
        elif kind == _OWN:
            _fill(shadow, first, last, -value)
        elif kind == _EPOCH:
            store_i64(shadow, step)
        elif kind == _TAKE:
            store_i64(slots + 8 * value, load_i64(shadow + 8 * (1 + first)))
        else:
            expected = -value
            if kind in (_READ, _READ_PEER):
                expected = mine | value
            elif kind == _READ_HANDLE:
                expected = load_i64(slots + 8 * value)
            wrong = first
            if kind != _READ_NOBODY:
                wrong = _differs(shadow, first, last, expected, 0 if kind == _OR_EMPTY else expected)
            epoch = load_i64(shadow)
            late = kind == _READ_HANDLE and epoch != expected >> STEP_SHIFT
            if wrong < last:
                _report(report, load_i64(row + 56), wrong, load_i64(shadow + 8 * (1 + wrong)), expected, epoch)
                return 1
            if late:
                _report(report, load_i64(row + 56), -1, expected, expected, epoch)
                return 1
    return 0
