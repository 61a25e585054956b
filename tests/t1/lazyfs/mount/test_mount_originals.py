"""Originals that a mount reads in place: changed, truncated, removed, or in a directory that was never imported."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from lazyfs.api import import_directory, read_through
from lazyfs.mount import kernel
from tests.kits.lazyfs.rig import (
    assert_same,
    both,
    is_daemon,
    wait_for,
    write_model,
)

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]


@both
@pytest.mark.slow
def test_a_truncated_original_fails_and_the_daemon_continues(rig, tmp_path, shared, transport):
    """Truncated while it is open: EIO for the missing part."""
    model = write_model(tmp_path / "own", [5 << 20, 3 << 20])
    handle = rig.mount(read_through(model), transport=transport, native="off", cache_dir=None)
    reader, path = rig.reader(), handle.mountpoint / "model.safetensors"
    assert reader.ask("open", "m", str(path)) is True
    os.truncate(model / "model.safetensors", 1 << 20)
    assert reader.ask("pread", "m", 6 << 20, 4096) == {"errno": errno.EIO}
    assert reader.ask("digest", str(handle.mountpoint / "config.json")) == reader.ask(
        "digest", str(model / "config.json")
    )
    assert is_daemon(handle.pid)


@pytest.mark.slow
@both
def test_a_changed_original_is_not_served(shared, rig, tmp_path, transport):
    model = write_model(tmp_path / "own", [5 << 20])
    digest = import_directory(model)
    handle = rig.mount(digest, transport=transport)
    reader, path = rig.reader(), model / "config.json"
    before = reader.ask("digest", str(path))
    stat = path.stat()
    path.write_text(path.read_text().replace("toy", "bad"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert reader.ask("digest", str(handle.mountpoint / "config.json")) == before != reader.ask("digest", str(path))


@pytest.mark.slow
@both
@pytest.mark.parametrize("native", ["auto", "off"])
def test_open_files_see_changes_of_an_original(rig, tmp_path, shared, transport, native):
    """A reader that has it open sees the new bytes, as in the plain directory; other readers do not."""
    model = write_model(tmp_path / "own", [5 << 20])
    handle = rig.mount(import_directory(model), transport=transport, native=native)
    path, reader = str(handle.mountpoint / "config.json"), rig.reader()
    wanted = reader.ask("digest", path)
    reader.ask("open", 0, path)
    (model / "sub" / "tokenizer.json").unlink()  # A file that is only removed is unchanged.
    with open(model / "config.json", "r+b") as original:
        original.write(b"EVIL")
    assert reader.ask("open", 1, path) == {"errno": errno.EIO}
    reader.ask("close", 0)
    # The kernel reports the last close a moment later.
    wait_for(lambda: reader.ask("digest", path) == wanted)


def test_reading_a_directory_in_place(rig, tmp_path, shared):
    model = write_model(tmp_path / "own", [5 << 20, 1000])
    handle = rig.mount(read_through(model), cache_dir=None)
    reader = rig.reader()
    assert_same(reader, model, handle.mountpoint)
    assert handle.status()["counters"]["reads"] == 0
    handle.unmount()
    cached = rig.mount(read_through(model), use_origin=False, cache_dir=None)
    assert_same(reader, model, cached.mountpoint)
    (model / "sub" / "tokenizer.json").write_bytes(b"y" * 100_000)
    stale = rig.mount(cached.manifest, "second", use_origin=False, cache_dir=None)
    assert_same_or_error(reader, stale.mountpoint / "sub" / "tokenizer.json", 100_000)


def assert_same_or_error(reader, path, size):
    """Assert that a source that changed under a mount gives the old bytes (cached) or an error, never the new ones."""
    answer = reader.ask("call", f"open({str(path)!r}, 'rb').read().count(b'y')")
    assert isinstance(answer, dict) or answer < size // 2


@pytest.mark.slow
def test_a_missing_original_does_not_count_as_cached(rig, tmp_path, shared):
    model = write_model(tmp_path / "own", [5 << 20])
    digest = import_directory(model)
    handle = rig.mount(digest, cache_dir=tmp_path / "c")
    size = handle.status()["bytes"]
    assert handle.status()["cached_bytes"] == size
    assert handle.control("pin").items() >= {"files": 4, "in_place": 4, "absent_chunks": 0, "absent_bytes": 0}.items()
    shutil.rmtree(model)
    assert handle.status()["cached_bytes"] == 0
    handle.unmount()
    # A later mount fetches all of it in the background, like any other file.
    again = rig.mount(digest, "again", cache_dir=tmp_path / "c")
    wait_for(lambda: again.status()["cached_bytes"] == size)
