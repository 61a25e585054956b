"""Dropping a file's sparse cache file while the fetcher works on it: the steps of its threads, one by one."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time

import pytest

from lazyfs.cache.cache import Cache
from lazyfs.cache.slots import SlotMemory, SlotWriter
from lazyfs.cache.sparse_file import PRESENT, SparseFile
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.importer import import_tree
from lazyfs.fetch import wire, worker
from lazyfs.mount.config import MountConfig
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.models import write_safetensors

pytestmark = pytest.mark.t0
LIMIT_S = 30


class Host:
    """A fetcher without its threads, and the server's end of its channel."""

    def __init__(self, folder):
        (folder / "model").mkdir()
        write_safetensors(folder / "model" / "model.safetensors", {"a": b"a" * 3000, "b": b"b" * 5000})
        chunks = ChunkStore(LocalStore(folder / "store"))
        digest, _ = import_tree(folder / "model", chunks)
        names = {n: str(folder / n) for n in ("mountpoint", "cache_dir", "log_file", "socket", "state_file", "home")}
        config = MountConfig(manifest=digest, store_url=f"file://{folder / 'store'}", use_origin=False, **names)
        self.manifest = chunks.get_manifest(digest)
        self.file = self.manifest.files[0]
        self.cache = Cache(folder / "cache_dir")
        self.memory = SlotMemory(64)
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fetcher = worker.Fetcher(
            config, self.manifest, worker.build(config, self.manifest), theirs, SlotWriter(self.memory.fd)
        )

    def take(self):
        """Take the next job as a worker would."""
        (file, chunk), urgency = self.fetcher.queue.get(lambda: wire.FSYNC, 0)
        return file, chunk, urgency

    def do(self, taken):
        self.fetcher._do(*taken)
        self.fetcher.queue.done(taken[0])

    def fill(self):
        """Fetch all of the file; only the fsync is left to do."""
        for chunk in range(len(self.file.chunks)):
            self.fetcher.queue.put((0, chunk), wire.READAHEAD)
            self.do(self.take())
        assert self.cache.present_bytes(self.file) == self.file.size

    def gone(self):
        return not self.cache.folder(self.file).exists()

    def close(self):
        self.fetcher.queue.close()
        self.fetcher.sparse_files.close_all()
        self.ours.close()
        self.fetcher.channel.close()
        os.close(self.memory.fd)


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    host.close()


def wait_for(check):
    limit = time.monotonic() + LIMIT_S
    while not check():
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_a_drop_waits_for_a_slow_fsync(host, monkeypatch):
    """The file is dropped afterwards, even if all tries were used up meanwhile."""
    monkeypatch.setattr(worker, "_DROP_TRIES", 1)
    monkeypatch.setattr(worker, "_DROP_PAUSE_S", 0.001)
    begun, go_on = threading.Event(), threading.Event()

    def slow(fd):
        begun.set()
        assert go_on.wait(LIMIT_S)

    monkeypatch.setattr(os, "fdatasync", slow)
    host.fill()
    flushing = threading.Thread(target=host.do, args=(host.take(),))
    flushing.start()
    assert begun.wait(LIMIT_S)
    host.fetcher.drop(0)
    time.sleep(0.03)
    assert not host.gone()
    go_on.set()
    flushing.join(LIMIT_S)
    wait_for(host.gone)


def test_a_job_taken_before_the_drop_does_not_recreate_the_file(host, monkeypatch):
    monkeypatch.setattr(worker, "_DROP_PAUSE_S", 0.001)
    host.fetcher.queue.put((0, 0), wire.READAHEAD)
    taken = host.take()
    host.fetcher.drop(0)
    time.sleep(0.03)
    host.do(taken)
    wait_for(lambda: host.gone() and not host.fetcher.dropping)
    assert len(host.fetcher.sparse_files) == 0


def test_an_fsync_after_the_drop_marks_no_new_file_as_fsynced(host, monkeypatch):
    monkeypatch.setattr(worker, "_DROP_PAUSE_S", 0.001)
    host.fill()
    taken = host.take()
    assert taken[2] == wire.FSYNC
    host.fetcher.queue.done(0)
    host.fetcher.drop(0)
    wait_for(host.gone)
    host.fetcher._fsync(0)
    assert host.gone()
    # The same holds if the file was created again meanwhile.
    with host.fetcher.sparse_files.use(0):
        pass
    monkeypatch.setattr(SparseFile, "fsync", lambda self: pytest.fail("flushed an image with holes"))
    host.fetcher._fsync(0)


def test_a_file_that_another_process_has_open_is_not_dropped(host, monkeypatch, caplog):
    monkeypatch.setattr(worker, "_DROP_TRIES", 3)
    monkeypatch.setattr(worker, "_DROP_PAUSE_S", 0.001)
    host.fill()
    other = host.cache.open(host.file)
    with caplog.at_level("INFO"):
        host.fetcher.drop(0)
        wait_for(lambda: "not dropped, because it is in use" in caplog.text)
    assert host.cache.present_bytes(host.file) == host.file.size
    other.close()
    host.fetcher.drop(0)
    wait_for(host.gone)


def test_the_slot_of_a_cancelled_fetch_is_freed(host):
    slot = host.memory.allocate((0, 1))
    host.fetcher.slots[0, 1] = slot
    host.fetcher.queue.put((0, 1), wire.READAHEAD)
    host.fetcher.drop(0)
    kind, file, chunk, number, given, began = wire.ANSWER.unpack(host.ours.recv(wire.BUFFER))
    assert (kind, file, chunk, number, given, began) == (wire.FAILED, 0, 1, errno.ECANCELED, slot, 0.0)
    assert host.fetcher.slots == {}


def test_a_chunk_rewritten_after_the_fsync_is_verified_after_a_power_cut(host, monkeypatch):
    """The chunk that replaces the lost one has not been fsynced."""
    host.fill()
    host.do(host.take())
    sparse_file = host.cache.open(host.file)
    data = sparse_file.read(0)
    sparse_file.mark(0, 0)
    sparse_file.write(0, data)
    sparse_file.close()
    monkeypatch.setattr("lazyfs.cache.sparse_file.boot_id", lambda: b"0" * 36)
    again = host.cache.open(host.file)
    try:
        assert PRESENT not in [again.state(i) for i in range(len(host.file.chunks))]
    finally:
        again.close()
