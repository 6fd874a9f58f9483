"""Fits the constants of all classes to the published rates and writes them where `crossdock simulate` reads them.

    python benchmarks/published/fit.py [TABLE.csv]

The table's rows all count here; how good the laws are on devices that a fit has not seen is another question, which
`crossdock simulate --published benchmarks/published/rates.csv --splits` answers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from coordinator.simulate.calibrate_rates import Factor, factors
from coordinator.simulate.cases import case_of
from coordinator.simulate.claims import group_of
from coordinator.simulate.fit import Measured
from coordinator.simulate.hosts import Host, calibrate_host, host_name, usual_host
from coordinator.simulate.judge import fair, fit_all
from coordinator.simulate.known import anchor_name, presets_file
from coordinator.simulate.law import Constants
from coordinator.simulate.published import read_rows
from coordinator.simulate.rates import Ask
from protocol.errors import InputError

HERE = Path(__file__).parent
CLASSES_HEAD = """\
# Constants of the laws by class of device, fitted to all rows of the table of published rates that a class's law is
# for (one device, dense models, its usual backend and host). Written by benchmarks/published/fit.py.
# name@tag multiplies name for devices with that tag, name~year for builds up to that year.
# eb: share of the bandwidth that reads weights. q, qk: 1e9 quantised (qk: K-quantised) weights unpacked per second and
# unit (SM x GHz for NVIDIA, TFLOP/s of f16 else). ekv: share of the bandwidth that reads the KV cache; kvu: GB/s of it
# per unit. c_us: overhead of a layer (NVIDIA: at 2 GHz), c_us_core: and core. pp_*: TFLOP/s per unit in prompts, ppa:
# of attention, besides moving its scores;
# power: exponent of the power limit per unit against `watts`. moe_us: overhead of a layer of experts (set, not
# fitted). layers: hop_us and hop_gbs from device to device, overlap of pipelined prompts and the layers per device at
# which half of it is lost.
schema = 1
"""
CALIBRATED_HEAD = """\
# How much faster than the law of its class a device was measured (median of its rows, drawn towards 1 when they are
# few), and with a model of experts or behind RPC: exactly. Written by benchmarks/published/fit.py.
schema = 1
"""
HOSTS_HEAD = """\
# Machines that were measured with a part of the layers on the GPU, from those rows. Written by
# benchmarks/published/fit.py.
schema = 1
"""


def main() -> None:
    table = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "rates.csv"
    cases = fair(measured_rows(table))
    laws = fit_all(cases)
    write_constants(laws)
    ask = Ask(laws.__getitem__)
    alone = [m for m in cases if m.case.mode == "one" and not m.case.row.group and not m.case.load.experts]
    found = factors(alone, ask) | anchors(cases, ask)
    lines = [CALIBRATED_HEAD]
    for name, factor in sorted(found.items()):
        lines += [f'["{name}"]', f"k_decode = {factor.decode:.4f}", f"k_prompt = {factor.prompt:.4f}",
                  f'rows = "{rows_text(factor.rows)}"', ""]  # fmt: skip
    presets_file("calibrated.toml").write_text("\n".join(lines))
    write_hosts(cases)


def measured_rows(table: Path) -> list[Measured]:
    found = []
    for row in read_rows(table):
        try:
            found.append(Measured(case_of(row), row.tps))
        except InputError as error:
            print(f"{row.ident}: {error}")
    return found


def anchors(cases: Sequence[Measured], ask: Ask) -> dict[str, Factor]:
    """Devices with models of experts, or of which others are measured behind RPC."""
    behind = {(m.case.specs[0].name, m.case.row.model) for m in cases if m.case.mode == "rpc" and m.case.specs}
    chosen: dict[str, list[Measured]] = {}
    for m in cases:
        if len(m.case.specs) != 1 or m.case.remote or m.case.mode == "offload":
            continue
        if m.case.load.experts or (m.case.specs[0].name, m.case.row.model) in behind:
            name = anchor_name(m.case.specs[0].name, m.case.row.model, m.case.row.quant)
            chosen.setdefault(name, []).append(m)
    return {name: factors(rows, ask, shrink=0.0)[rows[0].case.specs[0].name] for name, rows in chosen.items()}


def write_constants(laws: Mapping[str, Constants]) -> None:
    lines = [CLASSES_HEAD]
    for cls, law in laws.items():
        lines.append(f'["{cls}"]')
        lines += [f'"{name}" = {value:.5g}' for name, value in law.values.items()]
        lines.append("")
    presets_file("classes.toml").write_text("\n".join(lines))


def write_hosts(cases: Sequence[Measured]) -> None:
    machines: dict[str, list[Measured]] = {}
    for m in cases:
        if group_of(m.case) in ("decode offload", "prompt offload"):
            machines.setdefault(host_name(m.case.row.hardware, m.case.row.model), []).append(m)
    lines = [HOSTS_HEAD]
    for name, rows in sorted(machines.items()):
        host: Host = calibrate_host([(m.case, m.tps) for m in rows], usual_host(rows[0].case))
        lines += [f'["{name}"]', f"gpu_gbs = {host.gpu_bandwidth / 1e9:.4g}",
                  f"cpu_gbs = {host.cpu_bandwidth / 1e9:.4g}", f"gpu_gflops = {host.gpu_rate / 1e9:.5g}",
                  f"stream_gbs = {host.stream_bandwidth / 1e9:.4g}",
                  f'rows = "{rows_text([m.case.row.ident for m in rows])}"', ""]  # fmt: skip
    presets_file("hosts.toml").write_text("\n".join(lines))


def rows_text(rows: Sequence[str]) -> str:
    return " ".join(rows) if len(rows) <= 12 else f"{' '.join(rows[:12])} and {len(rows) - 12} more"


if __name__ == "__main__":
    main()
