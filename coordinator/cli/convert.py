"""`crossdock convert`: a Hugging Face folder to one GGUF file."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import Progress

from coordinator.model.convert import convert as convert_folder
from coordinator.report.text import notes, show_bytes, watched
from protocol.dtypes import dtype_of
from protocol.errors import Exit


def convert(chosen: argparse.Namespace) -> int:
    """Convert and say what was written."""
    console, output = notes(), Path(chosen.output)
    with Progress(console=console, transient=True, disable=not watched()) as bar:
        task = bar.add_task("converting")

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        summary = convert_folder(Path(chosen.folder), output, dtype_of(chosen.type), progress)
    types = ", ".join(f"{n} {dtype.label}" for dtype, n in summary.by_type.items())
    print(
        f"{output}: {summary.arch}, {summary.n_params / 1e6:,.1f} M parameters, "
        f"{summary.n_tensors} tensors ({types}), {show_bytes(summary.nbytes)}"
    )
    return Exit.OK
