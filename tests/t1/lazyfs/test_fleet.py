"""Eight hosts and one slow store: each chunk leaves the store about once, whatever peers do, and every byte is right."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import pytest

from lazyfs.admin.verify import VerifyReport, verify_cache
from lazyfs.cache.cache import Cache
from lazyfs.cache.open_sparse_files import raise_descriptor_limit
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.importer import import_tree
from lazyfs.errors import LazyfsError, Permanent
from lazyfs.mount import kernel
from lazyfs.peers.client import Peers, Wanted
from lazyfs.peers.order import Members
from lazyfs.peers.server import Chunks, PeerServer
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.fleet import BadPeer, Host, SlowStore, dead_address, listed
from tests.kits.lazyfs.models import make_model
from tests.kits.lazyfs.rig import ROOT, assert_same, wait_for

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.usefixtures("home")]
TOKEN = "fleet"
HOSTS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    make_model(folder / "model", megabytes=96)
    chunks = ChunkStore(LocalStore(folder / "store"), zstd=None)
    digest, manifest = import_tree(folder / "model", chunks)
    return folder, digest, manifest


@pytest.fixture
def store(model):
    store = SlowStore(model[0] / "store", rate=80e6)
    yield store
    store.close()


@pytest.fixture
def patient(monkeypatch):
    """A slow machine's pauses are not a peer's silence: these tests count bytes, and benchmarks/lazyfs_fleet.py the time."""
    monkeypatch.setattr("lazyfs.peers.client.GRACE_S", 2.0)


@pytest.fixture
def started():
    found = []
    yield found
    for one in found:
        one.close()


def load_all(hosts, digest, manifest, peers):
    """Load the model on all hosts at once; return what each has fetched."""
    done, failed = [], []
    for host in hosts:
        host.knows(peers)

    def one(host):
        try:
            done.append(host.load(digest, manifest, peers))
        except LazyfsError as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(host,)) for host in hosts]
    [t.start() for t in threads]
    [t.join(90) for t in threads]
    assert not failed and len(done) == len(hosts)


def assert_right(hosts, manifest):
    for host in hosts:
        cache, report = Cache(host.folder / "cache"), VerifyReport()
        (host.folder / "cache" / "manifests").mkdir()
        from lazyfs.content.manifest import encode

        digest, data = encode(manifest)
        (host.folder / "cache" / "manifests" / digest).write_bytes(data)
        verify_cache(cache, None, report)
        assert report.clean and report.cache_chunks >= len(manifest.chunk_digests())
        assert all(cache.present_bytes(file) == file.size for file in manifest.files)


def unique_bytes(manifest):
    return sum({c.digest: c.length for f in manifest.files for c in f.chunks}.values())


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_chunk_leaves_the_store_once_for_eight_hosts(model, store, started, tmp_path):
    _, digest, manifest = model
    hosts = [Host(tmp_path / f"h{i}", store.url, TOKEN, address=f"127.0.0.{i + 2}") for i in range(HOSTS)]
    started += hosts
    load_all(hosts, digest, manifest, listed(*(host.server.address for host in hosts)))
    assert_right(hosts, manifest)
    copies = store.sent / unique_bytes(manifest)
    assert copies <= 1.3
    print(f"{copies:.2f} copies")


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_peers_that_are_dead_lie_and_stall_cost_little_more_than_one_copy(model, store, started, tmp_path):
    _, digest, manifest = model
    bad = [BadPeer("lie"), BadPeer("stall"), BadPeer("half")]
    hosts = [Host(tmp_path / f"h{i}", store.url, TOKEN, serves=i < 5, address=f"127.0.0.{i + 2}") for i in range(HOSTS)]
    started += [*bad, *hosts]
    good = [host.server.address for host in hosts if host.server]
    load_all(hosts, digest, manifest, listed(*good, *(peer.address for peer in bad)))
    assert_right(hosts, manifest)
    assert all(peer.asked for peer in bad)
    copies = store.sent / unique_bytes(manifest)
    assert copies <= 1.3
    print(f"{copies:.2f} copies")


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_peers_that_die_within_the_load_cost_little_more_than_one_copy(model, store, started, tmp_path):
    _, digest, manifest = model
    hosts = [Host(tmp_path / f"h{i}", store.url, TOKEN, address=f"127.0.0.{i + 2}") for i in range(HOSTS)]
    started += hosts
    addresses = listed(*(host.server.address for host in hosts))
    killer = threading.Timer(0.4, lambda: [host.server.close() for host in hosts[:2]])
    killer.start()
    load_all(hosts, digest, manifest, addresses)
    killer.join()
    assert_right(hosts, manifest)
    copies = store.sent / unique_bytes(manifest)
    assert copies <= 1.3
    print(f"{copies:.2f} copies")


class Asked:
    """Peers of one host, and a file of one chunk."""

    def __init__(self, manifest, peers, **more):
        self.file = next(f for f in manifest.files if f.path == "config.json")
        self.peers = Peers(Members(peers), TOKEN, **more)

    def ask(self):
        view = memoryview(bytearray(8 << 20))
        began = time.monotonic()
        found = self.peers.get(Wanted.of(self.file, 0), view)
        return None if found is None else bytes(found), time.monotonic() - began


@pytest.mark.parametrize("does", ["stall", "half", "lie"])
def test_a_bad_peer_is_given_up_at_once_and_the_next_one_serves(model, store, started, tmp_path, does):
    folder, _, manifest = model
    host, bad = Host(tmp_path / "h", store.url, TOKEN), BadPeer(does)
    started += [host, bad]
    right = (folder / "model" / "config.json").read_bytes()
    asked = Asked(manifest, listed(bad.address, host.server.address))
    started.append(asked.peers)
    for _ in range(6):
        data, took = asked.ask()
        assert data == right and took < 5
    if does == "lie":
        assert bad.asked <= 1, "once, and not again for ten minutes"
    alone = Asked(manifest, listed(bad.address))
    started.append(alone.peers)
    assert alone.ask()[0] is None


def test_a_dead_peer_and_no_peer_at_all_leave_the_store(model, started):
    asked = Asked(model[2], listed(dead_address()))
    started.append(asked.peers)
    data, took = asked.ask()
    assert data is None and took < 1


def test_a_peer_that_is_only_busy_is_waited_for_up_to_its_limit(model, started, monkeypatch):
    monkeypatch.setattr("lazyfs.peers.client._PATIENCE_S", 0.5)
    bad = BadPeer("wait")
    asked = Asked(model[2], listed(bad.address))
    started += [bad, asked.peers]
    data, took = asked.ask()
    assert data is None and took >= 0.5


def test_a_peer_serves_what_its_cache_has_without_a_store_and_nothing_else(model, store, started, tmp_path):
    folder, digest, manifest = model
    host = Host(tmp_path / "h", store.url, TOKEN, serves=False)
    host.load(digest, manifest, "")
    server = PeerServer(("127.0.0.1", 0), TOKEN, Chunks(host.folder / "cache", None, 0))
    server.start()
    asked = Asked(manifest, listed(server.address))
    started += [server, asked.peers]
    assert asked.ask()[0] == (folder / "model" / "config.json").read_bytes()
    asked.file = manifest.files[0].__class__("x", 0o644, 4, (manifest.files[0].chunks[0].__class__("a" * 64, 4),))
    assert asked.ask()[0] is None
    assert server.counters()["served_chunks"] == 1 and server.counters()["fetched_bytes"] == 0


def test_a_wrong_token_is_refused(model, store, started, tmp_path):
    host = Host(tmp_path / "h", store.url, "another token")
    asked = Asked(model[2], listed(host.server.address))
    started += [host, asked.peers]
    assert asked.ask()[0] is None and not host.server.counters()["served_chunks"]


def test_a_token_of_a_file_ends_with_a_newline_and_may_hold_any_letters(model, store, started, tmp_path):
    host = Host(tmp_path / "h", store.url, "ключ\n")
    asked = Asked(model[2], listed(host.server.address))
    asked.peers = Peers(Members(listed(host.server.address)), "ключ")
    started += [host, asked.peers]
    assert asked.ask()[0] is not None


def test_a_kept_connection_may_have_any_descriptor(model, store, started, tmp_path):
    """A host of a large fleet, or with many open files, has more than the 1,024 that select() knows."""
    host = Host(tmp_path / "h", store.url, TOKEN)
    asked = Asked(model[2], listed(host.server.address))
    started += [host, asked.peers]
    raise_descriptor_limit()
    with contextlib.ExitStack() as stack:
        null = stack.enter_context(open(os.devnull))
        for _ in range(1024):
            stack.callback(os.close, os.dup(null.fileno()))
        assert asked.ask()[0] is not None
        assert max(connection.fileno() for connection in asked.peers._idle.values()) > 1023
        assert asked.ask()[0] is not None


def test_who_asks_for_a_wrong_length_or_place_fails_alone(model, store, started, tmp_path, caplog):
    host = Host(tmp_path / "h", store.url, TOKEN)
    asked = Asked(model[2], listed(host.server.address))
    started += [host, asked.peers]
    right = Wanted.of(asked.file, 0)
    assert asked.ask()[0] is not None
    for more in (
        {"length": right.length - 1},
        {"length": right.length - 1, "file": "0" * 64},
        {"index": 1 << 70},
        {"start": 1 << 63},
    ):
        connection = http.client.HTTPConnection(*host.server.address, timeout=10)
        connection.request("GET", dataclasses.replace(right, **more).path, headers={"Authorization": f"Bearer {TOKEN}"})
        assert connection.getresponse().status in (400, 404), more
        connection.close()
    assert asked.ask()[0] is not None and "defect" not in caplog.text


def test_connections_are_bounded_before_anybody_shows_a_token(model, store, started, tmp_path, monkeypatch):
    monkeypatch.setattr("lazyfs.peers.server._CONNECTIONS", 3)
    host = Host(tmp_path / "h", store.url, TOKEN)
    started.append(host)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(host.server.address)) for _ in range(4)]
        assert idle[3].recv(1) == b"", "closed at once"
        idle[0].close()
        asked = Asked(model[2], listed(host.server.address), silence_s=1.0)
        started.append(asked.peers)
        wait_for(lambda: asked.ask()[0] is not None, limit_s=10)


def test_connections_that_get_no_thread_do_not_count(model, store, started, tmp_path, monkeypatch):
    monkeypatch.setattr("lazyfs.peers.server._CONNECTIONS", 2)
    host = Host(tmp_path / "h", store.url, TOKEN)
    started.append(host)
    with monkeypatch.context() as full:
        full.setattr(socketserver.threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no thread")))
        for _ in range(3):
            with socket.create_connection(host.server.address) as connection:
                assert connection.recv(1) == b""
    asked = Asked(model[2], listed(host.server.address), silence_s=1.0)
    started.append(asked.peers)
    assert asked.ask()[0] is not None


class Slow:
    """A store that answers when it is told to."""

    def __init__(self, fails=False):
        self.go, self.store, self.fails = threading.Event(), None, fails

    def get(self, digest, length, encoding):
        assert self.go.wait(30)
        if self.fails:
            raise Permanent("no", code="test")
        return bytes(length)


def test_chunks_under_way_being_sent_and_kept_share_one_budget(tmp_path):
    store = Slow()
    chunks = Chunks(tmp_path, store, 100)
    wanted = [Wanted(name * 64, 40, 0, name * 64, 0, 0) for name in "abcd"]
    first, second = chunks.fetch(wanted[0]), chunks.fetch(wanted[1])
    assert chunks.fetch(wanted[0]) is first, "once for all who ask"
    assert chunks.fetch(wanted[2]) is None and chunks.refused == 1 and chunks.used == 80
    store.go.set()
    sent = first.result(30)
    assert second.result(30).data == bytes(40) and chunks.in_memory("a" * 64) is sent
    del first, second
    also_sent = chunks.fetch(wanted[2]).result(30)
    assert chunks.in_memory("b" * 64) is None, "a kept one goes, the least recently used first"
    # These are used by us, as by handlers that send them: they count, kept or not.
    assert chunks.fetch(wanted[3]) is None and chunks.used == 80 and chunks.in_memory("a" * 64) is None
    del sent, also_sent
    assert chunks.used == 0 and chunks.fetch(wanted[3]).result(30)
    chunks.close()
    wait_for(lambda: chunks.used == 0, limit_s=10)


def test_who_asks_when_a_fetch_has_just_ended_gets_its_chunk_and_no_second_fetch(tmp_path):
    """A handler looks in memory, on disk, and then asks for a fetch: another one's may end meanwhile."""
    store = Slow()
    store.go.set()
    chunks, wanted = Chunks(tmp_path, store, 100), Wanted("a" * 64, 40, 0, "a" * 64, 0, 0)
    first = chunks.fetch(wanted).result(30)
    assert chunks.fetch(wanted).result(0) is first and chunks.fetched == 40
    chunks.close()


def test_a_server_without_its_address_leaves_no_thread(tmp_path):
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError):
        PeerServer(other.getsockname(), TOKEN, Chunks(tmp_path, None, 0))
    assert threading.active_count() == before


@pytest.mark.parametrize("ends", ["failed", "closed"])
def test_a_fetch_that_fails_or_never_begins_gives_its_memory_back(tmp_path, monkeypatch, ends):
    monkeypatch.setattr("lazyfs.peers.server._FETCHING", 1)
    store = Slow(fails=True)
    chunks = Chunks(tmp_path, store, 100)
    futures = [chunks.fetch(Wanted(name * 64, 40, 0, name * 64, 0, 0)) for name in "ab"]
    assert chunks.used == 80
    if ends == "failed":
        store.go.set()
    else:
        threading.Timer(0.1, store.go.set).start()
        chunks.close()
    for future in futures:
        with pytest.raises((Permanent, CancelledError)):
            future.result(30)
    wait_for(lambda: chunks.used == 0, limit_s=10)
    chunks.close()


def test_without_memory_a_peer_serves_what_is_on_disk_and_others_ask_the_store(model, store, started, tmp_path):
    host = Host(tmp_path / "h", store.url, TOKEN)
    host.server.chunks.memory = 0
    asked = Asked(model[2], listed(host.server.address))
    started += [host, asked.peers]
    assert asked.ask()[0] is None and host.server.counters()["refused_fetches"] == 1
    host.load(model[1], model[2], "")
    assert asked.ask()[0] is not None


@pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")
@pytest.mark.parametrize("named_by", ["settings", "variables"])
def test_a_mount_reads_through_the_peer_of_its_host(model, store, home, rig, monkeypatch, named_by):
    """The commands as users run them: a server, and a mount that asks it; at the end it says what it has served."""
    folder, digest, _ = model
    words = ["-m", "plugin", "peer", "--listen", "127.0.0.1:0", "--store", store.url, "--json"]
    environment = {**os.environ, "QUICKTHAW_PEER_TOKEN": TOKEN}
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as server:
        try:
            address = json.loads(server.stdout.readline())["address"]
            peers = {"peers": address, "peer_token": TOKEN}
            if named_by == "variables":  # as for a launch's mounts
                for name in peers:
                    monkeypatch.setenv(f"QUICKTHAW_{name.upper()}", peers[name])
                peers = {}
            handle = rig.mount(digest, store_url=store.url, use_origin=False, **peers)
            assert_same(rig.reader(), folder / "model", handle.mountpoint)
            wait_for(lambda: handle.status()["fetcher"].get("peer_bytes", 0) > 90 << 20)
            assert handle.status()["fetcher"]["store_bytes"] == 0
            assert 'quickthaw_lazyfs_tier_bytes_total{tier="peer"}' in handle.control("metrics")["text"]
            assert TOKEN not in handle.log_file.read_text()
        finally:
            server.terminate()
            counters = json.loads(server.stdout.readline())
        assert server.wait(30) == 0
    assert counters["served_bytes"] == counters["fetched_bytes"] > 90 << 20
