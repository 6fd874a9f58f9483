"""A model on a fleet of workers: loaded once, then images are encoded and tokens evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from coordinator.config import Topology
from coordinator.graph.debug import route_debug_inputs
from coordinator.graph.language import CrossState, build_language
from coordinator.graph.node import Graph
from coordinator.graph.vision import build_vision
from coordinator.graph.vision_2024 import build_vision_2024
from coordinator.model.gguf_file import ModelFile
from coordinator.model.hparams import ModelParams
from coordinator.model.image import Tiles
from coordinator.ownership.violation import OwnershipError
from coordinator.runtime.evaluate import Evaluator, Places, Shipped, StepResult
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.inputs import Array, CrossMasks, text_inputs, vision_inputs, vision_inputs_2024
from coordinator.runtime.memory import HANDLES, Budget, Memory, Progress
from coordinator.runtime.one_token import OneToken
from coordinator.runtime.quirks import (
    Quirk,
    check_pinned_devices,
    check_pinned_tensors,
    lost_image,
    with_leaf_caches,
    with_pins,
)
from coordinator.runtime.stopwatch import Stopwatch
from coordinator.runtime.taps import Tap, check_patterns, compile_patterns
from coordinator.schedule.lower import Home, Keep
from coordinator.schedule.placement import Placement, PlacementOptions, check_overrides, plan_placement
from coordinator.schedule.plan import ACCEL_ALIGNMENT, HOST_ALIGNMENT, Device
from coordinator.schedule.residents import residents
from coordinator.schedule.scheduler import Scheduler
from protocol import messages as m
from protocol.dtypes import DType
from protocol.errors import CapacityError, UsageError

KV_PADDING = 256
"""The language graph reads the cache in multiples of this, so that one plan serves many tokens (as llama.cpp)."""


class Ownership(StrEnum):
    """What happens to bytes that outlive their graph."""

    SAFE = "safe"  # they get memory of their own
    STRICT = "strict"  # they stay where they are, and every read is checked
    FAITHFUL = "faithful"  # they stay where they are, as in ggml


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Everything about a run that is not the model, the workers or the prompt."""

    placement: PlacementOptions = field(default_factory=PlacementOptions)
    n_ctx: int = 0  # 0: the model's, at most 4096
    n_ubatch: int = 512
    kv_dtype: DType = DType.F16
    share_scheduler: bool = True
    debug: tuple[str, ...] = ()
    ownership: Ownership = Ownership.SAFE
    check: bool = False  # compare every read as in strict ownership, whatever `ownership` is
    pins: tuple[tuple[str, str], ...] = ()  # tensor of a graph and the worker that the user wants it on
    quirks: frozenset[Quirk] = frozenset()
    taps: tuple[str, ...] = ()  # regular expressions: tensors whose bytes come back with each evaluation


def devices_of(topology: Topology) -> tuple[Device, ...]:
    """The scheduler's devices, one per worker, each with a buffer type of its own."""
    last = len(topology.workers) - 1
    return tuple(
        Device(
            spec.name,
            kind="cpu" if i == last else "gpu",
            buft=spec.name,
            alignment=HOST_ALIGNMENT if spec.kind == "cpu" or i == last else ACCEL_ALIGNMENT,
            is_host=i == last,
            unsupported_ops=frozenset(spec.unsupported_ops),
        )
        for i, spec in enumerate(topology.workers)
    )


class Session:
    """A loaded model. `n_images` is fixed when it is made, since it sizes the cross-attention memory.

    Vision and language graphs run on scheduler 0, or on 0 and 1 when not shared. What outlives its graph, the vision
    tower's output, is copied to memory of its own at the end of that graph (safe ownership), or read where the vision
    graph left it. Raises UsageError for several images that would have to lie in that one place.

    `on_tensor`, when it is set, is called with each tensor of `options.taps` after each evaluation, in the plan's order
    and whatever worker it was on: ggml's eval callback, without stopping between nodes. `stopwatch`, set before `open`,
    takes the times of all evaluations.
    """

    def __init__(
        self,
        model: ModelFile,
        params: ModelParams,
        topology: Topology,
        options: SessionOptions,
        *,
        n_images: int = 0,
    ) -> None:
        self.model, self.params, self.topology, self.options = model, params, topology, options
        self.n_images = n_images
        if n_images > 1 and not self.keeps:
            raise UsageError(
                f"--ownership {options.ownership} with {n_images} images: without memory of its own each image's "
                "output lies where the last one's was; give one image, or --ownership safe"
            )
        self.taps = compile_patterns(options.taps)
        self.on_tensor: Callable[[Tap], None] | None = None
        self.stopwatch: Stopwatch | None = None
        self.n_ctx = _context_size(params, options.n_ctx)
        self.devices = devices_of(topology)
        check_pinned_devices(options.pins, [device.name for device in self.devices])
        memory = [spec.memory for spec in topology.workers]
        self.placement: Placement = plan_placement(self.devices, memory, params.text.n_layer, options.placement)
        check_overrides(options.placement, model.weights)
        shared = options.share_scheduler or not n_images
        self.schedulers = [Scheduler(self.devices) for _ in range(1 if shared else 2)]
        self.vision_debug: tuple[str, ...] = ()
        self.text_debug: tuple[str, ...] = ()
        self.n_past = 0
        self._encoded = False
        self.masks: CrossMasks | None = None
        self.budgets: list[Budget] = []
        self._plan_ahead()

    @property
    def keeps(self) -> bool:
        """True when what outlives its graph gets memory of its own."""
        return self.options.ownership is Ownership.SAFE

    @property
    def checks(self) -> bool:
        """True when every read is compared with who wrote its bytes last."""
        return self.options.check or self.options.ownership is Ownership.STRICT

    @property
    def n_cross(self) -> int:
        """Rows of the cross states of all images."""
        vision = self.params.vision
        return 0 if vision is None else self.n_images * vision.max_tiles * vision.n_tile_tokens

    def _plan_ahead(self) -> None:
        """Size everything for the worst case, before any process is asked for memory.

        Raises CapacityError when a worker cannot hold its share.
        """
        vision = self._vision_graph() if self.n_images else None
        if vision is not None:
            plan = self.schedulers[0].allocate(vision)
            owner = plan.backend[vision.named("vision_output").id]
            self.placement = replace(self.placement, fixed=(("cross_states", owner),))
        n_tokens = min(self.options.n_ubatch, self.n_ctx)
        prompt = self._language_graph(n_tokens, self.n_ctx, write=True)
        self._route_debug(vision, prompt)
        graphs = [
            self._language_graph(n_tokens, self.n_ctx, write=True),
            self._language_graph(1, self.n_ctx, write=False),
        ]
        planned = [*([] if vision is None else [vision]), *graphs]
        check_patterns(self.taps, planned)
        check_pinned_tensors(self.options.pins, planned)
        if vision is not None:
            vision = self._vision_graph()
            self.schedulers[0].reserve(vision)
        for graph in (*graphs, graphs[0]):
            self.schedulers[-1].reserve(graph)
        self.residents = residents(graphs if vision is None else [vision, *graphs])
        if self.n_images and not self.keeps:
            del self.residents[self._cross_states_key()]

    def _route_debug(self, vision: Graph | None, prompt: Graph) -> None:
        """Send each debug tensor to the graph that has the tensor it copies."""
        graphs = (prompt,) if vision is None else (prompt, vision)
        routed = route_debug_inputs(self.options.debug, *graphs)
        self.text_debug, self.vision_debug = routed[0], routed[1] if vision is not None else ()

    def open(self, fleet: Fleet, progress: Progress | None = None) -> None:
        """Load the model onto the workers of `fleet`; `progress` is told of weights. Raises what workers fail with."""
        self.fleet = fleet
        fleet.doing = "loading the model"
        self.memory = Memory(fleet, self.topology, self.devices, self.model, shadows=self.checks)
        self.budgets = self.memory.check_budget(self.residents, [s.buffer_sizes for s in self.schedulers])
        self.memory.load(self.residents, progress)
        for number, scheduler in enumerate(self.schedulers):
            self.memory.fit_compute(number, scheduler.buffer_sizes)
        self.evaluator = Evaluator(
            fleet, self.memory, self.schedulers, overlaps=not self.keeps, taps=self.taps, stopwatch=self.stopwatch
        )
        self.one_token = OneToken(self.evaluator)

    def close(self) -> None:
        """Give the workers' memory back; the fleet can open another session then."""
        self.evaluator.drop()
        self.memory.release()

    def peak_memory(self) -> list[int]:
        """Most bytes that each worker's process has had in memory, code and libraries included."""
        workers = range(len(self.devices))
        for worker in workers:
            self.fleet.send(worker, m.StatsRequest())
        return [answer.message.peak_nbytes for _, answer in sorted(self.fleet.gather(workers).items())]

    def restart(self) -> None:
        """Begin a new sequence: the caches are written over from the start."""
        self.n_past = 0
        self.masks = None

    def read(self, name: str) -> bytes:
        """The bytes of a resident tensor (a cache, or the kept `cross_states`) as they are now."""
        key = (name, self.placement(name).buft)
        home, tensor = self.memory.resident[key], self.residents[key]
        answer = self.fleet.request(home.worker, m.Read(home.arena, home.offset, tensor.nbytes))
        return bytes(answer.buffers[0])

    def _vision_graph(self) -> Graph:
        vision = self.params.vision
        assert vision is not None
        build = build_vision_2024 if Quirk.KEEP_INPUTS in self.options.quirks else build_vision
        graph = build(vision, self.params.text.n_embd, self.model.weights, self.placement, debug=self.vision_debug)
        return with_pins(graph, self.options.pins)

    def _language_graph(self, n_tokens: int, n_kv: int, *, write: bool) -> Graph:
        cross = CrossState(self.n_cross, write) if self.n_images and not self._forgets(write) else None
        graph = build_language(
            self.params,
            self.model.weights,
            self.placement,
            n_tokens=n_tokens,
            n_kv=n_kv,
            n_outputs=1,
            n_ctx=self.n_ctx,
            kv_dtype=self.options.kv_dtype,
            cross=cross,
            debug=self.text_debug,
            pin_norm=self.placement.pin_norm(n_tokens),
        )
        graph = with_pins(graph, self.options.pins)
        return with_leaf_caches(graph) if Quirk.LEAF_CACHE in self.options.quirks and not write else graph

    def _forgets(self, first: bool) -> bool:
        """True when the fact that the sequence has an image was lost after its first call; never with safe ownership,
        which keeps it with the sequence."""
        return Quirk.FORGET_IMAGE in self.options.quirks and not first and not self.keeps

    def encode(self, image: int, tiles: Tiles) -> tuple[StepResult, Shipped]:
        """Run the vision tower for image number `image`; the language graph finds its output as `cross_states`."""
        assert self.params.vision is not None
        shipped = self.evaluator.program(
            ("vision", image), 0, self._vision_graph, digests=("vision_output",), keeps=self._keeps(image),
            takes={} if self.keeps else {"vision_output": HANDLES["cross_states"]},
        )  # fmt: skip
        if not self.keeps:
            self.memory.resident[self._cross_states_key()] = shipped.lowered.home("vision_output")
        return self._run(shipped, self._vision_inputs(tiles)), shipped

    def _run(self, shipped: Shipped, inputs: dict[str, Array] | Places) -> StepResult:
        result = self.evaluator.run(shipped, inputs)
        if self.on_tensor is not None:
            for tap in result.taps:
                self.on_tensor(tap)
        return result

    def _vision_inputs(self, tiles: Tiles) -> dict[str, Array]:
        """Inputs of the vision graph; of 2024's, which adds to one of them, that one is set once unless safe."""
        assert self.params.vision is not None
        if Quirk.KEEP_INPUTS not in self.options.quirks:
            return vision_inputs(self.params.vision, tiles)
        inputs = vision_inputs_2024(self.params.vision, tiles)
        if self._encoded and not self.keeps:
            del inputs["embeddings"]
        self._encoded = True
        return inputs

    def _keeps(self, image: int) -> tuple[Keep, ...]:
        """Where safe ownership copies the output of image number `image`."""
        if not self.keeps:
            return ()
        assert self.params.vision is not None
        home = self.memory.resident[self._cross_states_key()]
        rows = self.params.vision.max_tiles * self.params.vision.n_tile_tokens
        offset = image * rows * self.params.text.n_embd * DType.F32.block_nbytes
        return (Keep("vision_output", Home(home.worker, home.arena, home.offset + offset)),)

    def _cross_states_key(self) -> tuple[str, str]:
        return ("cross_states", self.placement("cross_states").buft)

    def evaluate(self, tokens: Sequence[int]) -> tuple[npt.NDArray[np.float32], StepResult, Shipped]:
        """Logits f32 [n_vocab] after the next tokens of the sequence; at most n_ubatch at a time.

        Raises CapacityError when the context is full.
        """
        n_tokens = len(tokens)
        assert 0 < n_tokens <= self.options.n_ubatch, n_tokens
        if self.n_past + n_tokens > self.n_ctx:
            raise CapacityError(f"the context of {self.n_ctx} tokens is full: {self.n_past} + {n_tokens} do not fit")
        n_kv = min(self.n_ctx, -(-(self.n_past + n_tokens) // KV_PADDING) * KV_PADDING)
        write = bool(self.n_images) and self.n_past == 0
        if self.checks and self.n_images and self._forgets(write):
            raise OwnershipError(lost_image("language"))
        shipped = self.evaluator.program(
            ("language", n_tokens, n_kv, write),
            len(self.schedulers) - 1,
            lambda: self._language_graph(n_tokens, n_kv, write=write),
            outputs=("result_output",),
        )
        assert not self.n_images or self.masks is not None
        masks = self.masks if self.n_images else None
        places = self.one_token.places(shipped, n_kv) if n_tokens == 1 else None
        if places is not None:
            self.one_token.set(tokens[0], self.n_past, masks)
            result = self._run(shipped, places)
        else:
            inputs = text_inputs(tokens, self.n_past, n_kv)
            result = self._run(shipped, inputs | masks.rows(self.n_past, n_tokens) if masks is not None else inputs)
        self.n_past += n_tokens
        return np.frombuffer(result.outputs["result_output"], np.float32), result, shipped


def _context_size(params: ModelParams, wanted: int) -> int:
    if wanted > params.text.n_ctx_train:
        raise UsageError(f"--ctx-size {wanted}: the model was trained for at most {params.text.n_ctx_train} tokens")
    return wanted or min(params.text.n_ctx_train, 4096)
