"""Modelled devices and links as the scheduler and the engine see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.schedule.plan import Device
from coordinator.simulate.fabric import Fabric, Route
from coordinator.simulate.hardware import DeviceModel, LinkModel
from protocol.errors import UsageError
from protocol.ops import Op

OFFLOAD_BATCH = 32
"""Rows from which a GPU takes an op whose weights lie in host memory (CUDA's rule)."""

LinkOf = Callable[[str, str], LinkModel | None]
"""The link from one device to another by their names, None where there is none."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices in priority order, the host's CPU last: their models, what the scheduler sees of them, and the fabric."""

    models: tuple[DeviceModel, ...]
    devices: tuple[Device, ...]
    fabric: Fabric

    @property
    def names(self) -> tuple[str, ...]:
        """Names in device order."""
        return tuple(model.name for model in self.models)

    @property
    def limits(self) -> tuple[int | None, ...]:
        """Bytes of memory by device, None: unlimited."""
        return tuple(model.memory_nbytes or None for model in self.models)


def make_machine(
    models: Sequence[DeviceModel], link_of: LinkOf, capacities: Mapping[str, float] | None = None
) -> Machine:
    """The machine of these models (the last one the host's CPU) and links.

    `capacities` are bytes/s of segments by name; a segment that is not among them has that of its fastest link.
    Raises UsageError for devices that cannot be meant.
    """
    models = tuple(models)
    if not models or models[-1].cls != "cpu" or models[-1].accelerator:
        last = models[-1].name if models else "none"
        raise UsageError(f"--system: the last device is {last}: expected the host, a device of class cpu")
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--system: two devices are called {twice!r}: expected different names")
    fabric = make_fabric(names, link_of, capacities or {})
    host = len(models) - 1
    devices = tuple(_device(model, _is_remote(fabric, host, index)) for index, model in enumerate(models))
    return Machine(models, devices, fabric)


def make_fabric(names: Sequence[str], link_of: LinkOf, capacities: Mapping[str, float]) -> Fabric:
    """Routes for each ordered pair of devices that have a link.

    Both directions of a link that is not duplex share a medium; links of a segment share one, in both directions.
    """
    routes: list[Route] = []
    index: dict[tuple[int, int], int] = {}
    media: dict[str, int] = {}
    capacity: list[float] = []

    def medium(name: str, bandwidth: float, least: bool) -> int:
        if name not in media:
            media[name] = len(capacity)
            capacity.append(bandwidth)
        elif least:
            capacity[media[name]] = max(capacity[media[name]], bandwidth)
        return media[name]

    for a in range(len(names)):
        for b in range(len(names)):
            link = link_of(names[a], names[b]) if a != b else None
            if link is None:
                continue
            shared = []
            if not link.duplex:
                pair = " - ".join(names[k] for k in sorted((a, b)))
                shared.append(medium(f"{link.name} {pair}", link.bandwidth, False))
            if link.segment:
                known = capacities.get(link.segment)
                shared.append(medium(link.segment, known or link.bandwidth, known is None))
            index[a, b] = len(routes)
            host = len(names) - 1 in (a, b)
            routes.append(
                Route(
                    f"{link.name} {names[a]} -> {names[b]}", link.latency_s, link.bandwidth, tuple(shared), link.jitter,
                    link.fixed_s_per_token or (0.0 if host else link.further_s),
                    link.pageable, link.wake, link.each, link.fixed_missed_s,
                )
            )  # fmt: skip
    return Fabric(tuple(routes), index, tuple(capacity), tuple(media))


def _is_remote(fabric: Fabric, host: int, device: int) -> bool:
    """True when the device is reached over RPC."""
    route = fabric.index.get((host, device))
    return route is not None and fabric.routes[route].fixed_s > 0.0


def _device(model: DeviceModel, remote: bool) -> Device:
    """As the scheduler sees it: GPUs take ops whose weights lie in host memory; remote ones do not (llama.cpp), and
    no worker of crossdock does."""
    is_host = model.cls == "cpu" and not model.accelerator
    offload = frozenset(Op.__members__) if not is_host and not remote and not model.accelerator else frozenset()
    return Device(
        model.name,
        kind="cpu" if is_host else "gpu",
        buft=model.name,
        alignment=model.alignment,
        max_size=model.max_buffer_nbytes or None,
        is_host=is_host,
        unsupported_ops=frozenset(model.unsupported_ops),
        offload_ops=offload,
        offload_min_batch=OFFLOAD_BATCH,
    )
