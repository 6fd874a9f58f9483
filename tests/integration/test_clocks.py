"""Virtual clocks beside the wall clock: real workers come to the times that the simulation of their programs gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.model.sampling import Sampler
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.generate import Timings, encode_images, generate
from coordinator.runtime.session import Session, SessionOptions
from coordinator.runtime.stopwatch import Evaluation, Stopwatch
from coordinator.schedule.placement import PlacementOptions
from coordinator.simulate.engine import simulate
from coordinator.simulate.hardware import DeviceModel, LinkModel
from coordinator.simulate.lowered import time_program
from coordinator.simulate.machine import Machine, make_machine
from coordinator.simulate.timed import Do, Job
from protocol.board import NBYTES, Board
from protocol.errors import ProtocolError, UsageError
from protocol.program import Instruction, Kind
from protocol.sharedmem import create
from protocol.timing import BLOCKS, PS, Cost, pack_costs, unpack_costs
from tests.integration.describing import Loaded, chat_prompt, fleet_of, load
from workers.timing import VirtualClock, timing_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SLACK_PS = 500
"""An instruction's time is rounded to a picosecond; an evaluation has some dozens of them."""

HOST = DeviceModel("host", "cpu", 0, 60e9, {"f32": 4e11}, launch_s=2e-6)
GPU = DeviceModel("gpu", "nvidia", 0, 900e9, {"f16": 8e13}, launch_s=3e-6, step_s=40e-6, async_copies=True)
CARD = LinkModel("card", 4e-6, 24e9)
WIRE = LinkModel("wire", 30e-6, 1.1e9, fixed_s_per_token=700e-6)


def machine(device: DeviceModel, link: LinkModel, other: DeviceModel | None = None) -> Machine:
    models = (replace(device, name="one"), replace(other or device, name="two"), HOST)
    return make_machine(models, lambda source, target: link)


MACHINES = {
    "cards": machine(GPU, CARD),
    "behind RPC": machine(GPU, WIRE),
    "nothing overlaps": machine(HOST, CARD),
    "some overlap": machine(HOST, WIRE, GPU),
}
PLACEMENTS = {
    "middle": PlacementOptions(3),
    "all": PlacementOptions(),  # the result comes from another worker than the host
    "scattered": PlacementOptions(4, overrides=(("attn_v", "cpu0"), ("ffn_up", "accel1")), kv_offload=False),
}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(EXAMPLES / "crossdock-demo.gguf")


@pytest.fixture(scope="module")
def chain() -> Iterator[Fleet]:
    with fleet_of("cpu:1,accel:2") as fleet:
        yield fleet


def answer(fleet: Fleet, loaded: Loaded, stopwatch: Stopwatch | None, n: int = 4, where: str = "middle") -> list[int]:
    """The tokens of the bundled question; times are in the stopwatch."""
    prompt = chat_prompt(loaded, "Describe this image.", [EXAMPLES / "images" / "tower.png"])
    options = SessionOptions(PLACEMENTS[where])
    session = Session(loaded.model, loaded.params, fleet.topology, options, n_images=1)
    session.stopwatch = stopwatch
    session.open(fleet)
    encode_images(session, prompt, Timings())
    tokens = [token for token, _ in generate(session, loaded.tokenizer, prompt, Sampler(), n, Timings())]
    session.close()
    return tokens


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("where", PLACEMENTS)
def test_clocks_of_a_run_are_those_of_the_simulation(chain: Fleet, loaded: Loaded, name: str, where: str) -> None:
    found = MACHINES[name]
    stopwatch = Stopwatch(found, keep=True)
    answer(chain, loaded, stopwatch, 2, where)
    assert len(stopwatch.taken) == 3  # the image, the prompt, a token
    for evaluation in stopwatch.taken:
        check_evaluation(evaluation, found)


def check_evaluation(evaluation: Evaluation, found: Machine) -> None:
    timed = time_program(evaluation.lowered, found.models, found.fabric)
    is_async = [model.async_copies for model in found.models]
    timeline = simulate(is_async, found.fabric, [timed], [[Job(0)]], check=True, record=True)
    assert abs(evaluation.virtual_ps - timeline.end_s * PS) <= SLACK_PS
    for worker, rows in evaluation.times.items():
        instructions = evaluation.lowered.programs[worker].instructions
        real = [row[2:4] for item, row in zip(instructions, rows, strict=False) if item.kind is Kind.RUN]
        ran = [piece for piece in timeline.slices if piece.worker == worker and piece.do == Do.RUN]
        simulated = ran[len(ran) - len(real) :]  # the device's own overhead comes before them
        assert len(simulated) == len(real)
        for one, two in zip(real, simulated, strict=True):
            assert abs(one[0] - two.start * PS) <= SLACK_PS, (worker, one, two)
            assert abs(one[1] - two.end * PS) <= SLACK_PS, (worker, one, two)


def test_clocks_change_nothing(chain: Fleet, loaded: Loaded) -> None:
    tokens = answer(chain, loaded, None)
    watched, again = Stopwatch(MACHINES["nothing overlaps"], keep=True), Stopwatch(MACHINES["nothing overlaps"])
    assert answer(chain, loaded, watched) == tokens
    assert answer(chain, loaded, again) == tokens
    assert watched.now_ps == again.now_ps == sum(evaluation.virtual_ps for evaluation in watched.taken)
    assert not again.taken


def test_clocks_travel_with_messages(loaded: Loaded) -> None:
    """Where bytes do not go through shared memory, and nobody waits for a loan."""
    found = MACHINES["nothing overlaps"]
    stopwatch = Stopwatch(found, keep=True)
    with fleet_of("cpu:1,accel:2", transport="tcp") as fleet:
        assert fleet.plane == "message"
        answer(fleet, loaded, stopwatch, n=2)
    for evaluation in stopwatch.taken:
        check_evaluation(evaluation, found)


def test_pace_is_that_of_the_model(chain: Fleet, loaded: Loaded) -> None:
    stopwatch = Stopwatch(machine(GPU, LinkModel("slow", 10e-3, 1e9)), pace=True, keep=True)
    answer(chain, loaded, stopwatch, n=2)
    assert stopwatch.now_ps > PS // 20
    for evaluation in stopwatch.taken:
        wall_s, virtual_s = (evaluation.end_ns - evaluation.start_ns) / 1e9, evaluation.virtual_ps / PS
        assert virtual_s <= wall_s
    last = stopwatch.taken[-1]
    for rows in last.times.values():  # each instruction ends when it should, or later where the machine is slower
        assert all((row.end_ns - rows[-1].start_ns) * 1000 >= row.start_ps for row in rows[:-1])


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(create(NBYTES, str(tmp_path), "board"))


def test_a_sender_that_blocks_and_a_loan_by_hand(board: Board) -> None:
    """One computes 5, sends (link: 3, then 2 on the way), computes 1, waits for its loan; two computes 10 first."""
    send, recv = Instruction(Kind.SEND, 0, 1), Instruction(Kind.RECV, 0, 0)
    one = VirtualClock(board, [Cost(0), Cost(5), Cost(0, 0, 0, BLOCKS), Cost(1), Cost(0, 0, 0)])
    two = VirtualClock(board, [Cost(0), Cost(10), Cost(3, 2, 0)])
    one.begin(1)
    two.begin(1)
    one.add(0)
    one.send(1, send)
    two.add(0)
    assert two.receive(1, recv) == 13
    assert two.now == 15
    one.add(2)
    assert one.ends == {1: 13}
    one.wait(3, Instruction(Kind.WAIT, 0, 1))
    assert one.now == 14


def test_costs_that_cannot_be_meant(board: Board) -> None:
    table = pack_costs([Cost(1), Cost(2, 3, 0, BLOCKS)]).tobytes()
    assert unpack_costs(table, 1) == [Cost(1), Cost(2, 3, 0, BLOCKS)]
    run = [Instruction(Kind.RUN)]
    for kind, buffer, message in (
        ("clock", table[:32], "modelled times: 1 rows for 1 instructions"),
        ("clock", table[:33], "modelled times: 33 bytes are no table of 4 words a row"),
        ("pace", pack_costs([Cost(0), Cost(-1)]).tobytes(), "modelled times: expected 0 to 2"),
        ("noon", table, "timing 'noon': expected one of '', 'trace', 'clock', 'pace'"),
    ):
        with pytest.raises(ProtocolError, match=message):
            timing_of(kind, buffer, run, board)


def test_a_link_that_is_missing(chain: Fleet, loaded: Loaded) -> None:
    models = (replace(GPU, name="one"), replace(GPU, name="two"), HOST)
    apart = make_machine(models, lambda source, target: CARD if "host" in (source, target) else None)
    with pytest.raises(UsageError, match="no link from one to two"):
        answer(chain, loaded, Stopwatch(apart))
