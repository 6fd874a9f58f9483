"""The proof of leases on programs written by hand: each of its refusals, and what a worker knows without being told."""

from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.ownership.leases import check_leases
from coordinator.schedule.lower import Lowered, Transfer, WorkerProgram
from protocol.errors import PlanError
from protocol.program import Instruction, Kind

A, B, C = range(3)
N = 64  # bytes of every transfer; transfer t is lent from byte N * t of arena 1 and received behind all of those


def send(transfer: int, peer: int) -> Instruction:
    return Instruction(Kind.SEND, transfer, peer, 0, 1, N * transfer, N)


def receive(transfer: int, peer: int, source: int | None = None) -> Instruction:
    at = N * transfer if source is None else source
    return Instruction(Kind.RECV, transfer, peer, 0, 1, N * (10 + transfer), N, (1, at))


def wait(transfer: int, peer: int) -> Instruction:
    return Instruction(Kind.WAIT, transfer, peer, 0)


def overwrite(transfer: int) -> Instruction:
    return Instruction(Kind.COPY, 0, 0, 3, 1, N * transfer + N - 1, N, (1, 4096))


def lowered(*programs: tuple[Instruction, ...]) -> Lowered:
    ends: dict[int, list[int]] = {}
    for worker, program in enumerate(programs):
        for item in program:
            if item.kind in (Kind.SEND, Kind.RECV):
                ends.setdefault(item.transfer, [worker, item.peer][:: 1 if item.kind is Kind.SEND else -1])
    plan: Any = SimpleNamespace(graph=SimpleNamespace(name="g"), devices=[SimpleNamespace(name=name) for name in "abc"])
    transfers = tuple(Transfer(t, *ends[t], f"x{t}", N, 0, 1, t) for t in sorted(ends))
    return Lowered(plan, tuple(WorkerProgram((), program, (), (), ()) for program in programs), transfers)


SOUND = {
    "it waits": ((send(0, B), wait(0, B), overwrite(0)), (receive(0, A),)),
    "its answer tells": ((send(0, B), receive(1, B), overwrite(0)), (receive(0, A), send(1, A), wait(1, A))),
    "somebody else tells": (
        (send(0, B), receive(2, C), overwrite(0)),
        (receive(0, A), send(1, C), wait(1, C)),
        (receive(1, B), send(2, A), wait(2, A)),
    ),
    "nothing is lent": ((overwrite(0),), ()),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_passes(name: str) -> None:
    check_leases(lowered(*SOUND[name]))


REFUSED = {
    "a: transfer 0 of 'x0': COPY in split 3 overwrites bytes [63, 127) of arena 1 while they are on loan": (
        (send(0, B), overwrite(0), wait(0, B)), (receive(0, A),),
    ),
    "a: transfer 0 of 'x0': COPY in split 3 overwrites": (  # b said something, but before it had taken the bytes
        (send(0, B), receive(1, B), overwrite(0)), (send(1, A), receive(0, A), wait(1, A)),
    ),
    "a: transfer 0 of 'x0': is sent twice": ((send(0, B), send(0, B), wait(0, B)), (receive(0, A),)),
    "b: transfer 0 of 'x0': is received twice": ((send(0, B), wait(0, B)), (receive(0, A), receive(0, A))),
    "b: transfer 0 of 'x0': is never received": ((send(0, B),), ()),
    "b: transfer 0 of 'x0': RECV in split 0 waits for ever": ((), (receive(0, A),)),
    "b: transfer 0 of 'x0': is not received from where it was sent": ((send(0, B),), (receive(0, A, 1),)),
    "c: transfer 0 of 'x0': is received by another worker than it was sent to": (
        (send(0, B), wait(0, B)), (), (receive(0, A),),
    ),
    "a: transfer 0 of 'x0': the program ends while the bytes are on loan": ((send(0, B),), (receive(0, A),)),
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_what_is_not_is_refused(says: str) -> None:
    with pytest.raises(PlanError) as refused:
        check_leases(lowered(*REFUSED[says]))
    assert str(refused.value).startswith(f"g: {says}")
