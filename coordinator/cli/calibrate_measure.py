"""Measurements of `crossdock calibrate`: operations alone, and steps of several workers that hand over bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from coordinator.cli.calibrate_rig import Loaded, Rig, Share
from coordinator.config import Topology
from coordinator.simulate.calibrate_cases import Room, brief_op, cases, chain_ops, first_bytes, sweep_ops
from coordinator.simulate.calibrate_fit import Sample, line, low, noise
from coordinator.simulate.work import work_of
from protocol.messages import Port
from protocol.program import Instruction, Kind

BUSY_S: Final = 100e-6
"""A worker of a chain computes for about this long, as one of a model that fits into the cache: peers fall asleep."""
HOPS: Final = (1, 3, 6)
HOP_NBYTES: Final = (512, 64 << 10, 1 << 20, 8 << 20)
OUTPUT_NBYTES: Final = (512, 64 << 10, 512 << 10)
_HOPS_OF_A_SIZE: Final = 4
_IN_A_ROW: Final = 4
_SPLIT: Final = "split"
_AFTER: Final = "after a sweep"

SWEEP_NBYTES: Final = 40 << 20
"""A worker reads so much to drive everything else out of the cache."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How often each thing is measured. Rounds go over everything in turn, so that a busy moment spoils a sample of
    each rather than all of one."""

    op_rounds: int = 40
    step_rounds: int = 40
    quick: bool = False


QUICK: Final = Effort(16, 20, quick=True)


@dataclass(frozen=True, slots=True)
class Steps:
    """What a step costs besides operations: seconds.

    `step_s` of a step with one worker, `further_s` for each further one, `split_s` of a run of ops, `hop_s` of a
    transfer and `byte_s` of each of its bytes, `output_byte_s` of each byte that goes back to the coordinator. `missed`
    are how much more a step, a further worker and a run of ops take when everything was driven out of the cache;
    outputs are measured so, since long ones are those of large models.
    """

    step_s: float
    further_s: float
    split_s: float
    missed: tuple[float, float, float]
    hop_s: float
    byte_s: float
    output_byte_s: float
    noise: float


Samples = dict[str, list[float]]
"""Seconds of each sample by what was measured; samples of several times can be put together."""


@dataclass(frozen=True, slots=True)
class Raw:
    """All samples: operations by case, and what steps took outside of them by the plane that carried bytes."""

    ops: Samples
    steps: Samples
    messages: Samples

    def add(self, other: Raw) -> None:
        """Put samples of another time to these."""
        for mine, more in ((self.ops, other.ops), (self.steps, other.steps), (self.messages, other.messages)):
            for name, seconds in more.items():
                mine.setdefault(name, []).extend(seconds)


def measure_ops(topology: Topology, room: Room, effort: Effort, progress: Progress) -> Samples:
    """Every case on one worker."""
    alone = Topology(topology.workers[-1:])
    with Rig(alone, [room.nbytes]) as rig:
        for offset, data in first_bytes(room):
            rig.write(0, offset, data)
        loaded = {c.name: rig.ship(c.name, {0: Share(c.ops)}) for c in cases(room, quick=effort.quick)}
        seconds: Samples = {name: [] for name in loaded}
        for number in range(effort.op_rounds):
            progress(f"operations, round {number + 1} of {effort.op_rounds}")
            for name, program in loaded.items():
                seconds[name].append(program.timed().compute_s[0])
    return seconds


def samples_of(room: Room, effort: Effort, seconds: Samples) -> list[Sample]:
    """What one op of each case takes."""
    return [
        Sample(work_of(c.ops[0]), low(seconds[c.name]) / len(c.ops), c.missed, c.name)
        for c in cases(room, quick=effort.quick)
    ]


def measure_steps(topology: Topology, effort: Effort, progress: Progress, plane: str | None = None) -> Samples:
    """Chains over one, two and three workers. `topology` has three, the host last."""
    room = Room(Rig.ARENA, SWEEP_NBYTES)
    with Rig(topology, [room.nbytes] * 3, plane) as rig:
        for worker in range(3):
            for offset, data in first_bytes(room):
                rig.write(worker, offset, data)
        programs = _programs(rig, room)
        seconds: Samples = {name: [] for name in programs}
        for number in range(effort.step_rounds):
            if number % 4 == 0:
                progress(f"steps, round {number + 1} of {effort.step_rounds}")
            for name, program in programs.items():
                program.run()  # the one before it may have emptied the cache
                for _ in range(_IN_A_ROW):
                    if name.startswith(_SPLIT):
                        seconds[name].append(program.noted(2, 3))  # RUN, SEND, RECV, RUN
                    else:
                        seconds[name].append(program.timed().outside_s)
    return seconds


def fit_steps(seconds: Samples) -> Steps:
    """What steps cost."""
    outside = {name: low(values) for name, values in seconds.items()}
    start, hop_s = line([(hops, outside[f"hops {hops}"]) for hops in HOPS])
    _, byte_s = line([(nbytes * _HOPS_OF_A_SIZE, outside[f"bytes {nbytes}"]) for nbytes in HOP_NBYTES])
    _, output_s = line([(nbytes, outside[f"output {nbytes}"]) for nbytes in OUTPUT_NBYTES])
    step_s = outside["alone"]
    further_s = max(0.0, (start - step_s + outside["three"] - 2 * hop_s - step_s) / 3)
    step, further, split = (outside[f"{name} {_AFTER}"] - outside[name] for name in ("alone", "three", _SPLIT))
    missed = (max(0.0, step), max(0.0, (further - step) / 2), max(0.0, split))
    return Steps(step_s, further_s, outside[_SPLIT], missed, hop_s, byte_s, output_s, middle_noise(seconds))


def middle_noise(seconds: Samples) -> float:
    """How much longer the middle sample of the middle case took than an undisturbed one."""
    return median(map(noise, seconds.values()))


def _programs(rig: Rig, room: Room) -> dict[str, Loaded]:
    """What is run: chains with several hops between two workers, of several sizes, over three workers, and outputs."""
    busy = Share(chain_ops(room, BUSY_S))
    brief = Share((brief_op(room),))
    found = {
        "alone": rig.ship("alone", {2: busy}),
        "three": rig.ship("three", chain([busy, busy, busy], [2, 0, 1], HOP_NBYTES[0])),
        _SPLIT: rig.ship(_SPLIT, chain([brief, busy, brief], [2, 0, 2], HOP_NBYTES[0]), "trace"),
    }
    sweep = Share(sweep_ops(room))
    found |= {
        f"alone {_AFTER}": rig.ship("alone", {2: sweep}),
        f"three {_AFTER}": rig.ship("three", chain([sweep, sweep, sweep], [2, 0, 1], HOP_NBYTES[0])),
        f"{_SPLIT} {_AFTER}": rig.ship(_SPLIT, chain([brief, sweep, brief], [2, 0, 2], HOP_NBYTES[0]), "trace"),
    }
    for hops in HOPS:
        order = [(2, 0)[i % 2] for i in range(hops + 1)]
        found[f"hops {hops}"] = rig.ship("hops", chain([busy] * len(order), order, HOP_NBYTES[0]))
    for nbytes in HOP_NBYTES:
        order = [(2, 0)[i % 2] for i in range(_HOPS_OF_A_SIZE + 1)]
        found[f"bytes {nbytes}"] = rig.ship("bytes", chain([brief] * len(order), order, nbytes))
    for nbytes in OUTPUT_NBYTES:
        port = Port("result", rig.ARENA, 0, nbytes)
        found[f"output {nbytes}"] = rig.ship("output", {2: replace(sweep, outputs=(port,))})
    return found


def chain(runs: Sequence[Share], workers: Sequence[int], nbytes: int) -> dict[int, Share]:
    """Programs in which these workers compute one after the other, each handing `nbytes` to the next.

    All runs of a worker are of the same ops.
    """
    instructions: dict[int, list[Instruction]] = {worker: [] for worker in workers}
    ops = {worker: run.ops for worker, run in zip(workers, runs, strict=True)}
    for number, worker in enumerate(workers):
        own = instructions[worker]
        if number:
            before = workers[number - 1]
            own.append(Instruction(Kind.RECV, number - 1, before, 0, Rig.ARENA, _into(nbytes), nbytes, (Rig.ARENA, 0)))
        own.append(Instruction(Kind.RUN, 0, len(ops[worker])))
        if number + 1 < len(workers):
            own.append(Instruction(Kind.SEND, number, workers[number + 1], 0, Rig.ARENA, 0, nbytes))
    for number, worker in enumerate(workers[:-1]):
        instructions[worker].append(Instruction(Kind.WAIT, number, workers[number + 1]))
    return {worker: Share(ops[worker], tuple(own)) for worker, own in instructions.items()}


def _into(nbytes: int) -> int:
    """Where a transfer goes: behind where it comes from, for both are the same on every worker."""
    return -(-nbytes // 4096) * 4096
