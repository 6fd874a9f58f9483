"""Files that a command is to write: no two of them are one, and none is one that it reads."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import UsageError

WRITTEN = {
    "trace": "--trace", "record": "--record", "memory_map": "--memory-map", "plot": "--plot", "output": "--output",
    "dump_dir": "--dump-dir",
}  # fmt: skip
"""Arguments that name what is written, and how people write them."""

READ = {
    "model": "the model", "image": "--image", "topology": "--topology", "system": "--system", "network": "--network",
    "simulate": "--simulate", "published": "--published", "graph": "--graph", "folder": "the folder",
}  # fmt: skip
"""Arguments that name what is read."""

_OR_NAMES = ("model", "system", "network", "simulate")
"""Those that may also be presets, kinds of links, or nothing."""


def check_files(chosen: argparse.Namespace) -> None:
    """Raises UsageError when what is to be written would take the place of another file of the command.

    Links and relative paths are followed. Devices, pipes and what is no file at all (presets) are nobody's to lose.
    """
    given = vars(chosen)
    written = [(option, str(given[name])) for name, option in WRITTEN.items() if given.get(name) is not None]
    if not written:
        return
    others = [*_read(chosen), *written]
    for option, file in written:
        for other, theirs in others:
            if other != option and _same(Path(file), Path(theirs)):
                raise UsageError(f"{option} {file} is the file of {other}{_called(file, theirs)}: name another one")


def _read(chosen: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for name, what in READ.items():
        value = getattr(chosen, name, None)
        for file in value if isinstance(value, list) else [value]:
            if isinstance(file, str) and (name not in _OR_NAMES or os.path.exists(file)):
                yield what, file
    if hasattr(chosen, "folder"):  # a model that was converted into it before is none of its sources
        yield from ((READ["folder"], str(p)) for p in Path(chosen.folder).glob("*") if p.suffix != ".gguf")
    if getattr(chosen, "model", "") is None or getattr(chosen, "image", "") is None:
        from coordinator.cli.options import DEMO_IMAGE, DEMO_MODEL  # slow to import, and seldom needed here

        yield from (("the bundled model", str(DEMO_MODEL)), ("the bundled image", str(DEMO_IMAGE)))


def _same(one: Path, other: Path) -> bool:
    try:
        seen = one.stat()
    except OSError:  # not there yet, or not to be looked at: then by name
        return os.path.realpath(one) == os.path.realpath(other)
    try:
        return _holds_bytes(seen) and os.path.samestat(seen, other.stat())
    except OSError:
        return False


def _holds_bytes(seen: os.stat_result) -> bool:
    return stat.S_ISREG(seen.st_mode) or stat.S_ISDIR(seen.st_mode)


def _called(file: str, theirs: str) -> str:
    return "" if file == theirs else f" ({theirs})"
