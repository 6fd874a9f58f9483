"""Each off switch, transport and plane takes another way to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.harness import run

WAYS: dict[str, tuple[list[object], str]] = {
    "memfd": ([], "memfd"),
    "futex": ([], "futex"),
    "mailbox": ([], "mailbox"),
    "sharedmem": ([], "sharedmem"),
    "one by one": ([], "fork"),
    "numba": ([], "image"),
    "tcp": (["--transport", "tcp"], ""),
    "everything": (["--transport", "tcp", "-t", 2], "memfd,futex,sharedmem"),
}


def answer(model: Path, image: Path, more: list[object], disabled: str) -> tuple[object, object, object]:
    arguments = ["run", "-m", model, "-i", image, "-w", "cpu:1,accel:1", "-n", 6, "--json", *more]
    result = run(arguments, env={"CROSSDOCK_DISABLE": disabled})
    assert (result.status, result.stderr, result.leftovers) == (0, "", [])
    document = json.loads(result.stdout)
    return document["text"], document["tokens"], document["embeddings_sha256"]


@pytest.fixture(scope="module")
def expected(warm: None, model: Path, image: Path) -> tuple[object, object, object]:
    found = answer(model, image, [], "")
    assert found[1]
    assert found[2]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_same_bytes(way: str, expected: tuple[object, object, object], model: Path, image: Path) -> None:
    assert answer(model, image, *WAYS[way]) == expected
