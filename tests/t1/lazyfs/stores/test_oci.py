"""Weights as artifacts of an OCI registry: pushed, pulled, mounted and imported, against a registry on loopback."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import filecmp
import json
import os
import socket
import threading
import time

import pytest
from click.testing import CliRunner

from lazyfs.api import import_directory, read_through
from lazyfs.cli.weights import weights
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.manifest import decode
from lazyfs.errors import NotFound, Permanent, Temporary, Usage
from lazyfs.paths import open_fd
from lazyfs.stores import oci, opened
from lazyfs.stores.local import LocalStore
from lazyfs.stores.oci import TITLE, OciStore, parse
from lazyfs.stores.retry import RetryPolicy
from tests.kits.lazyfs.models import make_model
from tests.kits.lazyfs.registry import Registry

pytestmark = [pytest.mark.t1, pytest.mark.usefixtures("home")]


@pytest.fixture(autouse=True)
def docker(tmp_path, monkeypatch):
    """A folder for `docker login`'s file, empty."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker" / "config.json"


@pytest.fixture
def registry():
    registry = Registry()
    yield registry
    registry.close()


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model", megabytes=12)


def run(*words, code=0):
    result = CliRunner().invoke(weights, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def assert_equal(one, other):
    for file in one.rglob("*"):
        if file.is_file():
            assert filecmp.cmp(file, other / file.relative_to(one), shallow=False), file


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("oci://h/a", ("h", "a", "latest")),
        ("oci://h:5000/a/b-c:v1", ("h:5000", "a/b-c", "v1")),
        ("oci://h/a@sha256:" + "0" * 64, ("h", "a", "sha256:" + "0" * 64)),
    ],
)
def test_an_artifact_is_named_by_tag_or_digest(url, named):
    assert parse(url) == named


@pytest.mark.parametrize("url", ["oci://h", "oci://h/A", "oci://h/a@sha256:0", "oci://h/a/../b", "oci://h/a:v1?x"])
def test_what_names_no_artifact_is_refused(url):
    with pytest.raises(Usage, match="oci://HOST/REPOSITORY"):
        parse(url)


def test_a_model_is_pushed_and_pulled_and_only_what_is_new_travels(registry, model, tmp_path):
    url = f"oci://{registry.host}/team/model:v1"
    first = json.loads(run("push", model, url, "--json"))
    assert first["new"] == len(registry.blobs) and first["digest"].startswith("sha256:")
    document = json.loads(registry.manifests["team/model", "v1"])
    assert document["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert {one["annotations"][TITLE] for one in document["layers"]} >= {"model.safetensors", "sub/tokenizer.json"}
    (model / "config.json").write_text("changed")
    assert json.loads(run("push", model, url, "--json"))["new"] == 1
    done = json.loads(run("pull", url, tmp_path / "there", "--json"))
    assert_equal(model, tmp_path / "there")
    assert done["new"] == done["files"]
    (tmp_path / "there" / "config.json").write_text("damaged")
    assert json.loads(run("pull", url, tmp_path / "there", "--json"))["new"] >= 1
    assert_equal(model, tmp_path / "there")
    assert not list((tmp_path / "there").rglob("*.part"))


def test_weights_of_a_store_are_pushed_and_imported_elsewhere(registry, model, home, tmp_path):
    url = f"oci://{registry.host}/team/model:v1"
    import_directory(model, tag="m:v1")
    run("push", "m:v1", url)
    run("import", url, "--tag", "m:v1", "--store", tmp_path / "other")
    other = ChunkStore(LocalStore(tmp_path / "other"))
    manifest = other.get_manifest(other.resolve("m:v1"))
    for file in manifest.files:
        assert b"".join(other.get(chunk.digest) for chunk in file.chunks) == (model / file.path).read_bytes()


def test_an_artifact_is_read_in_place_by_ranges_and_pinned(registry, model, home):
    url = f"oci://{registry.host}/team/model:v1"
    run("push", model, url)
    digest = read_through(url)
    manifest = decode((home / "cache" / "sources" / digest).read_bytes(), digest, local=True)
    assert manifest.source.startswith(f"oci://{registry.host}/team/model@sha256:")
    file = next(f for f in manifest.files if f.path == "model.safetensors")
    with opened(manifest.source) as store:
        before = registry.count("GET", "/manifests/")
        part = bytes(store.get(file.path, 5000, 100, file.version))
        assert part == (model / file.path).read_bytes()[5000:5100]
        assert registry.count("GET", "/manifests/") == before, "a blob is named by its own digest"
        assert bytes(store.get("config.json")) == (model / "config.json").read_bytes()
        with pytest.raises(NotFound, match=r"no file absent\.json"):
            store.get("absent.json")


def test_a_wrong_blob_is_never_kept(registry, model, tmp_path, home):
    url = f"oci://{registry.host}/team/model:v1"
    run("push", model, url)
    layers = json.loads(registry.manifests["team/model", "v1"])["layers"]
    digest = next(one["digest"] for one in layers if one["annotations"][TITLE] == "model.safetensors")
    registry.blobs[digest] = registry.blobs[digest][:-1] + b"\xff\xfe"[:1]
    assert "integrity" in run("pull", url, tmp_path / "there", code=1)
    assert not (tmp_path / "there" / "model.safetensors").exists()
    assert "integrity" in run("import", url, code=1)


def test_two_pulls_into_one_directory_do_not_mix(registry, model, tmp_path):
    url, there = f"oci://{registry.host}/team/model:v1", tmp_path / "there"
    run("push", model, url)
    there.mkdir()
    with open_fd(there, os.O_RDONLY) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "pull-busy" in run("pull", url, there, code=1)
        assert not list(there.iterdir())
    run("pull", url, there)
    assert_equal(model, there)


@pytest.mark.parametrize("path", ["../out", "/etc/passwd", "a//b", "."])
def test_files_that_lead_out_of_the_directory_are_refused(registry, model, tmp_path, path):
    url = f"oci://{registry.host}/team/model:v1"
    run("push", model, url)
    document = json.loads(registry.manifests["team/model", "v1"])
    document["layers"][0]["annotations"][TITLE] = path
    registry.manifests["team/model", "v1"] = json.dumps(document).encode()
    assert "bad-artifact" in run("pull", url, tmp_path / "there", code=1)


def test_an_image_is_no_artifact_of_files(registry, tmp_path):
    registry.manifests["team/image", "v1"] = json.dumps({"layers": [{"digest": "x"}]}).encode()
    assert "no files" in run("pull", f"oci://{registry.host}/team/image:v1", tmp_path / "there", code=1)


def test_a_registry_that_asks_for_a_token_gets_the_one_of_docker_login(model, docker, tmp_path):
    registry = Registry(password="me:secret")
    url = f"oci://{registry.host}/team/model:v1"
    try:
        assert "docker login" in run("push", model, url, code=1)
        auth = base64.b64encode(b"me:secret").decode()
        docker.write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
        run("push", model, url)
        run("pull", url, tmp_path / "there")
        assert_equal(model, tmp_path / "there")
    finally:
        registry.close()


@pytest.fixture
def secured(docker):
    """A registry that wants a password, which `docker login` has stored."""
    registry = Registry(password="me:secret")
    docker.write_text(json.dumps({"auths": {registry.host: {"auth": base64.b64encode(b"me:secret").decode()}}}))
    yield registry
    registry.close()


def test_the_password_is_not_given_to_whoever_blobs_are_redirected_to(secured, model, tmp_path):
    url, thief = f"oci://{secured.host}/team/model:v1", Registry(password="no:body")
    try:
        run("push", model, url)
        secured.blobs_at = f"http://{thief.host}/v2/a/blobs/b"
        assert "permission-denied" in run("pull", url, tmp_path / "there", code=1)
        assert thief.requests and not thief.passwords
    finally:
        thief.close()


def test_an_upload_whose_token_expires_begins_again(secured, model, tmp_path):
    url = f"oci://{secured.host}/team/model:v1"
    secured.expire_uploads = 1
    run("push", model, url)
    secured.expire_uploads = 0
    run("pull", url, tmp_path / "there")
    assert_equal(model, tmp_path / "there")


def test_a_token_that_no_header_can_have_is_none(secured, model):
    secured.token = "a\r\nX-Other: b"
    assert "permission-denied" in run("push", model, f"oci://{secured.host}/team/model:v1", code=1)


@pytest.mark.parametrize("fault", ["refused", "busy", "drips"])
def test_a_token_service_that_is_down_is_tried_again_not_taken_for_wrong_credentials(secured, model, tmp_path, fault):
    url = f"oci://{secured.host}/team/model:v1"
    run("push", model, url)
    with opened(url) as store, socket.create_server(("127.0.0.1", 0)) as service:
        secured.token_service = f"http://127.0.0.1:{service.getsockname()[1]}/token"
        store.whole_s = 0.2
        threading.Thread(target=answer_badly, args=(service, fault), daemon=True).start()
        with pytest.raises(Temporary):
            store.layers()
        secured.token_service = ""
        assert "config.json" in store.layers()


def answer_badly(service, fault):
    """Answer one request: refused (close), busy (HTTP 503), drips (a byte now and then, each within the limit of silence)."""
    with contextlib.suppress(OSError), service.accept()[0] as connection:
        connection.recv(4096)
        if fault == "busy":
            connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
        until = time.monotonic() + 5
        while fault == "drips" and time.monotonic() < until:
            connection.sendall(b"H")
            time.sleep(0.02)


@pytest.mark.parametrize("place", ["http://127.0.0.1:1/x", "file:///etc/passwd"])
def test_an_upload_is_never_sent_without_encryption_where_the_registry_has_it(place, monkeypatch):
    store = OciStore("oci://registry.example/a/b")
    monkeypatch.setattr(store, "_request", lambda *_: (_ for _ in ()).throw(NotFound("no blob")))
    monkeypatch.setattr(store, "_write", lambda method, *_: place if method == "POST" else pytest.fail("sent"))
    with pytest.raises(Permanent, match="redirects to"):
        store._blob("sha256:" + "0" * 64, 1, lambda: iter([b"x"]))


@pytest.mark.parametrize(
    ("host", "scheme"),
    [
        ("127.0.0.1:5000", "http"),
        ("localhost", "http"),
        ("[::1]:5000", "http"),
        ("localhost.example.com", "https"),
        ("127.example.com:5000", "https"),
    ],
)
def test_only_this_host_is_spoken_to_without_encryption(host, scheme):
    assert OciStore(f"oci://{host}/a").base.startswith(f"{scheme}://{host}/")


def test_a_registry_that_takes_an_upload_too_slowly_is_given_up(registry, monkeypatch):
    monkeypatch.setattr(oci, "RetryPolicy", lambda: RetryPolicy(attempts=1))
    store = oci.OciStore(f"oci://{registry.host}/team/slow:v1")
    store.whole_s = 0.2

    def parts():
        for _ in range(20):
            yield bytes(1 << 10)
            time.sleep(0.05)

    layer = oci.layer_of("a", 20 << 10, [bytes(20 << 10)])
    with contextlib.closing(store), pytest.raises(Temporary, match="takes less than 256 KiB/s"):
        store.push([(layer, parts)])
    assert not registry.blobs and not registry.manifests
