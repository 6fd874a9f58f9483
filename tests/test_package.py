"""What is installed, and what `crossdock doctor` says of it."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from protocol.features import SWITCHES

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_holds_three_packages(tmp_path: Path) -> None:
    """PyPI has packages of these names too: nothing else may come along."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"coordinator", "protocol", "workers"}
    assert "workers/kernels/ggml/table.py" in names


def test_doctor() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "crossdock", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["packages"]["numba"]
    assert set(facts["features"]) == set(SWITCHES)


def test_launch_says_what_is_too_old() -> None:
    """The version check comes before anything that an old Python could not read."""
    source = (ROOT / "launch").read_text()
    assert source.index("sys.version_info < (3, 11)") < source.index("import contextlib")
    compile(source[: source.index("import contextlib")], "launch", "exec", dont_inherit=True)
