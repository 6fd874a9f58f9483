from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.model.convert import convert
from coordinator.model.gguf_file import open_model
from coordinator.model.tokens import Tokenizer
from coordinator.schedule import warm as planner
from protocol.dtypes import DType
from tests.faults import surgery
from workers.kernels import warm as kernels

REFERENCE = Path(__file__).parent.parent / "data" / "ref_mllama"


@pytest.fixture(scope="session")
def image() -> Path:
    return sorted((REFERENCE / "images").glob("*.png"))[0]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny reference model, small enough to be copied for every test."""
    path = tmp_path_factory.mktemp("model") / "ref.gguf"
    convert(REFERENCE, path, DType.F16)
    return path


@pytest.fixture(scope="session")
def long_model(model: Path) -> Path:
    """The same, with room for long generations that never stop by themselves: they give time to interfere."""
    path = model.with_name("long.gguf")
    reader = surgery.copy(model, path)
    surgery.set_value(reader, "mllama.context_length", 32768)
    never = surgery.element(reader, "tokenizer.ggml.tokens", b"<|image|>")  # the only one that no logit stands for
    for end in (b"<|eot_id|>", b"<|eom_id|>", b"<|end_of_text|>"):
        surgery.rename(reader, "tokenizer.ggml.tokens", end, end.upper())
    for key in ("tokenizer.ggml.eos", "tokenizer.ggml.eot", "tokenizer.ggml.eom", "crossdock.stop"):
        surgery.set_value(reader, key + ("_token_ids" if key == "crossdock.stop" else "_token_id"), never)
    changed = open_model(path)
    n_logits = changed.weights["output.weight"].ne[1]
    assert min(Tokenizer.from_metadata(changed.metadata, path.name).stop_ids) >= n_logits
    return path


@pytest.fixture(scope="session")
def warm() -> None:
    """Kernels and planner are compiled: what is timed from here on does not wait for that."""
    if not kernels.is_warm():
        kernels.warm()
    planner.warm()
