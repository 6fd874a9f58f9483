"""Planning takes seconds of a processor and little memory, whatever the model's size, and starts no processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import json, subprocess, sys, time
from pathlib import Path
sys.argv = ["crossdock"]
import os
os.fork = subprocess.Popen.__init__ = None  # whoever starts a process fails
from coordinator.cli.parser import parse
status = parse(["plan", *ARGUMENTS])()
# getrusage would count the memory of the process that started this one
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([int(status), int(peak.split()[1]) * 1024, time.process_time()]), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("arguments", [
    ("llama-3.2-90b-vision", "-ngl", "30", "--device", "gpu0", "--dump", "plan"),
    ("llama-3.2-90b-vision", "--dialect", "2024", "-ngl", "30", "--device", "gpu0", "--why"),
    ("llama-3.2-90b-vision", "--device", "gpu0:40GiB", "--fit"),
])  # fmt: skip
def test_largest_preset(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("ARGUMENTS", repr(arguments))], capture_output=True, text=True, check=True
    )
    status, nbytes, seconds = json.loads(done.stderr.splitlines()[-1])
    assert status == 0
    assert nbytes < 300e6
    assert seconds < 60, "seconds, and time to compile the planner when that was never done"
