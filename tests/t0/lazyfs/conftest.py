"""Fixtures for lazyfs's tests without mounts: a state folder, and a chunk store in a folder of its own."""

from __future__ import annotations

import pytest

from lazyfs.content.chunk_store import ChunkStore
from lazyfs.stores.local import LocalStore


@pytest.fixture(autouse=True, scope="session")
def unbounded():
    """Bound no cache by the free space of the machine that runs the tests; those of the bound set their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICKTHAW_CACHE_LIMIT", "none")
        yield


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUICKTHAW_STORE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def chunks(tmp_path):
    return ChunkStore(LocalStore(tmp_path / "store"))
