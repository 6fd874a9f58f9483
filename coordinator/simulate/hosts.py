"""Machines that divide a model's layers between a GPU and the CPU: how fast either side is, from their own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from coordinator.simulate.known import presets_file
from coordinator.simulate.tables import Table, read_toml

if TYPE_CHECKING:
    from coordinator.simulate.cases import Case

USUAL_CPU: Final = 45e9
"""Bytes/s at which the CPU of a desktop reads weights (two channels; rows C01, O01 to O06)."""
USUAL_STREAM: Final = 4.8e9
"""Bytes/s of weights that are sent to the GPU from pageable memory (row O26)."""


@dataclass(frozen=True, slots=True)
class Host:
    """Bytes/s of weights read by GPU and CPU in decode; FLOP/s of the GPU and bytes/s sent to it in a prompt."""

    gpu_bandwidth: float
    cpu_bandwidth: float
    gpu_rate: float
    stream_bandwidth: float


def usual_host(case: Case) -> Host:
    """A machine nobody has measured: the GPU as specified, the rest as usual."""
    spec = case.specs[0] if case.specs else None
    bandwidth = 0.7 * spec.bandwidth if spec else 250e9
    return Host(bandwidth, USUAL_CPU, 0.4 * spec.flops if spec and spec.flops else 15e12, USUAL_STREAM)


def calibrate_host(cases: Sequence[tuple[Case, float]], usual: Host) -> Host:
    """The machine from measured cases, each with its rate in tokens/s; `usual` where they say nothing.

    Decode takes share / gpu + (1 - share) / cpu for each byte, which is linear in the two unknowns: weighted least
    squares of relative errors. A prompt likewise.
    """
    host = usual
    decode = [(c, tps) for c, tps in cases if c.test.kind == "decode"]
    if decode:
        gpu, cpu = _solve(
            [(c.load.read_nbytes * c.share, c.load.read_nbytes * (1 - c.share), 1 / tps) for c, tps in decode],
            1 / usual.gpu_bandwidth, 1 / usual.cpu_bandwidth,
        )  # fmt: skip
        host = replace(host, gpu_bandwidth=1 / gpu, cpu_bandwidth=1 / cpu)
    prompt = [(c, tps) for c, tps in cases if c.test.kind == "prompt"]
    if prompt:
        rate, stream = _solve(
            [(2 * c.load.weights, _sent(c), 1 / tps) for c, tps in prompt],
            1 / usual.gpu_rate, 1 / usual.stream_bandwidth,
        )  # fmt: skip
        host = replace(host, gpu_rate=1 / rate, stream_bandwidth=1 / stream)
    return host


def _sent(case: Case) -> float:
    return case.load.file_nbytes * (1 - case.share) / min(case.test.n, case.test.ubatch)


def _solve(rows: Sequence[tuple[float, float, float]], usual_a: float, usual_b: float) -> tuple[float, float]:
    """a, b > 0 with x a + y b = t for each row (x, y, t), pulled a little towards what is usual."""
    weak = 1e-2
    lines = [(x / t, y / t, 1.0) for x, y, t in rows]
    lines += [(weak / usual_a, 0.0, weak), (0.0, weak / usual_b, weak)]
    m = np.array(lines)
    a, b = np.linalg.lstsq(m[:, :2], m[:, 2], rcond=None)[0]
    return max(float(a), usual_a / 50), max(float(b), usual_b / 50)


def host_name(hardware: str, model: str) -> str:
    """Under which name a machine that was measured with a model is calibrated."""
    return f"{hardware} | {model}"


def find_host(hosts: Mapping[str, Host], hardware: str, model: str) -> Host | None:
    """The machine as it was measured with this model, or else with another one."""
    found = hosts.get(host_name(hardware, model))
    return found or next((host for name, host in hosts.items() if name.startswith(f"{hardware} | ")), None)


@cache
def known_hosts() -> Mapping[str, Host]:
    """Calibrated machines by host_name."""
    path = presets_file("hosts.toml")
    found = {}
    for name, values in read_toml(path).items():
        table = Table(values, f"{path}: {name}")
        gbs = [table.number(key, low=1e-3) * 1e9 for key in ("gpu_gbs", "cpu_gbs", "gpu_gflops", "stream_gbs")]
        table.text("rows", "")
        table.end()
        found[name] = Host(*gbs)
    return found
