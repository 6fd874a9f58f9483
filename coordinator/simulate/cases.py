"""From a published row to something that can be predicted: which devices, which model, which way of splitting it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from coordinator.simulate.known import anchored, find_spec
from coordinator.simulate.law import Spec
from coordinator.simulate.models import Workload, workload_of
from coordinator.simulate.published import Row, Test, test_of
from protocol.errors import InputError

CLASS_OF: Final = {
    "nv": "nvidia", "nvidia": "nvidia", "nvold": "nvidia-old", "amd": "amd", "amdvk": "amd", "apple": "apple",
    "intel": "intel", "cpu": "cpu",
}  # fmt: skip
"""The table's classes."""

SLOW_HOST_S: Final = 1e-3
"""What a Raspberry Pi as the host adds to a token (rows G60 to G65 against G01 to G10: 0.9 to 1.3 ms)."""

USUAL_CPU_FLOPS: Final = 1e12
"""The peak of a processor of which nothing but its memory is known."""

MODES: Final = ("one", "layers", "rows", "offload", "rpc")


@dataclass(frozen=True, slots=True)
class Case:
    """A row with everything a prediction needs.

    `specs` are the devices in order, `share` of the layers that lie on them (the rest on the host's CPU), `remote`
    how many of them are reached over RPC, `extra_s` what the host adds to an evaluation.
    """

    row: Row
    test: Test
    load: Workload
    specs: tuple[Spec, ...]
    mode: str
    share: float = 1.0
    remote: int = 0
    flash: bool = False
    extra_s: float = 0.0


def case_of(row: Row) -> Case:
    """What a row is about. Raises InputError that says why it cannot be predicted."""
    if "mmproj" in row.quant.lower() or "vit" in row.model.lower().split():
        raise InputError("image encoders: the published rows support no law better than a factor of 2 to 3")
    test = test_of(row)
    load = workload_of(row.model, row.params, row.file_nbytes, row.quant)
    split = row.split.lower()
    mode, share = "one", 1.0
    layers = re.search(r"ngl\s*=?\s*(\d+)(?:\s*/\s*(\d+))?", split)
    specs = _specs(row, unknown="rpc" not in split and layers is not None)
    if "rpc" in split:
        mode = "rpc"
    elif "row" in split and row.n_devices > 1:
        mode = "rows"
    elif layers is not None:
        total = int(layers[2]) if layers[2] else load.layers + 1
        share = min(1.0, int(layers[1]) / max(1, total))
        mode = "offload"
    elif row.n_devices > 1 or len(specs) > 1:
        mode = "layers"
    _check_units(specs)
    if mode == "rpc" or load.experts:
        specs = tuple(anchored(spec, row.model, row.quant) for spec in specs)
    slow = row.group == "pihost" or "host = raspberry" in row.notes.lower()
    return Case(row, test, load, specs, mode, share, _remote(row, mode), _flash(row), SLOW_HOST_S if slow else 0.0)


def _check_units(specs: tuple[Spec, ...]) -> None:
    for spec in specs:
        if spec.units <= 0 and spec.cls != "cpu":
            raise InputError(f"hardware {spec.name!r} is not known, and the row has no peak_fp16_tflops for it")


def _flash(row: Row) -> bool:
    """Whether the row's notes say so; of a table whose "CUDA rows" have it, other rows have not."""
    said = re.search(r"(cuda rows )?\bfa\s*=\s*(1|on|yes)", row.notes.lower())
    return said is not None and (not said[1] or row.cls.startswith("nv"))


def _remote(row: Row, mode: str) -> int:
    """Devices behind RPC: all but the first, or all where the row says so or the client only serves."""
    if mode != "rpc":
        return 0
    split = row.split.lower().strip()
    everything = "all remote" in split or split == "rpc" or "client" in row.hardware.lower()
    return row.n_devices if everything else row.n_devices - 1


def _specs(row: Row, *, unknown: bool) -> tuple[Spec, ...]:
    """The devices of a row: by name, else by its columns; none where they may be `unknown`."""
    name = re.sub(r"^\d+\s*x\s+|\s*\(\d+x.*?\)", "", row.hardware)
    names = [part.strip() for part in name.split(" + ")] if " + " in name and "client" not in name else [name]
    names = [part for part in names if part.upper() != "CPU"] or [name]
    try:
        found = [_spec(part.removesuffix("+ Mac client").strip(), row, alone=len(names) == 1) for part in names]
    except InputError:
        if unknown:  # what is known of such a machine are its own rows
            return ()
        raise
    return tuple(found) if len(found) > 1 else (found[0],) * max(1, row.n_devices if row.split != "ngl=all" else 1)


def _spec(name: str, row: Row, *, alone: bool) -> Spec:
    cls = CLASS_OF.get(row.cls, "")
    spec = find_spec(name, cls) or (find_spec(name) if not cls else None)
    if spec is None:
        if not (alone and row.bandwidth and cls):
            spec = _guess(name, cls)
        else:
            flops = row.flops or (USUAL_CPU_FLOPS if cls == "cpu" else 0.0)
            spec = Spec(name, cls, row.bandwidth, flops, tags=(row.arch,) if row.arch else ())
    if "vulkan" in row.group or row.cls.endswith("vk"):
        spec = replace(spec, tags=(*spec.tags, "vulkan"))
    watts = re.search(r"(?:power|limit|cap|tdp)\D{0,20}(\d{2,4})\s*w\b", row.notes.lower())
    return replace(spec, watts=float(watts[1])) if watts and cls.startswith("nvidia") else spec


def _guess(name: str, cls: str) -> Spec:
    """A processor whose memory is part of its name."""
    memory = re.search(r"(?:(\d+)\s*ch\w*\s+)?(?:lp)?ddr\d\w?-(\d{4,5})", name.lower())
    if memory is None:
        raise InputError(f"hardware {name!r} is not known, and the row has no bandwidth and class for it")
    return Spec(name, cls or "cpu", int(memory[1] or 2) * 8 * float(memory[2]) * 1e6, flops=USUAL_CPU_FLOPS, sm=8)
