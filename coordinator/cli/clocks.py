"""Clocks of `crossdock run`: a trace of what happened, and virtual time on modelled hardware."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from coordinator.config import Topology
from coordinator.runtime.fleet import FleetOptions
from coordinator.runtime.stopwatch import Stopwatch, check_machine
from protocol.errors import InputError, UsageError

DEFAULT_LINK = "pcie4x16"


def add_clocks(group: argparse._ArgumentGroup) -> None:
    """Arguments about time."""
    group.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing")
    group.add_argument("--simulate", metavar="TOML",
                       help="keep virtual time as well, on a system with a device for each worker")  # fmt: skip
    group.add_argument("--network", metavar="TOML|LINK",
                       help=f"links between them, or one kind of link for all (default: {DEFAULT_LINK})")  # fmt: skip
    group.add_argument("--pace", action="store_true", help="sleep until wall time is where virtual time is")


def stopwatch_of(chosen: argparse.Namespace, workers: Topology) -> Stopwatch | None:
    """The clocks that were asked for, None without any. Raises UsageError, InputError for a trace without a place."""
    if chosen.trace is not None:
        path = Path(chosen.trace)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise InputError(f"--trace {path}: expected a file in a directory that exists")
    if chosen.simulate is None:
        for option, given in (("--network", chosen.network is not None), ("--pace", chosen.pace)):
            if given:
                raise UsageError(f"{option} goes with --simulate TOML: the devices that time is modelled for")
        return None if chosen.trace is None else Stopwatch(keep=True)
    from coordinator.cli.simulate_model import machine_of  # models and presets, which other runs do without

    machine = machine_of(chosen.simulate, chosen.network or DEFAULT_LINK)
    check_machine(machine, workers.names, chosen.simulate)
    return Stopwatch(machine, pace=chosen.pace, keep=chosen.trace is not None)


def patient(chosen: argparse.Namespace, fleet: FleetOptions) -> FleetOptions:
    """With --pace workers may sleep for as long as the model computes: that is no stall."""
    return replace(fleet, stall_timeout_s=math.inf) if chosen.pace else fleet


def write_run_trace(chosen: argparse.Namespace, stopwatch: Stopwatch | None, workers: Topology) -> None:
    """With --trace: write it. Raises InputError when the file cannot be written."""
    if chosen.trace is None or stopwatch is None:
        return
    from coordinator.report.run_trace import run_trace
    from coordinator.report.trace import write_trace

    write_trace(Path(chosen.trace), run_trace(workers.names, stopwatch.taken))
