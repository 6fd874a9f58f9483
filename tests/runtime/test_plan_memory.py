"""Planning takes seconds and little memory, whatever the model's size, and starts no processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

PROBE = """
import json, resource, subprocess, sys
sys.argv = ["crossdock"]
import os
os.fork = subprocess.Popen.__init__ = None  # whoever starts a process fails
from coordinator.cli.parser import parse
status = parse(["plan", *ARGUMENTS])()
scale = 1 if sys.platform == "darwin" else 1024
print(json.dumps([int(status), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale]), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [
    ("llama-3.2-90b-vision", "-ngl", "30", "--device", "gpu0", "--dump", "plan"),
    ("llama-3.2-90b-vision", "--dialect", "2024", "-ngl", "30", "--device", "gpu0", "--why"),
    ("llama-3.2-90b-vision", "--device", "gpu0:40GiB", "--fit"),
])  # fmt: skip
def test_largest_preset(arguments: tuple[str, ...]) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("ARGUMENTS", repr(arguments))], capture_output=True, text=True, check=True
    )
    seconds = time.monotonic() - started
    status, nbytes = json.loads(done.stderr.splitlines()[-1])
    assert status == 0
    assert nbytes < 300e6
    assert seconds < 60, "seconds, and time to compile the planner when that was never done"
