"""A model's graphs planned without workers, weights or images: what would run where, and what it would need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordinator.graph.debug import add_debug_inputs, route_debug_inputs
from coordinator.graph.language import CrossState, build_language
from coordinator.graph.language_2024 import build_language_2024
from coordinator.graph.node import Graph
from coordinator.graph.vision import build_vision
from coordinator.graph.vision_2024 import build_vision_2024
from coordinator.model.hparams import ModelParams
from coordinator.model.presets import Blueprint
from coordinator.schedule.document import Document
from coordinator.schedule.placement import Placement, PlacementOptions, check_overrides, plan_placement
from coordinator.schedule.plan import Device, Plan
from coordinator.schedule.residents import purpose_of, residents
from coordinator.schedule.scheduler import Scheduler
from protocol.dtypes import DType
from protocol.errors import UsageError

PHASES = ("vision", "prompt", "token")
"""The graphs of a run: an image, a batch of the prompt, one more token."""

PURPOSES = ("weights", "KV", "kept", "compute")
"""What memory is for, in the order of tables."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything a model's plan depends on besides the model.

    `limits` are bytes per device, None: unlimited. `n_kv` 0: the whole context is read; `n_outputs` None: a row of
    logits for each token. With `n_images` 0 the cross layers are left out, as in llama.cpp's reservation for text.
    """

    devices: tuple[Device, ...]
    limits: tuple[int | None, ...]
    placement: PlacementOptions = field(default_factory=PlacementOptions)
    dialect: str = "2026"
    phases: tuple[str, ...] = PHASES
    n_images: int = 1
    n_tokens: int = 512
    n_ctx: int = 0
    n_kv: int = 0
    n_outputs: int | None = 1
    kv_dtype: DType = DType.F16
    debug: tuple[str, ...] = ()
    share_scheduler: bool = True
    op_offload: bool = True
    parallel: bool = False


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one buffer type by purpose, and the limit of its device in bytes (None: unlimited)."""

    device: str
    parts: Mapping[str, int]
    limit: int | None

    @property
    def total(self) -> int:
        """Sum over purposes."""
        return sum(self.parts.values())

    @property
    def short(self) -> int:
        """Bytes that are missing; 0 when it fits."""
        return 0 if self.limit is None else max(0, self.total - self.limit)


@dataclass(frozen=True, slots=True)
class Planned:
    """One planned graph; `what` is it in words ("prompt of 512"). `plan` is None for a graph that was only reserved."""

    name: str
    what: str
    plan: Plan | None
    n_splits: int
    buffer_sizes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Outline:
    """The planned graphs in order, and what each device holds when all are planned."""

    devices: tuple[Device, ...]
    graphs: tuple[Planned, ...]
    memory: tuple[DeviceMemory, ...]
    op_offload: bool
    parallel: bool
    placement: Placement | None = None


def plan_model(blueprint: Blueprint, setting: Setting) -> Outline:
    """Plan the phases of `setting` in order, on one scheduler or on one for vision and one for language.

    Raises UsageError for a setting that does not go with the model, PlanError when a graph cannot be planned.
    """
    setting = fit_setting(blueprint.params, setting)
    placement = plan_placement(setting.devices, setting.limits, blueprint.params.text.n_layer, setting.placement)
    check_overrides(setting.placement, blueprint.weights)
    graphs = _Graphs(blueprint, setting, placement).build()
    made: dict[bool, Scheduler] = {}
    planned = []
    for name, graph in graphs.items():
        key = name == "vision" and not setting.share_scheduler
        if key not in made:
            made[key] = _scheduler(setting)
        plan = made[key].allocate(graph)
        planned.append(Planned(name, _describe(name, setting), plan, len(plan.splits), plan.buffer_sizes))
    sizes = [scheduler.buffer_sizes for scheduler in made.values()]
    memory = device_memory(setting.devices, setting.limits, graphs.values(), sizes)
    return Outline(setting.devices, tuple(planned), memory, setting.op_offload, setting.parallel, placement)


def plan_entries(document: Document) -> Outline:
    """Plan every graph of a document on one scheduler, as `plan_document` does, and keep the plans.

    Raises PlanError when one of them cannot be planned.
    """
    scheduler = Scheduler(document.devices, parallel=document.parallel, op_offload=document.op_offload)
    planned = []
    for number, entry in enumerate(document.entries):
        if entry.reset:
            scheduler.reset()
        plan = None
        if entry.reserve:
            scheduler.reserve(entry.graph)
        else:
            plan = scheduler.allocate(entry.graph, reset=False)
        what = "reserved" if entry.reserve else ""
        planned.append(Planned(f"graph {number}", what, plan, scheduler.n_splits, scheduler.buffer_sizes))
    limits = (None,) * len(document.devices)
    graphs = [entry.graph for entry in document.entries]
    memory = device_memory(document.devices, limits, graphs, [scheduler.buffer_sizes])
    return Outline(document.devices, tuple(planned), memory, document.op_offload, document.parallel)


def fit_setting(params: ModelParams, setting: Setting) -> Setting:
    """The setting with the model's own numbers where none are given, and without phases that it does not have.

    Raises UsageError for a context that the model was not trained for, or a phase without an image to go with it.
    """
    text = params.text
    if setting.n_ctx > text.n_ctx_train:
        raise UsageError(f"--ctx-size {setting.n_ctx}: the model was trained for at most {text.n_ctx_train} tokens")
    n_ctx = setting.n_ctx or min(text.n_ctx_train, 4096)
    if setting.n_kv > n_ctx:
        raise UsageError(f"--kv {setting.n_kv}: the context has {n_ctx} positions (--ctx-size)")
    n_images = setting.n_images if params.vision is not None else 0
    phases = tuple(phase for phase in PHASES if phase in setting.phases and (n_images or phase != "vision"))
    if not phases:
        why = "--images is 0" if params.vision is not None else f"{params.arch} models take none"
        raise UsageError(f"--phase vision: there is no image: {why}")
    n_tokens = min(setting.n_tokens, n_ctx)
    n_kv = max(setting.n_kv or n_ctx, n_tokens)
    return replace(setting, n_ctx=n_ctx, n_kv=n_kv, n_images=n_images, phases=phases, n_tokens=n_tokens)


def build_graphs(blueprint: Blueprint, setting: Setting, placement: Placement) -> dict[str, Graph]:
    """The graphs of a fitted setting by phase, debug tensors included. Raises ModelError, UsageError."""
    return _Graphs(blueprint, setting, placement).build()


def _scheduler(setting: Setting) -> Scheduler:
    return Scheduler(setting.devices, parallel=setting.parallel, op_offload=setting.op_offload)


def _describe(phase: str, setting: Setting) -> str:
    if phase == "vision":
        return "one image"
    image = ", with the image" if setting.n_images == 1 else f", with {setting.n_images} images"
    what = f"prompt of {setting.n_tokens}" if phase == "prompt" else "one token"
    return what + (image if setting.n_images else "")


class _Graphs:
    """Builds the graphs of one setting."""

    def __init__(self, blueprint: Blueprint, setting: Setting, placement: Placement) -> None:
        self.params, self.weights = blueprint.params, blueprint.weights
        self.setting, self.placement = setting, placement
        vision = self.params.vision
        self.n_cross = 0 if vision is None else setting.n_images * vision.max_tiles * vision.n_tile_tokens

    def build(self) -> dict[str, Graph]:
        graphs: dict[str, Graph] = {}
        if self.n_cross:
            graphs["vision"] = self._vision()
            self._keep_states(graphs["vision"])
        for phase in ("prompt", "token"):
            graphs[phase] = self._language(phase)
        graphs = {phase: graphs[phase] for phase in self.setting.phases}
        kinds = {graph.name: graph for graph in graphs.values()}
        routed = dict(zip(kinds, route_debug_inputs(self.setting.debug, *kinds.values()), strict=True))
        return {phase: add_debug_inputs(graph, routed[graph.name]) for phase, graph in graphs.items()}

    def _keep_states(self, vision: Graph) -> None:
        """What is kept for the language graph lies where the vision tower ends."""
        plan = _scheduler(self.setting).allocate(vision)
        owner = plan.backend[vision.named("vision_output").id]
        self.placement = replace(self.placement, fixed=(("cross_states", owner),))

    def _vision(self) -> Graph:
        vision = self.params.vision
        assert vision is not None
        build: Callable[..., Graph] = build_vision_2024 if self.setting.dialect == "2024" else build_vision
        return build(vision, self.params.text.n_embd, self.weights, self.placement)

    def _language(self, phase: str) -> Graph:
        setting, prompt = self.setting, phase == "prompt"
        n_tokens = setting.n_tokens if prompt else 1
        n_outputs = n_tokens if setting.n_outputs is None else min(setting.n_outputs, n_tokens)
        if setting.dialect == "2024":
            return build_language_2024(
                self.params, self.weights, self.placement, n_tokens=n_tokens, n_past=0 if prompt else setting.n_kv - 1,
                n_kv=setting.n_kv, n_outputs=n_outputs, n_ctx=setting.n_ctx, kv_dtype=setting.kv_dtype,
                n_cross=self.n_cross, cross_write=prompt, pin_norm=self.placement.pin_norm(n_tokens),
            )  # fmt: skip
        cross = CrossState(self.n_cross, prompt) if self.n_cross else None
        return build_language(
            self.params, self.weights, self.placement, n_tokens=n_tokens, n_kv=setting.n_kv, n_outputs=n_outputs,
            n_ctx=setting.n_ctx, kv_dtype=setting.kv_dtype, cross=cross, pin_norm=self.placement.pin_norm(n_tokens),
        )  # fmt: skip


def device_memory(
    devices: Sequence[Device],
    limits: Sequence[int | None],
    graphs: Iterable[Graph],
    buffers: Iterable[Mapping[str, tuple[int, ...]]],
) -> tuple[DeviceMemory, ...]:
    """Bytes by buffer type, under the name of the first device that allocates in it, in the order of the devices.

    `buffers` are the schedulers' compute buffers. Resident tensors are aligned as the buffer type asks.
    """
    owners: dict[str, Device] = {}
    for device in devices:
        owners.setdefault(device.buft or device.name, device)
    parts: dict[str, dict[str, int]] = {buft: {} for buft in owners}
    for (_, buft), tensor in residents(graphs).items():
        alignment = owners[buft].alignment if buft in owners else 1
        sums, purpose = parts.setdefault(buft, {}), purpose_of(tensor)
        sums[purpose] = sums.get(purpose, 0) + -(-tensor.nbytes // alignment) * alignment
    for sizes in buffers:
        for buft, chunks in sizes.items():
            parts[buft]["compute"] = parts[buft].get("compute", 0) + sum(chunks)
    limit = {device.name: nbytes for device, nbytes in zip(devices, limits, strict=True)}
    names = {buft: owners[buft].name if buft in owners else buft for buft in parts}
    return tuple(
        DeviceMemory(names[buft], {p: sums[p] for p in PURPOSES if sums.get(p)}, limit.get(names[buft]))
        for buft, sums in parts.items()
    )


def allocator_nodes(plan: Plan) -> int:
    """Nodes that the allocator walks: the graph's, and two for each input of a split."""
    return len(plan.graph.nodes) + 2 * sum(len(split.inputs) for split in plan.splits)
