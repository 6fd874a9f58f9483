"""`crossdock scenario`: hazards acted out on real bytes, in each mode of ownership."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from coordinator.cli.options import EXAMPLES
from coordinator.ownership.check import alternatives, explain
from coordinator.ownership.scenario import MODES, Report, Scenario, load_scenario, play
from coordinator.report.plan import answer
from coordinator.report.story import print_scenario, print_scenarios, scenario_document
from protocol.errors import Exit, UsageError

SCENARIOS = EXAMPLES / "scenarios"


def scenario(chosen: argparse.Namespace) -> int:
    """Run scenarios. Exits with FOUND when one does not behave as it says."""
    modes = MODES if chosen.ownership is None else (chosen.ownership,)
    reports = [play(s, modes) for s in find_scenarios(chosen.name)]
    if len(reports) == 1:
        reports = [_explained(reports[0])]
    if chosen.json:
        print(json.dumps([scenario_document(r) for r in reports], ensure_ascii=False))
    else:
        with answer() as console:
            if len(reports) == 1:
                print_scenario(console, reports[0])
            else:
                print_scenarios(console, reports)
    return Exit.OK if all(r.as_documented for r in reports) else Exit.FOUND


def find_scenarios(name: str) -> list[Scenario]:
    """The bundled scenarios of that name, or a file's.

    Raises UsageError when there is none, InputError for a bad one.
    """
    path = Path(name)
    if path.suffix == ".toml":
        return [load_scenario(path)]
    files = sorted(SCENARIOS.glob("*.toml"))
    if not files:
        raise UsageError("this installation has no bundled scenarios: name a TOML file")
    if name != "all":
        found = [f for f in files if f.stem == name.lower()]
        if not found:
            raise UsageError(f"unknown scenario {name!r}: expected all, {', '.join(f.stem for f in files)}")
        files = found
    return [load_scenario(f) for f in files]


def _explained(report: Report) -> Report:
    static = explain(report.static, alternatives(report.scenario.sequence))
    return Report(report.scenario, static, report.outcomes)
