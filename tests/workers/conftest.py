"""For tests of workers that share memory within this process."""

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture
def directory() -> Iterator[str]:
    """A run's: short enough for a socket, which pytest's may not be."""
    with tempfile.TemporaryDirectory(prefix="xd-", dir="/tmp") as path:
        yield path
