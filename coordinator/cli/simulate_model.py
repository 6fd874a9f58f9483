"""`crossdock simulate MODEL`: how fast a model would be on modelled hardware, without weights or workers."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordinator.cli import options
from coordinator.cli.documents import print_json
from coordinator.model.presets import Blueprint
from coordinator.report import simulate as report
from coordinator.report.plan import answer, model_line
from coordinator.report.simulate_search import limit_lines, search_document, search_line
from coordinator.report.simulate_trace import simulated_trace
from coordinator.report.trace import write_trace
from coordinator.simulate.hardware import LinkModel
from coordinator.simulate.machine import Machine, make_machine
from coordinator.simulate.network import Network, links, load_network, uniform
from coordinator.simulate.predict import predict
from coordinator.simulate.search import search
from coordinator.simulate.series import Load, Options, make_series
from coordinator.simulate.sweep import parse_sweep, sweep
from coordinator.simulate.system import load_system, on_one_machine
from protocol.dtypes import dtype_of
from protocol.errors import Exit, UsageError


def simulate_model(chosen: argparse.Namespace) -> int:
    """Simulate and show it. Exits with CAPACITY when a device is too small for the model."""
    _check_questions(chosen)
    machine = machine_of(chosen.system, chosen.network)
    blueprint = options.blueprint(chosen)
    if chosen.sweep is not None:
        return _show_sweep(chosen, blueprint, machine)
    if chosen.search is not None:
        return _show_search(chosen, blueprint, machine)
    series = make_series(blueprint, machine, options_of(chosen), load_of(chosen))
    found = predict(series, seed=chosen.seed, check=chosen.check)
    if chosen.trace is not None:
        write_trace(Path(chosen.trace), simulated_trace(found))
    if chosen.json:
        print_json({"model": blueprint.params.name, **report.prediction_document(found)})
    else:
        with answer() as console:
            console.print(f"[bold]model[/]     {model_line(blueprint.params, blueprint.weights)}")
            report.print_prediction(console, found, quiet=chosen.quiet)
            if not chosen.quiet:
                console.print()
                console.print(report.next_line(found, chosen.trace is not None))
    return Exit.OK if found.fits else Exit.CAPACITY


def machine_of(system: str | None, network: str) -> Machine:
    """The machine of a system file, and a network file or one kind of link for all. Raises UsageError."""
    if system is None:
        raise UsageError("--system TOML is missing: the devices to simulate (examples/systems has some)")
    modelled = load_system(system_path(system))
    found = network_of(network)

    def link_of(source: str, target: str) -> LinkModel | None:
        try:
            return found.link(source, target)
        except UsageError:
            return None  # an error only if the plan sends something there

    return on_one_machine(make_machine(modelled.devices, link_of, found.capacity), modelled.pool)


def system_path(text: str) -> Path:
    """The file of a system. Raises UsageError with what to do when there is none."""
    path = Path(text)
    if not path.exists():
        raise UsageError(
            f"--system {text}: No such file; expected one as in examples/systems, whose devices may be presets that "
            "crossdock devices lists"
        )
    return path


def network_of(text: str) -> Network:
    """The links of a file, or one kind of link for all. Raises UsageError."""
    known = links()
    if text in known:
        return uniform(known[text])
    if not Path(text).exists():
        raise UsageError(f"--network {text}: no such file, and no kind of link: expected one of {', '.join(known)}")
    return load_network(Path(text))


def options_of(chosen: argparse.Namespace) -> Options:
    """Placement and context. Raises UsageError."""
    return Options(
        placement=options.placement_options(chosen),
        n_ctx=chosen.ctx_size,
        kv_dtype=dtype_of(chosen.kv_type),
        share_scheduler=chosen.share_scheduler,
        op_offload=chosen.op_offload,
        parallel=chosen.parallel,
    )


def load_of(chosen: argparse.Namespace) -> Load:
    """What the model is to do."""
    return Load(
        n_prompt=chosen.prompt,
        n_predict=chosen.predict,
        n_images=options.n_images(chosen),
        n_ubatch=chosen.ubatch,
        batch=chosen.batch,
        n_requests=chosen.requests,
    )


def _check_questions(chosen: argparse.Namespace) -> None:
    """Refuse combinations that would leave an option without effect. Raises UsageError."""
    asked = [name for name in ("sweep", "search", "trace") if getattr(chosen, name) is not None]
    if len(asked) > 1:
        raise UsageError(f"--{asked[0]} and --{asked[1]} are two answers: choose one")
    if chosen.plot is not None and chosen.sweep is None:
        raise UsageError(f"--plot {chosen.plot}: expected --sweep or --published with it")
    if chosen.splits:
        raise UsageError("--splits: expected --published with it")
    if chosen.search is not None and (chosen.n_gpu_layers is not None or chosen.tensor_split):
        raise UsageError("--search finds --n-gpu-layers and --tensor-split: leave them out")


def _show_sweep(chosen: argparse.Namespace, blueprint: Blueprint, machine: Machine) -> int:
    values = parse_sweep(chosen.sweep)
    points = list(sweep(blueprint, machine, options_of(chosen), load_of(chosen), values, seed=chosen.seed))
    if chosen.plot is not None:
        from coordinator.report.simulate_plot import plot_sweep  # matplotlib, which only plots need

        plot_sweep(Path(chosen.plot), values, points, blueprint.params.name)
    if chosen.json:
        print_json([report.point_document(point) for point in points])
        return Exit.OK
    with answer() as console:
        console.print(f"[bold]model[/]     {model_line(blueprint.params, blueprint.weights)}")
        console.print(f"[bold]machine[/]   {report.machine_line(machine)}")
        console.print()
        console.print(report.sweep_table(points))
    return Exit.OK


def _show_search(chosen: argparse.Namespace, blueprint: Blueprint, machine: Machine) -> int:
    found = search(blueprint, machine, options_of(chosen), load_of(chosen), chosen.search)
    if chosen.json:
        print_json(search_document(found))
        return Exit.OK
    with answer() as console:
        console.print(f"[bold]model[/]     {model_line(blueprint.params, blueprint.weights)}")
        console.print(f"[bold]best[/]      {search_line(found)}")
        for line in limit_lines(found):
            console.print(f"[bold]limit[/]     {line}")
        report.print_prediction(console, found.prediction, quiet=chosen.quiet)
    return Exit.OK
