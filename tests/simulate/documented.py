"""Outputs of `crossdock simulate` in the documentation: `python tests/simulate/documented.py` writes them anew."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from coordinator.cli.parser import parse

ROOT = Path(__file__).parents[2]
PAGES = tuple(ROOT / "docs" / name for name in ("simulation.md", "second-card-or-faster-link.md"))

_COMMAND = re.compile(r"(?<=```\n)\$ crossdock simulate (.*)\n((?:(?!```).*\n)*)")


def simulate(arguments: Sequence[str]) -> tuple[int, str]:
    """Status and output. Raises what the command raises."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = parse(["simulate", *arguments])()
    return status, output.getvalue()


def documented(page: Path) -> list[tuple[list[str], str]]:
    """Arguments and output of each command on a page."""
    return [(shlex.split(m[1]), m[2]) for m in _COMMAND.finditer(page.read_text())]


def write() -> None:
    """Write every output anew."""
    os.chdir(ROOT)
    for page in PAGES:
        text = _COMMAND.sub(
            lambda m: f"$ crossdock simulate {m[1]}\n{simulate(shlex.split(m[1]))[1]}", page.read_text()
        )  # fmt: skip
        page.write_text(text)


if __name__ == "__main__":
    write()
