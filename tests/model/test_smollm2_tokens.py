"""A published vocabulary and template, where its package is installed: see the `smollm2` fixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.model.chat import ChatTemplate, Message
from coordinator.model.gguf_file import ModelFile, open_model
from coordinator.model.params import read_params
from coordinator.model.tokens import Tokenizer

pytestmark = pytest.mark.slow
CASES = json.loads((Path(__file__).parent.parent / "data" / "smollm2_greedy.json").read_text())["cases"]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> ModelFile:
    return open_model(smollm2)


def test_parameters(model: ModelFile) -> None:
    params = read_params(model)
    assert (params.arch, params.text.n_layer, params.text.n_head, params.text.n_head_kv) == ("llama", 30, 9, 3)
    assert params.text.tied_output


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:20].strip())
def test_tokens_equal_llama_cpp_s(case: dict[str, object], model: ModelFile) -> None:
    tokenizer = Tokenizer.from_metadata(model.metadata)
    text = str(case["text"])
    assert tokenizer.encode(text, parse_special=True) == case["tokens"]
    assert tokenizer.decode(case["generated"]) == case["content"]  # type: ignore[arg-type]
    if case["chat"]:
        template = ChatTemplate.from_metadata(model.metadata, tokenizer)
        assert template.render([Message("user", str(case["prompt"]))]).text == text
