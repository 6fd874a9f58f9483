"""`crossdock calibrate`: measure this machine's workers, and write the model of hardware that describes them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from coordinator.cli.calibrate_measure import (
    QUICK,
    Effort,
    Progress,
    Raw,
    Steps,
    fit_steps,
    measure_ops,
    measure_steps,
    middle_noise,
    samples_of,
)
from coordinator.cli.calibrate_rig import Rig
from coordinator.config import Topology, parse_workers
from coordinator.report.bench import machine
from coordinator.report.text import notes, watched
from coordinator.runtime.session import devices_of
from coordinator.simulate.calibrate_cases import Room
from coordinator.simulate.calibrate_fit import Sample, errors, fit_costs
from coordinator.simulate.calibrate_write import Calibration, Link, network_text, system_text
from coordinator.simulate.hardware import Cost
from coordinator.simulate.work import OUTPUT
from protocol.errors import UsageError

CHAIN: Final = "cpu:1,accel:2"
"""The workers on which steps and transfers are measured."""
USUAL_CACHE: Final = 32 << 20
NOISY: Final = 0.15
"""Above this the machine is said to be busy."""


def calibrate(chosen: argparse.Namespace) -> int:
    """Measure, fit, write two files, and say what was found."""
    output = Path(chosen.output)
    if not output.resolve().parent.is_dir():
        raise UsageError(f"--output {output}: no such folder")
    topology = parse_workers(chosen.workers or CHAIN, chosen.threads)
    if any(spec.kind == "null" for spec in topology.workers):
        raise UsageError(f"--workers {chosen.workers}: null workers compute nothing that could be measured")
    with notes().status("starting workers") if watched() else nullcontext() as status:
        progress: Progress = status.update if status is not None else lambda _: None
        effort = QUICK if chosen.quick else Effort()
        found = fitted(measured(chosen.threads, effort, progress), chosen.threads, effort)
    files = write(output, topology, found)
    _say(Console(highlight=False, soft_wrap=True), found, files)
    return 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one calibration found: samples and costs of ops, steps with shared memory and with messages."""

    samples: list[Sample]
    costs: dict[str, Cost]
    noise: float
    shared: Steps
    messages: Steps
    threads: int
    cache: int


def room_of() -> Room:
    """Memory for weights of ops that are to miss the cache."""
    return Room(Rig.ARENA, 3 * cache_nbytes())


def measured(threads: int, effort: Effort, progress: Progress) -> Raw:
    """Measure everything with workers of `threads` threads. Raises what workers fail with."""
    chain = parse_workers(CHAIN, threads)
    ops = measure_ops(chain, room_of(), effort, progress)
    steps = measure_steps(chain, effort, progress)
    return Raw(ops, steps, measure_steps(chain, effort, progress, "message"))


def fitted(raw: Raw, threads: int, effort: Effort, room: Room | None = None) -> Measured:
    """What follows from the samples, which were taken with `room_of()` or another room."""
    samples = samples_of(room or room_of(), effort, raw.ops)
    shared, messages = fit_steps(raw.steps), fit_steps(raw.messages)
    costs = fit_costs(samples) | {OUTPUT: Cost(byte_s=shared.output_byte_s)}
    return Measured(samples, costs, middle_noise(raw.ops), shared, messages, threads, cache_nbytes())


def write(output: Path, topology: Topology, found: Measured) -> tuple[Path, Path, Path]:
    """The system and two networks, shared memory and messages; where they are. Raises UsageError."""
    files = (output, _beside(output, "network"), _beside(output, "messages"))
    about = _about(found)
    devices = devices_of(topology)
    workers = [
        (spec.name, not device.is_host, device.alignment, spec.memory or 0)
        for spec, device in zip(topology.workers, devices, strict=True)
    ]
    links = (
        Link("shared", found.shared.hop_s, found.shared.byte_s, found.shared.further_s),
        Link("message", found.messages.hop_s, found.messages.byte_s, found.messages.further_s),
    )
    texts = [system_text(_calibration(found, about), workers), *(network_text(about, link) for link in links)]
    for file, text in zip(files, texts, strict=True):
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output {file}: {error.strerror}") from None
    return files


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.stem}-{what}{output.suffix}")


def _calibration(found: Measured, about: Sequence[str]) -> Calibration:
    copies = [s for s in found.samples if s.work.op == "CONT"]
    rate = max((s.work.read_nbytes + s.work.write_nbytes) / s.seconds for s in copies)
    flops = max(s.work.flops / s.seconds for s in found.samples if s.work.kind == "matmat")
    steps = found.shared
    step, further, split = steps.missed
    return Calibration(
        tuple(about), found.costs, steps.step_s, (further, step), (steps.split_s, split),
        found.cache, rate, flops,
    )  # fmt: skip


def _about(found: Measured) -> tuple[str, ...]:
    facts = machine()
    load = ", ".join(f"{x:g}" for x in facts["load"])
    return (
        f"Written by crossdock calibrate on {facts['system']}, {facts['machine']}, {facts['processors']} processors.",
        f"Workers of {found.threads} thread{'s' * (found.threads > 1)}; load {load} over 1, 5 and 15 minutes.",
        f"The middle sample took {found.noise:.0%} longer than an undisturbed one (operations), "
        f"{found.shared.noise:.0%} (steps).",
    )


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
        f"[bold]step[/]        {steps.step_s * 1e6:.0f} us, each further worker {steps.further_s * 1e6:.0f} us, "
        f"each split {steps.split_s * 1e6:.0f} us"
    )
    for name, of in (("hop", found.shared), ("as message", found.messages)):
        console.print(f"[bold]{name:11}[/] {of.hop_s * 1e6:.0f} us, then {1e-9 / of.byte_s:.3g} GB/s")
    busy = " (busy: repeat it when the machine is quiet)" if max(found.noise, steps.noise) > NOISY else ""
    console.print(
        f"[bold]noise[/]       the middle sample took {found.noise:.0%} longer than an undisturbed one, "
        f"{steps.noise:.0%} in steps{busy}"
    )
    console.print(f"[bold]written[/]     {', '.join(map(str, files))}")
    console.print(f"[bold]next[/]        crossdock simulate --system {files[0]} --network {files[1]}")
