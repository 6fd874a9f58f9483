"""`crossdock plan` called in this process."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from coordinator.cli.parser import parse

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "data" / "ref_mllama" / "config.json")
"""A small mllama: 6 text layers (cross 1 and 4), 4 + 2 vision layers."""


def plan(*arguments: str) -> str:
    """What the command prints."""
    return run_plan(*arguments)[1]


def run_plan(*arguments: str) -> tuple[int, str]:
    """Status and output. Raises what the command raises."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = parse(["plan", *arguments])()
    return status, output.getvalue()


def plan_json(*arguments: str) -> Any:
    """The document that the command prints."""
    return json.loads(plan(*arguments, "--json"))
