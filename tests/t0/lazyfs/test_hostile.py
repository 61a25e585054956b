"""A store, or the way to it, in an attacker's hands: nothing is read, sent, written or kept in memory that should not be."""

from __future__ import annotations

import http.server
import stat
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from checkpoint.errors import CheckpointError
from checkpoint.store.archive import open_chunks
from lazyfs.admin.verify import verify
from lazyfs.content.chunk_store import ChunkStore, chunk_key, digest_of
from lazyfs.content.chunking import MAX_CHUNK
from lazyfs.content.manifest import RAW, VERSION, ZSTD, Chunk, Directory, File, Manifest, Symlink, decode, encode
from lazyfs.content.stat_index import read_through
from lazyfs.content.trees import get_tree
from lazyfs.errors import Integrity, LazyfsError, NotFound, Permanent, Usage
from lazyfs.fetch.access_log import parse
from lazyfs.fetch.chunk import StoreSource
from lazyfs.mount.config import MountConfig
from lazyfs.mount.manifest_source import load_manifest
from lazyfs.stores.base import MOST_BYTES
from lazyfs.stores.http import WebStore
from lazyfs.stores.local import LocalStore
from lazyfs.stores.urls import normal_url, shown_url
from plugin.runtime.steps.compile_cache import CompileCache
from plugin.runtime.steps.snapshot_fetch import Fetching

pytestmark = pytest.mark.t0
D = "a" * 64
LIMIT_S = 30


def document(kind="weights", files=(), symlinks=(), directories=(), source=""):
    return Manifest(VERSION, kind, tuple(directories), tuple(files), tuple(symlinks), {}, source)


def plant(chunks, manifest):
    """Put a manifest into the store as its owner can, unchecked."""
    digest, data = encode(manifest)
    chunks.store.put(f"manifests/{digest}", data)
    return digest


def config_of(folder, digest):
    names = {n: str(folder / n) for n in ("mountpoint", "cache_dir", "log_file", "socket", "state_file", "home")}
    return MountConfig(manifest=digest, store_url=f"file://{folder / 'store'}", **names)


# -- what a manifest may say


@pytest.mark.parametrize(
    "manifest",
    [
        document("source", [File("shadow", 0o644, 3, (Chunk("", 3),), "3-1-1-1")], source="file:///etc"),
        document("weights", [File("shadow", 0o644, 3, (Chunk(D, 3),))], source="s3://bucket/of-another"),
        document("weights", [File("shadow", 0o644, 3, (Chunk("", 3),))]),
        document("snapshot", [File("shadow", 0o644, 3, (Chunk(D, 3),), "3-1-1-1")]),
    ],
)
def test_a_manifest_from_a_store_names_no_source(tmp_path, chunks, manifest):
    """The daemon would open any file or URL of this host, with its own credentials."""
    digest = plant(chunks, manifest)
    with pytest.raises(Integrity) as caught:
        load_manifest(config_of(tmp_path, digest))
    assert caught.value.code == "foreign-source"
    # Nor from the copies of what came from a store.
    copies = tmp_path / "cache_dir" / "manifests"
    copies.mkdir(parents=True)
    (copies / digest).write_bytes(encode(manifest)[1])
    with pytest.raises(Integrity):
        load_manifest(config_of(tmp_path, digest))


def test_a_source_that_this_host_named_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    digest = read_through(tmp_path / "model", cache_dir=tmp_path / "cache_dir")
    assert load_manifest(config_of(tmp_path, digest)).source == f"file://{tmp_path / 'model'}"


@pytest.mark.parametrize("length", [MAX_CHUNK + 1, 1 << 40])
def test_a_chunk_has_a_bound(length):
    digest, data = encode(document(files=[File("a", 0o644, length, (Chunk(D, length),))]))
    with pytest.raises(Integrity, match="chunk of more than"):
        decode(data, digest)


@pytest.mark.parametrize("mode", [-1, 0o10000, 1 << 40])
def test_a_mode_is_one_that_a_file_can_have(mode):
    digest, data = encode(document(files=[File("a", mode, 0)]))
    with pytest.raises(Integrity, match="mode"):
        decode(data, digest)


LINKS_OUT = {
    "absolute": [Symlink("a", "/etc/passwd")],
    "above": [Symlink("sub/a", "../../etc/passwd")],
    "within a name": [Symlink("a", "sub/../../etc")],
    # Each of them stays inside by its own words.
    "through another": [Symlink("sub/up", ".."), Symlink("a", "sub/up/../etc")],
    "through two": [Symlink("sub/up", ".."), Symlink("b", "sub/up"), Symlink("a", "b/../etc")],
    "to one that leads out": [Symlink("a", "b"), Symlink("b", "/etc/passwd")],
}


@pytest.mark.parametrize("links", LINKS_OUT.values(), ids=LINKS_OUT.keys())
@pytest.mark.parametrize("kind", ["weights", "snapshot", "anything"])
def test_links_out_of_the_tree_are_not_written_and_not_mounted(tmp_path, chunks, links, kind):
    digest = plant(chunks, document(kind, symlinks=links, directories=[Directory("sub", 0o755)]))
    for take in (
        lambda: get_tree(digest, chunks, tmp_path / "out"),
        lambda: load_manifest(config_of(tmp_path, digest)),
    ):
        with pytest.raises(Integrity) as caught:
            take()
        assert caught.value.code == "link-out"
    assert not (tmp_path / "out").exists()


def test_links_inside_the_tree_are_kept(tmp_path, chunks):
    links = [Symlink("sub/up", ".."), Symlink("a", "sub/up/sub"), Symlink("gone", "nothing"), Symlink("loop", "loop")]
    digest = plant(chunks, document(symlinks=links, directories=[Directory("sub", 0o755)]))
    get_tree(digest, chunks, tmp_path / "out")
    assert (tmp_path / "out" / "a").resolve() == tmp_path / "out" / "sub"


def test_nothing_from_a_store_runs_with_its_owners_rights(tmp_path, chunks):
    body = chunks.put_chunk(b"#!/bin/sh\n").chunk
    tree = document(files=[File("sub/tool", 0o6755, body.length, (body,))], directories=[Directory("sub", 0o2755)])
    get_tree(plant(chunks, tree), chunks, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / "sub" / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "sub").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "body", [b'{"format": 1, "touches": [[1e999, 0, 0]]}', b"[" * 200_000, b'{"format": 1, "touches": [["a", 0, 0]]}']
)
def test_a_hostile_trace_is_not_a_trace(body):
    with pytest.raises(ValueError):
        parse(body)


# -- how much of it


def peak_of(call):
    tracemalloc.start()
    try:
        with pytest.raises(LazyfsError) as caught:
            call()
        return tracemalloc.get_traced_memory()[1], caught.value
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [1000, None])
def test_a_frame_that_states_its_size_is_bounded(chunks, length):
    """2 KB would become 64 MiB, and 100 KB several gigabytes."""
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(MOST_BYTES))
    assert len(bomb) < 4096
    chunks.store.put(chunk_key(D, ZSTD), bomb)
    peak, error = peak_of(lambda: chunks.get(D, length, ZSTD))
    assert isinstance(error, Integrity) and peak < MAX_CHUNK * 2


def test_a_frame_that_does_not_state_its_size_is_bounded(chunks):
    bomb = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(MOST_BYTES))
    chunks.store.put(chunk_key(D, ZSTD), bomb)
    peak, error = peak_of(lambda: chunks.get(D, None, ZSTD))
    assert isinstance(error, Integrity) and peak < MAX_CHUNK * 2


def test_a_mount_bounds_what_it_decompresses(chunks):
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(MOST_BYTES))
    chunks.store.put(chunk_key(D, ZSTD), bomb)
    file = File("a", 0o644, 1000, (Chunk(D, 1000, ZSTD),))
    peak, error = peak_of(lambda: StoreSource(chunks).fetch(file, 0))
    assert isinstance(error, Integrity) and peak < MAX_CHUNK * 2


def test_the_largest_chunk_comes_back_at_any_level(tmp_path):
    for level in (1, 19):
        store = ChunkStore(LocalStore(tmp_path / str(level)), zstd=level)
        data = bytes(range(256)) * (MAX_CHUNK // 256)
        digest = store.put(data)
        assert store.get(digest) == data and store.get(digest, MAX_CHUNK, ZSTD) == data
    with pytest.raises(Usage):
        store.put(bytes(MAX_CHUNK + 1))


@pytest.mark.parametrize("encoding", [RAW, ZSTD])
def test_a_chunk_of_a_directory_is_bounded_by_what_a_chunk_can_be(chunks, encoding):
    """Not by the largest object of a store, eight times that: each thread of a fetcher may hold one."""
    path = chunks.store.path(chunk_key(D, encoding))
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(MAX_CHUNK + 1)
    for take in (lambda: chunks.get(D), lambda: StoreSource(chunks).fetch(File("a", 0o644, 9, (Chunk(D, 9),)), 0)):
        peak, error = peak_of(take)
        assert isinstance(error, Integrity) and error.code == "too-large" and peak < MAX_CHUNK


def test_a_chunk_that_is_too_long_is_damage_and_repaired(chunks):
    """It is one chunk's, and no reason to stop looking at the others."""
    good = chunks.put_chunk(b"good").chunk
    digest = plant(chunks, document(files=[File("a", 0o644, 9, (Chunk(D, 9),)), File("b", 0o644, 4, (good,))]))
    chunks.store.put(chunk_key(D), bytes(MAX_CHUNK + 1))
    report = verify(chunks, [digest], repair=True)
    assert report.bad == {D: "a"} and report.chunks == 2
    assert chunks.store.head(chunk_key(D)) is None and chunks.has(good.digest, 4)


def test_an_object_of_a_directory_is_bounded(chunks):
    path = chunks.store.path("manifests/" + D)
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(MOST_BYTES + 1)
    peak, error = peak_of(lambda: chunks.get_manifest(D))
    assert error.code == "too-large" and peak < MAX_CHUNK


# -- over HTTP


class Site(http.server.BaseHTTPRequestHandler):
    """Answers as its server's `answer` says, and records the headers that came."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        self.server.answer(self)

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass  # The client has cut it off.

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    """Starts servers on 127.0.0.1 (or another name of this host)."""
    servers = []

    def start(answer):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
        server.daemon_threads = True
        server.answer, server.seen = answer, []
        server.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def web():
    """Opens stores, and closes them."""
    stores = []

    def start(url):
        stores.append(WebStore(url, inactivity_s=LIMIT_S))
        return stores[-1]

    yield start
    for store in stores:
        store.close()


def fine(request):
    body = b"body"
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def redirect(location):
    def answer(request):
        request.send_response(302)
        request.send_header("Location", location)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def endless(chunked):
    """Sends for as long as somebody reads."""

    def answer(request):
        request.send_response(200)
        request.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(1 << 40))))
        request.end_headers()
        piece = bytes(1 << 20)
        try:
            while True:
                request.wfile.write(b"100000\r\n" + piece + b"\r\n" if chunked else piece)
        except OSError:
            request.close_connection = True

    return answer


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("length", [None, 1000])
def test_a_body_without_end_is_not_taken_into_memory(site, web, chunked, length):
    server = site(endless(chunked))
    store = web(f"http://127.0.0.1:{server.port}")
    peak, error = peak_of(lambda: store.get("x", 0, length))
    assert isinstance(error, Permanent) and error.code == "too-large"
    # Joining what came is never reached.
    assert peak < MOST_BYTES + (8 << 20)
    server.answer = fine
    assert store.get("x") == b"body"


@pytest.mark.parametrize("chunked", [True, False])
def test_a_chunk_without_end_takes_no_more_than_a_chunk(site, web, chunked):
    source = StoreSource(ChunkStore(web(f"http://127.0.0.1:{site(endless(chunked)).port}")))
    peak, error = peak_of(lambda: source.fetch(File("a", 0o644, 9, (Chunk(D, 9),)), 0))
    assert isinstance(error, Integrity) and error.code == "too-large" and peak < 2 * MAX_CHUNK


def test_a_long_page_that_says_not_found_is_still_not_found(site, web):
    def answer(request):
        body = b"<html>" + bytes(3 << 20)
        request.send_response(404)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        try:
            request.wfile.write(body)
        except OSError:
            request.close_connection = True

    server = site(answer)
    store = web(f"http://127.0.0.1:{server.port}")
    with pytest.raises(NotFound):
        store.get("x", 0, 10)
    server.answer = fine
    assert store.get("x") == b"body"


def test_a_token_stays_with_its_host_and_port(site, web, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HTTP_TOKEN", "hunter2")
    other = site(fine)
    first = site(redirect(f"http://127.0.0.1:{other.port}/y"))
    store = web(f"http://127.0.0.1:{first.port}")
    assert store.get("x") == b"body"
    assert first.seen[0][1]["Authorization"] == "Bearer hunter2"
    assert "Authorization" not in other.seen[0][1]
    first.answer = lambda request: redirect("/y")(request) if request.path == "/x" else fine(request)
    assert store.get("x") == b"body"
    assert first.seen[-1][0] == "/y" and first.seen[-1][1]["Authorization"] == "Bearer hunter2"


def test_a_host_that_begins_alike_is_another(site, web, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HTTP_TOKEN", "hunter2")
    other = site(fine)
    first = site(redirect(f"http://127.0.0.1.localhost:{other.port}/y"))
    store = web("http://127.0.0.1")
    # The store without a port in its URL, on the one that the test could get: its name is what the redirection begins with.
    monkeypatch.setattr("http.client.HTTPConnection.default_port", first.port)
    monkeypatch.setattr("socket.getaddrinfo", _loopback)
    assert store.get("x") == b"body"
    assert "Authorization" in first.seen[0][1] and "Authorization" not in other.seen[0][1]


def _loopback(host, port, *_, **__):
    import socket

    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://h:port/", "gopher:x"])
def test_redirections_stay_with_http(site, web, location):
    server = site(redirect(location))
    store = web(f"http://127.0.0.1:{server.port}")
    with pytest.raises(Permanent) as caught:
        store.get("x")
    assert caught.value.code == "bad-redirect" and "\n" not in str(caught.value)


def test_a_redirection_does_not_give_up_encryption():
    with pytest.raises(Permanent) as caught:
        WebStore._redirected("https://store.example/x", "http://store.example/x?token=hunter2")
    assert caught.value.code == "bad-redirect" and "hunter2" not in str(caught.value)


# -- what others may see


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:hunter2@host:80/a?sig=abc", "http://***@host:80/a?***"),
        ("s3://key:hunter2@bucket/p", "s3://***@bucket/p"),
        ("https://host/a", "https://host/a"),
        ("file:///a@b?c", "file:///a@b?c"),
        ("/a@b", "/a@b"),
    ],
)
def test_a_url_as_others_may_see_it(url, shown):
    assert shown_url(url) == shown


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@host:port/x", "ftp://user:hunter2@host/x", "http://user:hunter2@"]
)
def test_a_url_that_is_refused_does_not_show_its_password(url):
    try:
        store = WebStore(normal_url(url))
    except Usage as error:
        assert "hunter2" not in str(error)
    else:
        assert "hunter2" not in store.url


def test_errors_of_a_store_show_no_password(site, web):
    server = site(redirect("http://127.0.0.1:1/y?X-Amz-Signature=hunter3"))
    store = web(f"http://user:hunter2@127.0.0.1:{server.port}")
    with pytest.raises(LazyfsError) as caught:
        store.get("x")
    assert "hunter" not in str(caught.value) and "hunter" not in store.url
    assert server.seen[0][1]["Authorization"].startswith("Basic ")


def test_records_of_imports_hold_no_password(tmp_path, monkeypatch):
    from lazyfs.content.stat_index import _record, _record_file

    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    url, other = "http://user:hunter2@host/a", "http://host/a"
    assert _record_file(Path("/m"), url) == _record_file(Path("/m"), other)
    assert "hunter2" not in str(_record(Path("/m"), url, digest_of(b""), []))


def test_what_reads_a_store_for_a_launch_logs_no_password(tmp_path, caplog):
    url = "ftp://user:hunter2@host/p?sig=hunter3"
    with pytest.raises(CheckpointError) as caught:
        open_chunks(url)
    (tmp_path / "cache").mkdir()
    cache = CompileCache(tmp_path / "cache", url, "name")
    settings = SimpleNamespace(snapshot_store=url, strict=False, named=False, trust_keys=(), home=tmp_path)
    with caplog.at_level("INFO"):
        cache.pull(LIMIT_S)
        assert Fetching(settings).find("name", lambda found: None) is None
    cache._remember("listing")
    said = f"{caught.value} {caplog.text} {cache._note.read_text()}"
    assert "***@host" in said and "hunter" not in said and len(caplog.records) == 2
