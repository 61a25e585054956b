"""The chunk store over a directory: content addressing, refs, import, verification, removal, collection."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.admin.gc import collect
from lazyfs.admin.listing import listing, remove, store_lock
from lazyfs.admin.verify import verify
from lazyfs.cache.cache import UNPROVEN, Cache
from lazyfs.content import importer
from lazyfs.content.chunk_store import ChunkStore, chunk_key, digest_of
from lazyfs.content.importer import import_tree
from lazyfs.content.manifest import RAW, ZSTD, Chunk, File, decode, encode
from lazyfs.content.read_through import describe
from lazyfs.content.source_digests import DigestLog
from lazyfs.content.stat_index import import_directory, known_digest, origins, read_through
from lazyfs.content.trees import get_tree, put_tree
from lazyfs.errors import Busy, DiskFull, Integrity, LazyfsError, NotFound, Permanent, Temporary, Usage
from lazyfs.fetch.chunk import ChunkFetcher, ReadThroughSource, StoreSource
from lazyfs.mount import manifest_source
from lazyfs.mount.config import MountConfig
from lazyfs.stores import open_store
from lazyfs.stores.base import ObjectInfo
from lazyfs.stores.local import LocalStore
from lazyfs.stores.retry import RetryPolicy, retrying
from tests.kits.lazyfs_kit import make_model, write_safetensors

pytestmark = pytest.mark.t0


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUICKTHAW_STORE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def chunks(tmp_path):
    return ChunkStore(LocalStore(tmp_path / "store"))


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@given(st.binary(max_size=4096), st.sampled_from(["auto", None, 1, 19]))
@settings(max_examples=50, deadline=None)
def test_a_chunk_comes_back_as_it_was(tmp_path_factory, data, zstd):
    chunks = ChunkStore(LocalStore(tmp_path_factory.mktemp("s")), zstd=zstd)
    digest = chunks.put(data)
    assert digest == digest_of(data)
    assert chunks.get(digest) == data
    assert chunks.get(digest, len(data), ZSTD) == data
    assert chunks.put_chunk(data).stored == (0 if data else chunks.put_chunk(data).stored)


def test_compression_only_where_it_pays(tmp_path):
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
def test_damaged_chunks_never_come_back(chunks, spoil):
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


def test_bad_names(chunks):
    for name in ("", "../x", "a b", "a:b:c", "a//b", "x" * 200, "/a", "a/", "-x", "a\n"):
        with pytest.raises(Usage):
            chunks.set_ref("tags", name, "0" * 64)
    with pytest.raises(Usage):
        chunks.get("../../etc/passwd")
    with pytest.raises(Usage):
        open_store("gopher://x")


def test_import_skips_what_is_there_and_shares_tensors(tmp_path, chunks, monkeypatch):
    rng = random.Random(3)
    base = {f"t{i}": rng.randbytes(4 << 20) for i in range(3)}
    for name, tensors in (("base", base), ("tuned", {**base, "t1": rng.randbytes(4 << 20)})):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
    reports = []
    first, _ = import_tree(tmp_path / "base", chunks, progress=reports.append)
    assert reports[-1].done == reports[-1].total == reports[-1].stored
    second, _ = import_tree(tmp_path / "tuned", chunks, progress=reports.append)
    assert first != second
    assert reports[-1].stored == 4 << 20
    again, _ = import_tree(tmp_path / "base", chunks, progress=reports.append)
    assert again == first and reports[-1].stored == 0
    by_digest = {e.manifest: e for e in listing(chunks)}
    assert by_digest[second].unshared == 4 << 20


def test_each_byte_is_read_once(tmp_path, chunks, monkeypatch):
    model = make_model(tmp_path / "model", megabytes=12)
    read = []
    real = importer._read
    monkeypatch.setattr(importer, "_read", lambda fd, at, n, source: read.append(n) or real(fd, at, n, source))
    _, manifest = import_tree(model, chunks)
    header = 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")
    assert sum(read) == manifest.size + header


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


def test_holes_cost_nothing(tmp_path, chunks):
    (tmp_path / "m").mkdir()
    with open(tmp_path / "m" / "sparse.bin", "wb") as f:
        f.truncate(64 << 20)
    digest, manifest = import_tree(tmp_path / "m", chunks)
    assert len(manifest.chunk_digests()) == 1
    get_tree(digest, chunks, tmp_path / "out")
    assert (tmp_path / "out" / "sparse.bin").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "out" / "sparse.bin").read_bytes() == bytes(64 << 20)


def test_links_that_lead_out_are_followed(tmp_path, chunks):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.bin").symlink_to("../blobs/abc")
    _, manifest = import_tree(tmp_path / "snapshot", chunks)
    assert [f.path for f in manifest.files] == ["model.bin"] and not manifest.symlinks
    (tmp_path / "snapshot" / "loop").symlink_to("../snapshot")
    with pytest.raises(Permanent) as caught:
        import_tree(tmp_path / "snapshot", chunks)
    assert caught.value.code == "link-loop"
    (tmp_path / "snapshot" / "loop").unlink()
    (tmp_path / "snapshot" / "broken").symlink_to("../blobs/gone")
    with pytest.raises(Permanent, match="broken: a symbolic link to ../blobs/gone") as caught:
        import_tree(tmp_path / "snapshot", chunks)
    assert caught.value.code == "dangling-link"


def test_links_to_nothing_inside_are_kept_as_they_are(tmp_path, home):
    model = make_model(tmp_path / "model", megabytes=1)
    (model / "sub" / "nothing").symlink_to("../later.json")
    (model / "circle").symlink_to("circle")
    digest = import_directory(model)
    links = {s.path: s.target for s in ChunkStore(open_store(f"file://{home / 'store'}")).get_manifest(digest).symlinks}
    assert links["sub/nothing"] == "../later.json" and links["circle"] == "circle"
    assert known_digest(model) == digest == import_directory(model)


def test_what_cannot_be_imported(tmp_path, chunks):
    with pytest.raises(NotFound):
        import_tree(tmp_path / "none", chunks)
    (tmp_path / "file").touch()
    with pytest.raises(Usage):
        import_tree(tmp_path / "file", chunks)
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "pipe")
    with pytest.raises(Permanent) as caught:
        import_tree(tmp_path / "d", chunks)
    assert caught.value.code == "bad-file-type"
    assert not (tmp_path / "store" / "manifests").exists()


def test_a_pipe_in_a_shared_store_holds_up_nobody(tmp_path):
    """Opening a pipe that nobody writes to blocks for ever."""
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


def test_a_full_disk_leaves_no_half_import(tmp_path, home):
    model = make_model(tmp_path / "model", megabytes=12)
    chunks = ChunkStore(LocalStore(tmp_path / "store"))
    real_write = os.write
    spent = []

    def write(fd, data):
        spent.append(len(data))
        if sum(spent) > 9 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(fd, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lazyfs.stores.local.os.write", write)
        with pytest.raises(DiskFull) as caught:
            import_tree(model, chunks)
    assert "free some space" in str(caught.value)
    assert not [p for p in files_below(tmp_path / "store") if ".tmp" in p or p.startswith("manifests")]
    assert verify(chunks).clean
    digest, _ = import_tree(model, chunks)
    assert verify(chunks, [digest]).clean


def test_a_source_that_changes_while_read_gets_no_digest(tmp_path, chunks):
    model = make_model(tmp_path / "model", megabytes=12)
    listed = importer.walk(model)
    (model / "config.json").write_text("changed meanwhile")
    with pytest.raises(Permanent) as caught:
        import_tree(model, chunks, listing=listed)
    assert caught.value.code == "source-changed"


def test_import_directory_knows_what_it_knows(tmp_path, home, monkeypatch):
    model = make_model(tmp_path / "model", megabytes=5)
    digest = import_directory(model, tag="toy:v1")
    calls = []
    monkeypatch.setattr("lazyfs.content.importer.import_tree", lambda *a, **k: calls.append(a))
    assert import_directory(model) == digest and not calls
    assert import_directory(model, tag="toy:v2") == digest and not calls
    store = ChunkStore(open_store(f"file://{home / 'store'}"))
    assert dict(store.refs("tags")) == {"toy:v1": digest, "toy:v2": digest}
    monkeypatch.undo()
    monkeypatch.setenv("QUICKTHAW_HOME", str(home))
    same_size = (model / "config.json").read_text().replace("toy", "toz")
    before = (model / "config.json").stat()
    (model / "config.json").write_text(same_size)
    os.utime(model / "config.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert import_directory(model) != digest
    shutil.rmtree(home / "store" / "manifests")
    assert import_directory(model) in [p.name for p in (home / "store" / "manifests").iterdir()]
    assert (home.stat().st_mode & 0o777) == 0o700
    assert not [p for p in home.rglob("*") if p.is_file() and p.stat().st_mode & 0o077]


def test_read_through_copies_nothing(tmp_path, home):
    model = make_model(tmp_path / "model", megabytes=5)
    digest = read_through(model)
    assert read_through(model) == digest
    assert sum(p.stat().st_size for p in home.rglob("*") if p.is_file()) < 100_000
    (model / "config.json").write_text("another")
    assert read_through(model) != digest


def test_what_is_left_of_the_originals(tmp_path, home):
    model = make_model(tmp_path / "model", megabytes=5)
    digest, url = import_directory(model), f"file://{home / 'store'}"
    assert "config.json" in origins(digest, url) and "model.safetensors" in origins(digest, url)
    (model / "config.json").write_text("another")
    assert "config.json" not in origins(digest, url) and "model.safetensors" in origins(digest, url)
    again = shutil.copytree(model, tmp_path / "again", symlinks=True)
    (again / "config.json").write_text('{"model_type": "toy"}')
    assert import_directory(again) == digest
    assert origins(digest, url)["config.json"][0] == str(again / "config.json")
    shutil.rmtree(model)
    shutil.rmtree(again)
    assert origins(digest, url) == {}


class Listed:
    """A bucket that a listing shows as obstore does: without the slash that a folder's marker ends with."""

    remote, url = True, "s3://bucket/m"

    def __init__(self, objects):
        self.objects = objects

    def list(self, prefix):
        return iter([ObjectInfo(key.rstrip("/"), len(body), 0.0, "v1") for key, body in self.objects.items()])

    def head(self, key):
        body = self.objects.get(key)
        return None if body is None else ObjectInfo(key, len(body), 0.0, "v1")

    def get(self, key, start=0, length=None, version="", into=None):
        return self.objects[key][start:][:length]


@pytest.mark.parametrize(
    ("objects", "files", "folders"),
    [
        ({"": b"", "a/": b"", "a/b": b"1"}, ["a/b"], ["a"]),
        ({"a/b/": b"", "c": b"1"}, ["c"], ["a", "a/b"]),
        ({"empty": b"", "c": b"1"}, ["c", "empty"], []),
        ({"a": b"", "a/b": b"1"}, ["a/b"], ["a"]),
    ],
)
def test_objects_that_stand_for_folders(monkeypatch, objects, files, folders):
    monkeypatch.setattr("lazyfs.content.read_through.open_store", lambda url: Listed(objects))
    digest, data = encode(describe("s3://bucket/m"))
    manifest = decode(data, digest, local=True)
    assert [f.path for f in manifest.files] == files and [d.path for d in manifest.directories] == folders


def test_an_object_that_is_a_folder_too_is_named(monkeypatch):
    monkeypatch.setattr("lazyfs.content.read_through.open_store", lambda url: Listed({"a": b"1", "a/b": b"2"}))
    with pytest.raises(Permanent, match="a is an object and a folder") as caught:
        describe("s3://bucket/m")
    assert caught.value.code == "name-clash"


def test_equal_bodies_are_quarantined_once_and_the_quarantine_can_be_emptied(tmp_path):
    cache = Cache(tmp_path / "cache")
    first = cache.quarantine("ab", b"wrong", "why")
    assert cache.quarantine("ab", memoryview(b"wrong"), "why again") == first
    assert cache.quarantine("ab", b"other", "why") != first and len(cache.quarantined()) == 2
    cache.clear_quarantine()
    assert cache.quarantined() == []


@pytest.mark.parametrize(("attempts", "tries"), [(3, 3), (None, 20)])
def test_tries_are_counted_or_the_limit_alone_ends_them(attempts, tries):
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


def test_verify_names_what_is_wrong_and_repairs(tmp_path, chunks):
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
    """The first `times` gets of each key come back with a flipped bit."""

    def __init__(self, root, times):
        super().__init__(root)
        self.times, self.asked = times, {}

    def get(self, key, *arguments, **more):
        self.asked[key] = self.asked.get(key, 0) + 1
        data = bytearray(super().get(key, *arguments, **more))
        if self.asked[key] <= self.times:
            data[len(data) // 2] ^= 1
        return bytes(data)


def test_what_is_spoiled_on_its_way_is_read_once_more_before_it_counts_as_damaged(tmp_path, chunks):
    digest, manifest = import_tree(make_model(tmp_path / "model", megabytes=6), chunks)
    once = ChunkStore(SpoiledOnTheWay(tmp_path / "store", 1))
    assert verify(once, repair=True).clean
    assert set(once.store.asked.values()) == {2}
    twice = verify(ChunkStore(SpoiledOnTheWay(tmp_path / "store", 2)))
    assert list(twice.broken_manifests) == [digest]
    assert verify(chunks).clean, "nothing was deleted for a bit that flipped elsewhere"


@pytest.mark.parametrize(("times", "right"), [(1, True), (2, False)])
def test_a_manifest_spoiled_on_its_way_is_fetched_once_more(tmp_path, chunks, monkeypatch, times, right):
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
    """Cut short on its way, flipped inside a zstd frame, or flipped in plain bytes: each is kept, with why."""
    _, manifest = import_tree(make_model(tmp_path / "model", megabytes=1), ChunkStore(chunks.store, zstd=1))
    cache = Cache(tmp_path / "cache")
    for path, why in (("sub/tokenizer.json", "decompress"), ("model.safetensors", "instead of")):
        file = next(f for f in manifest.files if f.path == path)
        source = StoreSource(ChunkStore(SpoiledOnTheWay(tmp_path / "store", 2)))
        image = cache.open(file)
        with pytest.raises(Integrity):
            ChunkFetcher(cache, source, {}, 5.0).fill(image, 0)
        image.close()
        name, reason = cache.quarantined()[-1]
        assert name.startswith(file.chunks[0].digest)
        assert why in reason and f"chunk 0 of {path}" in reason and str(tmp_path / "store") in reason
    assert len(cache.quarantined()) == 2  # the second body of each was the same
    for number in range(20):
        cache.quarantine("ab" * 32, b"x%d" % number, f"reason {number}")
    assert [r for _, r in cache.quarantined()] == [f"reason {n}" for n in range(4, 20)]
    assert len(list((tmp_path / "cache" / "reasons").iterdir())) == 16


def test_a_digest_lost_in_a_power_cut_proves_nothing(tmp_path):
    """A read-through chunk whose recorded digest did not reach the disk is fetched again, not believed."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a").write_bytes(b"right" * 1000)
    info = next(LocalStore(folder).list(""))
    file = File("a", 0o644, info.size, (Chunk("", info.size),), info.version)
    cache = Cache(tmp_path / "cache")
    image = cache.open(file)
    image.write(0, b"wrong" * 1000)
    image.mark(0, UNPROVEN)
    fetcher = ChunkFetcher(cache, ReadThroughSource(LocalStore(folder)), {}, 5.0, DigestLog(tmp_path / "digests"))
    assert fetcher.fill(image, 0) is None
    assert image.read(0) == b"right" * 1000 and fetcher.stats.tiers["store"] == 5000
    image.mark(0, UNPROVEN)
    assert fetcher.fill(image, 0) is None and fetcher.stats.tiers["proven"] == 5000
    image.close()


def test_collection_spares_what_is_named_young_or_a_snapshot(tmp_path, chunks):
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


def test_resolving(tmp_path, chunks):
    digest = put_tree(make_model(tmp_path / "m", megabytes=1), chunks, kind="weights", name="m:latest")
    assert chunks.resolve("m") == chunks.resolve("m:latest") == chunks.resolve(digest) == digest
    assert chunks.resolve(digest[:10]) == digest
    for name in ("nothing", "0" * 12, "m:other"):
        with pytest.raises(NotFound):
            chunks.resolve(name)
