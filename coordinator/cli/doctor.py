"""`crossdock doctor`: what this machine has, and what is used where it has not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata

import llvmlite.binding as llvm
from rich.table import Table

from coordinator.report.text import notes, show_bytes
from protocol.errors import Exit
from protocol.features import CPU_SWITCHES, VARIABLE, disabled, has, of_cpu

PACKAGES = ("numpy", "numba", "llvmlite", "gguf", "pillow", "pyzmq", "msgpack", "tokenizers", "jinja2", "rich")
_TWINS = {
    "memfd": "files in the run's directory",
    "futex": "short naps",
    "sharedmem": "tensors travel as messages",
    "mailbox": "steps travel through sockets",
    "fork": "each worker is started by itself",
    "image": "kernels come from numba's cache",
    "avx2": "generic vector code, the same bits",
    "fma": "fused multiply-add in software, the same bits",
    "f16c": "half precision by bit operations, the same bits",
    "vnni": "products of 16 bits, the same sums",
    "avx512": "vectors of 256 bits, the same bits",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """The report. `features`: here and not switched off."""

    machine: str
    system: str
    memory: str
    temporary: str
    disabled: str
    features: dict[str, bool]
    packages: dict[str, str]


def doctor(chosen: argparse.Namespace) -> int:
    """Print the report."""
    facts = _facts()
    if chosen.json:
        print(json.dumps(asdict(facts)))
        return Exit.OK
    console = notes()
    console.file = sys.stdout
    for key in ("machine", "system", "memory", "temporary", "disabled"):
        console.print(f"[bold]{key:<11}[/] {getattr(facts, key)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("feature", "here", "without it"):
        table.add_column(header)
    for name, present in facts.features.items():
        table.add_row(name, "yes" if present else "no", _TWINS[name])
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    console.print(f"[bold]packages[/]    {versions}")
    return Exit.OK


def _facts() -> Facts:
    temporary = tempfile.gettempdir()
    cpu = of_cpu([name for name, present in llvm.get_host_cpu_features().items() if present], disabled())
    return Facts(
        machine=f"{platform.machine()}, {os.cpu_count()} processors",
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        memory=show_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        temporary=f"{temporary}, {show_bytes(shutil.disk_usage(temporary).free)} free",
        disabled=", ".join(sorted(disabled())) or f"nothing ({VARIABLE})",
        features={name: name in cpu if name in CPU_SWITCHES else has(name) for name in _TWINS},
        packages={name: metadata.version(name) for name in PACKAGES},
    )
