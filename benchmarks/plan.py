"""Planning time of a llama-like graph against ggml's scheduler; the measurement is tests/conformance/timing.py's."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Row, compare
from protocol.errors import UsageError
from tests.conformance import real_ggml, timing


def rows(quick: bool) -> Iterator[Row]:
    """What both do; then what only we have, as milliseconds alone. Raises UsageError without libggml-python."""
    path = real_ggml.library_path()
    if path is None:
        raise UsageError("the package libggml-python is missing: see benchmarks/requirements.txt")
    devices = [{"name": "GPU0", "type": "gpu"}, {"name": "CPU", "type": "cpu"}]
    doc = {"devices": devices, "parallel": False, "op_offload": False, "graphs": [timing.llama_graph(36, 24)]}
    samples = timing.measure(doc, real_ggml.load(path), 10 if quick else 40)
    for key, ggml in samples.items():
        who, _, what = key.partition("  ")
        if who == "ggml":
            pair = {"ours": samples[f"ours  {what}"], "ggml 0.20.2": ggml}
            yield compare("plan", f"plan: {what}", pair, "us", lambda s: s * 1e6)
