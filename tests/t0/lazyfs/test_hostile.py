"""A store, or the network path to it, controlled by an attacker: nothing is read, sent, written or held in memory that should not be."""

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
    """Write a manifest to the store without validation, as its owner can."""
    digest, data = encode(manifest)
    chunks.store.put(f"manifests/{digest}", data)
    return digest


def config_of(folder, digest):
    names = {n: str(folder / n) for n in ("mountpoint", "cache_dir", "log_file", "socket", "state_file", "home")}
    return MountConfig(manifest=digest, store_url=f"file://{folder / 'store'}", **names)


# -- contents of a manifest


@pytest.mark.parametrize(
    "manifest",
    [
        document("source", [File("shadow", 0o644, 3, (Chunk("", 3),), "3-1-1-1")], source="file:///etc"),
        document("weights", [File("shadow", 0o644, 3, (Chunk(D, 3),))], source="s3://bucket/of-another"),
        document("weights", [File("shadow", 0o644, 3, (Chunk("", 3),))]),
        document("snapshot", [File("shadow", 0o644, 3, (Chunk(D, 3),), "3-1-1-1")]),
    ],
)
def test_a_stores_manifest_must_not_name_a_source(tmp_path, chunks, manifest):
    """Otherwise the daemon would open any file or URL of this host, with its own credentials."""
    digest = plant(chunks, manifest)
    with pytest.raises(Integrity) as caught:
        load_manifest(config_of(tmp_path, digest))
    assert caught.value.code == "foreign-source"
    # Cached copies of a store's manifests must not either.
    copies = tmp_path / "cache_dir" / "manifests"
    copies.mkdir(parents=True)
    (copies / digest).write_bytes(encode(manifest)[1])
    with pytest.raises(Integrity):
        load_manifest(config_of(tmp_path, digest))


def test_a_source_that_this_host_recorded_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    digest = read_through(tmp_path / "model", cache_dir=tmp_path / "cache_dir")
    assert load_manifest(config_of(tmp_path, digest)).source == f"file://{tmp_path / 'model'}"


@pytest.mark.parametrize("length", [MAX_CHUNK + 1, 1 << 40])
def test_a_chunks_length_is_bounded(length):
    digest, data = encode(document(files=[File("a", 0o644, length, (Chunk(D, length),))]))
    with pytest.raises(Integrity, match="chunk of more than"):
        decode(data, digest)


@pytest.mark.parametrize("mode", [-1, 0o10000, 1 << 40])
def test_a_files_mode_is_validated(mode):
    digest, data = encode(document(files=[File("a", mode, 0)]))
    with pytest.raises(Integrity, match="mode"):
        decode(data, digest)


LINKS_OUT = {
    "absolute": [Symlink("a", "/etc/passwd")],
    "above": [Symlink("sub/a", "../../etc/passwd")],
    "within a name": [Symlink("a", "sub/../../etc")],
    # Each target stays inside if read alone.
    "through another": [Symlink("sub/up", ".."), Symlink("a", "sub/up/../etc")],
    "through two": [Symlink("sub/up", ".."), Symlink("b", "sub/up"), Symlink("a", "b/../etc")],
    "to a link that leads outside": [Symlink("a", "b"), Symlink("b", "/etc/passwd")],
}


@pytest.mark.parametrize("links", LINKS_OUT.values(), ids=LINKS_OUT.keys())
@pytest.mark.parametrize("kind", ["weights", "snapshot", "anything"])
def test_links_out_of_the_tree_are_neither_written_nor_mounted(tmp_path, chunks, links, kind):
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


def test_setuid_and_setgid_bits_from_a_store_are_dropped(tmp_path, chunks):
    body = chunks.put_chunk(b"#!/bin/sh\n").chunk
    tree = document(files=[File("sub/tool", 0o6755, body.length, (body,))], directories=[Directory("sub", 0o2755)])
    get_tree(plant(chunks, tree), chunks, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / "sub" / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "sub").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "body", [b'{"format": 1, "touches": [[1e999, 0, 0]]}', b"[" * 200_000, b'{"format": 1, "touches": [["a", 0, 0]]}']
)
def test_a_hostile_access_log_is_ignored(body):
    with pytest.raises(ValueError):
        parse(body)


# -- amounts of data


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


def test_the_largest_chunk_decodes_at_any_level(tmp_path):
    for level in (1, 19):
        store = ChunkStore(LocalStore(tmp_path / str(level)), zstd=level)
        data = bytes(range(256)) * (MAX_CHUNK // 256)
        digest = store.put(data)
        assert store.get(digest) == data and store.get(digest, MAX_CHUNK, ZSTD) == data
    with pytest.raises(Usage):
        store.put(bytes(MAX_CHUNK + 1))


@pytest.mark.parametrize("encoding", [RAW, ZSTD])
def test_a_chunk_read_from_a_directory_has_the_chunk_limit(chunks, encoding):
    """Not the limit of an object, which is eight times as large: each thread of a fetcher may hold one."""
    path = chunks.store.path(chunk_key(D, encoding))
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(MAX_CHUNK + 1)
    for take in (lambda: chunks.get(D), lambda: StoreSource(chunks).fetch(File("a", 0o644, 9, (Chunk(D, 9),)), 0)):
        peak, error = peak_of(take)
        assert isinstance(error, Integrity) and error.code == "too-large" and peak < MAX_CHUNK


def test_a_chunk_that_is_too_long_is_reported_and_repaired(chunks):
    """It concerns one chunk only; verification of the others continues."""
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
    """Answers with `answer`, and records the headers of requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        self.server.answer(self)

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass  # The client has closed the connection.

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    """Return a function that starts servers on 127.0.0.1 (or another name of this host)."""
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
    """Return a function that opens stores; close them at the end."""
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
    """Send for as long as the client reads."""

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
def test_an_endless_body_is_not_read_into_memory(site, web, chunked, length):
    server = site(endless(chunked))
    store = web(f"http://127.0.0.1:{server.port}")
    peak, error = peak_of(lambda: store.get("x", 0, length))
    assert isinstance(error, Permanent) and error.code == "too-large"
    # The join of the parts is never reached.
    assert peak < MOST_BYTES + (8 << 20)
    server.answer = fine
    assert store.get("x") == b"body"


@pytest.mark.parametrize("chunked", [True, False])
def test_an_endless_chunk_takes_no_more_memory_than_a_chunk(site, web, chunked):
    source = StoreSource(ChunkStore(web(f"http://127.0.0.1:{site(endless(chunked)).port}")))
    peak, error = peak_of(lambda: source.fetch(File("a", 0o644, 9, (Chunk(D, 9),)), 0))
    assert isinstance(error, Integrity) and error.code == "too-large" and peak < 2 * MAX_CHUNK


def test_a_long_404_page_means_not_found(site, web):
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


def test_a_host_with_the_same_prefix_is_another_host(site, web, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HTTP_TOKEN", "hunter2")
    other = site(fine)
    first = site(redirect(f"http://127.0.0.1.localhost:{other.port}/y"))
    store = web("http://127.0.0.1")
    # The store's URL has no port, so that the redirection's URL begins with the store's URL; the test's port is used.
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


def test_a_redirection_from_https_to_http_is_refused():
    with pytest.raises(Permanent) as caught:
        WebStore._redirected("https://store.example/x", "http://store.example/x?token=hunter2")
    assert caught.value.code == "bad-redirect" and "hunter2" not in str(caught.value)


# -- secrets


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
def test_a_shown_url_has_no_password(url, shown):
    assert shown_url(url) == shown


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@host:port/x", "ftp://user:hunter2@host/x", "http://user:hunter2@"]
)
def test_a_refused_urls_error_hides_its_password(url):
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


def test_a_launchs_store_readers_log_no_password(tmp_path, caplog):
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
