"""A mount's daemon and its fetcher under stress: few descriptors, a slow host, a stopped fetcher, a dead store, a damaged cache."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lazyfs.admin.verify import VerifyReport, verify_cache
from lazyfs.api import import_directory
from lazyfs.cache.cache import Cache
from lazyfs.cache.slots import SlotMemory
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.fetch import supervisor
from lazyfs.fetch.supervisor import FetcherLink
from lazyfs.mount import kernel
from lazyfs.mount.config import MountConfig
from lazyfs.mount.control import address
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.rig import LIMIT_S, fetcher_pid, wait_for

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
QUIET = {"use_origin": False, "prefetch": False, "background_mb_s": 0.0}
MANY = 900


@pytest.fixture(scope="module")
def shared(module_folder, stored):
    """Return a home whose store has a model, and a directory of very many files."""
    model, digest, _ = stored
    many = module_folder / "many"
    many.mkdir()
    for number in range(MANY):
        (many / f"{number:04}").write_bytes(number.to_bytes(4, "little") * 10)
    return model, digest, many, import_directory(many)


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["raw", "pyfuse3"])
def test_a_cold_mount_opens_more_files_than_the_soft_limit_allows(shared, rig, tmp_path, transport):
    """`ulimit -Sn 1024` is usual: with one descriptor per file it is exceeded at the 1,000th file, with four at the 254th."""
    _, _, many, digest = shared
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        handle = rig.mount(digest, cache_dir=tmp_path / "c", transport=transport, **QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    idle = descriptors(handle.pid)
    reader, wanted = rig.reader(), 300
    for number in range(wanted):
        assert reader.ask("open", number, str(handle.mountpoint / f"{number:04}")) is True
        assert reader.ask("pread", number, 0, 4) == number.to_bytes(4, "little").hex()
    assert handle.status()["open_files"] == wanted
    for number in range(wanted):
        reader.ask("close", number)
    wait_for(lambda: handle.status()["open_files"] == 0)
    # The fetcher fsyncs the files that it has filled, and closes them.
    fetcher = rig.fetcher_of(handle)
    wait_for(lambda: descriptors(handle.pid) <= idle + 8 and descriptors(fetcher) < 100)


@pytest.mark.slow
def test_a_chunk_that_verify_removed_is_fetched_again_at_once(shared, rig, tmp_path):
    """The mount had the complete file: its fetcher reported the chunk as present, and its server requested it again, for a minute."""
    model, digest, *_ = shared
    handle = rig.mount(digest, cache_dir=tmp_path / "c", native="off", read_limit_s=10.0, **QUIET)
    cache, chunks = Cache(tmp_path / "c"), ChunkStore(LocalStore(Path(os.environ["QUICKTHAW_HOME"]) / "store"))
    file = next(f for f in chunks.get_manifest(digest).files if f.path == "model.safetensors")
    reader, path = rig.reader(), handle.mountpoint / "model.safetensors"
    assert reader.ask("open", 1, str(path)) is True
    handle.control("prefetch")
    wait_for(lambda: handle.status()["cached_bytes"] == handle.status()["bytes"])
    have = cache.folder(file) / "have"
    # The header says that everything is fsynced: then the fetcher closes the file.
    wait_for(lambda: have.read_bytes()[44])
    time.sleep(0.05)
    with open(cache.folder(file) / "data", "r+b") as data:
        data.seek(file.offsets[2] + 100)
        data.write(b"damaged by somebody")
    report = VerifyReport()
    verify_cache(cache, chunks, report)
    assert report.cache_bad == 1
    right = (model / "model.safetensors").read_bytes()[file.offsets[2] :][:1000].hex()
    assert reader.ask("pread", 1, file.offsets[2], 1000) == right
    assert handle.status()["counters"]["failed"] == 0


class Delayed:
    """A daemon's control socket behind a proxy that delays the first few requests, as a busy host does."""

    def __init__(self, path, seconds, times):
        self.path, self.seconds, self.times = path, seconds, times
        self.behind = path.with_suffix(".behind")
        path.rename(self.behind)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with address(path) as name:
            self.socket.bind(name)
        self.socket.listen(16)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                channel, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(channel, self.times > 0), daemon=True).start()
            self.times -= 1

    def _one(self, channel, late):
        with channel, contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
            line = channel.recv(65536)
            if late:
                time.sleep(self.seconds)
            with address(self.behind) as name:
                daemon.connect(name)
            daemon.sendall(line)
            channel.sendall(daemon.makefile("rb").readline())

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.path.unlink()
        self.behind.rename(self.path)


@pytest.mark.slow
def test_a_slow_daemon_is_not_killed(shared, rig, monkeypatch):
    """Engines read through it; two missed pings are no reason to kill it."""
    _, digest, *_ = shared
    monkeypatch.setattr("lazyfs.mount.client._PING_S", 0.2)
    first = rig.mount(digest)
    slow = Delayed(first.socket, seconds=1.0, times=4)
    try:
        assert rig.mount(digest).pid == first.pid
    finally:
        slow.close()
    assert first.status()["pid"] == first.pid


@pytest.mark.slow
def test_prefetch_requests_are_not_lost(shared, rig, tmp_path):
    """More requests than the fetcher's socket holds, while the fetcher is stopped."""
    _, _, _, digest = shared
    handle = rig.mount(digest, cache_dir=tmp_path / "c", **QUIET)
    assert rig.reader().ask("digest", str(handle.mountpoint / "0000"))
    fetcher = rig.fetcher_of(handle)
    os.kill(fetcher, signal.SIGSTOP)
    try:
        asking = threading.Thread(target=lambda: handle.control("prefetch"))
        asking.start()
        asking.join(0.5)
    finally:
        os.kill(fetcher, signal.SIGCONT)
    asking.join(LIMIT_S)
    wait_for(lambda: handle.status()["cached_bytes"] == handle.status()["bytes"])


def test_requests_to_a_killed_fetcher_are_sent_to_the_next(stored, rig, tmp_path):
    _, digest, _ = stored
    handle = rig.mount(digest, cache_dir=tmp_path / "c", **QUIET)
    assert rig.reader().ask("digest", str(handle.mountpoint / "config.json"))
    fetcher = rig.fetcher_of(handle)
    os.kill(fetcher, signal.SIGSTOP)
    handle.control("pin")
    os.kill(fetcher, signal.SIGKILL)
    wait_for(lambda: handle.status()["cached_bytes"] == handle.status()["bytes"])
    assert fetcher_pid(handle.pid) not in (None, fetcher)


@pytest.mark.slow
def test_a_fetcher_that_cannot_start_is_retried(tmp_path, monkeypatch):
    """Each one ends at once, because its manifest does not exist; two of them cannot be started at all."""
    names = {n: str(tmp_path / n) for n in ("mountpoint", "cache_dir", "log_file", "socket", "state_file", "home")}
    config = MountConfig(manifest="0" * 64, store_url=f"file://{tmp_path / 'store'}", **names)
    memory = SlotMemory(64)
    asked = threading.Event()
    channel = FetcherLink(config, memory.fd)
    channel.on_restart = asked.set
    real, calls = subprocess.Popen, []

    class Popen(real):
        def __init__(self, *arguments, **more):
            calls.append(time.monotonic())
            if len(calls) in (2, 3):
                raise OSError(12, "Cannot allocate memory")
            super().__init__(*arguments, **{**more, "stderr": subprocess.DEVNULL})

    monkeypatch.setattr(supervisor.subprocess, "Popen", Popen)
    before = len(os.listdir("/proc/self/fd"))
    try:
        channel.ensure_started()
        assert asked.wait(LIMIT_S)
        assert len(calls) >= 4
    finally:
        channel.close()
    os.close(memory.fd)
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.slow
def test_a_dead_store_is_logged_once(shared, rig, tmp_path, control):
    """Not for each chunk and attempt: the log of an hour without network must be readable."""
    _, digest, *_ = shared
    control("reset")
    settings = {"fetch_limit_s": 1.0, "read_limit_s": 4.0, "use_origin": False, "log_file": tmp_path / "log"}
    handle = rig.mount(digest, store_url=control.url, cache_dir=tmp_path / "c", **settings)
    reader = rig.reader()
    assert "errno" in reader.ask("digest", str(handle.mountpoint / "model.safetensors"))
    wait_for(lambda: handle.status()["fetcher"].get("retries", 0) >= 20)
    lines = (tmp_path / "log").read_text().splitlines()
    assert 2 <= len(lines) <= 8 and any("reset by peer" in line for line in lines), lines
    control()
    assert "errno" not in reader.ask("digest", str(handle.mountpoint / "model.safetensors"))
