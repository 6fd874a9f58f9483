"""SmolLM2 in ggml's own arithmetic: the graphs, inputs and weights are such that every token is llama.cpp's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.graph.language import build_language
from coordinator.graph.node import BufferRef, Graph
from coordinator.model.sampling import Sampler
from coordinator.runtime.inputs import text_inputs
from protocol.dtypes import DType
from protocol.ops import Usage
from tests.integration.describing import Loaded
from tests.integration.ggml_arithmetic import Array, Program, libraries, resident_bytes

CASES = json.loads((Path(__file__).parent.parent / "data" / "smollm2_greedy.json").read_text())["cases"]
N_KV = 256
RECORDED = 1e-5
"""The reference's gaps have five digits behind the point."""

Evaluate = Callable[[list[int], int], Array]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def evaluate(smollm2: Loaded) -> Iterator[Evaluate]:
    """Logits after tokens that follow `n_past` others; a later sequence overwrites an earlier one."""
    model, params, found = smollm2.model, smollm2.params, libraries()

    def graph(n_tokens: int) -> Graph:
        place = BufferRef("CPU", Usage.WEIGHTS)
        return build_language(
            params, model.weights, lambda _: place, n_tokens=n_tokens, n_kv=N_KV, n_outputs=1, n_ctx=N_KV,
            kv_dtype=DType.F16,
        )  # fmt: skip

    one = graph(1)
    resident = resident_bytes(model, one)
    programs = {1: Program(found, one, resident)}

    def run(tokens: list[int], n_past: int) -> Array:
        n = len(tokens)
        if n not in programs:
            programs[n] = Program(found, graph(n), resident)
        return programs[n].run(text_inputs(tokens, n_past, N_KV), "result_output")

    yield run
    for program in programs.values():
        program.close()


@pytest.mark.parametrize("case", CASES, ids=[case["prompt"][:30] for case in CASES])
def test_every_token_is_llama_cpps(evaluate: Evaluate, case: dict[str, Any]) -> None:
    """And so is the gap between the two best logits, to the last digit that was recorded."""
    logits, n_past = evaluate(case["tokens"], 0), len(case["tokens"])
    for number, step in enumerate(case["steps"]):
        second, best = np.sort(logits)[-2:].astype(float)
        assert Sampler().sample(logits) == step["id"], f"token {number}"
        assert best - second == pytest.approx(step["gap"], abs=RECORDED), f"token {number}"
        logits, n_past = evaluate([step["id"]], n_past), n_past + 1
