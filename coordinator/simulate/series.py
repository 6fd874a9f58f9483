"""The evaluations of a whole request, planned and timed: images, micro-batches of the prompt, tokens at their depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.graph.language import CrossState, build_language
from coordinator.graph.node import Graph
from coordinator.graph.vision import build_vision
from coordinator.model.presets import Blueprint
from coordinator.schedule.lower import Lowered
from coordinator.schedule.outline import DeviceMemory, device_memory
from coordinator.schedule.placement import Placement, PlacementOptions, plan_placement
from coordinator.schedule.residents import residents
from coordinator.schedule.scheduler import Scheduler
from coordinator.schedule.split import PARALLEL_COPIES
from coordinator.simulate.lowered import PlanHomes, lower_plan, time_program
from coordinator.simulate.machine import Machine
from coordinator.simulate.timed import Job, Timed
from protocol.dtypes import DType
from protocol.errors import UsageError

KV_PADDING = 256
"""The language graph reads the cache in multiples of this, so that one plan serves many tokens."""

DEFAULT_CTX = 4096


MOST: Final = {"images": 256, "batch": 4096, "requests": 4096}
"""More of a request than this is no request that anybody has, and would be simulated for hours."""


@dataclass(frozen=True, slots=True)
class Load:
    """A request: `n_images`, then `n_prompt` tokens in micro-batches of `n_ubatch`, then `n_predict` more.

    `batch` sequences are decoded together, a row each of one evaluation; their prompts come one after the other.
    `n_requests` such requests are under way at once, each with caches of its own.
    """

    n_prompt: int = 512
    n_predict: int = 128
    n_images: int = 1
    n_ubatch: int = 512
    batch: int = 1
    n_requests: int = 1


@dataclass(frozen=True, slots=True)
class Options:
    """What a request's plans depend on besides model, machine and load. `n_ctx` positions for each sequence, 0: as many
    as are needed and at least 4096, if the model was trained for them."""

    placement: PlacementOptions = field(default_factory=PlacementOptions)
    n_ctx: int = 0
    kv_dtype: DType = DType.F16
    share_scheduler: bool = True
    op_offload: bool = True
    parallel: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """The programs of a request, the plans they were lowered from, and what each device holds."""

    machine: Machine
    load: Load
    placement: Placement
    programs: tuple[Timed, ...]
    lowered: tuple[Lowered, ...]
    jobs: tuple[Job, ...]
    memory: tuple[DeviceMemory, ...]

    @property
    def short(self) -> tuple[DeviceMemory, ...]:
        """The devices whose memory is too small."""
        return tuple(memory for memory in self.memory if memory.short)


def make_series(blueprint: Blueprint, machine: Machine, options: Options, load: Load) -> Series:
    """Plan, lower and time every evaluation of a request. Raises UsageError for one that does not go with the model."""
    return _Maker(blueprint, machine, options, load).run()


def memory_of(blueprint: Blueprint, machine: Machine, options: Options, load: Load) -> tuple[DeviceMemory, ...]:
    """What each device holds, without lowering or timing anything. Raises UsageError."""
    return _Maker(blueprint, machine, options, load).memory


def _padded(n: int) -> int:
    return -(-n // KV_PADDING) * KV_PADDING


class _Maker:
    """Reserves for the largest evaluations first, as a run does, then plans each one that is needed."""

    def __init__(self, blueprint: Blueprint, machine: Machine, options: Options, load: Load) -> None:
        self.params, self.weights = blueprint.params, blueprint.weights
        self.machine, self.options = machine, options
        vision = self.params.vision
        self.load = load = replace(load, n_images=load.n_images if vision is not None else 0)
        self.n_ctx = context(self.params.text.n_ctx_train, options.n_ctx, load)
        self.n_cross = load.n_images * vision.max_tiles * vision.n_tile_tokens if vision is not None else 0
        self.placement = plan_placement(
            machine.devices, machine.limits, self.params.text.n_layer, options.placement
        )  # fmt: skip
        self.programs: list[Timed] = []
        self.lowered: list[Lowered] = []
        self.known: dict[tuple[object, ...], int] = {}
        self._reserve()

    def _reserve(self) -> None:
        """Size all buffers, in the order of a run."""
        apart = bool(self.n_cross) and not self.options.share_scheduler
        self.schedulers = [self._scheduler() for _ in range(2 if apart else 1)]
        graphs = []
        if self.n_cross:
            vision = self._vision_graph()
            plan = self._scheduler().allocate(vision)
            owner = plan.backend[vision.named("vision_output").id]
            self.placement = replace(self.placement, fixed=(("cross_states", owner),))
            graphs.append(self._vision_graph())
            self.schedulers[0].reserve(graphs[-1])
        load, rows = self.load, self.load.batch
        prompt = self._language_graph(min(load.n_ubatch, load.n_prompt), self.n_ctx, 1, write=True)
        token = self._language_graph(rows, self.n_ctx, rows, write=False)
        for graph in (prompt, token):
            self.schedulers[-1].reserve(graph)
        graphs += [prompt, token]
        self.residents = residents(graphs)
        sizes = [scheduler.buffer_sizes for scheduler in self.schedulers]
        memory = device_memory(self.machine.devices, self.machine.limits, graphs, sizes)
        self.memory = tuple(self._times_requests(row) for row in memory)

    def _times_requests(self, memory: DeviceMemory) -> DeviceMemory:
        """Every request has caches of its own."""
        parts = {p: n * (self.load.n_requests if p == "KV" else 1) for p, n in memory.parts.items()}
        return replace(memory, parts=parts)

    def run(self) -> Series:
        homes = [PlanHomes(self.machine.devices, self.residents, number) for number in range(len(self.schedulers))]
        self.homes = homes
        jobs = tuple(self._jobs())
        return Series(
            self.machine, self.load, self.placement, tuple(self.programs), tuple(self.lowered), jobs, self.memory
        )

    def _jobs(self) -> Iterator[Job]:
        load, ahead = self.load, PARALLEL_COPIES if self.options.parallel else 1
        for _ in range(load.batch):
            for _ in range(load.n_images):
                yield Job(self._vision(), tag="vision")
            for first in range(0, load.n_prompt, load.n_ubatch):
                n = min(load.n_ubatch, load.n_prompt - first)
                yield Job(self._prompt(n, first), window=ahead if first else 1, tag="prompt")
        for made in range(load.n_predict):
            yield Job(self._token(load.n_prompt + made), tag="token")

    def _vision(self) -> int:
        key: tuple[object, ...] = ("vision",)
        if key not in self.known:
            self._add(key, self._vision_graph(), 0, "vision", keep=True)
        return self.known[key]

    def _prompt(self, n: int, past: int) -> int:
        n_kv, write = min(self.n_ctx, _padded(past + n)), past == 0
        key = ("prompt", n, n_kv, write)
        if key not in self.known:
            name = f"prompt of {n} at depth {past}"
            self._add(key, self._language_graph(n, n_kv, 1, write=write), -1, name)
        return self.known[key]

    def _token(self, past: int) -> int:
        n_kv, rows = min(self.n_ctx, _padded(past + 1)), self.load.batch
        key = ("token", n_kv)
        if key not in self.known:
            graph = self._language_graph(rows, n_kv, rows, write=False)
            name = f"{'token' if rows == 1 else f'{rows} tokens'} at depth {past}"
            self._add(key, graph, -1, name, streams=rows)
        return self.known[key]

    def _add(
        self, key: tuple[object, ...], graph: Graph, scheduler: int, name: str, *, streams: int = 1, keep: bool = False
    ) -> None:
        plan = self.schedulers[scheduler].allocate(graph)
        kept = None
        if keep:
            kept = ("vision_output", self.residents["cross_states", self.placement("cross_states").buft])
        lowered = lower_plan(plan, self.homes[scheduler], kept)
        timed = time_program(
            lowered, self.machine.models, self.machine.fabric, name=name, streams=streams,
            buffered=self.options.parallel,
        )  # fmt: skip
        self.known[key] = len(self.programs)
        self.programs.append(timed)
        self.lowered.append(lowered)

    def _scheduler(self) -> Scheduler:
        options = self.options
        return Scheduler(self.machine.devices, parallel=options.parallel, op_offload=options.op_offload)

    def _vision_graph(self) -> Graph:
        vision = self.params.vision
        assert vision is not None
        return build_vision(vision, self.params.text.n_embd, self.weights, self.placement)

    def _language_graph(self, n_tokens: int, n_kv: int, streams: int, *, write: bool) -> Graph:
        """`n_tokens` of `streams` sequences, which each look at `n_kv` positions and their own images."""
        cross = CrossState(self.n_cross * streams, write) if self.n_cross else None
        return build_language(
            self.params, self.weights, self.placement, n_tokens=n_tokens, n_kv=n_kv * streams, n_outputs=streams,
            n_ctx=self.n_ctx * self.load.batch, kv_dtype=self.options.kv_dtype, cross=cross,
            pin_norm=self.placement.pin_norm(n_tokens),
        )  # fmt: skip


def context(trained: int, wanted: int, load: Load) -> int:
    """Positions of a sequence's cache: `wanted`, or for 0 what `load` needs. Raises UsageError for too many, and for a
    load that is too large."""
    for what, n in (("images", load.n_images), ("batch", load.batch), ("requests", load.n_requests)):
        if n > MOST[what]:
            raise UsageError(f"--{what} {n}: expected at most {MOST[what]}")
    needed = load.n_prompt + load.n_predict
    if wanted > trained:
        raise UsageError(f"--ctx-size {wanted}: the model was trained for at most {trained} tokens")
    n_ctx = wanted or min(trained, max(DEFAULT_CTX, _padded(needed)))
    if needed > n_ctx:
        limit = "--ctx-size holds" if wanted else "the model was trained for"
        raise UsageError(
            f"--prompt {load.n_prompt} and --predict {load.n_predict} need {needed} positions: {limit} {n_ctx}"
        )
    return n_ctx
