"""What is known of devices and their classes: the data files in presets/, read once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from coordinator.simulate.hardware import CLASSES
from coordinator.simulate.law import Constants, Spec
from coordinator.simulate.tables import Table, only_keys, read_toml
from protocol.errors import UsageError

_BRANDS: Final = re.compile(r"nvidia|geforce|amd|radeon(?=\s+(rx|pro|instinct))|instinct|apple|intel")
_MEMORY: Final = re.compile(r"\b\d+\s*g(i?b)\b|\(.*?\)")


def presets_file(name: str) -> Path:
    """The path of one of the data files."""
    return Path(str(resources.files("coordinator.simulate") / "presets" / name))


@cache
def specs() -> Mapping[str, Spec]:
    """Every device known by name, as specified and as calibrated."""
    path = presets_file("devices.toml")
    document = read_toml(path)
    only_keys(document, CLASSES, str(path))
    factors = calibrated()
    found: dict[str, Spec] = {}
    for cls, devices in document.items():
        for name, values in devices.items():
            spec = read_spec(name, cls, Table(values, f"{path}: {cls}: {name}"))
            decode, prompt, rows = factors.get(name, (1.0, 1.0, ""))
            sources = dict(spec.sources) | ({"k": rows} if rows else {})
            found[name] = replace(spec, k_decode=decode, k_prompt=prompt, sources=sources)
    return found


def read_spec(name: str, cls: str, table: Table) -> Spec:
    """A device of a class from a table. Raises UsageError."""
    numbers = {key: table.number(key, 0.0, high=1e9) for key in ("fp16_tflops", "sm", "ghz", "watts", "memory_gib")}
    bandwidth = table.number("bandwidth_gbs", low=0.01, high=1e6)
    tags = table.names("tags")
    source = table.text("source", "")
    table.end()
    sources = {key: source for key in ("bandwidth_gbs", *numbers) if key == "bandwidth_gbs" or numbers[key]}
    return Spec(name, cls, bandwidth * 1e9, numbers["fp16_tflops"] * 1e12, numbers["sm"], numbers["ghz"],
                numbers["watts"], int(numbers["memory_gib"] * (1 << 30)), tags, sources=sources)  # fmt: skip


@cache
def constants(cls: str) -> Constants:
    """The fitted constants of a class. Raises UsageError for a class that has none."""
    classes = _classes()
    if cls not in classes:
        raise UsageError(f"class {cls!r} is not known: expected one of {', '.join(classes)}")
    return classes[cls]


@cache
def _classes() -> Mapping[str, Constants]:
    path = presets_file("classes.toml")
    document = read_toml(path)
    return {
        cls: Constants({key: inner.number(key) for key in values})
        for cls, values in document.items()
        for inner in [Table(values, f"{path}: {cls}")]
    }


@cache
def calibrated() -> Mapping[str, tuple[float, float, str]]:
    """By device: how much faster than the law it decodes and reads prompts, and the rows that say so."""
    path = presets_file("calibrated.toml")
    found = {}
    for name, values in read_toml(path).items():
        table = Table(values, f"{path}: {name}")
        found[name] = (table.number("k_decode", 1.0), table.number("k_prompt", 1.0), table.text("rows", ""))
        table.end()
    return found


def anchored(spec: Spec, model: str, quant: str) -> Spec:
    """A device as it was measured with this very model, where it was."""
    decode, prompt, rows = calibrated().get(anchor_name(spec.name, model, quant), (0.0, 0.0, ""))
    if not rows:
        return spec
    sources = dict(spec.sources) | {"k": rows}
    return replace(spec, k_decode=decode, k_prompt=prompt, sources=sources)


def anchor_name(device: str, model: str, quant: str) -> str:
    """Under which name a device that was measured with a model is calibrated."""
    return f"{device} | {model} | {quant}"


def find_spec(name: str, cls: str = "") -> Spec | None:
    """The device that is meant by a name as people write it, or None."""
    known = specs()
    if name in known:
        return known[name]
    for plain in (_plain(name, keep_memory=True), _plain(name, keep_memory=False)):
        for candidate, spec in _by_plain_name().items():
            if candidate == plain and (not cls or _same_class(spec.cls, cls)):
                return spec
    return _inside(_plain(name, keep_memory=True), cls)


def _inside(plain: str, cls: str) -> Spec | None:
    """The longest known name that stands in `plain`, or else the first that begins with it."""
    known = {n: s for n, s in _by_plain_name().items() if not cls or _same_class(s.cls, cls)}
    longest = max((n for n in known if len(n) > 3 and n in plain), key=len, default=None)
    if longest is None and len(plain) > 1:
        longest = next((n for n in known if n.startswith(plain) and (len(plain) > 5 or known[n].cls == "apple")), None)
    return known[longest] if longest else None


@cache
def _by_plain_name() -> Mapping[str, Spec]:
    found: dict[str, Spec] = {}
    for name, spec in specs().items():
        for keep in (True, False):
            found.setdefault(_plain(name, keep_memory=keep), spec)
    return found


def _same_class(one: str, other: str) -> bool:
    return one == other or {one, other} == {"nvidia", "nvidia-old"}


def _plain(name: str, *, keep_memory: bool) -> str:
    text = name.lower() if keep_memory else _MEMORY.sub(" ", name.lower())
    text = _BRANDS.sub(" ", text).replace("tesla", " ").replace("-core", "c")
    return re.sub(r"[^a-z0-9]+", "", text)


def as_table(spec: Spec) -> dict[str, Any]:
    """A device as `crossdock devices --json` shows it."""
    return {
        "name": spec.name, "class": spec.cls, "tags": list(spec.tags), "memory_gib": spec.memory_nbytes / (1 << 30),
        "bandwidth_gbs": spec.bandwidth / 1e9, "fp16_tflops": spec.flops / 1e12, "sm": spec.sm, "ghz": spec.ghz,
        "watts": spec.watts, "k_decode": spec.k_decode, "k_prompt": spec.k_prompt, "sources": dict(spec.sources),
    }  # fmt: skip
