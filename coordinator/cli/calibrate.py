"""`crossdock calibrate`: measure this machine's workers, and write the model of hardware that describes them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from rich.console import Console

from coordinator.cli.calibrate_measure import (
    QUICK,
    SWEEP_NBYTES,
    Chains,
    Effort,
    Operations,
    Progress,
    Raw,
    Steps,
    fit_steps,
    middle_noise,
    mixtures_of,
    samples_of,
)
from coordinator.cli.calibrate_rig import Rig
from coordinator.config import Topology, parse_workers
from coordinator.report.bench import machine
from coordinator.report.text import notes, watched
from coordinator.runtime.session import devices_of
from coordinator.simulate.calibrate_fit import Sample, errors, fit_costs, fit_mixed
from coordinator.simulate.calibrate_room import Room
from coordinator.simulate.calibrate_write import Calibration, Link, network_text, system_text
from coordinator.simulate.hardware import CACHES_SWEPT, Cost, Toll
from coordinator.simulate.work import DIGEST, OUTPUT
from protocol.errors import UsageError

CHAIN: Final = "cpu:1,accel:2"
"""The workers on which steps and transfers are measured."""
USUAL_CACHE: Final = 32 << 20
NOISY: Final = 0.15
"""Above this the machine is said to be busy."""


def calibrate(chosen: argparse.Namespace) -> int:
    """Measure, fit, write two files, and say what was found."""
    output = Path(chosen.output)
    _check_places(output)
    topology = parse_workers(chosen.workers or CHAIN, chosen.threads)
    if any(spec.kind == "null" for spec in topology.workers):
        raise UsageError(f"--workers {chosen.workers}: null workers compute nothing that could be measured")
    with notes().status("starting workers") if watched() else nullcontext() as status:
        progress: Progress = status.update if status is not None else lambda _: None
        effort = QUICK if chosen.quick else Effort()
        with Calibrator(chosen.threads, quick=effort.quick) as calibrator:
            found = fitted(calibrator.measure(effort, progress), chosen.threads, effort)
    files = write(output, topology, found)
    _say(Console(highlight=False, soft_wrap=True), found, files)
    return 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one calibration found: samples and costs of ops, steps with shared memory and with messages."""

    samples: list[Sample]
    costs: dict[str, Cost]
    mixed: Toll
    noise: float
    shared: Steps
    messages: Steps
    threads: int
    cache: int


def room_of() -> Room:
    """Memory for weights of ops that are to miss the cache."""
    return Room(Rig.ARENA, CACHES_SWEPT * cache_nbytes())


class Calibrator:
    """Idle workers of `threads` threads that hold all that is measured. Use as a context manager.

    Without `messages` bytes in messages are taken to cost what they cost in shared memory. Raises what workers fail
    with.
    """

    def __init__(self, threads: int, *, quick: bool, messages: bool = True) -> None:
        chain = parse_workers(CHAIN, threads)
        self.operations = Operations(chain, room_of(), quick=quick)
        self._shared = Chains(chain, room_of(), at_once=n_processors() // threads)
        self._messages = Chains(chain, Room(Rig.ARENA, SWEEP_NBYTES), "message") if messages else None
        self._stack = ExitStack()

    def __enter__(self) -> Calibrator:
        with ExitStack() as stack:
            for part in (self.operations, self._shared, self._messages):
                if part is not None:
                    stack.enter_context(part)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, tb)

    def measure(self, effort: Effort, progress: Progress) -> Raw:
        """Samples of everything."""
        ops = self.operations.measure(effort.op_rounds, progress)
        steps = self._shared.measure(effort.step_rounds, progress)
        messages = steps if self._messages is None else self._messages.measure(effort.step_rounds, progress)
        return Raw(ops, steps, {name: list(seconds) for name, seconds in messages.items()})


def fitted(raw: Raw, threads: int, effort: Effort, room: Room | None = None) -> Measured:
    """What follows from the samples, which were taken with `room_of()` or another room."""
    room = room or room_of()
    samples = samples_of(room, effort, raw.ops)
    costs = fit_costs(samples)
    first = fit_steps(raw.steps, costs, far=room).first
    mixed = fit_mixed(mixtures_of(room, raw.ops, first.base_s), costs, samples)
    shared, messages = (fit_steps(of, costs, mixed, far=room) for of in (raw.steps, raw.messages))
    costs[OUTPUT] = Cost(byte_s=shared.output_byte_s)
    costs[DIGEST] = Cost(shared.digest_s, byte_s=shared.digest_byte_s)
    return Measured(samples, costs, mixed, middle_noise(raw.ops), shared, messages, threads, cache_nbytes())


def write(output: Path, topology: Topology, found: Measured) -> tuple[Path, Path, Path]:
    """The system and two networks, shared memory and messages; where they are. Raises UsageError."""
    files = _files(output)
    about = _about(found)
    devices = devices_of(topology)
    workers = [
        (spec.name, not device.is_host, device.alignment, spec.memory or 0)
        for spec, device in zip(topology.workers, devices, strict=True)
    ]
    links = (
        Link("shared", found.shared.wake, found.shared.each, found.shared.byte_s, found.shared.further),
        Link("message", found.messages.wake, found.messages.each, found.messages.byte_s, found.messages.further),
    )
    texts = [system_text(_calibration(found, about), workers), *(network_text(about, link) for link in links)]
    for file, text in zip(files, texts, strict=True):
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output {file}: {error.strerror}") from None
    return files


def _check_places(output: Path) -> None:
    """Raises UsageError for files that could not be written, some minutes before they would be."""
    if not output.resolve().parent.is_dir():
        raise UsageError(f"--output {output}: no such folder")
    if output.is_dir():
        raise UsageError(f"--output {output}: it is a folder, expected a file such as here.toml")
    for file in _files(output):
        if file.exists() and not file.is_file():
            raise UsageError(f"--output {file}: not a regular file")
        if not os.access(file if file.exists() else file.resolve().parent, os.W_OK):
            raise UsageError(f"--output {file}: cannot be written")


def _files(output: Path) -> tuple[Path, Path, Path]:
    """The system, and the networks over shared memory and over messages."""
    return output, _beside(output, "network"), _beside(output, "messages")


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.stem}-{what}{output.suffix}")


def _calibration(found: Measured, about: Sequence[str]) -> Calibration:
    copies = [s for s in found.samples if s.work.op == "CONT"]
    rate = max((s.work.read_nbytes + s.work.write_nbytes) / s.seconds for s in copies)
    flops = max(s.work.flops / s.seconds for s in found.samples if s.work.kind == "matmat")
    steps = found.shared
    return Calibration(
        tuple(about), found.costs, steps.step, steps.first, steps.split, found.mixed, found.cache, rate, flops,
        max(1.0, n_processors() / found.threads), steps.memory,
    )  # fmt: skip


def _about(found: Measured) -> tuple[str, ...]:
    facts = machine()
    load = ", ".join(f"{x:g}" for x in facts["load"])
    return (
        f"Written by crossdock calibrate on {facts['system']}, {facts['machine']}, {facts['processors']} processors.",
        f"Workers of {found.threads} thread{'s' * (found.threads > 1)}; load {load} over 1, 5 and 15 minutes.",
        f"The middle sample took {found.noise:.0%} longer than a typical one (operations), "
        f"{found.shared.noise:.0%} (steps).",
    )


def n_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_nbytes() -> int:
    """The last-level cache of the first processor as Linux tells it, elsewhere a usual one."""
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            text = index.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return min(max(sizes, default=USUAL_CACHE), 1 << 28)


def _say(console: Console, found: Measured, files: Sequence[Path]) -> None:
    steps = found.shared
    wrong = sorted(abs(error) for of_key in errors(found.samples, found.costs).values() for error in of_key)
    console.print(f"[bold]machine[/]     {machine()['machine']}, {machine()['processors']} processors")
    console.print(
        f"[bold]operations[/]  {len(found.samples)} cases, {len(found.costs)} kinds; the fit is within "
        f"{wrong[len(wrong) // 2]:.0%} for half of them, {wrong[int(0.9 * len(wrong))]:.0%} for nine in ten"
    )
    console.print(
        f"[bold]step[/]        {_us(steps.step)}, each further worker {_us(steps.further)}, its first run "
        f"{_us(steps.first)}, later ones {_us(steps.split)}, operations among others {found.mixed.base_s * 1e6:.2f} us"
    )
    for name, of in (("hop", found.shared), ("as message", found.messages)):
        console.print(
            f"[bold]{name:11}[/] {_us(of.wake)} to wake up, {_us(of.each)} for each transfer, "
            f"{1e-9 / of.byte_s:.3g} GB/s"
        )
    if steps.memory:
        console.print(f"[bold]memory[/]      {steps.memory / 1e9:.3g} GB/s for workers that read at once")
    busy = " (busy: repeat it when the machine is quiet)" if max(found.noise, steps.noise) > NOISY else ""
    console.print(
        f"[bold]noise[/]       the middle sample took {found.noise:.0%} longer than a typical one, "
        f"{steps.noise:.0%} in steps{busy}"
    )
    console.print(f"[bold]written[/]     {', '.join(map(str, files))}")
    console.print(f"[bold]next[/]        crossdock simulate --system {files[0]} --network {files[1]}")


def _us(toll: Toll) -> str:
    """Warm, and behind an emptied cache."""
    return f"{toll.base_s * 1e6:.0f} to {(toll.base_s + toll.missed_s) * 1e6:.0f} us"
