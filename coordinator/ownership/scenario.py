"""Scenarios: programs with what they should come to, read from TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from coordinator.graph.node import Graph
from coordinator.ownership.check import check_sequence
from coordinator.ownership.facts import Finding, Kind
from coordinator.ownership.host import ACTS, walk
from coordinator.ownership.interpret import Run, run
from coordinator.ownership.scenario_graphs import read_graphs
from coordinator.ownership.sequence import QUIRKS, GraphSpec, Sequence, Step
from protocol.errors import InputError, PlanError

MODES = ("faithful", "strict", "safe")

OUTCOMES = ("right", "wrong", "crash", "none", *(str(kind) for kind in Kind))
"""What a scenario may expect: of `static` none or a kind; of a mode right, wrong, crash or a kind."""

_STEP_KEYS = {f.name for f in fields(Step)}
_KEYS = {"id", "title", "source", "twin_of", "about", "devices", "parallel", "op_offload", "late", "quirks", "graphs",
         "steps", "expect", "reallocations"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """A program, what is expected of it (`static` and each mode), and where it comes from.

    `late` are devices that lag, None: all asynchronous ones. `reallocations` by mode, where that is the point.
    """

    ident: str
    title: str
    source: str
    about: str
    twin_of: str
    sequence: Sequence
    late: frozenset[str] | None
    expect: Mapping[str, str]
    reallocations: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a mode came to: `right`, `wrong`, `crash` or a kind; the finding behind a kind; what was read."""

    mode: str
    result: str
    finding: Finding | None
    run: Run | None
    reallocations: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """A scenario after it was checked and run."""

    scenario: Scenario
    static: tuple[Finding, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def static_result(self) -> str:
        """The first kind that the static check found, or none."""
        return str(self.static[0].kind) if self.static else "none"

    @property
    def as_documented(self) -> bool:
        """True when everything came as expected."""
        s = self.scenario
        return self.static_result == s.expect["static"] and all(
            o.result == s.expect[o.mode] and o.reallocations == s.reallocations.get(o.mode, o.reallocations)
            for o in self.outcomes
        )


def play(scenario: Scenario, modes: tuple[str, ...] = MODES) -> Report:
    """Check a scenario and act it out in each mode. Raises InputError."""
    try:
        static = check_sequence(scenario.sequence)
        outcomes = tuple(_outcome(scenario, mode) for mode in modes)
    except PlanError as error:
        raise InputError(f"scenario {scenario.ident}: {error}") from None
    return Report(scenario, static, outcomes)


def _outcome(scenario: Scenario, mode: str) -> Outcome:
    machine = walk(scenario.sequence, safe=mode == "safe")
    if mode == "safe":  # what cannot be made right is refused before it runs
        refused = next((f for f in machine.findings if not f.is_cost), None)
        if refused is not None:
            return Outcome(mode, str(refused.kind), refused, None, machine.reallocations)
    done = run(machine.actions, strict=mode != "faithful", late=scenario.late)
    if done.violation is not None:
        return Outcome(mode, str(done.violation.kind), done.violation, done, machine.reallocations)
    result = "crash" if done.crashed else "right" if done.is_right else "wrong"
    return Outcome(mode, result, None, done, machine.reallocations)


def load_scenario(path: Path) -> Scenario:
    """Read a scenario. Raises InputError in one line: what is wrong and where."""
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    try:
        return parse_scenario(raw)
    except (InputError, PlanError) as error:
        raise InputError(f"{path}: {error}") from None


def parse_scenario(raw: Mapping[str, Any]) -> Scenario:
    """A scenario from a parsed document. Raises InputError, PlanError."""
    unknown = sorted(set(raw) - _KEYS)
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}: expected {', '.join(sorted(_KEYS))}")
    devices, queues, graphs = read_graphs(_typed(raw, "devices", list, []), _typed(raw, "graphs", list, []))
    quirks = frozenset(_typed(raw, "quirks", list, []))
    if bad := sorted(map(str, quirks - set(QUIRKS))):
        raise InputError(f"unknown quirk {bad[0]!r}: expected {', '.join(QUIRKS)}")
    steps = tuple(_step(s, f"steps[{k}]") for k, s in enumerate(_typed(raw, "steps", list, [])))
    late = _typed(raw, "late", list, None)
    sequence = Sequence(
        devices, _share(graphs), steps, queues, quirks, _typed(raw, "parallel", bool, False),
        _typed(raw, "op_offload", bool, False),
    )  # fmt: skip
    return Scenario(
        _typed(raw, "id", str), _typed(raw, "title", str), _typed(raw, "source", str, ""),
        _typed(raw, "about", str, ""), _typed(raw, "twin_of", str, ""), sequence,
        None if late is None else frozenset(map(str, late)),
        _expected(_typed(raw, "expect", dict)), _typed(raw, "reallocations", dict, {}),
    )  # fmt: skip


def _step(raw: object, where: str) -> Step:
    if not isinstance(raw, dict) or not isinstance(raw.get("do"), str):
        raise InputError(f"{where}: expected a table with 'do'")
    if raw["do"] not in ACTS:
        raise InputError(f"{where}: unknown act {raw['do']!r}: expected {', '.join(ACTS)}")
    step = Step(raw["do"])
    for key, value in raw.items():
        if key not in _STEP_KEYS:
            raise InputError(f"{where}: unknown key {key!r}: expected {', '.join(sorted(_STEP_KEYS))}")
        default = getattr(step, key)
        if key in ("value", "right") and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = float(value)
        elif key == "copy" and isinstance(value, int):
            pass
        elif type(value) is not type(default):
            raise InputError(f"{where}: {key} is {value!r:.40}, expected {type(default).__name__}")
        step = replace(step, **{key: value})
    return step


def _expected(raw: dict[str, Any]) -> dict[str, str]:
    for key in ("static", *MODES):
        if raw.get(key) not in OUTCOMES:
            raise InputError(f"expect.{key} is {raw.get(key)!r:.40}, expected one of {', '.join(OUTCOMES)}")
    return dict(raw)


def _share(graphs: dict[str, GraphSpec]) -> dict[str, GraphSpec]:
    """The first owner of a shared tensor shares it as well."""
    out = dict(graphs)
    for spec in graphs.values():
        for ref in spec.shared.values():
            name, _, tensor = ref.partition(".")
            if name not in out or tensor not in out[name].graph.by_name:
                raise InputError(f"shared {ref!r}: no such tensor, expected GRAPH.TENSOR")
            owner: Graph = out[name].graph
            out[name] = replace(out[name], shared={**out[name].shared, owner.by_name[tensor]: ref})
    return out


def _typed(raw: Mapping[str, Any], key: str, kind: type, *default: Any) -> Any:
    value = raw.get(key)
    if value is None and default:
        return default[0]
    if not isinstance(value, kind):
        raise InputError(f"{key} is {'missing' if value is None else repr(value)[:40]}, expected {kind.__name__}")
    return value
