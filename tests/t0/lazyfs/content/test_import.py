"""Imports: what is read, followed, refused and recorded; and reading through without an import."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time

import pytest

from lazyfs.admin.listing import listing
from lazyfs.admin.verify import verify
from lazyfs.content import importer
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.importer import import_tree
from lazyfs.content.manifest import decode, encode
from lazyfs.content.read_through import describe
from lazyfs.content.stat_index import import_directory, known_digest, origins, read_through
from lazyfs.content.trees import get_tree
from lazyfs.errors import DiskFull, NotFound, Permanent, Usage
from lazyfs.stores import open_store
from lazyfs.stores.base import ObjectInfo
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.models import make_model, write_safetensors

pytestmark = pytest.mark.t0


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_import_skips_stored_chunks_and_shares_tensors(tmp_path, chunks, monkeypatch):
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


def test_holes_cost_nothing(tmp_path, chunks):
    (tmp_path / "m").mkdir()
    with open(tmp_path / "m" / "sparse.bin", "wb") as f:
        f.truncate(64 << 20)
    digest, manifest = import_tree(tmp_path / "m", chunks)
    assert len(manifest.chunk_digests()) == 1
    get_tree(digest, chunks, tmp_path / "out")
    assert (tmp_path / "out" / "sparse.bin").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "out" / "sparse.bin").read_bytes() == bytes(64 << 20)


def test_links_out_of_the_directory_are_followed(tmp_path, chunks):
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
    with pytest.raises(Permanent, match="broken: cannot follow the symbolic link to ../blobs/gone") as caught:
        import_tree(tmp_path / "snapshot", chunks)
    assert caught.value.code == "dangling-link"


def test_dangling_links_inside_are_kept(tmp_path, home):
    model = make_model(tmp_path / "model", megabytes=1)
    (model / "sub" / "nothing").symlink_to("../later.json")
    (model / "circle").symlink_to("circle")
    digest = import_directory(model)
    links = {s.path: s.target for s in ChunkStore(open_store(f"file://{home / 'store'}")).get_manifest(digest).symlinks}
    assert links["sub/nothing"] == "../later.json" and links["circle"] == "circle"
    assert known_digest(model) == digest == import_directory(model)


def test_unsupported_files_are_refused(tmp_path, chunks):
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


def test_import_directory_reuses_an_unchanged_record(tmp_path, home, monkeypatch):
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


def test_origins_lists_unchanged_originals_only(tmp_path, home):
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
    """A bucket whose listing shows folder markers as obstore does: without their trailing slash."""

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
def test_folder_markers_become_folders(monkeypatch, objects, files, folders):
    monkeypatch.setattr("lazyfs.stores.open_store", lambda url: Listed(objects))
    digest, data = encode(describe("s3://bucket/m"))
    manifest = decode(data, digest, local=True)
    assert [f.path for f in manifest.files] == files and [d.path for d in manifest.directories] == folders


def test_an_object_that_is_also_a_folder_is_refused(monkeypatch):
    monkeypatch.setattr("lazyfs.stores.open_store", lambda url: Listed({"a": b"1", "a/b": b"2"}))
    with pytest.raises(Permanent, match="a is both an object and a folder") as caught:
        describe("s3://bucket/m")
    assert caught.value.code == "name-clash"


def test_the_headers_of_hundreds_of_safetensors_are_read_at_once_with_one_request_each_and_kept(monkeypatch, tmp_path):
    write_safetensors(tmp_path / "part", {"a": bytes(3000), "b": bytes(5000)})
    store = Listed({f"model-{i}.safetensors": (tmp_path / "part").read_bytes() for i in range(300)})
    monkeypatch.setattr("lazyfs.stores.open_store", lambda url: store)
    asked, most, now, lock, get = [], [0], [0], threading.Lock(), store.get

    def slow(key, *arguments, **named):
        with lock:
            asked.append(key)
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1
        return get(key, *arguments, **named)

    monkeypatch.setattr(store, "get", slow)
    manifest = describe("s3://bucket/m")
    assert sorted(asked) == sorted(store.objects) and most[0] > 4
    assert all(len(file.chunks) > 1 for file in manifest.files)
    store.objects["model-7.safetensors"] += b"longer"
    asked.clear()
    changed = describe("s3://bucket/m", manifest)
    assert asked == ["model-7.safetensors"] and len(changed.files) == 300
