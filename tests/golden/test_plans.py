"""Plans as real ggml made them once: compared without the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conformance.compare import differences, plan_ours

PLANS = sorted((Path(__file__).parent / "plans").glob("*.json"))


def test_there_are_plans() -> None:
    assert len(PLANS) >= 10


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_golden_plan(path: Path) -> None:
    golden = json.loads(path.read_text())
    assert differences(plan_ours(golden["document"]), golden["ggml"], len(golden["document"]["devices"])) == []
