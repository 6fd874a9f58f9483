"""One request under many settings: every combination of the values that are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from coordinator.model.presets import Blueprint
from coordinator.schedule.outline import DeviceMemory
from coordinator.simulate.machine import Machine
from coordinator.simulate.predict import Prediction, predict
from coordinator.simulate.series import Load, Options, context, make_series
from protocol.errors import UsageError

MAX_POINTS = 2000

_LOAD_KEYS: Mapping[str, str] = {
    "prompt": "n_prompt", "predict": "n_predict", "images": "n_images", "ubatch": "n_ubatch", "batch": "batch",
    "requests": "n_requests",
}  # fmt: skip
KEYS = ("n-gpu-layers", *_LOAD_KEYS, "ctx-size", "parallel")
"""What can be swept."""

_RANGE = re.compile(r"(\d{1,7})\.\.(\d{1,7})(?::(\d{1,7}))?")
_LEAST = {"prompt": 1, "ubatch": 1, "batch": 1, "requests": 1}
_MOST = {"parallel": 1}

Values = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Point:
    """One setting and what it comes to; rates as in Prediction. `short` are devices whose memory is too small."""

    values: Mapping[str, int]
    encode_s: float
    first_token_s: float
    prompt_rate: float
    decode_rate: float
    short: tuple[DeviceMemory, ...]
    busiest_link: tuple[str, float]


def parse_sweep(text: str) -> Values:
    """`n-gpu-layers=0..40,batch=1,4,16`: values and ranges (`A..B`, `A..B:STEP`, ends included) by key.

    Raises UsageError.
    """
    values: Values = {}
    key = ""
    for part in text.split(","):
        if "=" in part:
            key, _, part = part.partition("=")
            if key not in KEYS or key in values:
                what = "is given twice" if key in values else f"is unknown: expected one of {', '.join(KEYS)}"
                raise UsageError(f"--sweep {text}: {key!r} {what}")
            values[key] = ()
        if not key:
            raise UsageError(f"--sweep {text}: expected KEY=VALUES first, such as n-gpu-layers=0..40")
        values[key] += _numbers(part.strip(), text, _LEAST.get(key, 0), _MOST.get(key))
    n = 1
    for found in values.values():
        n *= len(found)
    if n > MAX_POINTS:
        raise UsageError(f"--sweep {text}: {n} combinations: at most {MAX_POINTS} are possible")
    return values


def _numbers(part: str, text: str, least: int, most: int | None) -> tuple[int, ...]:
    match = _RANGE.fullmatch(part)
    if match is not None:
        first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
        found = tuple(range(first, last + 1, step)) if step else ()
    else:
        found = (int(part),) if part.isascii() and part.isdecimal() and len(part) <= 7 else ()
    if most is not None and found and found[-1] > most:
        raise UsageError(f"--sweep {text}: {part!r}: expected {least} to {most}")
    if not found or found[0] < least:
        raise UsageError(f"--sweep {text}: {part!r}: expected a number or A..B[:STEP], from {least} on")
    return found


def sweep(
    blueprint: Blueprint, machine: Machine, options: Options, load: Load, values: Values, *, seed: int = 0
) -> Iterator[Point]:
    """A point for each combination, the last key changing fastest.

    Raises UsageError for one that cannot be meant, before the first is simulated.
    """
    _check(blueprint, options, load, values)
    for combination in product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        changed, request = apply(options, load, chosen)
        yield point(chosen, predict(make_series(blueprint, machine, changed, request), seed=seed))


def _check(blueprint: Blueprint, options: Options, load: Load, values: Values) -> None:
    """What is sure to fail for some combination should not do so after minutes of others. Raises UsageError."""
    params = blueprint.params
    n_layer, layers = params.text.n_layer, max(values.get("n-gpu-layers", (0,)))
    if layers > n_layer + 1:
        raise UsageError(
            f"--sweep n-gpu-layers: {layers}: the model has {n_layer} layers and an output: expected 0 to {n_layer + 1}"
        )
    if params.vision is None and max(values.get("images", (0,))):
        raise UsageError(f"--sweep images: {params.name} takes no images")
    for combination in product(*values.values()):
        changed, request = apply(options, load, dict(zip(values, combination, strict=True)))
        context(params.text.n_ctx_train, changed.n_ctx, request)


def apply(options: Options, load: Load, chosen: Mapping[str, int]) -> tuple[Options, Load]:
    """The options and the load with these values by key."""
    load = replace(load, **{_LOAD_KEYS[key]: value for key, value in chosen.items() if key in _LOAD_KEYS})
    if "n-gpu-layers" in chosen:
        options = replace(options, placement=replace(options.placement, n_gpu_layers=chosen["n-gpu-layers"]))
    if "ctx-size" in chosen:
        options = replace(options, n_ctx=chosen["ctx-size"])
    if "parallel" in chosen:
        options = replace(options, parallel=bool(chosen["parallel"]))
    return options, load


def point(values: Mapping[str, int], found: Prediction) -> Point:
    """What a prediction comes to, without its timeline."""
    routes, end = found.series.machine.fabric.routes, found.end_s
    shares = [(busy / end if end else 0.0, k) for k, busy in enumerate(found.timeline.route_busy_s)]
    busy, route = max(shares, default=(0.0, -1), key=lambda share: (share[0], -share[1]))
    link = (routes[route].name, busy) if busy else ("", 0.0)
    rates = found.encode_s, found.first_token_s, found.prompt_rate, found.decode_rate
    return Point(dict(values), *rates, found.series.short, link)


def varied(values: Values) -> Sequence[str]:
    """The keys by how many values they have, the most first."""
    return sorted(values, key=lambda key: -len(values[key]))
