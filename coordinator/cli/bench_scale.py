"""`crossdock bench scaling --simulate`: the real curve of a few processes, and the simulated one up to a thousand."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console

from coordinator.cli import options
from coordinator.cli.bench_scale_measure import Progress, Rig, measure_strong, measure_weak
from coordinator.model.gguf_file import open_model
from coordinator.model.presets import Blueprint, open_blueprint
from coordinator.report import scaling as report
from coordinator.report.plan import model_line
from coordinator.report.text import notes, plain
from coordinator.runtime.fleet import FleetOptions
from coordinator.runtime.session import KV_PADDING, SessionOptions
from coordinator.schedule.devices import MAX_DEVICES
from coordinator.simulate.hardware import DeviceModel, LinkModel, Pool
from coordinator.simulate.machine import Machine, make_machine
from coordinator.simulate.network import Network, links, load_network, uniform
from coordinator.simulate.scale import MAX_SCALE, MAX_STAGES, ScalePoint, scaling
from coordinator.simulate.series import Load, Options
from coordinator.simulate.system import load_system, on_one_machine
from protocol.dtypes import dtype_of
from protocol.errors import Exit, UsageError

HERE: Final = "here.toml"
"""The system that is taken where none is named: what `crossdock calibrate -o here.toml` has written."""

REAL: Final = 4
"""Up to so many workers are measured as well."""

DEEPEST: Final = MAX_DEVICES - 1
"""Accelerators that ggml's scheduler divides a graph among, beside the host."""

CROWD: Final = 16
"""Workers that are simulated on shared processors: more do not get more done."""

_OWN: Final = "; each worker has processors and memory of its own"

MOST: Final = 64
MOST_SEQUENCES: Final = 64
PROMPT, PREDICT, UBATCH, REPETITIONS = 256, 32, 128, 3


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be simulated and, with a rig, measured: numbers of workers, sequences under way in all, accelerators
    of one pipeline, and why nothing is measured ("" where it is). All workers of `machine_of` share the system's
    `pool`, if it says that there is one; those of `apart` have processors and memory of their own."""

    blueprint: Blueprint
    machine_of: Callable[[int], Machine]
    apart: Callable[[int], Machine]
    pool: Pool | None
    options: Options
    load: Load
    workers: tuple[int, ...]
    sequences: int
    stages: int
    rig: Rig | None
    note: str


def bench_scale(chosen: argparse.Namespace, progress: Progress) -> int:
    """Measure, simulate, and print one table, Markdown or JSON to stdout. Raises UsageError for impossible wishes."""
    _check(chosen)
    if chosen.plot:
        from coordinator.cli.bench_plot import check_plot

        check_plot(Path(chosen.plot))
    system = Path(chosen.simulate or HERE)
    asked = _asked(chosen, system)
    curves = (_strong(asked, progress), _pipelined(asked, progress), *_weak(asked, progress))
    found = report.Scaling(
        model_line(asked.blueprint.params, asked.blueprint.weights), str(system), asked.load, curves, asked.note
    )
    _print(chosen, found)
    if chosen.plot:
        from coordinator.cli.bench_scale_plot import plot_scaling

        plot_scaling(Path(chosen.plot), asked.blueprint.params.name, found)
    return Exit.OK


def _check(chosen: argparse.Namespace) -> None:
    """Refuse what would have no effect, and several values where one is meant. Raises UsageError."""
    if chosen.what != "scaling":
        raise UsageError("--simulate goes with scaling: crossdock bench scaling --simulate")
    if chosen.n_gpu_layers:
        raise UsageError("--n-gpu-layers: with --simulate all layers lie on accelerators: leave it out")
    for option, values in (("--n-prompt", chosen.n_prompt), ("--n-gen", chosen.n_gen), ("--ubatch", chosen.ubatch),
                           ("--threads", chosen.threads)):  # fmt: skip
        if values is not None and len(values) != 1:
            raise UsageError(f"{option}: expected one value with --simulate, {len(values)} given")
    if chosen.n_prompt == (0,):
        raise UsageError("--n-prompt 0: expected at least 1 with --simulate")


def _asked(chosen: argparse.Namespace, system: Path) -> Asked:
    if not chosen.simulate and not system.is_file():
        raise UsageError(
            f"--simulate: no {HERE} in this folder: `crossdock calibrate -o {HERE}` measures this machine in some "
            "minutes, or name a system: --simulate SYSTEM.toml"
        )
    modelled = load_system(system)
    devices, pool = modelled.devices, modelled.pool
    if len(devices) < 2:
        raise UsageError(f"--simulate {system}: no device besides the host: expected an accelerator to have more of")
    worker, host = devices[0], devices[-1]
    blueprint = open_blueprint(str(options.model_path(chosen)))
    load = _load(chosen, blueprint)
    n_ctx = -(-(load.n_prompt + load.n_predict) // KV_PADDING) * KV_PADDING
    n_ctx = min(n_ctx, blueprint.params.text.n_ctx_train)
    kv_dtype = dtype_of(chosen.kv_type)
    note = _why_not(chosen, worker)
    rig = None
    if not note:
        model = open_model(options.model_path(chosen))
        session = SessionOptions(n_ctx=n_ctx, n_ubatch=load.n_ubatch, kv_dtype=kv_dtype)
        rig = Rig(
            model, blueprint.params, session, FleetOptions(chosen.transport, arithmetic=chosen.arithmetic), load,
            chosen.threads[0] if chosen.threads else 1, chosen.repetitions or REPETITIONS,
        )  # fmt: skip
    workers, network = _workers(chosen.workers), _network(chosen.network, system)
    return Asked(
        blueprint, _machines(worker, host, network, pool), _machines(worker, host, network, None), pool,
        Options(n_ctx=n_ctx, kv_dtype=kv_dtype), load, workers,
        chosen.requests or min(max(workers), MOST_SEQUENCES), chosen.stages or MAX_STAGES, rig, note,
    )  # fmt: skip


def _load(chosen: argparse.Namespace, blueprint: Blueprint) -> Load:
    """A sequence: an image where the model takes some, a prompt, tokens one by one. Raises UsageError."""
    params = blueprint.params
    limit = params.text.n_ctx_train
    n_prompt = chosen.n_prompt[0] if chosen.n_prompt else min(PROMPT, limit // 2)
    n_predict = chosen.n_gen[0] if chosen.n_gen is not None else max(0, min(PREDICT, limit - n_prompt))
    if n_prompt + n_predict > limit:
        raise UsageError(f"tests of {n_prompt + n_predict} tokens: the model was trained for at most {limit}")
    images = int(params.vision is not None and not chosen.no_image)
    return Load(n_prompt, n_predict, images, min(chosen.ubatch[0] if chosen.ubatch else UBATCH, n_prompt))


def _why_not(chosen: argparse.Namespace, worker: DeviceModel) -> str:
    """Why nothing is measured, or ""."""
    if chosen.no_real:
        return "simulated only, as asked"
    if not worker.costs:
        return f"simulated only: {worker.name} is not a worker of this machine as crossdock calibrate measures it"
    if not Path(options.model_path(chosen)).is_file():
        return "simulated only: processes need a GGUF file"
    return ""


def _workers(given: Sequence[str] | None) -> tuple[int, ...]:
    """Numbers of workers: those that are given, or 1 to 4 and doubled up to the one that is. Raises UsageError."""
    text = ",".join(given or [str(MOST)])
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,5}", part) and 1 <= int(part) <= MAX_SCALE for part in parts):
        raise UsageError(f"--workers {text}: expected numbers from 1 to {MAX_SCALE} with --simulate, such as 1000")
    numbers = sorted({int(part) for part in parts})
    if len(numbers) > 1:
        return tuple(numbers)
    most = numbers[0]
    doubled = [REAL << k for k in range(1, most.bit_length()) if REAL << k < most]
    return tuple(sorted({*range(1, min(most, REAL) + 1), *doubled, most}))


def _network(text: str | None, system: Path) -> Network:
    """The links that are named, else those beside the system (crossdock calibrate writes them), else PCIe.

    Raises UsageError.
    """
    beside = system.with_name(f"{system.stem}-network{system.suffix}")
    if text is None:
        return load_network(beside) if beside.is_file() else uniform(links()["pcie4x16"])
    if text in links():
        return uniform(links()[text])
    if not Path(text).exists():
        raise UsageError(f"--network {text}: no such file, and no kind of link: expected one of {', '.join(links())}")
    return load_network(Path(text))


def _machines(
    worker: DeviceModel, host: DeviceModel, network: Network, pool: Pool | None
) -> Callable[[int], Machine]:  # fmt: skip
    """Machines with as many such workers as are asked for, which share what is in the pool."""
    base = worker.name.rstrip("0123456789") or worker.name

    def link_of(source: str, target: str) -> LinkModel | None:
        try:
            return network.link(source, target)
        except UsageError:
            return None  # an error only if the plan sends something there

    def machine_of(n: int) -> Machine:
        models = [replace(worker, name=f"{base}{k}") for k in range(n)]
        return on_one_machine(make_machine([*models, host], link_of, network.capacity), pool)

    return machine_of


def _strong(asked: Asked, progress: Progress) -> report.Curve:
    """One sequence, its layers over all workers; no further than one layer each, or than the scheduler goes."""
    deepest = _deepest(asked)
    workers = sorted({min(n, deepest) for n in asked.workers})
    load = replace(asked.load, n_requests=1)
    points = _simulated(asked, asked.machine_of, workers, "strong", deepest, asked.options, load, progress)
    end = "each has one layer" if deepest < DEEPEST else "and a host ggml's scheduler ends"
    about = (
        "one sequence, its layers divided among the workers, which take turns"
        + (f"; with {deepest} workers {end}: more of them need more sequences" if workers[-1] == deepest else "")
    )  # fmt: skip
    return report.Curve("strong", about, _rows(asked, points, measure_strong, progress))


def _deepest(asked: Asked) -> int:
    return min(asked.blueprint.params.text.n_layer, DEEPEST)


def _pipelined(asked: Asked, progress: Progress) -> report.Curve:
    """The same sequences for all numbers of workers, all under way at once, in pipelines and copies of them."""
    stages = min(asked.stages, _deepest(asked))
    workers = sorted({n if n <= stages else n // stages * stages for n in asked.workers})
    overlapped = replace(asked.options, parallel=True)
    load = replace(asked.load, n_requests=asked.sequences)
    points = _simulated(asked, asked.apart, workers, "strong", stages, overlapped, load, progress)
    about = (
        f"{asked.sequences:,} sequences under way at once and micro-batches that overlap, in pipelines of up to "
        f"{stages} workers and copies of them around one host{_OWN if asked.pool else ''}"
    )
    return report.Curve("pipelined", about, tuple(report.Row(point) for point in points))


def _weak(asked: Asked, progress: Progress) -> Iterator[report.Curve]:
    """As many sequences as workers, each of which has the whole model: on this machine, and on one each."""
    load = replace(asked.load, n_requests=1)
    workers = [n for n in asked.workers if n <= CROWD or not asked.pool] or asked.workers[:1]
    points = _simulated(asked, asked.machine_of, workers, "weak", 1, asked.options, load, progress)
    about = "a sequence and a copy of the model for each worker, around one host"
    here = f"{about}; {asked.pool.processors:g} processors for all of them" if asked.pool else about
    here += f"; real: each with a host of its own, on {os.cpu_count()} processors" if asked.rig else ""
    yield report.Curve("weak", here, _rows(asked, points, measure_weak, progress))
    if asked.pool:
        points = _simulated(asked, asked.apart, asked.workers, "weak", 1, asked.options, load, progress)
        yield report.Curve("apart", about + _OWN, tuple(report.Row(point) for point in points))


def _simulated(
    asked: Asked, machine_of: Callable[[int], Machine], workers: Sequence[int], mode: str, stages: int, made: Options,
    load: Load, progress: Progress,
) -> list[ScalePoint]:  # fmt: skip
    progress(f"simulating up to {workers[-1]:,} workers")
    return scaling(asked.blueprint, machine_of, made, load, workers, mode=mode, stages=stages)


def _rows(
    asked: Asked,
    points: Sequence[ScalePoint],
    measure: Callable[[Rig, Sequence[int], Progress], list[report.Real]],
    progress: Progress,
) -> tuple[report.Row, ...]:
    """Points with what was measured of the first ones."""
    few = [point.workers for point in points if point.workers <= REAL]
    real = dict(zip(few, measure(asked.rig, few, progress), strict=True)) if asked.rig is not None and few else {}
    return tuple(report.Row(point, real.get(point.workers)) for point in points)


def _print(chosen: argparse.Namespace, found: report.Scaling) -> None:
    peak = _peak_nbytes()
    if chosen.json:
        print(json.dumps(report.document(found, peak)))
        return
    console, rows = notes(), report.table_rows(found)
    console.print(f"[bold]model[/]     {plain(found.model)}")
    console.print(f"[bold]machine[/]   {plain(found.system)}{plain('; ' + found.note if found.note else '')}")
    for line in report.notes(found.curves):
        console.print(f"[bold]curve[/]     {plain(line)}")
    console.print(f"[bold]cost[/]      {report.cost_line(found, peak)}")
    if chosen.markdown:
        print(report.markdown(rows))
        return
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, soft_wrap=True, width=width).print(report.table(rows))


def _peak_nbytes() -> int:
    """Most memory that this process has ever had in use; Linux's getrusage would count its parent's before exec."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10
