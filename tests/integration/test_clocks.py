"""Virtual clocks beside the wall clock: real workers come to the times that the simulation of their programs gives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.model.sampling import Sampler
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.generate import Timings, encode_images, generate
from coordinator.runtime.session import Session, SessionOptions
from coordinator.runtime.stopwatch import Evaluation, Stopwatch, check_machine
from coordinator.schedule.placement import PlacementOptions
from coordinator.simulate.engine import simulate
from coordinator.simulate.hardware import DeviceModel, LinkModel
from coordinator.simulate.lowered import time_program
from coordinator.simulate.machine import Machine, make_machine
from coordinator.simulate.timed import Do, Job
from protocol.errors import UsageError
from protocol.program import Kind
from protocol.timing import PS
from tests.integration.describing import Loaded, chat_prompt, fleet_of, load

EXAMPLES = Path(__file__).parents[2] / "examples"
SLACK_PS = 500
"""An instruction's time is rounded to a picosecond; an evaluation has some dozens of them."""

HOST = DeviceModel("host", "cpu", 0, 60e9, {"f32": 4e11}, launch_s=2e-6)
GPU = DeviceModel("gpu", "nvidia", 0, 900e9, {"f16": 8e13}, launch_s=3e-6, step_s=40e-6, async_copies=True)
CARD = LinkModel("card", 4e-6, 24e9)
WIRE = LinkModel("wire", 30e-6, 1.1e9, fixed_s_per_token=700e-6)


def machine(device: DeviceModel, link: LinkModel) -> Machine:
    models = (replace(device, name="one"), replace(device, name="two"), HOST)
    return make_machine(models, lambda source, target: link)


MACHINES = {
    "cards": machine(GPU, CARD),
    "behind RPC": machine(GPU, WIRE),
    "nothing overlaps": machine(replace(HOST, name="core"), CARD),
}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(EXAMPLES / "crossdock-demo.gguf")


@pytest.fixture(scope="module")
def chain() -> Iterator[Fleet]:
    with fleet_of("cpu:1,accel:2") as fleet:
        yield fleet


def answer(fleet: Fleet, loaded: Loaded, stopwatch: Stopwatch | None, n: int = 4, layers: int = 3) -> list[int]:
    """The tokens of the bundled question; times are in the stopwatch."""
    prompt = chat_prompt(loaded, "Describe this image.", [EXAMPLES / "images" / "tower.png"])
    options = SessionOptions(PlacementOptions(layers))
    session = Session(loaded.model, loaded.params, fleet.topology, options, n_images=1)
    session.stopwatch = stopwatch
    session.open(fleet)
    encode_images(session, prompt, Timings())
    tokens = [token for token, _ in generate(session, loaded.tokenizer, prompt, Sampler(), n, Timings())]
    session.close()
    return tokens


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("layers", [3, 5])
def test_clocks_of_a_run_are_those_of_the_simulation(chain: Fleet, loaded: Loaded, name: str, layers: int) -> None:
    found = MACHINES[name]
    stopwatch = Stopwatch(found, keep=True)
    answer(chain, loaded, stopwatch, layers=layers)
    assert len(stopwatch.taken) == 5  # the image, the prompt, three tokens
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
