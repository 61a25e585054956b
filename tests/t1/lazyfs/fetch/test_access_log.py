"""Access logs are recorded, replayed and shared, with an S3 dialect: another host starts with what one host recorded."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from lazyfs.admin.gc import collect
from lazyfs.admin.listing import remove
from lazyfs.admin.verify import verify
from lazyfs.api import import_directory, read_through
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.errors import NotFound, Permanent
from lazyfs.fetch.access_log import AccessLog
from lazyfs.mount import kernel
from lazyfs.stores import open_store
from tests.kits.lazyfs.rig import LIMIT_S, wait_for, write_model

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
SIZES = [5 << 20, 1000, 4 << 20, 6 << 20]


@pytest.mark.slow
def test_an_access_log_is_recorded_and_replayed(home, rig, tmp_path):
    model = write_model(tmp_path / "model", SIZES)
    digest = import_directory(model)
    settings = {"use_origin": False, "background_mb_s": 0.0}
    first = rig.mount(digest, cache_dir=tmp_path / "c1", **settings)
    reader, size = rig.reader(), (model / "model.safetensors").stat().st_size
    reader.ask("open", "m", str(first.mountpoint / "model.safetensors"))
    # Backwards, without the smaller files: only the touched chunks, in that order.
    for place in (size - 100, 6 << 20, 100):
        reader.ask("pread", "m", place, 10)
    reader.ask("close", "m")
    path = home / "traces" / f"{digest}.json"
    wait_for(path.exists)
    first.unmount(force=True)
    known = AccessLog(path).known
    assert known and known[0][1] > known[-1][1] and len({f for f, _ in known}) == 1
    second = rig.mount(digest, "again", cache_dir=tmp_path / "c2", **settings)
    wait_for(lambda: second.status()["cached_bytes"] > 0)
    wait_for(lambda: second.status()["fetcher"].get("fetches") == len(known))
    assert second.status()["counters"]["reads"] == 0
    again = rig.reader()
    again.ask("digest", str(second.mountpoint / "config.json"))
    wait_for(lambda: len(AccessLog(path).known) == len(known) + 1)
    assert AccessLog(path).known[: len(known)] == known
    text = second.control("metrics")["text"]
    assert f'quickthaw_lazyfs_cached_bytes{{manifest="{digest[:16]}"}}' in text
    assert 'quickthaw_lazyfs_wait_seconds_bucket{le="+Inf"} 1' in text
    assert second.status()["counters"]["waits"] == 1 and second.status()["waited_for"]["store"] > 0


@pytest.mark.slow
def test_a_damaged_access_log_is_ignored(home, rig, tmp_path):
    model = write_model(tmp_path / "model", [5 << 20])
    digest = import_directory(model)
    (home / "traces").mkdir()
    for damage in (b"", b"{", b"[]", b'{"format": 1}', json.dumps({"format": 1, "touches": [[99, 99, 0.0]]}).encode()):
        (home / "traces" / f"{digest}.json").write_bytes(damage)
        handle = rig.mount(digest, use_origin=False, cache_dir=tmp_path / "c")
        reader = rig.reader()
        right = reader.ask("digest", str(model / "model.safetensors"))
        assert reader.ask("digest", str(handle.mountpoint / "model.safetensors")) == right
        handle.unmount(force=True)


@pytest.fixture
def s3(monkeypatch):
    """moto's server: an S3 dialect over HTTP, with one bucket."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }.items():
        monkeypatch.setenv(name, value)

    def up():
        try:
            request = urllib.request.Request(f"{url}/weights", method="PUT")
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    try:
        wait_for(up)
        yield "s3://weights/here"
    finally:
        server.kill()
        server.wait(LIMIT_S)


NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr crit;
events {{ }}
http {{
    access_log off; sendfile on; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {store}; }}
}}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
@pytest.mark.parametrize("transport", ["raw", "pyfuse3"])
def test_a_store_behind_nginx(home, rig, tmp_path, transport):
    """A plain web server serves the store: every byte is right, by digest, and missing objects are ENOENT."""
    model = write_model(tmp_path / "model", SIZES)
    digest = import_directory(model)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    conf = tmp_path / "nginx.conf"
    conf.write_text(NGINX.format(folder=tmp_path, port=port, store=home / "store"))
    tmp_path.chmod(0o755)
    server = subprocess.Popen(["nginx", "-e", "stderr", "-c", str(conf)], stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"

    def up():
        try:
            with urllib.request.urlopen(f"{url}/manifests/{digest}", timeout=LIMIT_S) as answer:
                return answer.status == 200
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, server.stderr.read()
            return False

    try:
        wait_for(up)
        handle = rig.mount(digest, store_url=url, use_origin=False, cache_dir=tmp_path / "c", transport=transport)
        reader = rig.reader()
        for name in ("model.safetensors", "sub/tokenizer.json", "empty"):
            assert reader.ask("digest", str(handle.mountpoint / name)) == reader.ask("digest", str(model / name))
        assert handle.status()["counters"]["failed"] == 0
        with pytest.raises(NotFound):
            rig.mount("0" * 64, "none", store_url=url)
    finally:
        server.kill()
        server.wait(LIMIT_S)
        server.stderr.close()


@pytest.mark.slow
def test_a_store_in_s3(home, rig, tmp_path, s3):
    model = write_model(tmp_path / "model", SIZES)
    digest = import_directory(model, s3, tag="toy:v1")
    chunks = ChunkStore(open_store(s3))
    assert chunks.resolve("toy:v1") == digest and verify(chunks).clean
    with pytest.raises(NotFound):
        chunks.get("0" * 64)
    handle = rig.mount(digest, store_url=s3, use_origin=False, cache_dir=tmp_path / "c")
    reader = rig.reader()
    for name in ("model.safetensors", "sub/tokenizer.json", "empty"):
        assert reader.ask("digest", str(handle.mountpoint / name)) == reader.ask("digest", str(model / name))
    # Another host without cache and access log finds the log in the store.
    wait_for(lambda: chunks.store.head(f"traces/{digest}") is not None)
    handle.unmount(force=True)
    os.environ["QUICKTHAW_HOME"] = str(tmp_path / "other-host")
    other = rig.mount(digest, "other", store_url=s3, use_origin=False, background_mb_s=0.0)
    wait_for(lambda: other.status()["cached_bytes"] >= sum(SIZES))
    assert other.status()["counters"]["reads"] == 0
    other.unmount(force=True)
    # Read-through: the same plain files under another prefix.
    plain = open_store("s3://weights/plain")
    for name in ("model.safetensors", "sub/tokenizer.json"):
        plain.put(name, (model / name).read_bytes())
    through = rig.mount(read_through("s3://weights/plain"), "through")
    for name in ("model.safetensors", "sub/tokenizer.json"):
        assert reader.ask("digest", str(through.mountpoint / name)) == reader.ask("digest", str(model / name))
    through.unmount(force=True)
    assert len(remove(chunks, "toy:v1")) == 2
    assert collect(chunks, grace_s=0).bytes >= sum(SIZES) and not list(chunks.manifests())


@pytest.mark.slow
def test_a_missing_bucket_is_named(s3, home, tmp_path):
    with pytest.raises(Permanent) as caught:
        import_directory(write_model(tmp_path / "model", [1000]), "s3://another/here")
    assert caught.value.code == "no-bucket" and "s3://another/here" in str(caught.value)
