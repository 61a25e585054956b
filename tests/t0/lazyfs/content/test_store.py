"""The chunk store in a directory: content addressing, refs, import, verification, removal, collection."""

from __future__ import annotations

import os
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.admin.gc import collect
from lazyfs.admin.listing import remove, store_lock
from lazyfs.admin.verify import verify
from lazyfs.cache.cache import Cache
from lazyfs.cache.sparse_file import UNVERIFIED
from lazyfs.content.chunk_store import ChunkStore, chunk_key, digest_of
from lazyfs.content.importer import import_tree
from lazyfs.content.manifest import RAW, VERSION, ZSTD, Chunk, File, Manifest
from lazyfs.content.source_digests import DigestLog
from lazyfs.content.trees import get_tree, put_tree
from lazyfs.errors import Busy, Integrity, LazyfsError, NotFound, Permanent, Temporary, Usage
from lazyfs.fetch.chunk import ChunkFetcher, ReadThroughSource, StoreSource, open_origin
from lazyfs.mount import manifest_source
from lazyfs.mount.config import MountConfig
from lazyfs.paths import fingerprint
from lazyfs.stores import open_store
from lazyfs.stores.local import LocalStore
from lazyfs.stores.retry import RetryPolicy, retrying
from tests.kits.lazyfs.models import make_model

pytestmark = pytest.mark.t0


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@given(st.binary(max_size=4096), st.sampled_from(["auto", None, 1, 19]))
@settings(max_examples=50, deadline=None)
def test_a_chunk_round_trips(tmp_path_factory, data, zstd):
    chunks = ChunkStore(LocalStore(tmp_path_factory.mktemp("s")), zstd=zstd)
    digest = chunks.put(data)
    assert digest == digest_of(data)
    assert chunks.get(digest) == data
    assert chunks.get(digest, len(data), ZSTD) == data
    assert chunks.put_chunk(data).stored == (0 if data else chunks.put_chunk(data).stored)


def test_chunks_are_compressed_only_if_that_saves_enough(tmp_path):
    noise, text = random.Random(1).randbytes(1 << 20), b"the same words " * 70_000
    auto = ChunkStore(LocalStore(tmp_path / "a"))
    assert auto.put_chunk(noise).chunk.encoding == RAW
    assert auto.put_chunk(text).chunk.encoding == ZSTD
    assert ChunkStore(LocalStore(tmp_path / "b"), zstd=None).put_chunk(text).chunk.encoding == RAW
    forced = ChunkStore(LocalStore(tmp_path / "c"), zstd=3)
    assert forced.put_chunk(text).stored < len(text) // 50
    assert forced.put_chunk(noise).chunk.encoding == RAW
    with pytest.raises(Usage):
        ChunkStore(LocalStore(tmp_path), zstd=99)


@pytest.mark.parametrize("spoil", ["flip", "truncate", "extend", "empty", "zstd-garbage"])
def test_damaged_chunks_are_never_returned(chunks, spoil):
    data = random.Random(2).randbytes(10_000)
    digest = chunks.put(data)
    path = chunks.store.path(chunk_key(digest))
    body = bytearray(path.read_bytes())
    if spoil == "flip":
        body[5000] ^= 1
    elif spoil == "truncate":
        del body[9000:]
    elif spoil == "extend":
        body += b"x"
    elif spoil == "empty":
        body.clear()
    else:
        path.unlink()
        path = chunks.store.path(chunk_key(digest, ZSTD))
    path.write_bytes(body)
    with pytest.raises(Integrity):
        chunks.get(digest, len(data))


@pytest.mark.parametrize("at", ["head", "touch"])
def test_what_a_collection_removes_while_it_is_stored_again_is_written(chunks, monkeypatch, at):
    """An old chunk or manifest is there, and is gone when its age is asked for, or reset."""
    manifest = Manifest(VERSION, "tree", (), (File("a", 0o644, 4, (chunks.put_chunk(b"abcd").chunk,)),), (), {})
    digest = chunks.put_manifest(manifest)
    keys = [chunk_key(digest_of(b"abcd"), RAW), f"manifests/{digest}"]
    for key in keys:
        os.utime(chunks.store.path(key), (0, 0))
    real = getattr(chunks.store, at)

    def removed_first(key):
        chunks.store.delete(key)
        return real(key)

    with monkeypatch.context() as patched:
        patched.setattr(chunks.store, at, removed_first)
        assert chunks.put(b"abcd") == digest_of(b"abcd") and chunks.put_manifest(manifest) == digest
    assert all(chunks.store.head(key) is not None for key in keys)


def test_bad_names_are_refused(chunks):
    for name in ("", "../x", "a b", "a:b:c", "a//b", "x" * 200, "/a", "a/", "-x", "a\n"):
        with pytest.raises(Usage):
            chunks.set_ref("tags", name, "0" * 64)
    with pytest.raises(Usage):
        chunks.get("../../etc/passwd")
    with pytest.raises(Usage):
        open_store("gopher://x")


def test_tree_round_trip(tmp_path, chunks):
    model = make_model(tmp_path / "model", megabytes=5)
    (model / "config.json").chmod(0o640)
    digest = put_tree(model, chunks, name="m1", meta={"engine": "toy"})
    assert chunks.resolve("m1") == digest
    get_tree(digest, chunks, tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(model)
    for path in files_below(model):
        assert (tmp_path / "out" / path).read_bytes() == (model / path).read_bytes()
        assert (tmp_path / "out" / path).stat().st_mode == (model / path).stat().st_mode
    assert os.readlink(tmp_path / "out" / "sub" / "up") == "../config.json"
    assert put_tree(tmp_path / "out", chunks, meta={"engine": "toy"}) == digest
    with pytest.raises(Permanent) as caught:
        get_tree(digest, chunks, tmp_path / "out")
    assert caught.value.code == "exists"


def test_a_failed_export_leaves_nothing(tmp_path, chunks):
    model = make_model(tmp_path / "model", megabytes=5)
    digest, manifest = import_tree(model, chunks)
    victim = manifest.files[2].chunks[-1].digest
    chunks.store.path(chunk_key(victim)).write_bytes(b"nonsense")
    with pytest.raises(LazyfsError):
        get_tree(digest, chunks, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "store"]


def test_a_pipe_in_place_of_an_original_does_not_block(tmp_path):
    original = tmp_path / "model.safetensors"
    original.write_bytes(b"weights")
    stats = fingerprint(original.stat())
    original.unlink()
    os.mkfifo(original)
    found = []

    def read():
        with open_origin(str(original), stats) as fd:
            found.append(fd)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert found == [None]


def test_a_pipe_in_a_shared_store_does_not_block(tmp_path):
    """Opening a pipe without a writer blocks forever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    kinds = []

    def ask(key):
        try:
            LocalStore(tmp_path).get(key)
        except Permanent as error:
            kinds.append(error.code)

    for key in ("pipe", "folder"):
        asked = threading.Thread(target=ask, args=[key], daemon=True)
        asked.start()
        asked.join(5.0)
        assert not asked.is_alive()
    assert kinds == ["not-a-file", "not-a-file"]


def test_equal_bodies_are_quarantined_once_and_the_quarantine_can_be_emptied(tmp_path):
    cache = Cache(tmp_path / "cache")
    first = cache.quarantine("ab", b"wrong", "why")
    assert cache.quarantine("ab", memoryview(b"wrong"), "why again") == first
    assert cache.quarantine("ab", b"other", "why") != first and len(cache.quarantined()) == 2
    cache.clear_quarantine()
    assert cache.quarantined() == []


@pytest.mark.parametrize(("attempts", "tries"), [(3, 3), (None, 20)])
def test_retries_end_by_count_or_by_the_time_limit(attempts, tries):
    calls = []

    def call():
        calls.append(1)
        if len(calls) < 20:
            raise Temporary("503")
        return "here"

    policy = RetryPolicy(attempts=attempts, base=0.0, limit=30.0)
    if attempts:
        with pytest.raises(Temporary):
            retrying(call, policy)
    else:
        assert retrying(call, policy) == "here"
    assert len(calls) == tries


def test_verify_names_damage_and_repairs_it(tmp_path, chunks):
    model = make_model(tmp_path / "model", megabytes=12)
    digest, manifest = import_tree(model, chunks)
    big = next(f for f in manifest.files if f.path == "model.safetensors")
    bad, gone = big.chunks[1].digest, big.chunks[-1].digest
    path = chunks.store.path(chunk_key(bad))
    path.write_bytes(b"\0" * path.stat().st_size)
    chunks.store.delete(chunk_key(gone))
    report = verify(chunks)
    assert report.bad == {bad: "model.safetensors"} and report.missing == {gone: "model.safetensors"}
    assert not report.clean
    verify(chunks, repair=True)
    import_tree(model, chunks)
    assert verify(chunks, [digest]).clean
    chunks.store.path(f"manifests/{digest}").write_bytes(b"{}")
    assert list(verify(chunks).broken_manifests) == [digest]


class SpoiledOnTheWay(LocalStore):
    """The first `times` gets of each key return one flipped bit."""

    def __init__(self, root, times):
        super().__init__(root)
        self.times, self.asked = times, {}

    def get(self, key, *arguments, **more):
        self.asked[key] = self.asked.get(key, 0) + 1
        data = bytearray(super().get(key, *arguments, **more))
        if self.asked[key] <= self.times:
            data[len(data) // 2] ^= 1
        return bytes(data)


def test_a_chunk_damaged_in_transit_is_read_again_before_it_counts_as_damaged(tmp_path, chunks):
    digest, manifest = import_tree(make_model(tmp_path / "model", megabytes=6), chunks)
    once = ChunkStore(SpoiledOnTheWay(tmp_path / "store", 1))
    assert verify(once, repair=True).clean
    assert set(once.store.asked.values()) == {2}
    twice = verify(ChunkStore(SpoiledOnTheWay(tmp_path / "store", 2)))
    assert list(twice.broken_manifests) == [digest]
    assert verify(chunks).clean, "a bit flipped in transit deletes nothing"


@pytest.mark.parametrize(("times", "right"), [(1, True), (2, False)])
def test_a_manifest_damaged_in_transit_is_fetched_again(tmp_path, chunks, monkeypatch, times, right):
    digest, manifest = import_tree(make_model(tmp_path / "model", megabytes=1), chunks)
    monkeypatch.setattr(manifest_source, "open_store", lambda url: SpoiledOnTheWay(tmp_path / "store", times))
    names = {n: str(tmp_path / n) for n in ("mountpoint", "cache_dir", "log_file", "socket", "state_file", "home")}
    config = MountConfig(manifest=digest, store_url="file:///", **names)
    if right:
        assert manifest_source.load_manifest(config) == manifest
    else:
        with pytest.raises(Integrity):
            manifest_source.load_manifest(config)
        assert not (tmp_path / "cache_dir" / "manifests").exists()


def test_a_body_that_does_not_decode_is_quarantined_with_its_reason(tmp_path, chunks):
    """Truncated in transit, flipped inside a zstd frame, or flipped in plain bytes: each is kept with its reason."""
    _, manifest = import_tree(make_model(tmp_path / "model", megabytes=1), ChunkStore(chunks.store, zstd=1))
    cache = Cache(tmp_path / "cache")
    for path, why in (("sub/tokenizer.json", "decompress"), ("model.safetensors", "instead of")):
        file = next(f for f in manifest.files if f.path == path)
        source = StoreSource(ChunkStore(SpoiledOnTheWay(tmp_path / "store", 2)))
        sparse_file = cache.open(file)
        with pytest.raises(Integrity):
            ChunkFetcher(cache, source, {}, 5.0).fill(sparse_file, 0)
        sparse_file.close()
        name, reason = cache.quarantined()[-1]
        assert name.startswith(file.chunks[0].digest)
        assert why in reason and f"chunk 0 of {path}" in reason and str(tmp_path / "store") in reason
    assert len(cache.quarantined()) == 2  # the second body of each was the same
    for number in range(20):
        cache.quarantine("ab" * 32, b"x%d" % number, f"reason {number}")
    assert [r for _, r in cache.quarantined()] == [f"reason {n}" for n in range(4, 20)]
    assert len(list((tmp_path / "cache" / "reasons").iterdir())) == 16


def test_a_digest_lost_in_a_power_cut_is_not_trusted(tmp_path):
    """A read-through chunk whose recorded digest did not reach the disk is fetched again."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a").write_bytes(b"right" * 1000)
    info = next(LocalStore(folder).list(""))
    file = File("a", 0o644, info.size, (Chunk("", info.size),), info.version)
    cache = Cache(tmp_path / "cache")
    sparse_file = cache.open(file)
    sparse_file.write(0, b"wrong" * 1000)
    sparse_file.mark(0, UNVERIFIED)
    fetcher = ChunkFetcher(cache, ReadThroughSource(LocalStore(folder)), {}, 5.0, DigestLog(tmp_path / "digests"))
    assert fetcher.fill(sparse_file, 0) is None
    assert sparse_file.read(0) == b"right" * 1000 and fetcher.stats.tiers["store"] == 5000
    sparse_file.mark(0, UNVERIFIED)
    assert fetcher.fill(sparse_file, 0) is None and fetcher.stats.tiers["proven"] == 5000
    sparse_file.close()


def test_collection_keeps_named_and_young_chunks_and_snapshots(tmp_path, chunks):
    one = put_tree(make_model(tmp_path / "a", megabytes=5, seed=1), chunks, kind="weights", name="a:1")
    two = put_tree(make_model(tmp_path / "b", megabytes=5, seed=2), chunks, kind="weights")
    snapshot = put_tree(make_model(tmp_path / "c", megabytes=5, seed=3), chunks)
    assert collect(chunks, grace_s=0).chunks == 0
    assert collect(chunks, grace_s=0, untagged=True, dry_run=True).manifests == 1
    assert verify(chunks).manifests == 3
    done = collect(chunks, grace_s=0, untagged=True)
    assert done.manifests == 1 and done.bytes > 4 << 20
    assert set(chunks.manifests()) == {one, snapshot} and two not in set(chunks.manifests())
    assert verify(chunks).clean
    assert remove(chunks, "a:1") == ["tag a:1", f"manifest {one}"]
    assert collect(chunks, grace_s=3600).chunks == 0
    assert collect(chunks, grace_s=0).bytes > 4 << 20
    assert verify(chunks).clean and list(chunks.manifests()) == [snapshot]


def test_collection_and_import_exclude_each_other(tmp_path, chunks):
    with store_lock(chunks, exclusive=False):
        with store_lock(chunks, exclusive=False):
            pass
        with pytest.raises(Busy):
            collect(chunks, grace_s=0)
    with store_lock(chunks, exclusive=True), pytest.raises(Busy):
        import_tree(make_model(tmp_path / "m", megabytes=1), chunks)


def test_names_tags_and_digest_prefixes_resolve(tmp_path, chunks):
    digest = put_tree(make_model(tmp_path / "m", megabytes=1), chunks, kind="weights", name="m:latest")
    assert chunks.resolve("m") == chunks.resolve("m:latest") == chunks.resolve(digest) == digest
    assert chunks.resolve(digest[:10]) == digest
    for name in ("nothing", "0" * 12, "m:other"):
        with pytest.raises(NotFound):
            chunks.resolve(name)
