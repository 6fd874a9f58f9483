"""Clocks of `crossdock run`: a trace of what happened, and virtual time on modelled hardware."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from coordinator.config import Topology
from coordinator.report.text import notes, plain
from coordinator.runtime.fleet import FleetOptions
from coordinator.runtime.stopwatch import Stopwatch, check_machine
from protocol.errors import InputError, UsageError

DEFAULT_LINK = "pcie4x16"


def add_clocks(group: argparse._ArgumentGroup) -> None:
    """Arguments about time."""
    group.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing")
    group.add_argument("--memory-map", metavar="FILE",
                       help="draw who held which bytes of compute memory when: .svg or .png")  # fmt: skip
    group.add_argument("--simulate", metavar="TOML",
                       help="keep virtual time as well, on a system with a device for each worker")  # fmt: skip
    group.add_argument("--network", metavar="TOML|LINK",
                       help=f"links between them, or one kind of link for all (default: {DEFAULT_LINK})")  # fmt: skip
    group.add_argument("--pace", action="store_true", help="sleep until wall time is where virtual time is")


def stopwatch_of(chosen: argparse.Namespace, workers: Topology) -> Stopwatch | None:
    """The clocks that were asked for, None without any. Raises UsageError, InputError for a file without a place."""
    for option, file in (("--trace", chosen.trace), ("--memory-map", chosen.memory_map)):
        if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            raise InputError(f"{option} {file}: expected a file in a directory that exists")
    if chosen.memory_map is not None:
        from coordinator.report.memory_map import check_map

        check_map(Path(chosen.memory_map))
    keep = chosen.trace is not None or chosen.memory_map is not None
    if chosen.simulate is None:
        for option, given in (("--network", chosen.network is not None), ("--pace", chosen.pace)):
            if given:
                raise UsageError(f"{option} goes with --simulate TOML: the devices that time is modelled for")
        return Stopwatch(keep=True) if keep else None
    from coordinator.cli.simulate_model import machine_of  # models and presets, which other runs do without

    machine = machine_of(chosen.simulate, chosen.network or DEFAULT_LINK)
    check_machine(machine, workers.names, chosen.simulate)
    return Stopwatch(machine, pace=chosen.pace, keep=keep)


def patient(chosen: argparse.Namespace, fleet: FleetOptions) -> FleetOptions:
    """With --pace workers may sleep for as long as the model computes: that is no stall."""
    return replace(fleet, stall_timeout_s=math.inf) if chosen.pace else fleet


def write_run_trace(chosen: argparse.Namespace, stopwatch: Stopwatch | None, workers: Topology) -> None:
    """With --trace, --memory-map: write them. Raises InputError when a file cannot be written."""
    if stopwatch is None or not stopwatch.keep:
        return
    if chosen.memory_map is not None and stopwatch.taken:
        _draw_map(chosen, stopwatch)
    if chosen.trace is None:
        return
    from coordinator.report.run_trace import run_trace
    from coordinator.report.trace import write_trace

    write_trace(Path(chosen.trace), run_trace(workers.names, stopwatch.taken))


def _draw_map(chosen: argparse.Namespace, stopwatch: Stopwatch) -> None:
    from coordinator.report.memory_map import map_line
    from coordinator.report.memory_map_run import draw_run_map

    path, kept = Path(chosen.memory_map), chosen.ownership == "safe"
    found = draw_run_map(path, stopwatch.taken, apart=not chosen.share_scheduler, kept=kept)
    if not (chosen.quiet or chosen.json):
        then = "safe ownership had copied them" if kept else f"{chosen.ownership} ownership copies nothing"
        notes().print(f"[bold]map[/]       {plain(map_line(path, found, then))}")
