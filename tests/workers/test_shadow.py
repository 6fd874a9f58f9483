"""The shadow walk, row by row, and tables that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import ProtocolError
from protocol.shadow import STEP_SHIFT, Kind, shadow_table
from workers.arena import Arenas
from workers.shadow import Shadows, Violation

N = 8  # granules of the arena


class NoPeers:
    """A plane without peers."""

    def shadow(self, peer: int, arena: int) -> None:
        return None


@pytest.fixture
def shadows(tmp_path: Any) -> Shadows:
    arenas = Arenas(str(tmp_path), "cpu0", limit=None, shared=False, virtual=False)
    arenas.allocate(1, 32 * N, "compute", shadow=True)
    arenas.allocate(2, 32 * N, "weights")
    return Shadows(arenas, NoPeers())  # type: ignore[arg-type]


def row(
    kind: Kind, first: int, last: int, value: int, group: int = 0, arena: int = 1, number: int = 0
) -> tuple[int, ...]:
    return (kind, group, arena, first, last, value, 0, number)


def walk(shadows: Shadows, *rows: tuple[int, ...], step: int = 1) -> tuple[int, ...] | None:
    """The report of a table of one group, None when everything was as expected."""
    numbered = [(*r[:7], i) for i, r in enumerate(rows)]
    bound = shadows.bind(shadow_table(numbered), 1, [])
    try:
        shadows.check(bound, 0, step)
    except Violation as violation:
        return violation.report
    return None


def test_reads_of_own_writes(shadows: Shadows) -> None:
    assert walk(shadows, row(Kind.MARK, 0, 4, 1), row(Kind.MARK, 4, 8, 2), row(Kind.READ, 0, 4, 1)) is None
    assert walk(shadows, row(Kind.READ, 0, 5, 1)) == (0, 4, 1 << STEP_SHIFT | 2, 1 << STEP_SHIFT | 1, 0)


def test_the_same_write_of_an_earlier_step_is_another(shadows: Shadows) -> None:
    assert walk(shadows, row(Kind.MARK, 0, 4, 1), step=1) is None
    assert walk(shadows, row(Kind.READ, 0, 4, 1), step=2) == (0, 0, 1 << STEP_SHIFT | 1, 2 << STEP_SHIFT | 1, 0)


@pytest.mark.parametrize("at", range(N))
def test_every_granule_counts(shadows: Shadows, at: int) -> None:
    assert walk(shadows, row(Kind.MARK, 0, N, 1), row(Kind.MARK, at, at + 1, 2), row(Kind.READ, 0, N, 1))[1] == at  # type: ignore[index]


def test_handle_of_an_earlier_epoch(shadows: Shadows) -> None:
    assert walk(shadows, row(Kind.EPOCH, 0, 0, 0), row(Kind.MARK, 2, 4, 7), row(Kind.TAKE, 2, 3, 5), step=3) is None
    read = row(Kind.READ_HANDLE, 2, 4, 5)
    assert walk(shadows, read, step=3) is None
    tag = 3 << STEP_SHIFT | 7
    assert walk(shadows, row(Kind.EPOCH, 0, 0, 0), read, step=4) == (1, -1, tag, tag, 4)  # intact, by luck
    assert walk(shadows, row(Kind.MARK, 3, 4, 1), read, step=4) == (1, 3, 4 << STEP_SHIFT | 1, tag, 4)


def test_memory_of_its_own(shadows: Shadows) -> None:
    assert walk(shadows, row(Kind.OWN, 0, 2, 9), row(Kind.READ_OWN, 0, 2, 9)) is None
    assert walk(shadows, row(Kind.READ_OWN, 0, 3, 9)) == (0, 2, 0, -9, 0)
    assert walk(shadows, row(Kind.READ_OWN_OR_EMPTY, 0, 3, 9)) is None
    assert walk(shadows, row(Kind.MARK, 1, 2, 4), row(Kind.READ_OWN_OR_EMPTY, 0, 3, 9)) == (
        1,
        1,
        1 << STEP_SHIFT | 4,
        -9,
        0,
    )


def test_what_nobody_writes_is_never_right(shadows: Shadows) -> None:
    assert walk(shadows, row(Kind.MARK, 0, N, 1), row(Kind.READ_NOBODY, 3, 4, 0)) == (1, 3, 1 << STEP_SHIFT | 1, 0, 0)


@pytest.mark.parametrize(
    "bad",
    [
        row(Kind.MARK, 0, N + 1, 1),
        row(Kind.MARK, -1, 2, 1),
        row(Kind.MARK, 3, 2, 1),
        row(Kind.MARK, 0, 2, 1, arena=2),  # has no shadow
        row(Kind.MARK, 0, 2, 1, arena=3),
        row(Kind.MARK, 0, 2, 1 << STEP_SHIFT),
        row(Kind.MARK, 0, 2, -1),
        row(Kind.MARK, 0, 2, 1, group=1),
        row(Kind.TAKE, 0, 1, 64),
        row(Kind.TAKE, N, N, 1),
        (10, 0, 1, 0, 1, 1, 0, 0),
    ],
)
def test_a_bad_table_is_refused(shadows: Shadows, bad: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError):
        shadows.bind(shadow_table([bad]), 1, [])
