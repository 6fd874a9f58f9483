"""Writes golden plans: documents with what real ggml makes of them (`python -m tests.golden.make_plans`)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.conformance.documents import random_document
from tests.conformance.server import RealServer
from tests.conformance.timing import llama_graph

PLANS = Path(__file__).parent / "plans"


def documents() -> dict[str, dict[str, Any]]:
    """Documents by name: llama graphs on several devices, and random ones of moderate size."""
    gpu, cpu = {"name": "GPU0", "type": "gpu", "alignment": 128}, {"name": "CPU", "type": "cpu"}
    plain = {"parallel": False, "op_offload": False}
    prompt = {"reserve": True} | {k: v for k, v in llama_graph(4, 2, 64, 256).items() if k != "reserve"}
    out: dict[str, dict[str, Any]] = {
        "llama-half-offloaded": {"devices": [gpu, cpu], **plain, "graphs": [llama_graph(4, 2, 64)]},
        "llama-reserved": {"devices": [gpu, cpu], **plain, "graphs": [prompt, llama_graph(4, 2, 64, 32)]},
        "llama-parallel": {"devices": [gpu, cpu], **plain, "parallel": True, "graphs": [llama_graph(3, 2, 64)] * 2},
        "llama-chunks": {"devices": [gpu | {"max_size": 2000}, cpu], **plain, "graphs": [llama_graph(3, 3, 64)]},
        "llama-offload": {
            "devices": [gpu | {"offload_ops": ["MUL_MAT"]}, cpu], **plain, "op_offload": True,
            "graphs": [llama_graph(3, 1, 64)],
        },
    }  # fmt: skip
    for seed in (12, 23, 42, 57, 91, 104):
        out[f"random-{seed}"] = random_document(random.Random(seed))
    return out


def main() -> None:
    """Plan all documents with the real library."""
    PLANS.mkdir(exist_ok=True)
    server = RealServer()
    for name, doc in documents().items():
        real = server.plan(doc)
        if isinstance(real, str):
            print(f"{name}: left out, ggml refuses it: {real}")
            continue
        (PLANS / f"{name}.json").write_text(json.dumps({"document": doc, "ggml": real}, separators=(",", ":")) + "\n")
    server.close()


if __name__ == "__main__":
    main()
