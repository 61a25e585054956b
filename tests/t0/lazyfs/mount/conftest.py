"""A model in a store with a mount's configuration, and a memory tier."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from lazyfs.cache.cache import Cache
from lazyfs.cache.slots import SlotMemory
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.importer import import_tree
from lazyfs.mount.config import MountConfig
from lazyfs.stores.local import LocalStore


@pytest.fixture
def model(tmp_path):
    """Return a store with a directory of forty files of one chunk each, its manifest and a mount's configuration."""
    (tmp_path / "model").mkdir()
    for number in range(40):
        (tmp_path / "model" / f"{number:02}.bin").write_bytes(bytes([number]) * 5000)
    chunks = ChunkStore(LocalStore(tmp_path / "store"))
    digest, manifest = import_tree(tmp_path / "model", chunks)
    names = {n: str(tmp_path / n) for n in ("mountpoint", "cache_dir", "log_file", "socket", "state_file", "home")}
    config = MountConfig(
        manifest=digest, store_url=f"file://{tmp_path / 'store'}", use_origin=False, background_mb_s=0.001, **names
    )
    return SimpleNamespace(manifest=manifest, config=config, cache=Cache(tmp_path / "cache_dir"), chunks=chunks)


@pytest.fixture
def memory():
    memory = SlotMemory(64)
    yield memory
    os.close(memory.fd)
