"""`crossdock bench`: rates of prompts, decoding and images, for every combination of workers and placement."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from coordinator.cli import options
from coordinator.cli.bench_measure import Wishes, measure
from coordinator.config import Topology, parse_workers
from coordinator.model.gguf_file import ModelFile, open_model
from coordinator.model.hparams import ModelParams
from coordinator.model.params import read_params
from coordinator.report import bench as report
from coordinator.report.text import notes, watched
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.session import KV_PADDING, Session, SessionOptions
from coordinator.schedule.placement import PlacementOptions
from protocol.dtypes import dtype_of
from protocol.errors import Exit, UsageError


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What is measured when nothing is said."""

    workers: tuple[str, ...]
    threads: tuple[int, ...]
    layers: tuple[str, ...]
    ubatches: tuple[int, ...]
    prompts: tuple[int, ...]
    tokens: tuple[int, ...]
    repetitions: int


_DEFAULTS = {
    "rates": _Defaults(("cpu:1",), (1,), ("all",), (512,), (512,), (128,), 5),
    "scaling": _Defaults(
        ("cpu:1", "cpu:1,accel:1", "cpu:1,accel:2"), (1, 2), ("half", "all"), (128, 512), (256,), (32,), 3
    ),
}


def bench(chosen: argparse.Namespace) -> int:
    """Measure, and print one table, Markdown or JSON to stdout. Raises UsageError for tests that cannot be run."""
    if chosen.simulate is not None:
        return _simulated(chosen)
    for option, given in (("--no-real", chosen.no_real), ("--network", chosen.network), ("--stages", chosen.stages),
                          ("--requests", chosen.requests)):  # fmt: skip
        if given:
            raise UsageError(f"{option} goes with --simulate: crossdock bench scaling --simulate")
    console, defaults = notes(), _DEFAULTS[chosen.what]
    scaling = chosen.what == "scaling"
    if chosen.plot and not scaling:
        raise UsageError("--plot draws scaling: crossdock bench scaling --plot FILE")
    if chosen.plot:
        from coordinator.cli.bench_plot import check_plot

        check_plot(Path(chosen.plot))
    model = open_model(options.weights_path(chosen))
    params = read_params(model)
    wishes = _wishes(chosen, defaults, params)
    subject = report.Subject.of(model, params)
    points: list[report.Point] = []
    with _progress(console) as progress:
        for point in _points(chosen, defaults, model, params, wishes, progress):
            points.append(point)
    _print(chosen, console, subject, points, scaling)
    if chosen.plot:
        from coordinator.cli.bench_plot import plot

        plot(Path(chosen.plot), subject, points)
    return Exit.OK


def _simulated(chosen: argparse.Namespace) -> int:
    """Real and simulated scaling on the same axes."""
    from coordinator.cli.bench_scale import bench_scale  # models of hardware, which measuring does without

    with _progress(notes()) as progress:
        return bench_scale(chosen, progress)


def _wishes(chosen: argparse.Namespace, defaults: _Defaults, params: ModelParams) -> Wishes:
    """The tests. Defaults shrink to the model's context; what was asked for does not."""
    limit = params.text.n_ctx_train
    prompts = chosen.n_prompt if chosen.n_prompt is not None else tuple(min(n, limit) for n in defaults.prompts)
    tokens = chosen.n_gen if chosen.n_gen is not None else tuple(min(n, limit - 1) for n in defaults.tokens)
    wishes = Wishes(
        prompts, tokens, params.vision is not None and not chosen.no_image,
        chosen.repetitions or defaults.repetitions,
    )  # fmt: skip
    if wishes.n_ctx > limit:
        raise UsageError(f"tests of {wishes.n_ctx} tokens: the model was trained for at most {limit}")
    if not (any(prompts) or any(tokens) or wishes.image):
        raise UsageError("nothing to measure: give --n-prompt or --n-gen")
    return wishes


def _points(
    chosen: argparse.Namespace,
    defaults: _Defaults,
    model: ModelFile,
    params: ModelParams,
    wishes: Wishes,
    progress: Callable[[str], None],
) -> Iterator[report.Point]:
    """One fleet per workers and threads, one session per layers and micro-batch."""
    fleets = [
        (text, parse_workers(text, threads), threads)
        for text in chosen.workers or defaults.workers
        for threads in chosen.threads or defaults.threads
    ]
    _check_layers(chosen, params.text.n_layer, any(len(topology.workers) > 1 for _, topology, _ in fleets))
    for text, topology, threads in fleets:
        sessions = _sessions(chosen, defaults, model, params, topology, wishes)
        with Fleet(topology, FleetOptions(chosen.transport, arithmetic=chosen.arithmetic)) as fleet:
            fleet.start()
            progress(f"{text}: starting workers")
            fleet.handshake()
            for layers, ubatch, session in sessions:
                where = f"{text} -t {threads} -ngl {layers} -ub {ubatch}: "
                session.open(fleet)
                tests = measure(session, wishes, lambda test, where=where: progress(where + test))  # type: ignore[misc]
                session.close()
                yield report.Point(report.Setting(text, len(topology.workers), threads, layers, ubatch), tests)


def _sessions(
    chosen: argparse.Namespace,
    defaults: _Defaults,
    model: ModelFile,
    params: ModelParams,
    topology: Topology,
    wishes: Wishes,
) -> Iterator[tuple[str, int, Session]]:
    """Sessions of a fleet; without accelerators there is one placement only."""
    alone = len(topology.workers) == 1
    n_ctx = min(params.text.n_ctx_train, -(-wishes.n_ctx // KV_PADDING) * KV_PADDING)
    for layers in ("-",) if alone else (chosen.n_gpu_layers or defaults.layers):
        for ubatch in chosen.ubatch or defaults.ubatches:
            placement = PlacementOptions(_layer_count(layers, params.text.n_layer))
            made = SessionOptions(placement, n_ctx, ubatch, dtype_of(chosen.kv_type))
            yield layers, ubatch, Session(model, params, topology, made, n_images=int(wishes.image))


def _check_layers(chosen: argparse.Namespace, n_layer: int, accelerators: bool) -> None:
    """Before the first of many measurements. Raises UsageError for numbers of layers that no setting can have."""
    if chosen.n_gpu_layers and not accelerators:
        raise UsageError(f"--n-gpu-layers {','.join(chosen.n_gpu_layers)}: there is no accelerator among the workers")
    for layers in chosen.n_gpu_layers or ():
        count = _layer_count(layers, n_layer)
        if count is not None and count > n_layer + 1:
            raise UsageError(
                f"--n-gpu-layers {layers}: the model has {n_layer} layers and an output: expected 0 to {n_layer + 1}"
            )


def _layer_count(text: str, n_layer: int) -> int | None:
    if text in ("-", "all"):
        return None
    return n_layer // 2 if text == "half" else int(text)


def _print(
    chosen: argparse.Namespace, console: Console, subject: report.Subject, points: list[report.Point], scaling: bool
) -> None:
    header, rows = report.scaling_rows(points) if scaling else report.rate_rows(points)
    if chosen.json:
        print(json.dumps(report.document(subject, points, scaling)))
        return
    console.print(f"[bold]model[/]     {subject.line()}")
    load = ", ".join(f"{x:g}" for x in report.machine()["load"])
    console.print(f"[bold]load[/]      {load} over 1, 5 and 15 minutes, this run included")
    if chosen.markdown:
        print(report.markdown(header, rows))
        return
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, soft_wrap=True, width=width).print(report.table(header, rows))


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """A line that says what is being measured, on terminals only."""
    if not watched():
        yield lambda _: None
        return
    with console.status("reading") as status:
        yield status.update
