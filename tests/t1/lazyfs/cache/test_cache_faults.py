"""A cache with a full disk, a limit, damage, or after a power cut: no wrong byte, no reader that hangs."""

from __future__ import annotations

import subprocess

import pytest

from lazyfs.admin.verify import VerifyReport, verify_cache
from lazyfs.api import import_directory
from lazyfs.cache.cache import Cache
from lazyfs.cache.reservations import reserved_by_others
from lazyfs.cache.sparse_file import PRESENT, UNVERIFIED
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.errors import LazyfsError
from lazyfs.mount import kernel
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.rig import LIMIT_S, digest_or_errno, wait_for, write_model

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]


# Long enough for one or two retries, short enough for a test.
QUICK = {"fetch_limit_s": 1.0, "read_limit_s": 4.0, "use_origin": False, "prefetch": False}


def test_reads_are_streamed_on_a_full_disk(stored, rig, tmp_path):
    """The cache is on a tiny file system: every byte is right, nothing fails, no partial file stays."""
    model, digest, _ = stored
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "none", small], check=True, timeout=LIMIT_S)
    try:
        handle = rig.mount(digest, cache_dir=small / "c", use_origin=False)
        reader = rig.reader()
        for _ in range(2):
            for name in ("model.safetensors", "config.json", "sub/tokenizer.json"):
                right = reader.ask("digest", str(model / name))
                assert digest_or_errno(reader, handle.mountpoint / name) == right
        assert handle.status()["counters"]["failed"] == 0
        assert handle.status()["counters"]["streamed"] > 0
        handle.unmount(force=True)
        # Inspecting sparse files takes a few bytes, too; what was written while the disk was full is inspected.
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True, timeout=LIMIT_S)
        report = VerifyReport()
        verify_cache(Cache(small / "c"), None, report)
        assert report.clean
    finally:
        rig.close()
        # The fetcher of a killed daemon ends shortly after it.
        wait_for(lambda: subprocess.run(["umount", small], check=False, timeout=LIMIT_S).returncode == 0)


@pytest.mark.slow
def test_mounting_pinning_and_verifying_on_a_full_disk(stored, rig, tmp_path, monkeypatch):
    """Not a byte is free for records: the mount serves, what cannot be stored is refused by name, and verifying needs no space."""
    model, digest, store = stored
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True, timeout=LIMIT_S)
    try:
        monkeypatch.setenv("QUICKTHAW_HOME", str(small / "home"))
        handle = rig.mount(digest, "first", store_url=f"file://{store}", use_origin=False)
        handle.unmount()
        with open(small / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(bytes(4096))
        handle = rig.mount(digest, store_url=f"file://{store}", use_origin=False)
        right = rig.reader().ask("digest", str(model / "model.safetensors"))
        assert digest_or_errno(rig.reader(), handle.mountpoint / "model.safetensors") == right
        with pytest.raises(LazyfsError) as caught:
            handle.control("pin")
        assert caught.value.code == "disk-full"
        report = VerifyReport()
        verify_cache(Cache(small / "home" / "cache"), ChunkStore(LocalStore(store)), report)
        assert report.clean
        handle.unmount(force=True)
    finally:
        rig.close()
        wait_for(lambda: subprocess.run(["umount", small], check=False, timeout=LIMIT_S).returncode == 0)


@pytest.mark.slow
@pytest.mark.usefixtures("stored")
def test_a_bounded_cache_stays_bounded_and_evicts_the_oldest(tmp_path, rig):
    reader = rig.reader()
    # 64 MiB are the memory for streaming, the rest is for the disk.
    limit = 88 << 20
    for i in range(3):
        other = write_model(tmp_path / f"m{i}", [6 << 20, 5 << 20], seed=10 + i)
        handle = rig.mount(
            import_directory(other), f"mnt{i}", use_origin=False, cache_dir=tmp_path / "c", cache_limit=limit
        )
        right = reader.ask("digest", str(other / "model.safetensors"))
        assert digest_or_errno(reader, handle.mountpoint / "model.safetensors") == right
        assert Cache(tmp_path / "c").usage() + reserved_by_others(tmp_path / "c")[0] <= limit
        handle.unmount()
        assert Cache(tmp_path / "c").usage() <= 24 << 20
    kept = rig.mount(import_directory(tmp_path / "m2"), "again", use_origin=False, cache_dir=tmp_path / "c")
    assert kept.status()["cached_bytes"] > 10 << 20


@pytest.mark.slow
@pytest.mark.usefixtures("stored")
def test_files_of_a_mount_with_an_access_log_are_not_evicted(tmp_path, rig):
    """A mount with a known access log has read nothing yet; filling the cache evicts other files and not its own."""
    reader, limit = rig.reader(), 100 << 20
    models = [write_model(tmp_path / f"m{i}", [6 << 20, 5 << 20], seed=20 + i) for i in range(4)]
    settings = {"use_origin": False, "cache_dir": tmp_path / "c", "cache_limit": limit, "background_mb_s": 0.0}
    digests = [import_directory(m) for m in models]
    for i in range(2):
        handle = rig.mount(digests[i], f"mnt{i}", **settings)
        assert digest_or_errno(reader, handle.mountpoint / "model.safetensors")
        handle.unmount()
    # The older one in the cache is mounted, untouched, and has an access log; the younger one is not mounted.
    idle = rig.mount(digests[0], "idle", **{**settings, "prefetch": False})
    wait_for(lambda: reserved_by_others(tmp_path / "c")[1])
    for i in (2, 3):
        handle = rig.mount(digests[i], f"mnt{i}", **settings)
        right = reader.ask("digest", str(models[i] / "model.safetensors"))
        assert digest_or_errno(reader, handle.mountpoint / "model.safetensors") == right
        handle.unmount()
    assert idle.status()["cached_bytes"] > 10 << 20
    again = rig.mount(digests[1], "again", **settings)
    assert again.status()["cached_bytes"] < 1 << 20


@pytest.mark.slow
def test_a_damaged_cache_is_found_and_repaired(stored, rig, tmp_path):
    _, digest, store = stored
    cache = Cache(tmp_path / "c")
    handle = rig.mount(digest, use_origin=False, cache_dir=tmp_path / "c")
    reader, path = rig.reader(), handle.mountpoint / "model.safetensors"
    right = reader.ask("digest", str(path))
    handle.unmount()
    chunks = ChunkStore(LocalStore(store))
    file = next(f for f in chunks.get_manifest(digest).files if f.path == "model.safetensors")
    data = cache.folder(file) / "data"
    with open(data, "r+b") as f:
        f.seek(6 << 20)
        f.write(b"damaged by somebody")
    report = VerifyReport()
    verify_cache(cache, chunks, report)
    assert report.cache_bad == 1 and not report.clean
    handle = rig.mount(digest, use_origin=False, cache_dir=tmp_path / "c")
    assert digest_or_errno(reader, path) == right


@pytest.mark.slow
def test_after_a_power_cut_everything_is_verified_again(stored, rig, tmp_path):
    """A sparse file of another boot without fsync: what the disk lost is detected, the rest is used."""
    model, digest, store = stored
    cache, chunks = Cache(tmp_path / "c"), ChunkStore(LocalStore(store))
    file = next(f for f in chunks.get_manifest(digest).files if f.path == "model.safetensors")
    sparse_file = cache.open(file)
    for index, chunk in enumerate(file.chunks):
        sparse_file.write(index, chunks.get(chunk.digest))
    sparse_file.close()
    have = cache.folder(file) / "have"
    body = bytearray(have.read_bytes())
    body[8:44] = b"f" * 36
    have.write_bytes(body)
    with open(cache.folder(file) / "data", "r+b") as f:
        f.seek(file.offsets[2])
        f.write(bytes(4096))
    sparse_file = cache.open(file)
    assert {sparse_file.state(i) for i in range(len(file.chunks))} == {UNVERIFIED}
    sparse_file.close()
    handle = rig.mount(digest, use_origin=False, cache_dir=tmp_path / "c")
    reader = rig.reader()
    right = reader.ask("digest", str(model / "model.safetensors"))
    assert digest_or_errno(reader, handle.mountpoint / "model.safetensors") == right
    sparse_file = cache.open(file)
    wait_for(lambda: {sparse_file.state(i) for i in range(len(file.chunks))} == {PRESENT})
    sparse_file.close()
