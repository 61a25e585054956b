"""Stores that fail in every way, disks that are full, and damaged caches: no wrong byte, no reader that hangs, recovery."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyfs.admin.verify import Damage, verify, verify_cache
from lazyfs.api import import_directory
from lazyfs.cache.cache import PRESENT, UNPROVEN, Cache
from lazyfs.cache.reservations import others
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.read_through import describe
from lazyfs.errors import Integrity, LazyfsError, NotFound, Permanent, Temporary
from lazyfs.fetch.access_log import shared_key
from lazyfs.mount import kernel
from lazyfs.stores import open_store
from lazyfs.stores.faulty import FAULTS
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs_rig import LIMIT_S, ROOT, Rig, wait_for, write_model

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
# Long enough for a retry or two, short enough for a test.
QUICK = {"fetch_limit_s": 1.0, "read_limit_s": 4.0, "use_origin": False, "prefetch": False}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lazyfs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICKTHAW_HOME", str(folder / "home"))
        patch.delenv("QUICKTHAW_STORE", raising=False)
        model = write_model(folder / "model", [5 << 20, 1000, 4 << 20, 6 << 20])
        yield model, import_directory(model), folder / "home" / "store"


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def control(tmp_path, shared):
    """Sets the fault of a store, while a mount uses it."""
    path = tmp_path / "control.json"

    def set_fault(fault=None, **values):
        text = json.dumps({"store": f"file://{shared[2]}", "fault": fault, "only": "chunks/", **values})
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").rename(path)

    set_fault()
    set_fault.url = f"faulty://{path}"
    return set_fault


def digest_or_errno(reader, path):
    answer = reader.ask("digest", str(path))
    return answer["errno"] if isinstance(answer, dict) else answer


# What test-fast runs; the others differ in how the store fails, hardly in what then happens.
FAST = ("corrupt",)


def each(faults):
    return [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in faults]


@pytest.mark.parametrize("fault", each(FAULTS))
def test_a_store_that_fails_always(shared, rig, control, tmp_path, fault):
    """Every read fails within its limit, none returns a wrong byte, and all is well once the fault ends."""
    model, digest, _ = shared
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **QUICK)
    reader, path = rig.reader(), handle.mountpoint / "model.safetensors"
    right = reader.ask("digest", str(model / "model.safetensors"))
    control(fault, seconds=0.05)
    started = time.monotonic()
    answer = digest_or_errno(reader, path)
    if fault == "slow":
        assert answer == right
    else:
        assert answer in (errno.EIO, errno.ETIMEDOUT, errno.ENOENT)
    assert time.monotonic() - started < LIMIT_S
    control()
    assert digest_or_errno(reader, path) == right


@pytest.mark.parametrize("fault", each(["corrupt", "truncate", "503", "empty"]))
def test_a_store_that_fails_half_the_time(shared, rig, control, tmp_path, fault):
    """Retries hide what is temporary; a corrupt body is fetched once more, and never served."""
    model, digest, _ = shared
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **{**QUICK, "fetch_limit_s": 8.0})
    reader, path = rig.reader(), handle.mountpoint / "model.safetensors"
    right = reader.ask("digest", str(model / "model.safetensors"))
    control(fault, share=0.4, seconds=0.01)
    for _ in range(20):
        answer = digest_or_errno(reader, path)
        assert answer in (right, errno.EIO)
        if answer == right:
            break
    assert answer == right


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "429", "reset", "stall"])
def test_an_import_into_a_store_that_fails_at_every_call(shared, tmp_path, fault):
    """A tenth of all calls fail, of every kind: the import gets there, and what it leaves verifies clean."""
    path = tmp_path / "control.json"
    calls = ["get", "put", "head", "touch", "list", "flush"]
    settings = {"store": f"file://{tmp_path / 'store'}", "fault": fault, "share": 0.1, "seconds": 0.01, "calls": calls}
    path.write_text(json.dumps(settings))
    digest = import_directory(shared[0], f"faulty://{path}", tag="toy:v1")
    chunks = ChunkStore(LocalStore(tmp_path / "store"))
    assert digest == shared[1] and chunks.resolve("toy:v1") == digest and verify(chunks).clean
    path.write_text(json.dumps({**settings, "share": 1.0, "fault": "forbidden"}))
    with pytest.raises(Permanent):
        import_directory(write_model(tmp_path / "other", [5 << 20], seed=3), f"faulty://{path}")
    assert list(chunks.manifests()) == [digest]


@pytest.mark.slow
def test_interleaved_reads_of_tensors_fetch_whole_chunks_once(rig, control, tmp_path, shared):
    """Three readers hop between tensors in small pieces: the store sees each chunk once, whole."""
    model = write_model(tmp_path / "many", [(1 << 20) + 4096 * i for i in range(24)], seed=9)
    digest = import_directory(model)
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **{**QUICK, "fetch_limit_s": 20.0})
    data = (model / "model.safetensors").read_bytes()
    file = next(f for f in ChunkStore(LocalStore(shared[2])).get_manifest(digest).files if f.path.startswith("model"))
    readers = [rig.reader() for _ in range(3)]
    for number, reader in enumerate(readers):
        assert reader.ask("open", "m", str(handle.mountpoint / "model.safetensors")) is True
        for place in range(number * (1 << 18), len(data), 3 << 18):
            there = (place * 7919) % len(data)
            assert reader.ask("pread", "m", there, 20_000) == data[there : there + 20_000].hex()
    wait_for(lambda: handle.status()["fetcher"].get("fetches", 0) >= len(file.chunks))
    time.sleep(1.2)
    asked = handle.status()["fetcher"]
    assert asked["fetches"] == len(file.chunks) and asked["store_bytes"] == len(data)


def test_a_corrupt_chunk_is_quarantined(shared, rig, control, tmp_path):
    _, digest, _ = shared
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **QUICK)
    reader = rig.reader()
    control("corrupt")
    assert digest_or_errno(reader, handle.mountpoint / "config.json") == errno.EIO
    # The first body and the one fetched to make sure, for each of the kernel's attempts.
    assert len(list((tmp_path / "c" / "quarantine").iterdir())) >= 2
    log = handle.log_file.read_text()
    assert "does not hash" in log and "config.json" in log
    # `weights verify` says the same, of this host's own cache.
    assert all("config.json" in why and "hashes to" in why for _, why in Cache(tmp_path / "c").quarantined())


@pytest.mark.slow
def test_a_reader_waits_for_one_limit_and_not_for_two(shared, rig, tmp_path):
    """The kernel reads ahead, and asks again for the one page when that failed."""
    _, digest, _ = shared
    limit_s = 5.0
    handle = rig.mount(
        digest, **{**QUICK, "read_limit_s": limit_s, "cache_dir": tmp_path / "c", "background_mb_s": 0.0}
    )
    os.kill(rig.fetcher_of(handle), signal.SIGSTOP)
    reader = rig.reader()
    reader.ask("open", 0, str(handle.mountpoint / "model.safetensors"))
    started = time.monotonic()
    assert reader.ask("pread", 0, 2 << 20, 4096) == {"errno": errno.ETIMEDOUT}
    assert limit_s <= time.monotonic() - started < 2 * limit_s


@pytest.mark.slow
def test_a_fetcher_that_says_nothing_is_replaced(shared, rig, tmp_path):
    model, digest, _ = shared
    handle = rig.mount(
        digest, **{**QUICK, "read_limit_s": LIMIT_S, "cache_dir": tmp_path / "c", "background_mb_s": 0.0}
    )
    first = rig.fetcher_of(handle)
    os.kill(first, signal.SIGSTOP)
    reader = rig.reader()
    assert reader.ask("digest", str(handle.mountpoint / "config.json")) == reader.ask(
        "digest", str(model / "config.json")
    )
    assert rig.fetcher_of(handle) != first


@pytest.mark.slow
def test_weights_verify_lists_what_is_quarantined_and_why(shared, rig, control):
    _, digest, _ = shared
    handle = rig.mount(digest, store_url=control.url, **QUICK)
    control("corrupt")
    assert digest_or_errno(rig.reader(), handle.mountpoint / "config.json") == errno.EIO
    control()
    command = [sys.executable, "-c", "from lazyfs.cli import weights; weights()", "verify"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S, check=False)
    assert done.returncode == 0 and "clean" in done.stdout, "the store itself is whole"
    assert "config.json" in done.stderr and "instead of" in done.stderr and control.url in done.stderr
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, cwd=ROOT, timeout=LIMIT_S).stdout)
    assert told["quarantine"] and all("config.json" in q["reason"] for q in told["quarantine"])


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow) for f in FAULTS])
def test_a_manifest_that_cannot_be_read(shared, rig, control, tmp_path, fault):
    """Mounting fails within its limit, in a way that says why, and leaves nothing; it works once the fault ends."""
    model, digest, _ = shared
    settings = {**QUICK, "store_url": control.url, "cache_dir": tmp_path / "c"}
    control(fault, seconds=0.05, only="manifests/")
    started = time.monotonic()
    if fault == "slow":
        rig.mount(digest, **settings).unmount()
    else:
        kinds = {"forbidden": Permanent, "missing": NotFound}
        kinds |= dict.fromkeys(("truncate", "corrupt", "longer", "empty"), Integrity)
        with pytest.raises(kinds.get(fault, Temporary)):
            rig.mount(digest, **settings)
        assert kernel.mount_at(str(tmp_path / "mnt")) is None
    assert time.monotonic() - started < LIMIT_S
    control()
    reader = rig.reader()
    right = reader.ask("digest", str(model / "config.json"))
    assert digest_or_errno(reader, rig.mount(digest, **settings).mountpoint / "config.json") == right


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow) for f in FAULTS])
def test_a_trace_that_cannot_be_read(shared, rig, control, tmp_path, fault):
    """The store's trace only helps: whatever comes of it, every read is right, and waits for chunks alone."""
    model, digest, store = shared
    touches = [[0, 0, 0.0], [1, 0, 0.1]]
    LocalStore(store).put(shared_key(digest), json.dumps({"format": 1, "touches": touches}).encode())
    control(fault, seconds=20.0 if fault == "stall" else 0.05, only="traces/")
    settings = {**QUICK, "prefetch": True, "record": "never"}
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **settings)
    reader = rig.reader()
    for name in ("config.json", "model.safetensors"):
        assert digest_or_errno(reader, handle.mountpoint / name) == reader.ask("digest", str(model / name))
    counters = handle.status()["counters"]
    assert counters["failed"] == 0 and counters["wait_seconds"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "reset", "stall"])
def test_a_listing_that_fails_now_and_then(shared, tmp_path, fault):
    """Describing a prefix in place reads its listing and headers: what is temporary is tried again."""
    path = tmp_path / "control.json"
    settings = {"store": f"file://{shared[0]}", "fault": fault, "share": 0.2, "seconds": 0.01, "calls": ["list", "get"]}
    path.write_text(json.dumps({**settings, "fault": None}))
    whole = describe(f"faulty://{path}")
    for _ in range(5):
        path.write_text(json.dumps(settings))
        assert describe(f"faulty://{path}") == whole
    path.write_text(json.dumps({**settings, "share": 1.0, "fault": "forbidden"}))
    with pytest.raises(Permanent):
        describe(f"faulty://{path}")


@pytest.mark.slow
def test_a_stalled_store_holds_up_nobody_else(shared, rig, control, tmp_path):
    _, digest, _ = shared
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **QUICK)
    reader, other = rig.reader(), rig.reader()
    assert other.ask("digest", str(handle.mountpoint / "config.json"))
    control("stall", seconds=3.0)
    reader.send("digest", str(handle.mountpoint / "model.safetensors"))
    wait_for(lambda: handle.status()["waiting"] > 0)
    assert isinstance(other.ask("digest", str(handle.mountpoint / "config.json"), limit_s=LIMIT_S), str)
    assert reader.receive()["errno"] in (errno.EIO, errno.ETIMEDOUT)


@pytest.mark.slow
def test_a_killed_reader_is_let_go(shared, rig, control, tmp_path):
    """A reader waiting for the network dies of SIGKILL at once, not when the network answers."""
    _, digest, _ = shared
    settings = {**QUICK, "read_limit_s": 600.0, "fetch_limit_s": 300.0}
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **settings)
    reader = rig.reader()
    control("stall", seconds=20.0)
    started = time.monotonic()
    reader.send("digest", str(handle.mountpoint / "config.json"))
    wait_for(lambda: handle.status()["waiting"] > 0)
    reader.process.kill()
    reader.process.wait(LIMIT_S)
    # Well before its own limits: it did not have to wait for the network.
    assert time.monotonic() - started < settings["read_limit_s"]


def test_a_full_disk_streams(shared, rig, tmp_path):
    """The cache on a tiny file system: every byte right, nothing fails, nothing half-written stays."""
    model, digest, _ = shared
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
        # Looking at images takes a few bytes, too; what was written while there was no room is what is looked at.
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True, timeout=LIMIT_S)
        report = Damage()
        verify_cache(Cache(small / "c"), None, report)
        assert report.clean
    finally:
        rig.close()
        # The fetcher of a killed daemon ends a moment after it.
        wait_for(lambda: subprocess.run(["umount", small], check=False, timeout=LIMIT_S).returncode == 0)


def test_mounting_pinning_and_verifying_on_a_full_disk(shared, rig, tmp_path, monkeypatch):
    """Not a byte is left for records: the mount serves, what cannot be kept is refused by name, and verifying needs no room."""
    model, digest, store = shared
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
        report = Damage()
        verify_cache(Cache(small / "home" / "cache"), ChunkStore(LocalStore(store)), report)
        assert report.clean
        handle.unmount(force=True)
    finally:
        rig.close()
        wait_for(lambda: subprocess.run(["umount", small], check=False, timeout=LIMIT_S).returncode == 0)


@pytest.mark.slow
def test_a_storm_that_passes_within_the_limit_costs_time_only(shared, rig, control, tmp_path):
    """However many tries that is: eight of them are over in a few seconds."""
    model, digest, _ = shared
    settings = {**QUICK, "fetch_limit_s": 40.0, "read_limit_s": 60.0}
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **settings)
    reader, path = rig.reader(), handle.mountpoint / "config.json"
    control("503")
    reader.send("digest", str(path))
    wait_for(lambda: handle.status()["fetcher"].get("retries", 0) >= 9)
    control()
    assert reader.receive() == reader.ask("digest", str(model / "config.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_a_bounded_cache_stays_bounded_and_evicts_the_oldest(tmp_path, rig):
    reader = rig.reader()
    # 64 MiB for the memory that streaming needs, the rest for the disk.
    limit = 88 << 20
    for i in range(3):
        other = write_model(tmp_path / f"m{i}", [6 << 20, 5 << 20], seed=10 + i)
        handle = rig.mount(
            import_directory(other), f"mnt{i}", use_origin=False, cache_dir=tmp_path / "c", cache_limit=limit
        )
        right = reader.ask("digest", str(other / "model.safetensors"))
        assert digest_or_errno(reader, handle.mountpoint / "model.safetensors") == right
        assert Cache(tmp_path / "c").usage() + others(tmp_path / "c")[0] <= limit
        handle.unmount()
        assert Cache(tmp_path / "c").usage() <= 24 << 20
    kept = rig.mount(import_directory(tmp_path / "m2"), "again", use_origin=False, cache_dir=tmp_path / "c")
    assert kept.status()["cached_bytes"] > 10 << 20


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_what_is_mounted_and_traced_stays(tmp_path, rig):
    """A mount whose trace is known has read nothing yet; what fills the cache beside it evicts the others, and not its files."""
    reader, limit = rig.reader(), 100 << 20
    models = [write_model(tmp_path / f"m{i}", [6 << 20, 5 << 20], seed=20 + i) for i in range(4)]
    settings = {"use_origin": False, "cache_dir": tmp_path / "c", "cache_limit": limit, "background_mb_s": 0.0}
    digests = [import_directory(m) for m in models]
    for i in range(2):
        handle = rig.mount(digests[i], f"mnt{i}", **settings)
        assert digest_or_errno(reader, handle.mountpoint / "model.safetensors")
        handle.unmount()
    # The older one of the two in the cache, mounted and not touched. It has a trace; the younger one is not mounted.
    idle = rig.mount(digests[0], "idle", **{**settings, "prefetch": False})
    wait_for(lambda: others(tmp_path / "c")[1])
    for i in (2, 3):
        handle = rig.mount(digests[i], f"mnt{i}", **settings)
        right = reader.ask("digest", str(models[i] / "model.safetensors"))
        assert digest_or_errno(reader, handle.mountpoint / "model.safetensors") == right
        handle.unmount()
    assert idle.status()["cached_bytes"] > 10 << 20
    again = rig.mount(digests[1], "again", **settings)
    assert again.status()["cached_bytes"] < 1 << 20


@pytest.mark.slow
def test_a_damaged_cache_is_found_and_mended(shared, rig, tmp_path):
    _, digest, store = shared
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
    report = Damage()
    verify_cache(cache, chunks, report)
    assert report.cache_bad == 1 and not report.clean
    handle = rig.mount(digest, use_origin=False, cache_dir=tmp_path / "c")
    assert digest_or_errno(reader, path) == right


def test_after_a_power_cut_everything_is_proven_again(shared, rig, tmp_path):
    """An image of another boot that was not sealed: what the disk lost is noticed, the rest is used."""
    model, digest, store = shared
    cache, chunks = Cache(tmp_path / "c"), ChunkStore(LocalStore(store))
    file = next(f for f in chunks.get_manifest(digest).files if f.path == "model.safetensors")
    image = cache.open(file)
    for index, chunk in enumerate(file.chunks):
        image.write(index, chunks.get(chunk.digest))
    image.close()
    have = cache.folder(file) / "have"
    body = bytearray(have.read_bytes())
    body[8:44] = b"f" * 36
    have.write_bytes(body)
    with open(cache.folder(file) / "data", "r+b") as f:
        f.seek(file.offsets[2])
        f.write(bytes(4096))
    image = cache.open(file)
    assert {image.state(i) for i in range(len(file.chunks))} == {UNPROVEN}
    image.close()
    handle = rig.mount(digest, use_origin=False, cache_dir=tmp_path / "c")
    reader = rig.reader()
    right = reader.ask("digest", str(model / "model.safetensors"))
    assert digest_or_errno(reader, handle.mountpoint / "model.safetensors") == right
    image = cache.open(file)
    wait_for(lambda: {image.state(i) for i in range(len(file.chunks))} == {PRESENT})
    image.close()


@pytest.mark.slow
def test_a_lost_store_does_not_hurt_what_is_cached(shared, rig, tmp_path):
    model = write_model(tmp_path / "own", [5 << 20])
    digest = import_directory(model, str(tmp_path / "store"))
    settings = {"store_url": str(tmp_path / "store"), "use_origin": False, "cache_dir": tmp_path / "c"}
    handle = rig.mount(digest, **settings)
    wait_for(lambda: handle.status()["cached_bytes"] == handle.status()["bytes"])
    handle.unmount()
    subprocess.run(["rm", "-rf", tmp_path / "store"], check=True, timeout=LIMIT_S)
    handle = rig.mount(digest, **settings)
    reader = rig.reader()
    right = reader.ask("digest", str(model / "model.safetensors"))
    assert digest_or_errno(reader, handle.mountpoint / "model.safetensors") == right


@pytest.mark.slow
def test_replicas_fetch_a_chunk_once(shared, rig, control, tmp_path):
    """Two mounts of one manifest over one cache: each chunk crosses the network once."""
    _, digest, _ = shared
    control("slow", seconds=0.3)
    settings = {**QUICK, "fetch_limit_s": 20.0, "read_limit_s": 30.0}
    handles = [rig.mount(digest, f"m{i}", store_url=control.url, cache_dir=tmp_path / "c", **settings) for i in "ab"]
    readers = [rig.reader() for _ in handles]
    for handle, reader in zip(handles, readers, strict=True):
        reader.send("digest", str(handle.mountpoint / "model.safetensors"))
    first, second = (r.receive() for r in readers)
    assert first == second and isinstance(first, str)

    def fetched():
        return sum(h.status()["fetcher"].get("store_bytes", 0) for h in handles)

    size = (shared[0] / "model.safetensors").stat().st_size
    wait_for(lambda: fetched() >= size)
    # The fetchers report once a second: a second fetch of anything would show by then.
    time.sleep(1.2)
    assert fetched() == size


def test_the_wrong_bytes_behind_a_right_name(shared, tmp_path):
    _, _, store = shared
    chunks = ChunkStore(open_store(str(store)))
    names = [i.key for i in chunks.store.list("chunks/")]
    with pytest.raises(Integrity):
        chunks.decode("0" * 64, b"not zstd", 1, 100)
    assert names and verify(chunks).clean
    with pytest.raises(LazyfsError):
        chunks.get("0" * 64)
    assert Path(store).is_dir()
