"""Where weights and caches lie: llama.cpp's -ngl, -ts, -ot and -nkvo."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from coordinator.graph.node import BufferRef
from coordinator.schedule.plan import Device
from protocol.errors import UsageError
from protocol.ops import Usage

_LAYER = re.compile(r"(?:v\.global\.|v\.)?blk\.(\d+)\.|(?:cache|cross)_([kv])_l(\d+)$")
SMALL_BATCH = 32
"""Below this many tokens llama.cpp binds each layer's norms to the layer's device."""

_OUTPUT = ("output.weight", "output_norm.weight")


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """`n_gpu_layers` None: all. `tensor_split` are proportions per accelerator, empty: by their memory, else equal.

    `overrides` are (regular expression, device name) pairs for weights; the first match decides.
    """

    n_gpu_layers: int | None = None
    tensor_split: tuple[float, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()
    kv_offload: bool = True


@dataclass(frozen=True, slots=True)
class Placement:
    """The device of each layer (`layers[n_layer]` is the output's), the overrides, and the host as the default."""

    devices: tuple[Device, ...]
    layers: tuple[int, ...]
    overrides: tuple[tuple[re.Pattern[str], int], ...]
    kv_offload: bool
    fixed: tuple[tuple[str, int], ...] = ()

    @property
    def host(self) -> int:
        """Index of the last device."""
        return len(self.devices) - 1

    def device_of(self, name: str) -> int:
        """Index of the device on which a weight or cache lies."""
        for fixed, device in self.fixed:
            if name == fixed:
                return device
        match = _LAYER.match(name)
        is_cache = match is not None and match[2] is not None
        for pattern, device in self.overrides:
            if not is_cache and pattern.search(name):
                return device
        if name in _OUTPUT:
            return self.layers[-1]
        if match is None or (is_cache and not self.kv_offload):
            return self.host
        layer = int(match[1] or match[3])
        return self.layers[layer] if layer < len(self.layers) - 1 else self.layers[-2]

    def pin_norm(self, n_tokens: int) -> Callable[[int], str | None] | None:
        """Which device the norms of a layer are bound to: llama.cpp binds those of small batches, and all of them when
        the whole model is offloaded; else None."""
        whole = all(device != self.host for device in self.layers)
        if n_tokens >= SMALL_BATCH and not whole:
            return None
        return self._norm_device

    def _norm_device(self, layer: int) -> str | None:
        """The layer's device, unless it lacks the op."""
        device = self.devices[self.layers[layer]]
        return None if "RMS_NORM" in device.unsupported_ops else device.name

    def __call__(self, name: str) -> BufferRef:
        """Buffer type of a weight or cache by name, for the graph builders."""
        return BufferRef(self.devices[self.device_of(name)].buft, Usage.WEIGHTS)


def plan_placement(
    devices: Sequence[Device], memory: Sequence[int | None], n_layer: int, options: PlacementOptions
) -> Placement:
    """Give the last `n_gpu_layers` of `n_layer` layers, and the output after all of them, to the accelerators.

    As in llama.cpp: layer i is offloaded if i >= n_layer - N, the output if N > n_layer; the offloaded ones go to the
    accelerators in order, in the split's proportions. A vision tower's layer i follows text layer i, as in the runs
    of discussion 10780. `memory` in bytes by device, None: not limited.

    Raises UsageError for more layers than there are, a split of the wrong length, an unknown device or a bad pattern.
    """
    accelerators = len(devices) - 1
    wanted = n_layer + 1 if options.n_gpu_layers is None else options.n_gpu_layers
    if not 0 <= wanted <= n_layer + 1:
        raise UsageError(
            f"--n-gpu-layers {wanted}: the model has {n_layer} layers and an output: expected 0 to {n_layer + 1}"
        )
    if wanted and not accelerators:
        if options.n_gpu_layers is not None:
            raise UsageError(f"--n-gpu-layers {wanted}: there is no accelerator among the workers")
        wanted = 0
    bounds = _bounds(accelerators, memory, options.tensor_split) if wanted else []
    first = n_layer - wanted if wanted <= n_layer else 0
    layers = [
        min(bisect_right(bounds, (il - first) / wanted), accelerators - 1)
        if wanted and il >= first and (il < n_layer or wanted > n_layer)
        else accelerators
        for il in range(n_layer + 1)
    ]
    overrides = tuple(_override(pattern, name, devices) for pattern, name in options.overrides)
    return Placement(tuple(devices), tuple(layers), overrides, options.kv_offload)


def check_overrides(options: PlacementOptions, weights: Iterable[str]) -> None:
    """Raises UsageError for an override that no weight's name matches; llama.cpp says nothing and goes on."""
    names = list(weights)
    for pattern, device in options.overrides:
        if not any(re.search(pattern, name) for name in names):
            raise UsageError(
                f"--override-tensor {pattern}={device}: matches none of the model's {len(names)} weights,"
                f" which are named like {', '.join(names[:: len(names) // 3 + 1])}"
            )


def _bounds(accelerators: int, memory: Sequence[int | None], split: Sequence[float]) -> list[float]:
    """Where each accelerator's share ends, in 0..1."""
    if split and (len(split) != accelerators or min(split) < 0 or sum(split) <= 0):
        shown = ",".join(f"{part:g}" for part in split)
        raise UsageError(f"--tensor-split {shown}: expected {accelerators} proportions, not negative and not all 0")
    limits = [memory[i] for i in range(accelerators)]
    shares = list(split) or [float(limit) for limit in limits if limit is not None]
    if len(shares) != accelerators or not sum(shares):  # no memory at all: what does not fit is told by who counts it
        shares = [1.0] * accelerators
    total, running, bounds = sum(shares), 0.0, []
    for share in shares:
        running += share
        bounds.append(running / total)
    return bounds


def _override(pattern: str, name: str, devices: Sequence[Device]) -> tuple[re.Pattern[str], int]:
    names = [device.name for device in devices]
    if name not in names:
        raise UsageError(f"--override-tensor {pattern}={name}: unknown device {name!r}: expected {', '.join(names)}")
    try:
        return re.compile(pattern), names.index(name)
    except re.error as error:
        raise UsageError(f"--override-tensor {pattern}={name}: not a regular expression: {error}") from None
