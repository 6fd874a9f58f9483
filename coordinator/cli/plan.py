"""`crossdock plan`: what would run where, without workers, weights or images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from coordinator.cli import options
from coordinator.cli.documents import from_document, print_json
from coordinator.cli.plan_arguments import add_plan, device_fields
from coordinator.cli.values import Parser
from coordinator.config import parse_size
from coordinator.model.presets import Blueprint
from coordinator.ownership.leases import check_plan_leases
from coordinator.report import memory_map
from coordinator.report import plan as report
from coordinator.report.plan_draw import draw_dot, draw_mermaid
from coordinator.report.plan_json import diff_document, dump_stage, fit_document, outline_document, planned_result
from coordinator.report.text import plain
from coordinator.schedule.check import check_plan
from coordinator.schedule.devices import buft_name
from coordinator.schedule.diff import diff
from coordinator.schedule.fit import fit
from coordinator.schedule.outline import Outline, Setting, plan_entries, plan_model
from coordinator.schedule.plan import ACCEL_ALIGNMENT, HOST_ALIGNMENT, Device
from protocol.dtypes import dtype_of
from protocol.errors import Exit, UsageError
from protocol.ops import Op

OFFLOAD_BATCH = 32
"""Rows from which a GPU takes an op whose weights lie in host memory (CUDA's rule)."""


def plan(chosen: argparse.Namespace) -> int:
    """Plan and show it. Exits with CAPACITY when a device is too small for the plan."""
    _check_questions(chosen)
    if chosen.graph is not None:
        return _plan_document(chosen)
    blueprint = options.blueprint(chosen)
    if chosen.fit:
        return _show_fit(chosen, blueprint)
    outline = plan_model(blueprint, setting_of(chosen))
    _check(chosen, outline)
    if chosen.diff is not None:
        other = _other(chosen)
        after = plan_model(options.blueprint(other), setting_of(other))
        _check(chosen, after)
        return _show_diff(chosen, outline, after)
    return _show(chosen, outline, blueprint)


def setting_of(chosen: argparse.Namespace) -> Setting:
    """Devices, placement, graphs. Raises UsageError."""
    devices, limits = _devices(chosen)
    return Setting(
        devices=devices,
        limits=limits,
        placement=options.placement_options(chosen),
        dialect=chosen.dialect,
        phases=chosen.phase,
        n_images=options.n_images(chosen),
        n_tokens=chosen.ubatch,
        n_ctx=chosen.ctx_size,
        n_kv=chosen.kv,
        n_outputs=chosen.outputs,
        kv_dtype=dtype_of(chosen.kv_type),
        debug=tuple(chosen.debug_tensor),
        share_scheduler=chosen.share_scheduler,
        op_offload=chosen.op_offload,
        parallel=chosen.parallel,
    )


def _devices(chosen: argparse.Namespace) -> tuple[tuple[Device, ...], tuple[int | None, ...]]:
    """The devices in priority order with their limits, the host last. Raises UsageError."""
    if not chosen.device:
        from coordinator.runtime.session import devices_of  # processes and sockets, which a plan does without

        given = argparse.Namespace(topology=chosen.topology, workers=chosen.workers, threads=None)
        topology = options.topology(given)
        return devices_of(topology), tuple(spec.memory for spec in topology.workers)
    if chosen.workers is not None or chosen.topology is not None:
        raise UsageError("--device goes without --workers and --topology")
    texts = [("--device", text) for text in chosen.device] + [("--host", chosen.host)]
    described = [_device(text, option) for option, text in texts]
    names = [device.name for device, _ in described]
    if len(set(names)) < len(names):
        raise UsageError(f"--device: two devices have the same name: {', '.join(names)}")
    known = list(dict.fromkeys(buft_name(device) for device, _ in described))
    for (option, text), (device, _) in zip(texts, described, strict=True):
        for buft in device.extra_bufts:
            if buft not in known:
                raise UsageError(f"{option} {text}: reads={buft}: no device has that: expected of {', '.join(known)}")
    return tuple(device for device, _ in described), tuple(limit for _, limit in described)


def _device(text: str, option: str) -> tuple[Device, int | None]:
    name, limit, keys = device_fields(text, option)
    where, host = f"{option} {text}", option == "--host"
    kind = keys.get("type", "cpu" if host else "gpu")
    if (kind == "cpu") != host:
        raise UsageError(f"{where}: type={kind}: " + ("the host is a cpu" if host else "a cpu is described by --host"))
    offload = keys.get("offload", "all" if kind == "gpu" else "none")
    device = Device(
        name,
        kind=kind,
        buft=keys.get("buft") or name,
        alignment=parse_count(keys.get("align"), HOST_ALIGNMENT if host else ACCEL_ALIGNMENT, f"{where}: align"),
        max_size=parse_size(keys["max"], f"{where}: max") if "max" in keys else None,
        is_host=host,
        extra_bufts=tuple(filter(None, keys.get("reads", "").split("+"))),
        unsupported_ops=_ops(keys.get("unsupported", ""), f"{where}: unsupported"),
        offload_ops=_ops(offload, f"{where}: offload"),
        offload_min_batch=parse_count(keys.get("batch"), OFFLOAD_BATCH, f"{where}: batch"),
    )
    return device, limit


def _ops(text: str, where: str) -> frozenset[str]:
    if text in ("", "none"):
        return frozenset()
    names = frozenset(Op.__members__ if text == "all" else text.split("+"))
    for name in sorted(names):
        if name not in Op.__members__:
            raise UsageError(f"{where}={text}: {name!r} is no op: ggml's names are meant, such as MUL_MAT+UNPAD")
    return names


def parse_count(text: str | None, default: int, where: str) -> int:
    """A number of a device's key. Raises UsageError."""
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise UsageError(f"{where}={text}: expected a number")
    return int(text)


def _check_questions(chosen: argparse.Namespace) -> None:
    """Refuse combinations that would leave an option without effect. Raises UsageError."""
    if chosen.json and chosen.format not in ("text", "json"):
        raise UsageError(f"--json and --format {chosen.format} are two answers: choose one")
    if chosen.json:
        chosen.format = "json"
    if chosen.quiet and chosen.why:
        raise UsageError("--quiet and --why are two answers: choose one")
    asked = [name for name in ("dump", "fit", "diff") if getattr(chosen, name)]
    if len(asked) > 1 or (chosen.diff is not None and not chosen.diff):
        if len(asked) > 1:
            raise UsageError(f"--{asked[0]} and --{asked[1]} are two answers: choose one")
        raise UsageError("--diff: name what is different, such as --diff --n-gpu-layers 36")
    if chosen.format in ("dot", "mermaid") and asked:
        raise UsageError(f"--{asked[0]} has no drawing: expected --format text or json")
    if chosen.memory_map is not None:
        if chosen.fit or chosen.diff or chosen.dump:
            raise UsageError(f"--memory-map and --{asked[0]} are two answers: choose one")
        memory_map.check_map(Path(chosen.memory_map))
    if chosen.graph is not None and (chosen.model is not None or chosen.fit or chosen.diff):
        what = "MODEL" if chosen.model is not None else "--fit" if chosen.fit else "--diff"
        raise UsageError(f"--graph {chosen.graph} and {what} do not go together: the document says everything")


class _OptionsOnly(Parser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"--diff: {message}")


def _other(chosen: argparse.Namespace) -> argparse.Namespace:
    """The arguments of the second plan: those of the first, but for what stands after --diff."""
    parser = _OptionsOnly(prog="crossdock plan --diff", add_help=False)
    add_plan(parser)
    first = vars(chosen)
    given = parser.parse_args(chosen.diff, argparse.Namespace(**dict.fromkeys(first)))
    if given.diff is not None or given.dump or given.fit or given.graph:
        raise UsageError("--diff: expected options of a plan after it: devices, layers, graphs")
    if given.json or given.format is not None:
        chosen.format = "json" if given.json else given.format
    changed = {name: value for name, value in vars(given).items() if value is not None}
    if "-ngl" in chosen.diff or "--n-gpu-layers" in chosen.diff:
        changed["n_gpu_layers"] = given.n_gpu_layers  # None stands for all of them
    if "--outputs" in chosen.diff:
        changed["outputs"] = given.outputs
    return argparse.Namespace(**first | changed)


def _show(chosen: argparse.Namespace, outline: Outline, blueprint: Blueprint | None) -> int:
    status = Exit.CAPACITY if any(memory.short for memory in outline.memory) else Exit.OK
    map_line = _draw_map(chosen, outline)
    if chosen.dump is not None:
        print_json(dump_stage(outline, chosen.dump))
    elif chosen.format == "json":
        print_json(outline_document(outline, None if blueprint is None else blueprint.params))
    elif chosen.format == "dot":
        print(draw_dot(outline))
    elif chosen.format == "mermaid":
        print(draw_mermaid(outline))
    else:
        with report.answer() as console:
            if blueprint is not None:
                console.print(f"[bold]model[/]     {report.model_line(blueprint.params, blueprint.weights)}")
            report.print_outline(console, outline, "none" if chosen.quiet else "all" if chosen.why else "some")
            if map_line:
                console.print()
                console.print(f"[bold]map[/]       {plain(map_line)}")
            if not chosen.quiet:
                console.print()
                console.print(report.next_line(outline, chosen.n_gpu_layers, chosen.why))
    return status


def _draw_map(chosen: argparse.Namespace, outline: Outline) -> str:
    """With --memory-map: draw it, and what it shows in a line."""
    if chosen.memory_map is None:
        return ""
    path = Path(chosen.memory_map)
    apart = not chosen.share_scheduler and outline.graphs[0].name == "vision"
    return memory_map.map_line(path, memory_map.draw_memory_map(path, outline, apart=apart))


def _show_fit(chosen: argparse.Namespace, blueprint: Blueprint) -> int:
    found = fit(blueprint, setting_of(chosen))
    _check(chosen, found.outline)
    if chosen.format == "json":
        print_json(fit_document(found, blueprint.params))
        return Exit.OK
    with report.answer() as console:
        console.print(f"[bold]model[/]     {report.model_line(blueprint.params, blueprint.weights)}")
        console.print(report.fit_line(found))
        console.print()
        report.print_fit(console, found)
    return Exit.OK


def _show_diff(chosen: argparse.Namespace, before: Outline, after: Outline) -> int:
    difference = diff(before, after)
    if chosen.format == "json":
        print_json(diff_document(difference))
        return Exit.OK
    with report.answer() as console:
        console.print(f"[bold]diff[/]      {' '.join(chosen.diff)}")
        console.print()
        report.print_diff(console, difference)
    return Exit.OK


def _plan_document(chosen: argparse.Namespace) -> int:
    """Plan the graphs of a document. Raises PlanError with one line for a bad one."""
    document, outline = from_document(chosen.graph, plan_entries)
    _check(chosen, outline)
    if chosen.format == "json" and chosen.dump is None:
        pairs = zip(outline.graphs, document.entries, strict=True)
        print_json([planned_result(graph, entry.ids) for graph, entry in pairs])
        return Exit.OK
    return _show(chosen, outline, None)


def _check(chosen: argparse.Namespace, *outlines: Outline) -> None:
    """With --check: prove each plan another way, and a model's programs too. Raises PlanError."""
    for outline in outlines if chosen.check else ():
        for graph in outline.graphs:
            if graph.plan is not None:
                check_plan(graph.plan)
                if _runs_on_workers(outline):
                    check_plan_leases(graph.plan)


def _runs_on_workers(outline: Outline) -> bool:
    """True for a model on devices of which each has memory of its own, and is one worker."""
    bufts = {buft_name(device) for device in outline.devices}
    apart = len(bufts) == len(outline.devices) and not any(device.extra_bufts for device in outline.devices)
    return apart and not outline.parallel and outline.placement is not None
