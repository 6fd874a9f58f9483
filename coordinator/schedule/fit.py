"""The most layers that fit: search over --n-gpu-layers and the split between devices, each answer proved by a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from coordinator.model.presets import Blueprint
from coordinator.schedule.outline import Outline, Setting, build_graphs, fit_setting, plan_model
from coordinator.schedule.placement import Placement, plan_placement
from coordinator.schedule.residents import residents
from protocol.errors import CapacityError, UsageError

EXHAUSTIVE = 16
"""Splits of one number of layers that are all tried; of more, those that promise most."""

REFINEMENTS = 4
"""Tries with one number of layers when not all splits are tried, each with the compute buffers the last one had."""

_UNLIMITED = float("inf")


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer: layers, how many of them each accelerator gets (empty: as --tensor-split says), and their plan.

    `n_planned` plans were made. `exhaustive`: every larger number was tried with every split that the weights allow.
    """

    n_gpu_layers: int
    tensor_split: tuple[int, ...]
    outline: Outline
    n_planned: int
    exhaustive: bool


@dataclass(frozen=True, slots=True)
class _Load:
    """Bytes of weights and caches: of each layer and the output (`units`), and what lies on a device in any case."""

    units: tuple[int, ...]
    fixed: tuple[int, ...]

    def of(self, counts: Sequence[int]) -> list[int]:
        """Least bytes per device when the accelerators take `counts` of the last units."""
        total = list(self.fixed)
        n_layer, wanted = len(self.units) - 1, sum(counts)
        first = n_layer - wanted if wanted <= n_layer else 0
        owners = [device for device, count in enumerate(counts) for _ in range(count)]
        for unit, nbytes in enumerate(self.units):
            taken = first <= unit < first + wanted
            total[owners[unit - first] if taken else -1] += nbytes
        return total


def fit(blueprint: Blueprint, setting: Setting) -> Fit:
    """The largest number of layers with which every device keeps its limit, and a split that does it.

    A given number of layers or split is kept, and the other searched. Numbers are tried from the top, so a smaller
    one is never taken for the largest; weights and caches alone rule most of them out without a plan. Raises
    UsageError when no accelerator has a limit, CapacityError when nothing fits.
    """
    if all(limit is None for limit in setting.limits[:-1]):
        raise UsageError("--fit: no device has a limit: give one its memory, such as --device gpu0:24GiB")
    return _Search(blueprint, fit_setting(blueprint.params, setting)).run()


class _Search:
    """One search; `overhead` is what each device needed beyond weights and caches in the last plan."""

    def __init__(self, blueprint: Blueprint, setting: Setting) -> None:
        self.blueprint, self.setting = blueprint, setting
        self.n_accelerators = len(setting.devices) - 1
        self.limits = [_UNLIMITED if limit is None else float(limit) for limit in setting.limits]
        self.load = _measure(blueprint, setting)
        self.overhead = [0.0] * len(setting.devices)
        self.n_planned = 0
        self.exhaustive = True
        self.nearest: tuple[int, int, str] | None = None

    def run(self) -> Fit:
        asked = self.setting.placement.n_gpu_layers
        numbers = range(len(self.load.units), -1, -1) if asked is None else [asked]
        for number in numbers:
            for counts in self._candidates(number):
                outline = self._plan(number, counts)
                if not any(memory.short for memory in outline.memory):
                    split = () if self.setting.placement.tensor_split else counts
                    return Fit(number, split, outline, self.n_planned, self.exhaustive)
        what = "no number of layers fits" if asked is None else f"--n-gpu-layers {asked} does not fit"
        if self.nearest is None:
            raise CapacityError(f"--fit: {what}: {self._too_large(asked or 0)}")
        short, number, device = self.nearest
        raise CapacityError(f"--fit: {what}: with {number} layers {device} is still {short:,} bytes short")

    def _too_large(self, number: int) -> str:
        """Which device could not even hold the weights and caches; of several accelerators, all together."""
        host = self.load.of((number, *(0,) * (self.n_accelerators - 1)))[-1]
        if host > self.limits[-1]:
            return f"{self.setting.devices[-1].name} would hold {host:,} bytes of weights and caches"
        return f"weights and caches of {number} layers are {sum(self._units(number)):,} bytes"

    def _plan(self, number: int, counts: tuple[int, ...]) -> Outline:
        split = self.setting.placement.tensor_split or (tuple(map(float, counts)) if number else ())
        placement = replace(self.setting.placement, n_gpu_layers=number, tensor_split=split)
        outline = plan_model(self.blueprint, replace(self.setting, placement=placement))
        self.n_planned += 1
        needs = {memory.device: memory.total for memory in outline.memory}
        loads = self.load.of(counts)
        self.overhead = [
            float(max(0, needs.get(device.name, 0) - least))
            for device, least in zip(self.setting.devices, loads, strict=True)
        ]
        worst = max(outline.memory, key=lambda memory: memory.short)
        if worst.short and (self.nearest is None or worst.short < self.nearest[0]):
            self.nearest = worst.short, number, worst.device
        return outline

    def _candidates(self, number: int) -> Iterator[tuple[int, ...]]:
        """Splits of `number` units to try: all that the weights allow when they are few, else the most promising."""
        if self.setting.placement.tensor_split:
            counts = self._asked_counts(number)
            if self._possible(counts):
                yield counts
            return
        possible = list(islice(self._compositions(number, 0, 0), EXHAUSTIVE + 1))
        if len(possible) <= EXHAUSTIVE:
            while possible:
                possible.sort(key=self._slack)
                yield possible.pop()
            return
        self.exhaustive = False
        seen: set[tuple[int, ...]] = set()
        for _ in range(REFINEMENTS):
            counts = self._widest(number)
            if counts in seen:
                return
            seen.add(counts)
            yield counts

    def _asked_counts(self, number: int) -> tuple[int, ...]:
        """How many units each accelerator gets by the given proportions."""
        placement = replace(self.setting.placement, n_gpu_layers=number)
        n_layer = len(self.load.units) - 1
        layers = plan_placement(self.setting.devices, self.setting.limits, n_layer, placement).layers
        return tuple(layers.count(device) for device in range(self.n_accelerators))

    def _possible(self, counts: tuple[int, ...]) -> bool:
        return all(need <= limit for need, limit in zip(self.load.of(counts), self.limits, strict=True))

    def _compositions(self, number: int, first: int, device: int) -> Iterator[tuple[int, ...]]:
        """Ways to give the units to the accelerators from `device` on that their limits allow, by weights alone."""
        units = self._units(number)
        host = self.load.fixed[-1] + sum(self.load.units) - sum(units)
        if host > self.limits[-1]:
            return
        need = float(self.load.fixed[device])
        if device == self.n_accelerators - 1:
            if need + sum(units[first:]) <= self.limits[device]:
                yield (number - first,)
            return
        for count in range(number - first + 1):
            if count:
                need += units[first + count - 1]
            if need > self.limits[device]:
                return
            for rest in self._compositions(number, first + count, device + 1):
                yield (count, *rest)

    def _units(self, number: int) -> tuple[int, ...]:
        n_layer = len(self.load.units) - 1
        return self.load.units[n_layer - number : n_layer] if number <= n_layer else self.load.units

    def _slack(self, counts: tuple[int, ...]) -> float:
        """The smallest share of its memory that a device is expected to keep free."""
        return min(
            (limit - need - extra) / limit if 0 < limit < _UNLIMITED else 1.0
            for need, extra, limit in zip(self.load.of(counts), self.overhead, self.limits, strict=True)
        )

    def _widest(self, number: int) -> tuple[int, ...]:
        """The split whose fullest device is expected to be least full: bisection on that share, filling in order."""
        low, high = 0.0, 4.0
        best = (0,) * (self.n_accelerators - 1) + (number,)
        for _ in range(40):
            middle = (low + high) / 2
            counts = self._filled(number, middle)
            if counts is None:
                low = middle
            else:
                high, best = middle, counts
        return best

    def _filled(self, number: int, share: float) -> tuple[int, ...] | None:
        """Each accelerator filled to `share` of its limit in order; None when units are left over."""
        units, counts, first = self._units(number), [], 0
        for device in range(self.n_accelerators):
            room = self.limits[device] * share - self.load.fixed[device] - self.overhead[device]
            count = 0
            while first + count < number and units[first + count] <= room:
                room -= units[first + count]
                count += 1
            counts.append(count)
            first += count
        return tuple(counts) if first == number else None


def _measure(blueprint: Blueprint, setting: Setting) -> _Load:
    """Weights and caches by layer: placed on imaginary devices, one per layer, behind the real ones."""
    n_layer, n_devices = blueprint.params.text.n_layer, len(setting.devices)
    none = replace(setting.placement, n_gpu_layers=0, tensor_split=())
    placement = plan_placement(setting.devices, setting.limits, n_layer, none)
    graphs = build_graphs(blueprint, replace(setting, debug=()), placement)
    by_layer = Placement(
        setting.devices, tuple(n_devices + unit for unit in range(n_layer + 1)), placement.overrides,
        placement.kv_offload,
    )  # fmt: skip
    total = [0] * (n_devices + n_layer + 1)
    for (name, _), tensor in residents(graphs.values()).items():
        if name not in ("cross_states", "rope_freqs.weight"):  # the plan decides where and how often
            total[by_layer.device_of(name)] += tensor.nbytes
    return _Load(tuple(total[n_devices:]), tuple(total[:n_devices]))
