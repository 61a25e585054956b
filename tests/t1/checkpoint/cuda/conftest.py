"""Real processes that a double of the CUDA driver suspends and resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kits.checkpoint.cuda_children import Children
from tests.kits.checkpoint.cuda_double import Double


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    found = Children(tmp_path)
    yield found
    found.close()


@pytest.fixture
def driver(children: Children) -> Double:
    return Double(str(children.folder))


@pytest.fixture
def pids(children: Children) -> list[int]:
    return [children.start(), children.start(2 << 20)]
