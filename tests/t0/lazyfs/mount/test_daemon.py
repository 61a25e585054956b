"""Failures in parts of a mount's daemon and its fetcher: the other parts continue."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import pyfuse3
import pytest
import trio

from lazyfs.cache.cache import Cache
from lazyfs.cache.open_sparse_files import OpenSparseFiles
from lazyfs.cache.reservations import reserved_by_others
from lazyfs.cache.slots import SlotWriter
from lazyfs.cache.sparse_file import PRESENT, SparseFile
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.errors import Temporary
from lazyfs.fetch import wire
from lazyfs.fetch.queue import RateLimit
from lazyfs.fetch.supervisor import FetcherLink
from lazyfs.fetch.worker import Fetcher, build
from lazyfs.logs import RepeatLimiter
from lazyfs.mount.control import ask
from lazyfs.mount.control_server import ControlServer
from lazyfs.mount.server import Server
from lazyfs.mount.service import Service
from lazyfs.mount.transports.pyfuse3 import _Operations
from lazyfs.paths import private_dir, write_atomic
from lazyfs.stores.local import LocalStore

pytestmark = pytest.mark.t0
LIMIT_S = 30
FILES = 40
"""As many as `model` has."""


@pytest.fixture
def fetcher(model, memory):
    """Return a fetcher without its threads, and (as `ours`) the server's end of its channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(LIMIT_S)
    fetcher = Fetcher(model.config, model.manifest, build(model.config, model.manifest), theirs, SlotWriter(memory.fd))
    fetcher.ours = ours
    yield fetcher
    fetcher.queue.close()
    ours.close()
    theirs.close()


def wait_for(check):
    limit = time.monotonic() + LIMIT_S
    while not check():
        assert time.monotonic() < limit
        time.sleep(0.002)


def answer_of(fetcher):
    """Return the next answer that is not statistics."""
    while True:
        answer = wire.ANSWER.unpack(fetcher.ours.recv(wire.BUFFER))
        if answer[0] != wire.STATS:
            return answer


# -- the fetcher


@pytest.mark.parametrize("defect", [ValueError("a defect"), MemoryError(), RecursionError()])
def test_a_reader_gets_an_answer_when_the_worker_fails(fetcher, monkeypatch, defect):
    def fill(sparse_file, index):
        raise defect

    monkeypatch.setattr(fetcher.chunk_fetcher, "fill", fill)
    worker = threading.Thread(target=fetcher._work, args=(0,), daemon=True)
    worker.start()
    for file in (0, 1):
        fetcher.queue.put((file, 0), wire.ON_DEMAND)
        kind, number, _, code, _, _ = answer_of(fetcher)
        assert (kind, number) == (wire.FAILED, file) and code in (errno.EIO, errno.ENOMEM)
    assert worker.is_alive()


def test_background_fetches_stay_below_their_rate():
    now = [100.0]
    rate = RateLimit(1.0, clock=lambda: now[0])
    taken = 0
    for _ in range(1000):
        if rate.take(8_000_000):
            taken += 8_000_000
        now[0] += 0.1
    assert 96_000_000 <= taken <= 108_000_000
    assert rate.wait_s() > 0
    free = RateLimit(0.0, clock=lambda: now[0])
    assert all(free.take(1 << 40) for _ in range(10)) and free.wait_s() == 0


def test_workers_do_not_sleep_for_the_background_rate(fetcher, model):
    """Otherwise all of them would be asleep when a read arrives."""
    # The clock stands still, so nothing more may be taken after the first chunk.
    fetcher.background = RateLimit(0.001, clock=lambda: 1.0)
    thread = threading.Thread(target=fetcher.run, daemon=True)
    thread.start()
    assert answer_of(fetcher)[0] == wire.STORED
    for file in range(FILES - 8, FILES):
        fetcher.ours.send(wire.REQUEST.pack(wire.ON_DEMAND, file, 0, -1))
    assert sorted(answer_of(fetcher)[1] for _ in range(8)) == list(range(FILES - 8, FILES))
    assert sum(model.cache.present_bytes(f) > 0 for f in model.manifest.files) == 9
    fetcher.ours.shutdown(socket.SHUT_RDWR)
    thread.join(LIMIT_S)


def test_one_request_fetches_all_of_a_file(fetcher):
    fetcher.config = None
    fetcher.background = RateLimit(0.001, clock=lambda: 1.0)
    fetcher._plan = lambda: None
    thread = threading.Thread(target=fetcher.run, daemon=True)
    thread.start()
    fetcher.ours.send(wire.REQUEST.pack(wire.FILE, 3, 0, -1))
    assert answer_of(fetcher)[:2] == (wire.STORED, 3)
    fetcher.ours.shutdown(socket.SHUT_RDWR)
    thread.join(LIMIT_S)


def test_a_failed_fetch_is_requested_again(fetcher, monkeypatch):
    real, failures = fetcher.chunk_fetcher.fill, [Temporary("the store is gone")]

    def fill(sparse_file, index, **named):
        if failures:
            raise failures.pop()
        return real(sparse_file, index, **named)

    monkeypatch.setattr(fetcher.chunk_fetcher, "fill", fill)
    fetcher.queue.put((0, 0), wire.READAHEAD)
    threading.Thread(target=fetcher._work, args=(0,), daemon=True).start()
    assert answer_of(fetcher)[0] == wire.FAILED
    wait_for(lambda: fetcher.postponed)
    fetcher._requeue_postponed()
    assert answer_of(fetcher)[:2] == (wire.STORED, 0)


def test_few_sparse_files_are_open_for_any_number_of_files(model):
    sparse_files = OpenSparseFiles(model.cache, model.manifest.files)
    sparse_files.most = 4
    before = len(os.listdir("/proc/self/fd"))
    with sparse_files.use(0) as first:
        for index in range(FILES):
            with sparse_files.use(index) as sparse_file:
                assert sparse_file.file is model.manifest.files[index]
        assert first.state(0) == 0, "files in use are not closed"
    assert len(sparse_files) <= 4
    # Four descriptors each, and the reservation that pins all forty.
    assert len(os.listdir("/proc/self/fd")) <= before + 4 * 4 + 2
    assert reserved_by_others(model.cache.root)[1] == {f.digest for f in model.manifest.files}
    assert model.cache.evict(1 << 40) == 0 and model.cache.folder(model.manifest.files[5]).exists()
    sparse_files.close_all()
    assert len(sparse_files) == 0


def test_a_kind_of_failure_is_logged_once_and_then_counted(caplog):
    now = [0.0]
    repeats = RepeatLimiter(logging.getLogger("test"), every_s=60.0, clock=lambda: now[0])
    with caplog.at_level("INFO"):
        for second in range(600):
            now[0] = float(second)
            for chunk in range(10):
                repeats.log(logging.ERROR, "temporary", f"chunk {chunk} failed")
            repeats.log(logging.WARNING, "other", "another")
            repeats.tick()
    assert len(caplog.records) == 2 + 2 * 9
    assert caplog.messages[0] == "chunk 0 failed" and "more like this one" in caplog.messages[-1]
    # A failure that has ended is logged when it begins again.
    now[0] += 61
    repeats.tick()
    now[0] += 61
    repeats.tick()
    caplog.clear()
    repeats.log(logging.ERROR, "temporary", "again")
    assert caplog.messages == ["again"]
    # Without any call of tick, a failure that goes on is logged again.
    now[0] += 61
    repeats.log(logging.ERROR, "temporary", "an hour later")
    repeats.log(logging.ERROR, "temporary", "at the same time")
    now[0] += 61
    repeats.log(logging.ERROR, "temporary", "and again")
    assert caplog.messages == ["again", "an hour later", "1 more like this one within 60 s: at the same time"]


# -- between fetcher and server


def test_a_full_socket_blocks_no_reader_and_loses_no_command(model, memory):
    """The fetcher is stopped or busy. Readers' threads do not wait for it; threads that can wait do."""
    link = FetcherLink(model.config, memory.fd)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    link._channel = ours
    sent = 0
    while link.request(wire.ON_DEMAND, sent, 0):
        sent += 1
        assert sent < 100_000
    assert not link.request(wire.FILE, sent, 0)
    got = []

    def drain():
        time.sleep(0.1)
        got.extend(wire.REQUEST.unpack(theirs.recv(wire.BUFFER))[1] for _ in range(sent + 1))

    draining = threading.Thread(target=drain)
    draining.start()
    assert link.request(wire.FILE, sent, 0, limit_s=LIMIT_S)
    draining.join(LIMIT_S)
    assert got == list(range(sent + 1))
    theirs.close()
    assert not link.request(wire.ON_DEMAND, 0, 0)
    ours.close()
    assert not link.request(wire.ON_DEMAND, 0, 0, limit_s=LIMIT_S)


# -- the cache


def test_an_open_that_races_eviction_is_retried(tmp_path, model, monkeypatch):
    """The folder is removed after it was made and before its files are opened."""
    file, made = model.manifest.files[0], []

    def make(path):
        private_dir(path)
        made.append(path)
        if len(made) < 4:
            shutil.rmtree(path)
        return path

    monkeypatch.setattr("lazyfs.cache.sparse_file.private_dir", make)
    sparse_file = model.cache.open(file)
    assert len(made) == 4 and sparse_file.state(0) == 0
    sparse_file.close()


def test_a_sparse_file_that_lost_a_chunk_is_incomplete(model):
    """`weights verify` removes a damaged chunk from a sparse file that a mount has open."""
    file = model.manifest.files[0]
    ours, theirs = model.cache.open(file), model.cache.open(file)
    ours.write(0, model.chunks.get(file.chunks[0].digest))
    ours.fsync()
    assert ours.complete() and theirs.complete() and theirs.fsynced()
    theirs.mark(0, 0)
    assert not ours.complete() and not ours.fsynced() and ours.present_bytes() == 0
    ours.write(0, model.chunks.get(file.chunks[0].digest))
    assert ours.state(0) == PRESENT and theirs.complete()
    for sparse_file in (ours, theirs):
        sparse_file.close()


def test_a_pinned_file_is_not_dropped_by_another_mount(model):
    file, other = model.manifest.files[0], Cache(model.cache.root)
    for cache in (model.cache, other):
        sparse_file = cache.open(file)
        sparse_file.write(0, model.chunks.get(file.chunks[0].digest))
        sparse_file.close()
    model.cache.pin_files([file.digest], keep=True)
    assert other.drop(file) == 0 and other.evict(1 << 40) == 0
    model.cache.pin_files([file.digest])
    assert other.evict(1 << 40) == 0 and other.drop(file) > 0


# -- the server


@pytest.fixture
def service(model, memory):
    return Service(model.config, model.manifest, model.cache, FetcherLink(model.config, memory.fd), memory)


def test_an_open_that_waits_for_the_disk_blocks_no_other_open(service, model, monkeypatch):
    """It blocks neither opens of another file nor later ones of the same file, and nothing is left open."""
    slow, begun, go_on = model.manifest.files[0], threading.Event(), threading.Event()
    real = model.cache.open_any

    def open_any(file):
        if file is slow and not begun.is_set():
            begun.set()
            assert go_on.wait(LIMIT_S)
        return real(file)

    monkeypatch.setattr(model.cache, "open_any", open_any)
    before = len(os.listdir("/proc/self/fd"))
    opened = []
    node, other = service.tree.files[0], service.tree.files[1]
    waiting = threading.Thread(target=lambda: opened.append(service.files.open(node, may_pass=False)[0]), daemon=True)
    waiting.start()
    assert begun.wait(LIMIT_S)
    beside = threading.Thread(
        target=lambda: opened.extend(service.files.open(n, may_pass=False)[0] for n in (other, node))
    )
    beside.start()
    beside.join(5)
    held_up = beside.is_alive()
    go_on.set()
    for thread in (waiting, beside):
        thread.join(LIMIT_S)
    assert not held_up
    assert opened[1] is opened[2] and opened[1].cached == 2 and len(service.files) == 2
    closed = []
    service.files.on_closed = closed.append
    for each in opened:
        service.files.release(each, native=False)
    assert service.files.by_inode == {} and [c.node.index for c in closed] == [1, 0]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_read_is_requested_again_if_the_request_was_not_sent(service, monkeypatch):
    """The fetcher's socket was full."""
    sent, room = [], [False]

    def request(kind, file, chunk, slot=-1, *, limit_s=0.0):
        if room[0]:
            sent.append((kind, file, chunk))
        return room[0]

    monkeypatch.setattr(service.link, "request", request)
    opened, _ = service.files.open(service.tree.files[2], may_pass=False)
    service.read(opened, 0, 100, 1, lambda data: None)
    service.expire()
    assert not sent
    room[0] = True
    service.expire()
    assert sent == [(wire.ON_DEMAND, 2, 0)] and not service.unsent
    service.interrupt(1)
    service.files.release(opened, native=False)


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("mmap"), OSError(errno.ENOMEM, "no memory")])
def test_pyfuse3_survives_any_error_of_an_operation(service, monkeypatch, error):
    """Any error other than FUSEError would end the loop and the mount."""

    def fail(*arguments, **more):
        raise error

    operations = _Operations(service)
    operations.handles[1] = None
    monkeypatch.setattr(service, "read", fail)
    monkeypatch.setattr(service.files, "open", fail)
    monkeypatch.setattr(service.files, "release", fail)
    operations.handles[1] = SimpleNamespace()
    for operation, *arguments in (
        (operations.read, 1, 0, 10),
        (operations.open, service.tree.files[0].ino, os.O_RDONLY, None),
        (operations.release, 1),
    ):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            trio.run(operation, *arguments)
        assert caught.value.errno == (error.errno if isinstance(error, OSError) else errno.EIO)


# -- power cuts


def test_directory_entries_are_synced_with_their_files(tmp_path, monkeypatch):
    flushed, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
    write_atomic(tmp_path / "record", b"{}")
    assert flushed == [str(tmp_path)]

    class Recorded(LocalStore):
        def put(self, key, data):
            super().put(key, data)
            done.append(key)

        def flush(self):
            super().flush()
            done.append("flush")

    done: list[str] = []
    ChunkStore(Recorded(tmp_path / "store")).set_ref("tags", "model:v1", "0" * 64)
    assert done == ["refs/tags/model@v1", "flush"]


def test_a_sparse_file_is_fsynced_once(fetcher, model, monkeypatch):
    fsynced, real = [], SparseFile.fsync
    monkeypatch.setattr(SparseFile, "fsync", lambda self: fsynced.append(self.file.path) or real(self))
    for _ in range(3):
        fetcher.queue.put((0, 0), wire.READAHEAD)
        while taken := fetcher.queue.get(lambda: wire.FSYNC, 0):
            (file, chunk), urgency = taken
            fetcher._do(file, chunk, urgency)
            fetcher.queue.done(file)
    assert fsynced == ["00.bin"] and len(fetcher.sparse_files) == 1


def test_a_control_socket_survives_a_lack_of_descriptors(tmp_path, monkeypatch):
    """A daemon without its control socket would be considered dead, and killed while it serves readers."""
    monkeypatch.setattr("lazyfs.mount.control_server._REFUSED_PAUSE_S", 0.01)
    server = ControlServer(tmp_path / "sock", {"ping": lambda request: {"pid": 1}})
    real, refused = server.socket, []

    class Refusing:
        def accept(self):
            if len(refused) < 3:
                refused.append(True)
                raise OSError(errno.EMFILE, "Too many open files")
            return real.accept()

        def __getattr__(self, name):
            return getattr(real, name)

    server.socket = Refusing()
    server.start()
    try:
        assert ask(tmp_path / "sock", {"op": "ping"}, LIMIT_S)["pid"] == 1 and len(refused) == 3
    finally:
        server.close()


def test_failing_housekeeping_does_not_end_the_mount(model, memory, monkeypatch, caplog):
    server = Server(model.config, model.manifest, FetcherLink(model.config, memory.fd), memory)
    ticks = []

    def expire():
        ticks.append(True)
        raise RuntimeError("a defect")

    monkeypatch.setattr(server.service, "expire", expire)
    monkeypatch.setattr(server.transport, "wait", lambda limit_s: len(ticks) >= 3)
    server.run()
    assert len(ticks) == 3 and "housekeeping failed" in caplog.text


def test_a_fetcher_in_an_fsync_does_not_delay_the_end_of_its_daemon(model, memory):
    """SIGKILL takes effect only after the fsync, which may take many seconds on a busy disk."""
    link, waited = FetcherLink(model.config, memory.fd), []

    def wait(limit_s):
        waited.append(limit_s)
        raise subprocess.TimeoutExpired("fetcher", limit_s)

    link.process = SimpleNamespace(kill=lambda: waited.append(0.0), wait=wait)
    link.close()
    assert waited[0] == 0.0 and sum(waited) <= 1.0
