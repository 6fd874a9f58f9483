"""Bytes on loan to ZeroMQ: the same answer, and whoever waits for a peer that takes nothing is ended like everybody."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.config import parse_workers
from coordinator.runtime.fleet import Fleet, FleetOptions
from protocol import messages as m
from protocol.board import State
from protocol.errors import CrossdockError, WorkerError
from protocol.program import Instruction, Kind, pack_instructions, pack_ops
from tests.faults.harness import end_unfinished, run
from tests.patience import LATE_S

pytestmark = pytest.mark.usefixtures("warm")

NBYTES = 64 << 20  # more than the system holds between two processes
SENDER, RECEIVER = 0, 1


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    yield
    end_unfinished()


def lend(fleet: Fleet) -> None:
    """The first worker sends an arena twice to the second, which is halted, and waits for the loans to come back.

    When a peer dies, ZeroMQ drops the message that it is writing: that loan comes back. It keeps the other one.
    """
    fleet.start()
    fleet.handshake()
    fleet.request(SENDER, m.Allocate(1, NBYTES, "lent", shadow=False))
    span = {"split": 3, "arena": 1, "offset": 0, "nbytes": NBYTES}
    program = [Instruction(Kind.SEND, transfer, RECEIVER, **span) for transfer in (0, 1)]
    program += [Instruction(Kind.WAIT, transfer, RECEIVER, 3) for transfer in (0, 1)]
    tables = pack_ops([]).tobytes(), pack_instructions(program).tobytes()
    fleet.request(SENDER, m.ProgramMessage(1, "lend", 2, (), (), (), (), overlaps=False), tables)
    os.kill(fleet.processes[RECEIVER].pid, signal.SIGSTOP)
    fleet.doing = "the test graph"
    fleet.send(SENDER, m.Step(1, 1))
    deadline = time.monotonic() + LATE_S
    while fleet.board.progress(SENDER).state is not State.WAITING:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("transport", ["ipc", pytest.param("tcp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "event",
    [
        "the receiver is killed", "the pipe closes", pytest.param("nothing happens", marks=pytest.mark.slow),
        "it goes on",
    ],
)  # fmt: skip
def test_waiting_for_a_loan(transport: str, event: str) -> None:
    # While processes start and ZeroMQ carries bytes nobody gets on: little time is for who is to be found halted.
    options = FleetOptions(transport=transport, plane="message", stall_timeout_s=LATE_S)
    with Fleet(parse_workers("cpu:2", 1), options) as fleet:
        lend(fleet)
        pids = [process.pid for process in fleet.processes]
        directory, names = fleet.directory, fleet.topology.names
        if event == "it goes on":
            os.kill(pids[RECEIVER], signal.SIGCONT)
            assert isinstance(fleet.gather([SENDER])[SENDER].message, m.Done)
        elif event == "the receiver is killed":
            os.kill(pids[RECEIVER], signal.SIGKILL)
            with pytest.raises(WorkerError, match=f"{names[RECEIVER]} was killed by SIGKILL .* during the test graph"):
                fleet.gather([SENDER])
        elif event == "the pipe closes":  # as when the coordinator dies
            fleet.processes[SENDER].hang_up()
            with pytest.raises(WorkerError, match=f"{names[SENDER]} ended with status 6 in split 3 of the test graph"):
                fleet.gather([SENDER])
        else:
            fleet.options = replace(options, stall_timeout_s=0.5)
            halted = f"no worker .* for 0.5 s during the test graph: {names[SENDER]} waits for a peer in split 3"
            with pytest.raises(CrossdockError, match=halted):
                fleet.gather([SENDER])
        began = time.monotonic()
    assert time.monotonic() - began < LATE_S
    assert not os.path.exists(directory)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


ALL_LENT = """
__path__ = [{folder!r}]
import pathlib
from workers import peers
def wait(self, step, item):
    if item.transfer in self.lent:
        pathlib.Path({marker!r}).touch()
    kept(self, step, item)
peers.COPIED_NBYTES = 0
kept, peers.MessagePlane.wait = peers.MessagePlane.wait, wait
"""


@pytest.mark.slow
@pytest.mark.parametrize("ownership", ["safe", "strict"])
def test_same_bytes_with_every_message_on_loan(ownership: str, model: Path, image: Path, tmp_path: Path) -> None:
    import workers

    (tmp_path / "workers").mkdir()
    marker, folder = tmp_path / "was-lent", str(Path(workers.__file__).parent)
    (tmp_path / "workers" / "__init__.py").write_text(ALL_LENT.format(folder=folder, marker=str(marker)))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = ["-i", image] if ownership == "safe" else ["-p", "hello", "--raw"]
    arguments = ["run", "-m", model, *asked, "-w", "cpu:1,accel:2", "-n", 8, "-q", "--ownership", ownership]
    expected = run(arguments)
    assert (expected.status, expected.stderr) == (0, "")
    assert expected.stdout
    found = run([*arguments, "--transport", "tcp"], env={"PYTHONPATH": path})
    assert (found.status, found.stderr, found.stdout, found.leftovers) == (0, "", expected.stdout, [])
    assert marker.exists()
