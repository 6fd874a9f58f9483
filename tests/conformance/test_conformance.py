"""Our scheduler against the real one: regressions, random documents, and what only a real abort can show."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conformance import real_ggml
from tests.conformance.compare import differences, plan_ours
from tests.conformance.documents import random_document
from tests.conformance.long import REGRESSIONS, compare
from tests.conformance.server import RealServer

DOCUMENTS = int(os.environ.get("CONFORMANCE_DOCUMENTS", "500"))

if real_ggml.library_path() is None:
    warnings.warn("conformance is not tested: libggml-python is not installed", stacklevel=1)
    pytest.skip("libggml-python is not installed: nothing to compare with", allow_module_level=True)


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    server = RealServer()
    yield server
    server.close()


def test_the_version_is_the_one_we_follow() -> None:
    path = real_ggml.library_path()
    assert path is not None
    assert real_ggml.load(path).ggml_version().decode() == real_ggml.VERSION


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*.json")), ids=lambda p: p.stem)
def test_regressions(server: RealServer, path: Path) -> None:
    outcome, found = compare(server, json.loads(path.read_text()))
    assert found == []
    assert outcome in ("same", "refused", "undefined")


@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_documents_that_shrink(server: RealServer, rng: random.Random) -> None:
    doc = random_document(rng)
    _, found = compare(server, doc)
    assert found == [], json.dumps(doc)


@pytest.mark.slow
def test_many_documents(server: RealServer) -> None:
    compared = 0
    for k in range(DOCUMENTS):
        doc = random_document(random.Random(k))
        outcome, found = compare(server, doc)
        assert found == [], f"document {k}: {json.dumps(doc)}"
        compared += outcome == "same"
    assert compared > DOCUMENTS * 0.7


def test_a_difference_would_be_seen(server: RealServer) -> None:
    """The comparison itself: a changed offset, backend or size does not pass."""
    doc: dict[str, Any] = random_document(random.Random(5))
    ours = plan_ours(doc)
    real = server.plan(doc)
    assert isinstance(real, list)
    assert differences(ours, real, 2) == []
    for key in ("offsets", "backend", "chunks", "nodes", "splits", "sources"):
        changed = json.loads(json.dumps(ours))
        changed[0][key] = [] if isinstance(changed[0][key], list) else {}
        assert differences(changed, real, 2), key
