"""Stores that fail in every way, full disks, and damaged caches: no wrong byte, no reader that hangs, recovery."""

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

from lazyfs.admin.verify import verify
from lazyfs.api import import_directory
from lazyfs.cache.cache import Cache
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.read_through import describe
from lazyfs.errors import Integrity, LazyfsError, NotFound, Permanent, Temporary
from lazyfs.fetch.access_log import shared_key
from lazyfs.mount import kernel
from lazyfs.stores import open_store
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.faulty_store import FAULTS
from tests.kits.lazyfs.rig import LIMIT_S, ROOT, digest_or_errno, wait_for, write_model

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
# Long enough for one or two retries, short enough for a test.
QUICK = {"fetch_limit_s": 1.0, "read_limit_s": 4.0, "use_origin": False, "prefetch": False}


# test-fast runs these; the others differ in how the store fails, hardly in the consequences.
FAST = ("corrupt",)


def each(faults):
    return [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in faults]


@pytest.mark.slow
@pytest.mark.parametrize("fault", each(FAULTS))
def test_a_store_that_fails_always(stored, rig, control, tmp_path, fault):
    """Every read fails within its limit, none returns a wrong byte, and reads succeed once the fault ends."""
    model, digest, _ = stored
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


@pytest.mark.slow
@pytest.mark.parametrize("fault", each(["corrupt", "truncate", "503", "empty"]))
def test_a_store_that_fails_half_the_time(stored, rig, control, tmp_path, fault):
    """Retries hide temporary faults; a corrupt body is fetched once more, and never served."""
    model, digest, _ = stored
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
def test_an_import_into_an_unreliable_store_succeeds(stored, tmp_path, fault):
    """A tenth of all calls of every kind fail: the import succeeds, and verification finds no damage."""
    path = tmp_path / "control.json"
    calls = ["get", "put", "head", "touch", "list", "flush"]
    settings = {"store": f"file://{tmp_path / 'store'}", "fault": fault, "share": 0.1, "seconds": 0.01, "calls": calls}
    path.write_text(json.dumps(settings))
    digest = import_directory(stored[0], f"faulty://{path}", tag="toy:v1")
    chunks = ChunkStore(LocalStore(tmp_path / "store"))
    assert digest == stored[1] and chunks.resolve("toy:v1") == digest and verify(chunks).clean
    path.write_text(json.dumps({**settings, "share": 1.0, "fault": "forbidden"}))
    with pytest.raises(Permanent):
        import_directory(write_model(tmp_path / "other", [5 << 20], seed=3), f"faulty://{path}")
    assert list(chunks.manifests()) == [digest]


@pytest.mark.slow
def test_interleaved_reads_fetch_each_chunk_once(rig, control, tmp_path, stored):
    """Three readers alternate between tensors in small reads: the store serves each complete chunk once."""
    model = write_model(tmp_path / "many", [(1 << 20) + 4096 * i for i in range(24)], seed=9)
    digest = import_directory(model)
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **{**QUICK, "fetch_limit_s": 20.0})
    data = (model / "model.safetensors").read_bytes()
    file = next(f for f in ChunkStore(LocalStore(stored[2])).get_manifest(digest).files if f.path.startswith("model"))
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


def test_a_corrupt_chunk_is_quarantined(stored, rig, control, tmp_path):
    _, digest, _ = stored
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **QUICK)
    reader = rig.reader()
    control("corrupt")
    assert digest_or_errno(reader, handle.mountpoint / "config.json") == errno.EIO
    # The first body and the second one for confirmation, for each of the kernel's attempts.
    assert len(list((tmp_path / "c" / "quarantine").iterdir())) >= 2
    log = handle.log_file.read_text()
    assert "does not hash" in log and "config.json" in log
    # `weights verify` reports the same for this host's cache.
    assert all("config.json" in why and "hashes to" in why for _, why in Cache(tmp_path / "c").quarantined())


@pytest.mark.slow
def test_a_failing_read_waits_for_one_limit_only(stored, rig, tmp_path):
    """The kernel reads ahead, and requests the one page again if that failed."""
    _, digest, _ = stored
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
def test_a_silent_fetcher_is_replaced(stored, rig, tmp_path):
    model, digest, _ = stored
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
def test_verify_lists_quarantined_chunks_with_reasons(stored, rig, control):
    _, digest, _ = stored
    handle = rig.mount(digest, store_url=control.url, **QUICK)
    control("corrupt")
    assert digest_or_errno(rig.reader(), handle.mountpoint / "config.json") == errno.EIO
    control()
    command = [sys.executable, "-c", "from lazyfs.cli.weights import weights; weights()", "verify"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S, check=False)
    assert done.returncode == 0 and "clean" in done.stdout, "the store itself is intact"
    assert "config.json" in done.stderr and "instead of" in done.stderr and control.url in done.stderr
    report = json.loads(subprocess.run([*command, "--json"], capture_output=True, cwd=ROOT, timeout=LIMIT_S).stdout)
    assert report["quarantine"] and all("config.json" in q["reason"] for q in report["quarantine"])


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow) for f in FAULTS])
def test_a_mount_without_a_readable_manifest_fails(stored, rig, control, tmp_path, fault):
    """Mounting fails within its limit with a reason, and leaves nothing; it works once the fault ends."""
    model, digest, _ = stored
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
def test_an_unreadable_access_log_is_ignored(stored, rig, control, tmp_path, fault):
    """The store's access log is optional: every read is right, and waits for chunks only."""
    model, digest, store = stored
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
def test_temporary_listing_failures_are_retried(stored, tmp_path, fault):
    """Describing a prefix in place reads its listing and headers."""
    path = tmp_path / "control.json"
    settings = {"store": f"file://{stored[0]}", "fault": fault, "share": 0.2, "seconds": 0.01, "calls": ["list", "get"]}
    path.write_text(json.dumps({**settings, "fault": None}))
    whole = describe(f"faulty://{path}")
    for _ in range(5):
        path.write_text(json.dumps(settings))
        assert describe(f"faulty://{path}") == whole
    path.write_text(json.dumps({**settings, "share": 1.0, "fault": "forbidden"}))
    with pytest.raises(Permanent):
        describe(f"faulty://{path}")


@pytest.mark.slow
def test_a_stalled_store_blocks_no_other_mount(stored, rig, control, tmp_path):
    _, digest, _ = stored
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **QUICK)
    reader, other = rig.reader(), rig.reader()
    assert other.ask("digest", str(handle.mountpoint / "config.json"))
    control("stall", seconds=3.0)
    reader.send("digest", str(handle.mountpoint / "model.safetensors"))
    wait_for(lambda: handle.status()["waiting"] > 0)
    assert isinstance(other.ask("digest", str(handle.mountpoint / "config.json"), limit_s=LIMIT_S), str)
    assert reader.receive()["errno"] in (errno.EIO, errno.ETIMEDOUT)


@pytest.mark.slow
def test_a_killed_reader_ends_at_once(stored, rig, control, tmp_path):
    """A reader that waits for the network dies of SIGKILL at once, not when the network answers."""
    _, digest, _ = stored
    settings = {**QUICK, "read_limit_s": 600.0, "fetch_limit_s": 300.0}
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **settings)
    reader = rig.reader()
    control("stall", seconds=20.0)
    started = time.monotonic()
    reader.send("digest", str(handle.mountpoint / "config.json"))
    wait_for(lambda: handle.status()["waiting"] > 0)
    reader.process.kill()
    reader.process.wait(LIMIT_S)
    # Well before the limits: it did not have to wait for the network.
    assert time.monotonic() - started < settings["read_limit_s"]


@pytest.mark.slow
def test_faults_that_end_within_the_limit_cost_time_only(stored, rig, control, tmp_path):
    """Independent of the number of tries: eight of them are over in a few seconds."""
    model, digest, _ = stored
    settings = {**QUICK, "fetch_limit_s": 40.0, "read_limit_s": 60.0}
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **settings)
    reader, path = rig.reader(), handle.mountpoint / "config.json"
    control("503")
    reader.send("digest", str(path))
    wait_for(lambda: handle.status()["fetcher"].get("retries", 0) >= 9)
    control()
    assert reader.receive() == reader.ask("digest", str(model / "config.json"))


@pytest.mark.slow
def test_cached_files_are_read_without_the_store(stored, rig, tmp_path):
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
def test_replicas_fetch_a_chunk_once(stored, rig, control, tmp_path):
    """Two mounts of one manifest with one cache: each chunk is fetched once."""
    _, digest, _ = stored
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

    size = (stored[0] / "model.safetensors").stat().st_size
    wait_for(lambda: fetched() >= size)
    # The fetchers report once a second, so a second fetch would be reported by then.
    time.sleep(1.2)
    assert fetched() == size


def test_wrong_bytes_under_a_valid_name_are_rejected(stored, tmp_path):
    _, _, store = stored
    chunks = ChunkStore(open_store(str(store)))
    names = [i.key for i in chunks.store.list("chunks/")]
    with pytest.raises(Integrity):
        chunks.decode("0" * 64, b"not zstd", 1, 100)
    assert names and verify(chunks).clean
    with pytest.raises(LazyfsError):
        chunks.get("0" * 64)
    assert Path(store).is_dir()
