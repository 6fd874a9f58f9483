"""From parsed arguments to the options of sessions and fleets."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import coordinator
from coordinator.config import Topology, parse_workers, read_topology
from coordinator.model.presets import PRESETS, Blueprint, open_blueprint
from coordinator.runtime.fleet import FleetOptions
from coordinator.runtime.session import Ownership, SessionOptions
from coordinator.runtime.taps import compile_patterns
from coordinator.schedule.placement import PlacementOptions
from protocol.dtypes import dtype_of
from protocol.errors import UsageError

EXAMPLES = Path(coordinator.__file__).resolve().parent.parent / "examples"
DEMO_MODEL = EXAMPLES / "crossdock-demo.gguf"
DEMO_IMAGE = EXAMPLES / "images" / "tower.png"
DEFAULT_WORKERS = "cpu:1,accel:2"
EVERYTHING = ".*"
"""Looks at all tensors."""


def model_path(chosen: argparse.Namespace) -> Path:
    """The model file. Raises UsageError when none is named and none is bundled."""
    if chosen.model is not None:
        return Path(chosen.model)
    if not DEMO_MODEL.is_file():
        raise UsageError("no --model given, and this installation has no bundled one")
    return DEMO_MODEL


def weights_path(chosen: argparse.Namespace) -> Path:
    """The model file of a run, with weights in it. Raises UsageError for one that can only be planned."""
    path = model_path(chosen)
    if not path.exists() and str(path).lower() in PRESETS:
        raise UsageError(
            f"--model {path}: a preset has no weights to run with: expected a GGUF file (crossdock plan {path}, and "
            "simulate, do without)"
        )
    return path


def topology(chosen: argparse.Namespace) -> Topology:
    """The workers. Raises UsageError."""
    if chosen.topology is None:
        return parse_workers(DEFAULT_WORKERS if chosen.workers is None else chosen.workers, chosen.threads or 1)
    for option, given in (("--workers", chosen.workers), ("--threads", chosen.threads)):
        if given is not None:
            raise UsageError(f"{option} {given} does not go with --topology: the file says that of each worker")
    return read_topology(Path(chosen.topology))


def fleet_options(chosen: argparse.Namespace) -> FleetOptions:
    """How processes talk. Raises UsageError."""
    if chosen.port and chosen.transport != "tcp":
        raise UsageError(f"--port {chosen.port} goes with --transport tcp")
    if chosen.port > 65535:
        raise UsageError(f"--port {chosen.port}: expected 0 to 65535")
    if not chosen.stall_timeout > 0:
        raise UsageError(f"--stall-timeout {chosen.stall_timeout:g}: expected more than 0 s")
    return FleetOptions(
        chosen.transport, chosen.port, stall_timeout_s=chosen.stall_timeout, arithmetic=chosen.arithmetic
    )


def session_options(chosen: argparse.Namespace, taps: tuple[str, ...] = ()) -> SessionOptions:
    """Placement, context, debug tensors, and regular expressions for tensors to look at. Raises UsageError."""
    return SessionOptions(
        placement_options(chosen),
        chosen.ctx_size,
        chosen.ubatch,
        dtype_of(chosen.kv_type),
        chosen.share_scheduler,
        tuple(chosen.debug_tensor),
        Ownership(chosen.ownership),
        chosen.check,
        tuple(_named(text, "--pin", "TENSOR=WORKER") for text in chosen.pin),
        taps=compile_patterns(taps).texts,
    )


def blueprint(chosen: argparse.Namespace) -> Blueprint:
    """The model that is planned. Raises UsageError, also for images of a model that takes none, and ModelError."""
    found = open_blueprint(str(model_path(chosen)), chosen.weights_type)
    if chosen.images and found.params.vision is None:
        raise UsageError(
            f"--images {chosen.images}: {found.params.name} ({found.params.arch}) takes no images: expected 0, or no "
            "--images"
        )
    return found


def n_images(chosen: argparse.Namespace) -> int:
    """How many images are planned for, if the model takes images: 1 where nothing is said."""
    return 1 if chosen.images is None else int(chosen.images)


def placement_options(chosen: argparse.Namespace) -> PlacementOptions:
    """What lies where. Raises UsageError."""
    return PlacementOptions(
        chosen.n_gpu_layers,
        _proportions(chosen.tensor_split),
        tuple(_named(text, "--override-tensor", "REGEX=WORKER") for text in chosen.override_tensor),
        not chosen.no_kv_offload,
    )


def _proportions(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        parts = tuple(float(part) for part in text.split(","))
    except ValueError:
        parts = (math.nan,)
    if not all(map(math.isfinite, parts)):
        raise UsageError(f"--tensor-split {text}: expected numbers separated by commas")
    return parts


def _named(text: str, option: str, expected: str) -> tuple[str, str]:
    name, separator, device = text.rpartition("=")
    if not separator or not name:
        raise UsageError(f"{option} {text}: expected {expected}")
    return name, device
