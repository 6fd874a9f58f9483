"""`python -m benchmarks NAME|all [--quick] [--json FILE]`: interleaved pairs, one row each."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, document, environment
from protocol.errors import CrossdockError, UsageError

NAMES = (
    "ops",
    "vision",
    "model",
    "rpc",
    "own",
    "hop",
    "start",
    "memory",
    "overhead",
    "plan",
    "profile",
    "ownership",
    "simulated",
)


@dataclass(frozen=True, slots=True)
class Wishes:
    """The arguments. `ggml` is a folder with ggml's libraries, `python` an interpreter that has llama-cpp-python."""

    quick: bool
    threads: tuple[int, ...]
    match: str
    models: tuple[str, ...]
    ggml: str
    python: str


def rows_of(name: str, wishes: Wishes) -> Iterable[Row]:
    """One benchmark's rows, as they come. Its modules are imported only here: a process holds one version of ggml."""
    if name == "ops":
        from benchmarks import ops

        return ops.rows(wishes.quick, wishes.threads, wishes.ggml, wishes.match)
    if name == "vision":
        from benchmarks import vision

        return vision.rows(wishes.quick, wishes.ggml)
    if name == "profile":
        from benchmarks import profile

        return profile.rows(wishes.quick, wishes.models or ("smollm2-q4_0",), wishes.ggml)
    if name == "hop":
        from benchmarks import hop

        return hop.rows(wishes.quick)
    if name == "plan":
        from benchmarks import plan

        return plan.rows(wishes.quick)
    if name == "simulated":
        from benchmarks import simulated

        return simulated.rows(wishes.quick)
    if name == "ownership":
        from benchmarks import ownership

        return ownership.rows(wishes.quick)
    if name in ("model", "rpc", "own"):
        return _whole(name, wishes)
    from benchmarks import process

    simple: dict[str, Callable[[bool], Iterator[Row]]] = {
        "start": process.startup, "memory": process.memory, "overhead": process.overhead
    }  # fmt: skip
    return simple[name](wishes.quick)


def _whole(name: str, wishes: Wishes) -> Iterator[Row]:
    from benchmarks import models, whole

    settings = whole.Settings(python=wishes.python)
    if wishes.quick:
        settings = settings.shortened()
    chosen = wishes.models or (models.NAMES[:3] if wishes.quick else models.NAMES)
    if name == "model":
        return whole.single(chosen, wishes.threads, settings)
    if name == "rpc":
        return whole.spread(
            wishes.models or ("smollm2-q4_0", "smollm2-q8_0", "llama1b-q8_0")[: 1 if wishes.quick else 3], settings
        )
    return whole.own(("demo", *chosen) if not wishes.models else chosen, settings)


def measure(name: str, wishes: Wishes) -> dict[str, Any]:
    """Print the rows of one benchmark as they come; the document for `--json`."""
    before, rows = environment(), []
    print(f"# {name}: load {before['load'][0]} on {before['processors']} processors, {before['cpu']}", flush=True)
    for row in rows_of(name, wishes):
        rows.append(row)
        print(row.line(), flush=True)
    return document(rows, before, environment())


def everything(arguments: list[str]) -> list[dict[str, Any]]:
    """Each benchmark in a process of its own; their documents."""
    documents = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "benchmarks", name, *arguments, "--json", str(file)]
            if subprocess.run(command).returncode == 0:
                documents += json.loads(file.read_text(encoding="utf-8"))
    return documents


def main() -> None:
    """Exit status 0, or 2 for what cannot be measured here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "all"))
    parser.add_argument("--quick", action="store_true", help="smaller shapes, fewer samples")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and load there")
    parser.add_argument("--threads", default="1,2", metavar="N,...", help="for ops and model (default: %(default)s)")
    parser.add_argument("--match", default="", metavar="TEXT", help="only operations whose name contains it")
    parser.add_argument("--models", default="", metavar="NAME,...", help="only these models")
    parser.add_argument("--ggml", default="", metavar="FOLDER", help="libggml-*.so there, not libggml-python's")
    parser.add_argument("--peer-python", default="", metavar="PATH", help="an interpreter with llama-cpp-python")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # libgomp reads it when ggml's libraries are loaded
    names = tuple(part for part in chosen.models.split(",") if part)
    threads = tuple(int(part) for part in chosen.threads.split(","))
    wishes = Wishes(chosen.quick, threads, chosen.match, names, chosen.ggml, chosen.peer_python)
    try:
        if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
            raise UsageError(f"--json {chosen.json}: no such folder")
        given = [*sys.argv[1:]]
        given.remove(chosen.name)
        documents = everything(_without_json(given)) if chosen.name == "all" else [measure(chosen.name, wishes)]
    except CrossdockError as error:
        sys.exit(f"benchmarks: {error}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(documents, indent=1) + "\n", encoding="utf-8")


def _without_json(arguments: list[str]) -> list[str]:
    if "--json" in arguments:
        at = arguments.index("--json")
        return arguments[:at] + arguments[at + 2 :]
    return [argument for argument in arguments if not argument.startswith("--json=")]


if __name__ == "__main__":
    main()
