"""Garbage collection in a remote store, which has no lock, during an import: no interleaving silently loses needed
chunks.
"""

from __future__ import annotations

import os
import threading
import time

import pytest

from lazyfs.admin.listing import named_manifests, remove
from lazyfs.admin.verify import verify
from lazyfs.content import chunk_store
from lazyfs.content.chunk_store import GC_MARK, ChunkStore
from lazyfs.content.importer import import_tree
from lazyfs.errors import Busy
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.models import make_model

pytestmark = pytest.mark.t0
LIMIT_S = 30
HOUR = 3600


class Remote:
    """A directory in place of a bucket, without a lock. `after_listing` and `before_delete` are called once at those
    moments.
    """

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
    """Return a model whose chunks are in the store, without a manifest."""
    model = make_model(tmp_path / "model", megabytes=9)
    digest, _ = import_tree(model, ChunkStore(store))
    remove(ChunkStore(store), digest)
    return model


@pytest.mark.parametrize(("old", "grace"), [(30 * HOUR, 24 * HOUR), (2 * HOUR, HOUR)], ids=["touched", "met untouched"])
def test_chunks_reused_by_an_import_after_the_listing_are_kept(store, garbage, old, grace):
    age(store, old)
    store.after_listing = lambda: import_tree(garbage, ChunkStore(store))
    done = collect(ChunkStore(store), grace_s=grace)
    assert done.chunks == 0 and store.after_listing is None
    assert verify(ChunkStore(store)).clean and verify(ChunkStore(store)).manifests == 1


@pytest.mark.slow
def test_chunks_reused_between_two_deletions_are_kept(store, garbage, monkeypatch):
    """The import touches the chunks while the first one is deleted. It had reused that one before, and gets an error."""
    monkeypatch.setattr("lazyfs.admin.gc._REMOTE_WORKERS", 1)
    age(store, 30 * HOUR)
    failures = []

    def meet():
        try:
            import_tree(garbage, ChunkStore(store))
        except Busy as error:
            failures.append(error.code)

    # In a thread, because it waits until the collection begins another batch or ends.
    importing = threading.Thread(target=meet)
    store.before_delete = lambda: (importing.start(), importing.join(0.3))
    done = collect(ChunkStore(store))
    importing.join(LIMIT_S)
    assert done.chunks == 1 and failures == ["collected-meanwhile"]
    assert not list(ChunkStore(store).manifests())
    import_tree(garbage, ChunkStore(store))
    assert verify(ChunkStore(store)).clean


def test_an_import_during_a_whole_collection_fails(store, garbage):
    """The chunks existed when the import reused them, and do not when it writes its manifest."""
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


@pytest.mark.parametrize("after", ["get", "touch"])
def test_a_manifest_that_was_collected_with_its_chunks_is_not_left_without_them(store, tmp_path, monkeypatch, after):
    """It was there when the import asked, old and without a name: nothing then kept it or its chunks."""
    chunks = ChunkStore(store)
    digest, _ = import_tree(make_model(tmp_path / "model", megabytes=1), chunks)
    for _, name in list(named_manifests(chunks)[0]):
        store.delete(chunks.ref_key("tags", name))
    manifest, key = chunks.get_manifest(digest), f"manifests/{digest}"
    os.utime(store.path(key), (time.time() - 30 * HOUR,) * 2)
    real = getattr(store.inner, after)

    def collected(asked, **options):
        found = real(asked, **options)
        if asked == key:
            monkeypatch.setattr(store.inner, after, real)
            collect(ChunkStore(store), grace_s=0, untagged=True)
        return found

    monkeypatch.setattr(store.inner, after, collected)
    with pytest.raises(Busy, match="deleted [0-9]+ chunks"):
        chunks.put_manifest(manifest)
    assert not list(chunks.manifests())


def test_an_old_collection_costs_an_import_one_read(store, garbage, monkeypatch):
    collect(ChunkStore(store))
    os.utime(store.path(GC_MARK), (time.time() - HOUR,) * 2)
    looked, real = [], ChunkStore.has
    monkeypatch.setattr(ChunkStore, "has", lambda self, *a: looked.append(a) or real(self, *a))
    import_tree(garbage, ChunkStore(store))
    assert not looked


def test_an_import_does_not_wait_for_a_killed_collection(store, garbage, monkeypatch):
    monkeypatch.setattr(chunk_store, "_GC_SILENT_S", 0.0)
    store.put(GC_MARK, b'{"batch": 3, "running": true}')
    import_tree(garbage, ChunkStore(store))
    assert verify(ChunkStore(store)).clean


def test_importing_a_manifest_again_renews_its_age(store, garbage):
    """Its tag is written a moment later; a collection of untagged manifests must not delete it in between."""
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
