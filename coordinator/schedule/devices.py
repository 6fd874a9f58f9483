"""Devices as tables: which device can run which op, read which buffer type, and how buffer types are numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from coordinator.schedule.arrays import I64, N_OPS, Bools
from coordinator.schedule.plan import Device
from protocol.errors import PlanError
from protocol.ops import Op

MAX_DEVICES = 16
"""ggml's GGML_SCHED_MAX_BACKENDS."""

UNLIMITED = 2**63 - 1
"""Largest buffer of a buffer type without a limit: ggml clamps to SIZE_MAX / 2."""

KINDS = ("gpu", "igpu", "accel", "cpu")


class DeviceTable(NamedTuple):
    """Answers of the devices, by device index (rows) and op or buffer type (columns).

    Buffer types 0 to n-1 are those the devices allocate in, in the order of the devices; further columns are extra
    buffer types and the last one stands for all that no device knows. `offload_min` [d] is the smallest batch.
    """

    supports_op: Bools
    offload_op: Bools
    offload_min: I64
    supports_buft: Bools
    buft: I64
    is_host: Bools
    alignment: I64
    max_size: I64


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of a scheduler with their buffer types by number; `n_compute` of `buft_names` can be allocated in."""

    devices: tuple[Device, ...]
    table: DeviceTable
    index: dict[str, int]
    buft_index: dict[str, int]
    buft_names: tuple[str, ...]
    n_compute: int

    @property
    def foreign(self) -> int:
        """The number of every buffer type that no device knows."""
        return len(self.buft_names)


def buft_name(device: Device) -> str:
    """The buffer type in which `device` allocates: its own name unless given."""
    return device.buft or device.name


def make_devices(devices: Sequence[Device]) -> Devices:
    """Check and tabulate devices in priority order.

    Raises PlanError when a device is impossible, names clash or the last one is no CPU.
    """
    devices = tuple(devices)
    _check(devices)
    compute = list(dict.fromkeys(buft_name(d) for d in devices))
    names = tuple(dict.fromkeys([*compute, *(b for d in devices for b in d.extra_bufts)]))
    index = {name: k for k, name in enumerate(names)}
    n = len(devices)
    supports_op = np.ones((n, N_OPS), np.bool_)
    offload_op = np.zeros((n, N_OPS), np.bool_)
    supports_buft = np.zeros((n, len(names) + 1), np.bool_)
    is_host = np.zeros(len(names) + 1, np.bool_)
    for k, device in enumerate(devices):
        supports_op[k, [Op[o] for o in device.unsupported_ops]] = False
        offload_op[k, [Op[o] for o in device.offload_ops]] = True
        supports_buft[k, [index[b] for b in (buft_name(device), *device.extra_bufts)]] = True
    owners = [next(d for d in devices if buft_name(d) == b) for b in compute]
    is_host[: len(compute)] = [d.is_host for d in owners]
    table = DeviceTable(
        supports_op,
        offload_op,
        np.array([d.offload_min_batch for d in devices], np.int64),
        supports_buft,
        np.array([index[buft_name(d)] for d in devices], np.int64),
        is_host,
        np.array([d.alignment for d in owners], np.int64),
        np.array([UNLIMITED if d.max_size is None else d.max_size for d in owners], np.int64),
    )
    by_name = {d.name: k for k, d in enumerate(devices)}
    return Devices(devices, table, by_name, index, names, len(compute))


def _check(devices: tuple[Device, ...]) -> None:
    if not devices:
        raise PlanError("no devices: expected at least a cpu")
    if len(devices) > MAX_DEVICES:
        raise PlanError(f"{len(devices)} devices: expected at most {MAX_DEVICES}")
    if devices[-1].kind != "cpu":
        raise PlanError(f"last device {devices[-1].name!r} is of type {devices[-1].kind!r}: expected 'cpu'")
    names = [d.name for d in devices]
    for k, device in enumerate(devices):
        where = f"device {device.name!r}"
        if device.name in names[:k]:
            raise PlanError(f"{where} is listed twice: expected different names")
        if device.kind not in KINDS:
            raise PlanError(f"{where}: type {device.kind!r}, expected one of {', '.join(KINDS)}")
        if device.alignment < 1 or device.alignment & (device.alignment - 1):
            raise PlanError(f"{where}: alignment {device.alignment}, expected a power of two")
        if device.max_size is not None and device.max_size < 1:
            raise PlanError(f"{where}: max_size {device.max_size}, expected at least 1 byte")
        for op in sorted(device.unsupported_ops | device.offload_ops):
            if op not in Op.__members__:
                raise PlanError(f"{where}: unknown op {op!r}, expected ggml's names (MUL_MAT, SOFT_MAX, ...)")
