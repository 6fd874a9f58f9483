"""Measurements of `crossdock calibrate`: operations alone, and steps of several workers that hand over bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from types import TracebackType
from typing import Final

from coordinator.cli.calibrate_rig import Loaded, Rig, Share
from coordinator.config import Topology
from coordinator.simulate.calibrate_cases import brief_op, reading
from coordinator.simulate.calibrate_fit import Sample, fit_sums, line, noise, typical
from coordinator.simulate.calibrate_layers import LARGE, SMALL, Shape, ends, every_case, layer_cases, layers
from coordinator.simulate.calibrate_room import AUX, PONG, Case, Room, first_bytes
from coordinator.simulate.hardware import FREE, Cost, Toll, Work
from coordinator.simulate.work import weight_footprint, work_of
from protocol.dtypes import DType
from protocol.messages import Port
from protocol.program import Instruction, Kind, OpRecord

BUSY_NBYTES: Final = 500 << 10
"""A worker of a chain computes over so many bytes of weights, as one of a small model: its peers fall asleep."""
TRANSFERS: Final = 8
HOPS: Final = ((2, 1), (4, 1), (2, TRANSFERS), (4, TRANSFERS))
"""Chains between two workers, back to the host as in a model: how often bytes change sides, in how many transfers."""
HOPS_AFTER: Final = ((2, 1), (2, TRANSFERS))
INPUT_NBYTES: Final = (4, 4, 8, 8, 512, 4)
"""What a step is given: token, positions, places in caches, a mask."""
RESULT_NBYTES: Final = 4096
HOP_NBYTES: Final = (512, 64 << 10, 1 << 20, 8 << 20)
OUTPUT_NBYTES: Final = (512, 64 << 10, 512 << 10)
DIGEST_NBYTES: Final = (4 << 10, 64 << 10, 1 << 20)
_LONG: Final = {f"output {n}" for n in OUTPUT_NBYTES} | {f"bytes {n}" for n in HOP_NBYTES if n >= 1 << 20}
"""Steps that take milliseconds or hand over much, beside those after a sweep."""
_HOPS_OF_A_SIZE: Final = 4
_IN_A_ROW: Final = 4
_SETTLING, _SETTLED = 16, 64
"""Short steps in a row that do not count, and that do: a coordinator and workers that have just run another program
find neither their code in the cache nor each other awake, and steps of a model follow each other."""
_NOTED: Final = {"first": 0, "split": 3}
"""Runs of one op in a chain from worker 2 to 0 and back: worker 2 has RUN, SEND, RECV, RUN, WAIT and RUN."""
_AFTER: Final = "after a sweep"
_SLOWER: Final = 1.05
"""Workers that read at once are slowed down by memory when they take so many times as long as one of them."""

SWEEP_NBYTES: Final = 40 << 20
"""A worker reads so much, a token's time in a model that no cache holds, to drive everything else out of the cache."""

_BEHIND: Final = " behind others"
"""Another worker reads more than all caches hold in each step."""
_ENDS: Final = {
    "": (SMALL[0], BUSY_NBYTES), f" {_AFTER}": (LARGE[0], SWEEP_NBYTES), _BEHIND: (LARGE[0], SWEEP_NBYTES)
}  # fmt: skip
"""What noted runs are the ends of: a layer's shape, and bytes of the output, which that worker computes, too."""

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
    """What a step costs besides operations, warm and when everything was driven out of the cache.

    `step` with one worker, `further` for each further one, `first` run of ops of a worker and each later `split`,
    `wake` of a worker that waited and `each` transfer that it then takes. `byte_s` are seconds of each transferred
    byte, `output_byte_s` of each that goes back to the coordinator, measured behind sweeps: long outputs are those of
    large models. `digest_s` and `digest_byte_s` are seconds of a hash and of each byte of it. `memory` is what several
    workers that read weights at once got of them in bytes/s, 0.0 where each got as much as alone.
    """

    step: Toll
    further: Toll
    first: Toll
    split: Toll
    wake: Toll
    each: Toll
    byte_s: float
    output_byte_s: float
    digest_s: float
    digest_byte_s: float
    memory: float
    noise: float


Samples = dict[str, list[float]]
"""Every sample by what was measured; samples of several times can be put together."""


@dataclass(frozen=True, slots=True)
class Raw:
    """All samples: operations by case, and what else was measured by the plane that carried bytes."""

    ops: Samples
    steps: Samples
    messages: Samples

    def add(self, other: Raw) -> None:
        """Put samples of another time to these."""
        for mine, more in ((self.ops, other.ops), (self.steps, other.steps), (self.messages, other.messages)):
            for name, seconds in more.items():
                mine.setdefault(name, []).extend(seconds)


class Operations:
    """One idle worker that holds every case. Use as a context manager.

    What is to find its weights in the cache runs once or several times before it counts.
    """

    def __init__(self, topology: Topology, room: Room, *, quick: bool) -> None:
        self.room, self.quick = room, quick
        self._rig = Rig(Topology(topology.workers[-1:]), [room.nbytes])
        self._loaded: dict[str, tuple[Case, Loaded]] = {}

    def __enter__(self) -> Operations:
        with ExitStack() as stack:
            rig = stack.enter_context(self._rig)
            for offset, data in first_bytes(self.room):
                rig.write(0, offset, data)
            every = (*every_case(self.room, quick=self.quick), *layer_cases(self.room))
            self._loaded = {case.name: (case, rig.ship(case.name, {0: Share(case.ops)})) for case in every}
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._rig.__exit__(kind, error, tb)

    def measure(self, rounds: int, progress: Progress) -> Samples:
        """Seconds of every case, by its name."""
        seconds: Samples = {name: [] for name in self._loaded}
        for number in range(rounds):
            progress(f"operations, round {number + 1} of {rounds}")
            for name in self._loaded:
                seconds[name].append(self.once(name))
        return seconds

    def once(self, name: str) -> float:
        """Seconds of the case of this name, this time."""
        case, program = self._loaded[name]
        for _ in range(0 if case.missed else case.before):
            program.run()
        return program.timed().compute_s[0]


def samples_of(room: Room, effort: Effort, seconds: Samples) -> list[Sample]:
    """What one op of each case takes."""
    return [
        Sample(work_of(c.ops[0]), typical(seconds[c.name]) / len(c.ops), c.missed, c.name)
        for c in every_case(room, quick=effort.quick)
    ]


def mixtures_of(room: Room, seconds: Samples, first_s: float) -> list[tuple[list[Work], float, bool]]:
    """What mixtures take: their works, seconds for all of them, and whether weights come from memory. Each was run once
    in a step, as a model's ops are, of which `first_s` is not theirs."""
    return [([work_of(op) for op in c.ops], typical(seconds[c.name]) - first_s, c.missed) for c in layer_cases(room)]


class Chains:
    """Three idle workers, the host last, that hold chains of one, two and three of them. Use as a context manager."""

    def __init__(self, topology: Topology, far: Room, plane: str | None = None, *, at_once: int = 1) -> None:
        """`far` has more weights than all caches hold; `at_once` workers also read weights at the same time."""
        self._room, self._far = Room(Rig.ARENA, SWEEP_NBYTES), far
        self._at_once = max(1, min(at_once, len(topology.workers)))
        sizes = [self._room.nbytes] * len(topology.workers)
        sizes[: self._at_once] = [max(far.nbytes, self._room.nbytes)] * self._at_once
        self._rig = Rig(topology, sizes, plane)
        self._programs: dict[str, Loaded] = {}
        self._noted: dict[str, Loaded] = {}
        self._readers: dict[str, Loaded] = {}

    def __enter__(self) -> Chains:
        with ExitStack() as stack:
            rig = stack.enter_context(self._rig)
            for worker in range(len(rig.sizes)):
                for offset, data in first_bytes(self._room):
                    rig.write(worker, offset, data)
            self._programs = _programs(rig, self._room)
            far = layers(self._far, LARGE[0], self._far.cold_nbytes)
            for after, (shape, nbytes) in _ENDS.items():
                others = far if after == _BEHIND else layers(self._room, shape, 1)
                self._noted[after] = rig.ship("noted", noted_shares(self._room, shape, nbytes, others), noted=True)
            reader = Share(reading(self._far).ops)
            for n in (1, self._at_once) if self._at_once > 1 else ():
                self._readers[f"readers {n}"] = rig.ship("readers", dict.fromkeys(range(n), reader))
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._rig.__exit__(kind, error, tb)

    def measure(self, rounds: int, progress: Progress) -> Samples:
        """Seconds outside of operations, of the runs of ops that are noted, and of reading weights, by name."""
        seconds: Samples = {name: [] for name in self._programs}
        seconds |= {name + after: [] for name in _NOTED for after in self._noted} | {name: [] for name in self._readers}
        for number in range(rounds):
            progress(f"steps, round {number + 1} of {rounds}")
            for name, program in self._programs.items():
                is_long = name.endswith(_AFTER) or name in _LONG
                for _ in range(1 if is_long else _SETTLING):  # the one before it may have emptied the cache
                    program.run()
                for _ in range(_IN_A_ROW if is_long else _SETTLED):
                    seconds[name].append(program.timed().outside_s)
            for after, program in self._noted.items():
                is_long = bool(after)
                for _ in range(1 if is_long else _SETTLING):
                    program.noted(2, ())
                for _ in range(_IN_A_ROW if is_long else _SETTLED):
                    for name, took in zip(_NOTED, program.noted(2, list(_NOTED.values())), strict=True):
                        seconds[name + after].append(took)
            for name, program in self._readers.items():
                for _ in range(_IN_A_ROW):
                    seconds[name].append(max(program.timed().compute_s.values()))
        return seconds


def fit_steps(seconds: Samples, costs: Mapping[str, Cost], mixed: Toll = FREE, *, far: Room) -> Steps:
    """What steps cost. `costs` and `mixed` say what of the noted runs is their op, `far` is what was read."""
    outside = {name: typical(values) for name, values in seconds.items()}
    _, byte_s = line([(nbytes * _HOPS_OF_A_SIZE, outside[f"bytes {nbytes}"]) for nbytes in HOP_NBYTES])
    _, output_s = line([(nbytes, outside[f"output {nbytes}"]) for nbytes in OUTPUT_NBYTES])
    hashed_s, digest_byte_s = line([(nbytes, outside[f"digest {nbytes}"]) for nbytes in DIGEST_NBYTES])
    digest_s = max(0.0, hashed_s - outside["alone"])
    warm, cold = _prices(outside, HOPS, ""), _prices(outside, HOPS_AFTER, f" {_AFTER}")
    step, further, wake, each = (Toll(a, max(0.0, b - a)) for a, b in zip(warm, cold, strict=True))
    first, split = (_toll(name, outside, costs, mixed) for name in _NOTED)
    return Steps(
        step, further, first, split, wake, each, byte_s, output_s, digest_s, digest_byte_s, _memory(outside, far),
        middle_noise(seconds),
    )  # fmt: skip


def _memory(outside: Mapping[str, float], far: Room) -> float:
    """Bytes/s of weights for several workers at once, 0.0 if none was slower for the others."""
    took_s = {int(name.split()[1]): s for name, s in outside.items() if name.startswith("readers ")}
    n = max(took_s, default=1)
    if n == 1 or took_s[n] <= _SLOWER * took_s[1]:
        return 0.0
    return n * weight_footprint(reading(far).ops) / took_s[n]


def _toll(name: str, outside: Mapping[str, float], costs: Mapping[str, Cost], mixed: Toll) -> Toll:
    """What a noted run took besides its op: warm, behind an emptied cache, and when others have read much besides."""
    left = []
    for after, (shape, nbytes) in _ENDS.items():
        of = ends(Room(Rig.ARENA, SWEEP_NBYTES), shape, nbytes, 0)
        work, missed = work_of({"first": of.lookup, "split": of.norm}[name]), float(bool(after))
        left.append(max(0.0, outside[name + after] - costs[work.key].seconds(work, missed) - mixed.seconds(missed)))
    base_s, cold_s, far_s = left
    return Toll(base_s, max(0.0, cold_s - base_s), max(0.0, far_s - max(base_s, cold_s)))


def _prices(outside: Mapping[str, float], hops: Sequence[tuple[int, int]], after: str) -> list[float]:
    """Seconds of a step, a further worker, waking up, and a transfer."""
    rows = [((1.0, 0.0, 0.0, 0.0), outside[f"alone{after}"])]
    rows += [((1.0, 2.0, 3.0, 3.0), outside[f"three{after}"])]
    rows += [((1.0, 1.0, n, n * each), outside[f"hops {n} of {each}{after}"]) for n, each in hops]
    return fit_sums(rows)


def middle_noise(seconds: Samples) -> float:
    """How much longer the middle sample of the middle case took than an undisturbed one."""
    return median(map(noise, seconds.values()))


def _programs(rig: Rig, room: Room) -> dict[str, Loaded]:
    """What is run: chains with several hops between two workers, of several sizes, over three workers, and outputs."""
    found: dict[str, Loaded] = {}
    for after, run, all_hops in (("", _busy(room), HOPS), (f" {_AFTER}", _sweep(room), HOPS_AFTER)):
        found[f"alone{after}"] = rig.ship("alone", {2: _with_ports(run)})
        shares = chain([run] * 4, [2, 0, 1, 2], HOP_NBYTES[0])
        found[f"three{after}"] = rig.ship("three", shares | {2: _with_ports(shares[2])})
        for hops, each in all_hops:
            order = [(2, 0)[i % 2] for i in range(hops + 1)]
            shares = chain([run] * len(order), order, HOP_NBYTES[0], each)
            found[f"hops {hops} of {each}{after}"] = rig.ship("hops", shares | {2: _with_ports(shares[2])})
    brief = Share((brief_op(room),))
    for nbytes in HOP_NBYTES:
        order = [(2, 0)[i % 2] for i in range(_HOPS_OF_A_SIZE + 1)]
        found[f"bytes {nbytes}"] = rig.ship("bytes", chain([brief] * len(order), order, nbytes))
    for nbytes in DIGEST_NBYTES:
        port = Port("hashed", Rig.ARENA, 0, nbytes)
        found[f"digest {nbytes}"] = rig.ship("digest", {2: replace(_with_ports(_busy(room)), digests=(port,))})
    for nbytes in OUTPUT_NBYTES:
        found[f"output {nbytes}"] = rig.ship("output", {2: _with_ports(_sweep(room), nbytes)})
    return found


def noted_shares(room: Room, shape: Shape, nbytes: int, others: Sequence[OpRecord]) -> dict[int, Share]:
    """The ends of a model on worker 2 around what another one computes, worker 0.

    The two runs that are noted are of different ops with data of their own. Were the second one like the first, it
    would find its code and data where that left them, in its own processor's cache, whatever others read meanwhile.
    """
    handed = DType.F32.row_nbytes(shape.width)
    ops = ends(room, shape, nbytes, _into(handed)).ops
    shares = chain([Share(ops), Share(others), Share(ops)], [2, 0, 2], handed)
    program = [*shares[2].instructions, Instruction(Kind.RUN, len(ops) - 1, len(ops), 2)]
    for op, number in enumerate(_NOTED.values()):
        program[number] = replace(program[number], first=op, last=op + 1)
    return shares | {2: _with_ports(Share(ops, tuple(program)), result=PONG)}


def _with_ports(share: Share, nbytes: int = RESULT_NBYTES, result: int = 0) -> Share:
    """Inputs and a result as a step of a model has them, of so many bytes, which lies there."""
    inputs = tuple(Port(f"input {k}", Rig.ARENA, AUX + 4096 * k, n) for k, n in enumerate(INPUT_NBYTES))
    return replace(share, inputs=inputs, outputs=(Port("result", Rig.ARENA, result, nbytes),))


def _busy(room: Room) -> Share:
    return Share(layers(room, SMALL[0], BUSY_NBYTES))


def _sweep(room: Room) -> Share:
    return Share(layers(room, LARGE[0], SWEEP_NBYTES))


def chain(runs: Sequence[Share], workers: Sequence[int], nbytes: int, each: int = 1) -> dict[int, Share]:
    """Programs in which these workers compute one after the other, each handing `nbytes` to the next in every one of
    `each` transfers.

    All runs of a worker are of the same ops.
    """
    instructions: dict[int, list[Instruction]] = {worker: [] for worker in workers}
    ops = {worker: run.ops for worker, run in zip(workers, runs, strict=True)}
    last = len(workers) - 1
    for number, worker in enumerate(workers):
        own = instructions[worker]
        for transfer in range(max(0, number - 1) * each, number * each):
            span, source = (Rig.ARENA, _into(nbytes), nbytes), (Rig.ARENA, 0)
            own.append(Instruction(Kind.RECV, transfer, workers[number - 1], number, *span, source))
        own.append(Instruction(Kind.RUN, 0, len(ops[worker]), number))
        for transfer in range(number * each, (number + 1) * each if number < last else 0):
            own.append(Instruction(Kind.SEND, transfer, workers[number + 1], number, Rig.ARENA, 0, nbytes))
    for number, worker in enumerate(workers[:-1]):
        for transfer in range(number * each, (number + 1) * each):
            instructions[worker].append(Instruction(Kind.WAIT, transfer, workers[number + 1], last))
    return {worker: Share(ops[worker], tuple(own)) for worker, own in instructions.items()}


def _into(nbytes: int) -> int:
    """Where a transfer goes: behind where it comes from, for both are the same on every worker."""
    return -(-nbytes // 4096) * 4096
