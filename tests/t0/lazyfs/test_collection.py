"""Collecting garbage of a remote store, which has no lock, while somebody imports into it: whatever the order, nothing that is
needed is lost without a word."""

from __future__ import annotations

import os
import threading
import time

import pytest

from lazyfs.admin.listing import remove
from lazyfs.admin.verify import verify
from lazyfs.content import chunk_store
from lazyfs.content.chunk_store import GC_MARK, ChunkStore
from lazyfs.content.importer import import_tree
from lazyfs.errors import Busy
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs_kit import make_model

pytestmark = pytest.mark.t0
LIMIT_S = 30
HOUR = 3600


class Remote:
    """A directory that passes for a bucket: no lock. `after_listing` and `before_delete` are called at those moments, once."""

    remote = True

    def __init__(self, root):
        self.inner = LocalStore(root)
        self.after_listing = self.before_delete = None

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def list(self, prefix):
        yield from self.inner.list(prefix)
        if prefix == "chunks/" and self.after_listing is not None:
            call, self.after_listing = self.after_listing, None
            call()

    def delete(self, key):
        if key.startswith("chunks/") and self.before_delete is not None:
            call, self.before_delete = self.before_delete, None
            call()
        self.inner.delete(key)


def collect(chunks, **more):
    from lazyfs.admin.gc import collect as collect_all

    return collect_all(chunks, **more)


def age(store, seconds):
    for path in store.root.glob("chunks/*/*"):
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def store(tmp_path):
    return Remote(tmp_path / "store")


@pytest.fixture
def garbage(tmp_path, store):
    """A model whose chunks are in the store, and whose manifest is gone."""
    model = make_model(tmp_path / "model", megabytes=9)
    digest, _ = import_tree(model, ChunkStore(store))
    remove(ChunkStore(store), digest)
    return model


@pytest.mark.parametrize(("old", "grace"), [(30 * HOUR, 24 * HOUR), (2 * HOUR, HOUR)], ids=["touched", "met untouched"])
def test_what_an_import_meets_after_the_listing_is_spared(store, garbage, old, grace):
    age(store, old)
    store.after_listing = lambda: import_tree(garbage, ChunkStore(store))
    done = collect(ChunkStore(store), grace_s=grace)
    assert done.chunks == 0 and store.after_listing is None
    assert verify(ChunkStore(store)).clean and verify(ChunkStore(store)).manifests == 1


def test_what_is_met_between_two_deletions_is_spared(store, garbage, monkeypatch):
    """The import touches them while the first chunk goes: it has met that one before, and is told."""
    monkeypatch.setattr("lazyfs.admin.gc._REMOTE_WORKERS", 1)
    age(store, 30 * HOUR)
    failures = []

    def meet():
        try:
            import_tree(garbage, ChunkStore(store))
        except Busy as error:
            failures.append(error.code)

    # In a thread: it waits for the collection to begin another batch, or to end.
    importing = threading.Thread(target=meet)
    store.before_delete = lambda: (importing.start(), importing.join(0.3))
    done = collect(ChunkStore(store))
    importing.join(LIMIT_S)
    assert done.chunks == 1 and failures == ["collected-meanwhile"]
    assert not list(ChunkStore(store).manifests())
    import_tree(garbage, ChunkStore(store))
    assert verify(ChunkStore(store)).clean


def test_an_import_across_a_whole_collection_is_told(store, garbage):
    """Its chunks were there when it met them, and are not when its manifest is written."""
    chunks = ChunkStore(store)
    real = chunks.put_manifest

    def put_manifest(manifest):
        collect(ChunkStore(store), grace_s=0)
        return real(manifest)

    chunks.put_manifest = put_manifest
    with pytest.raises(Busy) as caught:
        import_tree(garbage, chunks)
    assert caught.value.code == "collected-meanwhile" and not list(chunks.manifests())
    import_tree(garbage, ChunkStore(store))
    assert verify(ChunkStore(store)).clean


def test_a_collection_of_long_ago_costs_an_import_one_look(store, garbage, monkeypatch):
    collect(ChunkStore(store))
    os.utime(store.path(GC_MARK), (time.time() - HOUR,) * 2)
    looked, real = [], ChunkStore.has
    monkeypatch.setattr(ChunkStore, "has", lambda self, *a: looked.append(a) or real(self, *a))
    import_tree(garbage, ChunkStore(store))
    assert not looked


def test_a_collection_that_was_killed_is_not_waited_for(store, garbage, monkeypatch):
    monkeypatch.setattr(chunk_store, "_GC_SILENT_S", 0.0)
    store.put(GC_MARK, b'{"batch": 3, "running": true}')
    import_tree(garbage, ChunkStore(store))
    assert verify(ChunkStore(store)).clean


def test_a_manifest_that_is_imported_again_is_young(store, garbage):
    """Its tag comes a moment later, and a collection of what has no name must not come between."""
    digest, _ = import_tree(garbage, ChunkStore(store))
    for path in (*store.root.glob("manifests/*"), *store.root.glob("chunks/*/*")):
        os.utime(path, (time.time() - 30 * HOUR,) * 2)
    store.after_listing = lambda: import_tree(garbage, ChunkStore(store))
    done = collect(ChunkStore(store), untagged=True)
    assert done.manifests == 0 and ChunkStore(store).has_manifest(digest)
    assert verify(ChunkStore(store)).clean


def test_a_dry_run_deletes_nothing_and_leaves_no_mark(store, garbage):
    age(store, 30 * HOUR)
    assert collect(ChunkStore(store), dry_run=True).chunks > 1
    assert not store.path(GC_MARK).exists()
    assert collect(ChunkStore(store)).chunks > 1 and not list(store.list("chunks/"))
