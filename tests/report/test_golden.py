"""What `crossdock plan` prints stays what it was: dumps of small plans, and every output in docs/plans.md."""

from __future__ import annotations

import json
import shlex

import pytest
from golden_plans import CASES, GOLDEN, documented
from plan_command import ROOT, plan, run_plan


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    stored = json.loads((GOLDEN / f"{name}.json").read_text())
    assert json.loads(plan(*CASES[name])) == stored, "python tests/report/golden_plans.py writes the new plans"


def test_no_stray_files() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "output"), documented(), ids=lambda value: shlex.join(value) if isinstance(value, list) else ""
)
def test_documented_output(monkeypatch: pytest.MonkeyPatch, arguments: list[str], output: str) -> None:
    monkeypatch.chdir(ROOT)
    assert run_plan(*arguments)[1] == output
