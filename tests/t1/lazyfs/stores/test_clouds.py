"""Google's and Azure's clients as a store: the same guarantees as S3's, with the credentials of each ecosystem.

Google's client uses a double of the XML API (no installable emulator accepts its uploads); Azure's uses Microsoft's own emulator, where
`azurite-blob` is installed (npm install -g azurite).
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import http.server
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from lazyfs.admin.gc import collect
from lazyfs.admin.listing import remove
from lazyfs.admin.verify import verify
from lazyfs.api import import_directory, read_through
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.errors import NotFound, Permanent
from lazyfs.mount import kernel
from lazyfs.stores import open_store
from tests.kits.lazyfs.rig import LIMIT_S, Rig, wait_for, write_model

pytestmark = [
    pytest.mark.t1,
    pytest.mark.slow,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
SIZES = [5 << 20, 1000, 4 << 20]
# Published by Microsoft for its emulator only.
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class GoogleHandler(http.server.BaseHTTPRequestHandler):
    """The part of Cloud Storage's XML API that an object store uses, over one dictionary."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def key(self):
        return unquote(urlsplit(self.path).path).removeprefix("/weights").lstrip("/")

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.objects[self.key()] = body
        self.answer(200, ETag=etag(body))

    def do_DELETE(self):
        self.answer(404 if self.objects.pop(self.key(), None) is None else 204)

    def do_GET(self):
        key = self.key()
        if not key:
            self.listing(parse_qs(urlsplit(self.path).query).get("prefix", [""])[0])
            return
        body = self.objects.get(key)
        if body is None:
            self.answer(404)
            return
        about = {"ETag": etag(body), "Last_Modified": email.utils.formatdate(usegmt=True), "x_goog_generation": 1}
        if self.headers.get("If-Match", etag(body)) != etag(body):
            self.answer(412)
        elif "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            part = body[int(first) : int(last) + 1 if last else None]
            where = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
            self.answer(206, part, Content_Range=where, **about)
        elif self.command == "HEAD":
            self.answer(200, **{**about, "Content_Length": len(body)})
        else:
            self.answer(200, body, **about)

    do_HEAD = do_GET

    def listing(self, prefix):
        found = "".join(
            f"<Contents><Key>{k}</Key><Size>{len(v)}</Size><ETag>{etag(v)}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for k, v in sorted(self.objects.items())
            if k.startswith(prefix)
        )
        self.answer(200, f"<?xml version='1.0'?><ListBucketResult>{found}</ListBucketResult>".encode())

    def log_message(self, *arguments):
        pass


def etag(body):
    return f'"{hashlib.md5(body).hexdigest()}"'


@pytest.fixture
def gs(monkeypatch):
    handler = type("Handler", (GoogleHandler,), {"objects": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{server.server_port}")
    yield "gs://weights"
    server.shutdown()
    server.server_close()
    thread.join(LIMIT_S)


@pytest.fixture
def az(monkeypatch):
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("needs azurite-blob")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    where = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck"]
    server = subprocess.Popen([program, *where, "--silent"], stdout=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}/devstoreaccount1"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", AZURITE_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)

    def container():
        when = email.utils.formatdate(usegmt=True)
        signed = f"PUT{chr(10) * 12}x-ms-date:{when}\nx-ms-version:2021-08-06\n"
        signed += "/devstoreaccount1/devstoreaccount1/weights\nrestype:container"
        proof = hmac.new(base64.b64decode(AZURITE_KEY), signed.encode(), hashlib.sha256).digest()
        headers = {
            "x-ms-date": when, "x-ms-version": "2021-08-06", "Content-Type": "", "Content-Length": "0",
            "Authorization": f"SharedKey devstoreaccount1:{base64.b64encode(proof).decode()}",
        }  # fmt: skip
        request = urllib.request.Request(f"{endpoint}/weights?restype=container", method="PUT", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                return answer.status == 201
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, ConnectionError):
            return False

    try:
        wait_for(container)
        yield "az://weights"
    finally:
        server.kill()
        server.wait(LIMIT_S)


@pytest.fixture(params=["gs", "az"])
def bucket(request, monkeypatch, tmp_path):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUICKTHAW_STORE", raising=False)
    return request.getfixturevalue(request.param)


def test_a_cloud_store_implements_the_store_interface(bucket):
    store = open_store(f"{bucket}/below")
    store.put("a/b c", b"0123456789")
    version = store.head("a/b c").version
    assert (
        store.get("a/b c") == b"0123456789" and store.get("a/b c", 3, 4) == b"3456" and store.get("a/b c", 8) == b"89"
    )
    assert store.get("a/b c", 0, 5, version) == b"01234"
    store.put("a/b c", b"9876543210")
    with pytest.raises(Permanent) as caught:
        store.get("a/b c", 0, 5, version)
    assert caught.value.code == "source-changed"
    assert [i.key for i in store.list("a/")] == ["a/b c"] and not list(store.list("b/"))
    store.touch("a/b c")
    for _ in range(2):
        store.delete("a/b c")
    assert store.head("a/b c") is None
    with pytest.raises(NotFound):
        store.get("a/b c")


def test_weights_are_imported_mounted_and_removed(bucket, tmp_path):
    rig, model = Rig(tmp_path), write_model(tmp_path / "model", SIZES)
    names = ("model.safetensors", "sub/tokenizer.json", "empty")
    try:
        url, reader = f"{bucket}/here", rig.reader()

        def assert_same(where: Path) -> None:
            for name in names:
                assert reader.ask("digest", str(where / name)) == reader.ask("digest", str(model / name))

        digest = import_directory(model, url, tag="toy:v1")
        chunks = ChunkStore(open_store(url))
        assert chunks.resolve("toy:v1") == digest and verify(chunks).clean
        assert_same(rig.mount(digest, store_url=url, use_origin=False, cache_dir=tmp_path / "c").mountpoint)
        plain = open_store(f"{bucket}/plain")
        for name in names:
            plain.put(name, (model / name).read_bytes())
        assert_same(rig.mount(read_through(f"{bucket}/plain"), "through").mountpoint)
        assert len(remove(chunks, "toy:v1")) == 2
        assert collect(chunks, grace_s=0).bytes >= sum(SIZES) and not list(chunks.manifests())
    finally:
        rig.close()
