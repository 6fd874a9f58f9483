"""Golden plans and the outputs in docs/plans.md: `python tests/report/golden_plans.py` writes both anew."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from plan_command import ROOT, TINY, plan

GOLDEN = ROOT / "tests" / "golden" / "models"
DOCS = ROOT / "docs" / "plans.md"

_SMALL = (TINY, "-c", "64", "-ub", "40", "--device", "gpu0:align=128", "-ngl", "4")
_TWO = (TINY, "-c", "64", "-ub", "8", "--device", "gpu0:unsupported=PAD", "--device", "gpu1:align=64", "-ts", "1,2")

CASES: dict[str, tuple[str, ...]] = {
    "graph-token": (*_TWO, "--phase", "token", "--dump", "graph"),
    "assign-vision": (*_SMALL, "--phase", "vision", "--dump", "assign"),
    "splits-smollm2": ("smollm2-135m", "-ngl", "15", "--device", "gpu0", "--phase", "prompt", "--dump", "splits"),
    "alloc-prompt": (*_TWO, "--phase", "prompt", "--dump", "alloc"),
    "alloc-parallel": (*_TWO, "--phase", "token", "--parallel", "--dump", "alloc"),
    "plan-2024": (*_SMALL, "--dialect", "2024", "--phase", "prompt", "--dump", "plan"),
    "outline-all": (*_SMALL, "--json"),
}
"""Arguments of `crossdock plan` by the name of the file that holds what they print."""

_COMMAND = re.compile(r"(?<=```\n)\$ crossdock plan (.*)\n((?:(?!```).*\n)*)")


def spread(document: Any) -> str:
    """JSON with a line per key of each graph: small, and changes show where they are."""
    if isinstance(document, list):
        return "[\n" + ",\n".join(spread(part) for part in document) + "\n]"
    lines = (f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in document.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def documented() -> list[tuple[list[str], str]]:
    """Arguments and output of each command in docs/plans.md."""
    return [(shlex.split(m[1]), m[2]) for m in _COMMAND.finditer(DOCS.read_text())]


def write() -> None:
    """Write all golden files and the outputs in the documentation."""
    GOLDEN.mkdir(exist_ok=True)
    for name, arguments in CASES.items():
        (GOLDEN / f"{name}.json").write_text(spread(json.loads(plan(*arguments))) + "\n")
    text = _COMMAND.sub(lambda m: f"$ crossdock plan {m[1]}\n{plan(*shlex.split(m[1]))}", DOCS.read_text())
    DOCS.write_text(text)


if __name__ == "__main__":
    write()
