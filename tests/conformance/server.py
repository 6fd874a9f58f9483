"""Real ggml in a process of its own: where it aborts, only that process ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


class RealServer:
    """Plans documents with real ggml in a child process, which is started anew after an abort."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def plan(self, doc: dict[str, Any]) -> list[dict[str, Any]] | str:
        """What ggml decides, or its last words if it aborts."""
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(doc) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if line:
            result: list[dict[str, Any]] = json.loads(line)
            return result
        self._child = None
        _, err = child.communicate()
        said = [text for text in err.splitlines() if text.strip()]
        return next((t for t in reversed(said) if "/ggml" in t or "Error" in t), f"ended with {child.returncode}")

    def _start(self) -> subprocess.Popen[str]:
        env = os.environ | {"GGML_NO_BACKTRACE": "1", "PYTHONWARNINGS": "ignore"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        return self._child

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.communicate()
            self._child = None


def main() -> None:
    """Answer documents from standard input, one JSON line each."""
    from tests.conformance import real_ggml, real_sched

    path = real_ggml.library_path()
    if path is None:
        raise SystemExit("Error: libggml is missing: ./launch test installs it (the package libggml-python)")
    lib = real_ggml.load(path)
    lib.ggml_log_set(real_ggml.SILENT, None)
    for line in sys.stdin:
        print(json.dumps(real_sched.plan_real(lib, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
