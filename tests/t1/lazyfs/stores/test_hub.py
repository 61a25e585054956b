"""Models of the hub, read by ranges as they are needed: against a hub on loopback, with its own digests."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from checkpoint.errors import Incompatible
from lazyfs import api
from lazyfs.admin.verify import verify
from lazyfs.api import find_mount, mount, read_through, unmount
from lazyfs.cache.cache import Cache
from lazyfs.cli.mount import resolve
from lazyfs.cli.weights import weights
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.manifest import decode
from lazyfs.content.whole_file import hasher
from lazyfs.errors import LazyfsError, Permanent, Usage
from lazyfs.mount import kernel
from lazyfs.stores import opened
from lazyfs.stores.hub import parse, read_by_engines
from lazyfs.stores.local import LocalStore
from plugin.model import hub_mount
from plugin.model.content import ModelContent
from plugin.model.store_import import StoreImport
from tests.kits.hub_kit import Hub
from tests.kits.lazyfs.models import write_safetensors
from tests.kits.lazyfs.rig import assert_same, digest_or_errno, wait_for

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.usefixtures("home")]
mounts = pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")
MB = 1 << 20


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    for name, value in hub.environment(tmp_path / "hf").items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub.redirects = True
    yield hub
    hub.close()


@pytest.fixture
def model(tmp_path, hub):
    folder = tmp_path / "model"
    folder.mkdir()
    for part in (1, 2):
        tensors = {f"t{i}": bytes([part * 16 + i]) * size for i, size in enumerate((5 * MB, 6 * MB, 70_001))}
        write_safetensors(folder / f"model-{part}.safetensors", tensors)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.json").write_bytes(b"tokens" * 3000)
    hub.add("org/toy", folder)
    return folder


@pytest.fixture
def started():
    """Open stores, and close them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda url: stack.enter_context(opened(url))


@contextlib.contextmanager
def mounted_model(home, digest):
    """Mount a model where `launch` does; yield its content, and the mount."""
    handle = mount(digest, home / "mounts" / digest[:16], idle_exit_s=0.0, background_mb_s=0.0, prefetch=False)
    try:
        content = ModelContent(handle.mountpoint, home)
        yield content, handle
        content.close()
    finally:
        if find_mount(handle.mountpoint):
            unmount(handle.mountpoint, force=True)


def manifest_of(home, digest):
    return decode((home / "cache" / "sources" / digest).read_bytes(), digest, local=True)


def asked(hub, word):
    return [path for _, path in hub.requests if word in path]


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("hf://org/toy", ("org/toy", "main")),
        ("hf://gpt2@v1", ("gpt2", "v1")),
        ("hf://a/b@refs/pr/1", ("a/b", "refs/pr/1")),
    ],
)
def test_a_model_is_named_by_repository_and_revision(url, named):
    assert parse(url) == named


@pytest.mark.parametrize("url", ["hf://a/b/c", "hf://a/b@", "hf://a/b@../x", "hf://a/b?x=1", "hf://-a/b"])
def test_what_names_no_model_is_refused(url):
    with pytest.raises(Usage, match="hf://ORG/MODEL"):
        parse(url)


def test_files_that_no_engine_reads_are_left_out():
    both = {"model.safetensors", "pytorch_model.bin", "original/consolidated.pth", "tf_model.h5", "config.json"}
    assert read_by_engines(both) == {"model.safetensors", "config.json"}
    assert read_by_engines(both - {"model.safetensors"}) == both - {"model.safetensors", "tf_model.h5"}


def test_a_revision_is_pinned_headers_are_read_once_and_a_commit_is_not_asked_for_again(home, hub, model):
    digest = read_through("hf://org/toy")
    manifest = manifest_of(home, digest)
    commit = hub.repositories["org/toy"].refs["main"]
    assert manifest.source == f"hf://org/toy@{commit}"
    assert {f.path for f in manifest.files} == {
        "config.json", "model-1.safetensors", "model-2.safetensors", "sub/tokenizer.json"
    }  # fmt: skip
    assert all(hasher(f.version, f.size) for f in manifest.files)
    headers = len(asked(hub, "/signed/"))
    assert headers == 2
    (model / "config.json").write_text('{"model_type": "toy", "new": 1}')
    hub.repositories["org/toy"].commit()
    assert read_through("hf://org/toy") != digest
    assert len(asked(hub, "/signed/")) == headers, "the weights are the same: their headers are known"
    read_through(f"hf://org/toy@{commit}")
    before = len(hub.requests)
    assert read_through(f"hf://org/toy@{commit}") and len(hub.requests) == before
    assert resolve("hf://org/toy", None)[0] == read_through("hf://org/toy")


def test_a_hub_that_stalls_delays_a_launch_by_seconds_where_its_files_are_known(home, hub, model, monkeypatch, caplog):
    digest = read_through("hf://org/toy")
    monkeypatch.setattr(hub_mount, "_KNOWN_LIMIT_S", 0.2)
    monkeypatch.setattr(hub_mount, "_LIMIT_S", 0.4)
    shown = []
    monkeypatch.setattr(
        api, "mount", lambda found, place, **_: shown.append(found) or SimpleNamespace(mountpoint=place)
    )
    # It accepts connections, and answers nothing.
    with socket.create_server(("127.0.0.1", 0)) as stalled:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{stalled.getsockname()[1]}")
        began = time.monotonic()
        hub_mount.resolve(("--model", "hf://org/toy"), home, -1, mounts=True)
        other = hub_mount.resolve(("--model", "hf://org/other"), home, -1, mounts=True)
        assert time.monotonic() - began < 10, "requests have a minute each"
    assert shown == [digest]
    assert other == ("--model", "org/other"), "it downloads what is not known here itself"
    assert caplog.text.count("source-silent") == 2


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_hub_that_must_not_be_asked_shows_what_it_had(home, hub, model, caplog, variable):
    digest = read_through("hf://org/toy")
    before = len(hub.requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, "1")
        assert read_through("hf://org/toy") == digest
    assert "as it was when it last answered: offline" in caplog.text and len(hub.requests) == before


@pytest.mark.parametrize(
    ("name", "code"),
    [("hf://org/none", "permission-denied"), ("hf://org/toy@v9", "not-found"), ("hf://org/gated", "permission-denied")],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub, model, name, code):
    hub.add("org/gated", model, token="secret", gated=True)
    with pytest.raises(LazyfsError) as caught:
        read_through(name)
    assert caught.value.code == code and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        ({"sha": 5}, ""),
        ([], ""),
        ("x", ""),
        ([{"type": "file", "path": "config.json"}], ""),
        ([{"type": "file", "path": "a", "oid": "0", "size": "many"}], ""),
        (["a"], ""),
        ({"error": "none"}, ""),
    ],
)
def test_what_is_no_answer_of_the_hub_is_said_in_one_line(hub, monkeypatch, answer):
    commit = "" if answer[0] in ({"sha": 5}, [], "x") else "0" * 40
    monkeypatch.setattr("lazyfs.stores.hub.HubStore._api", lambda *_: answer)
    with pytest.raises(Permanent) as caught:
        read_through(f"hf://org/toy@{commit}" if commit else "hf://org/toy")
    assert caught.value.code == "hub-answer"


def test_a_list_without_an_end_and_sizes_of_no_model_are_refused(hub, monkeypatch):
    entry = {"type": "file", "path": "a.bin", "oid": "0" * 40, "size": 1 << 60}
    monkeypatch.setattr("lazyfs.stores.hub.HubStore._api", lambda *_: ([entry], ""))
    with pytest.raises(Permanent, match="sizes"):
        read_through("hf://org/toy@" + "0" * 40)
    monkeypatch.setattr("lazyfs.stores.hub.HubStore._api", lambda _, url: ([], url))
    with pytest.raises(Permanent, match="does not end"):
        read_through("hf://org/toy@" + "0" * 40)


def test_a_token_opens_a_private_model_and_stays_with_the_hub(hub, model, monkeypatch):
    hub.add("org/private", model, token="secret")
    with pytest.raises(Permanent, match="HF_TOKEN"):
        read_through("hf://org/private")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert read_through("hf://org/private")


def test_a_commits_files_are_listed_once_however_many_are_asked_for(hub, model, started):
    (model / "empty.txt").touch()
    hub.repositories["org/toy"].commit()
    store = started("hf://org/toy")
    for _ in range(3):
        assert store.head("empty.txt").size == 0 and store.head("none") is None
        assert {info.key for info in store.list("sub/")} == {"sub/tokenizer.json"}
    assert len(asked(hub, "/tree/")) == 1


def test_an_address_is_kept_and_asked_for_again_when_it_expires(hub, model, started):
    store = started("hf://org/toy")
    right = (model / "model-1.safetensors").read_bytes()
    assert bytes(store.get("model-1.safetensors", 100, 50)) == right[100:150]
    assert bytes(store.get("model-1.safetensors", MB, 50)) == right[MB : MB + 50]
    assert hub.signed == 1
    hub.expired.add(1)
    assert bytes(store.get("model-1.safetensors", 7, 9)) == right[7:16]
    assert hub.signed == 2
    assert bytes(store.get("config.json")) == (model / "config.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("status", [400, 416])
def test_a_file_that_is_not_served_by_ranges_is_downloaded_by_the_hubs_own_client(hub, model, status, started):
    pytest.importorskip("huggingface_hub")
    hub.refuses_ranges = status
    store = started("hf://org/toy")
    right = (model / "model-2.safetensors").read_bytes()
    assert bytes(store.get("model-2.safetensors", 5, 1000)) == right[5:1005]
    before = len(hub.requests)
    assert bytes(store.get("model-2.safetensors", 3 * MB, 1000)) == right[3 * MB : 3 * MB + 1000]
    assert len(hub.requests) == before


@mounts
def test_a_mount_shows_a_model_before_it_is_here_and_verifies_it_whole(home, hub, model, rig):
    digest = read_through("hf://org/toy")
    handle = rig.mount(digest, background_mb_s=0.0, prefetch=False)
    reader = rig.reader()
    reader.ask("open", "f", str(handle.mountpoint / "model-1.safetensors"))
    part = reader.ask("pread", "f", 6 * MB, 1000)
    assert bytes.fromhex(part) == (model / "model-1.safetensors").read_bytes()[6 * MB : 6 * MB + 1000]
    assert handle.status()["cached_bytes"] < 13 * MB, "the rest has not been asked for"
    assert_same(reader, model, handle.mountpoint)
    file = next(f for f in manifest_of(home, digest).files if f.path == "model-1.safetensors")
    cache = Cache(home / "cache")

    def verified():
        sparse_file = cache.open(file)
        try:
            return sparse_file.fsynced()
        finally:
            sparse_file.close()

    wait_for(verified)
    commits = hub.repositories["org/toy"].commits
    for name, data in next(iter(commits.values())).items():
        assert (model / name).read_bytes() == data


@mounts
def test_a_small_file_with_wrong_bytes_is_never_served_and_a_large_one_is_forgotten(home, hub, model, rig):
    digest = read_through("hf://org/toy")
    hub.wrong = lambda name, data: data if name == "model-2.safetensors" else data[:-1] + bytes([data[-1] ^ 1])
    handle = rig.mount(digest, background_mb_s=0.0, prefetch=False, fetch_limit_s=2.0, read_limit_s=5.0)
    reader = rig.reader()
    assert digest_or_errno(reader, handle.mountpoint / "sub" / "tokenizer.json") == 5
    # Its chunks have no digest of their own: the first reading serves them, and the whole file is verified after it.
    digest_or_errno(reader, handle.mountpoint / "model-1.safetensors")
    wait_for(lambda: "and the source says" in handle.log_file.read_text())
    file = next(f for f in manifest_of(home, digest).files if f.path == "model-1.safetensors")
    wait_for(lambda: Cache(home / "cache").present_bytes(file) < file.size)
    right = digest_or_errno(reader, model / "model-2.safetensors")
    assert digest_or_errno(reader, handle.mountpoint / "model-2.safetensors") == right


@mounts
def test_a_digest_of_a_hubs_model_is_kept_only_when_every_file_is_verified(home, hub, model):
    digest = read_through("hf://org/toy")
    with mounted_model(home, digest) as (content, handle):
        content.begin()
        right = content.verified_digest(30.0)
        assert handle.control("verified")["unverified"] == []
        assert ModelContent(handle.mountpoint, home).files.known_digest() == right, "it was kept"


@mounts
def test_nothing_is_kept_of_what_was_read_through_a_daemon_that_ended(home, hub, model):
    digest = read_through("hf://org/toy")
    with mounted_model(home, digest) as (content, handle):
        os.kill(handle.pid, signal.SIGKILL)
        wait_for(lambda: handle.daemon() == "gone")
        with pytest.raises(Incompatible, match="hub-unverified"):
            content.hub_files.wait(1.0)
        with mounted_model(home, digest), pytest.raises(Incompatible, match="hub-unverified: the daemon of"):
            content.hub_files.wait(1.0)


@mounts
def test_nothing_is_kept_of_a_hubs_model_of_which_wrong_bytes_were_served(home, hub, model):
    digest = read_through("hf://org/toy")
    first = itertools.chain([True], itertools.repeat(False))
    hub.wrong = lambda name, data: bytes(len(data)) if name.startswith("model-1") and next(first) else data
    with mounted_model(home, digest) as (content, handle):
        content.begin()
        with pytest.raises(Incompatible) as caught:
            content.verified_digest(30.0)
        assert caught.value.code == "hub-file-wrong" and "model-1.safetensors" in str(caught.value)
        # The engine may have read the wrong byte: that the file is fetched again, and right then, does not change it.
        wait_for(lambda: not handle.control("verified")["unverified"])
        with pytest.raises(Incompatible, match="hub-file-wrong"):
            content.verified_digest(1.0)
        assert not ModelContent(handle.mountpoint, home).files.known_digest(), "no digest of them was kept"
        assert "hub-file-wrong" in StoreImport(handle.mountpoint, "unused", hub_files=content.hub_files).run()


def test_an_import_from_the_hub_needs_no_copy_and_checks_the_hubs_digests(home, hub, model, tmp_path):
    result = CliRunner().invoke(weights, ["import", "hf://org/toy", "--tag", "toy:v1", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    chunks = ChunkStore(LocalStore(home / "store"))
    manifest = chunks.get_manifest(answer["manifest"])
    assert verify(chunks).clean and manifest.kind == "weights" and chunks.resolve("toy:v1") == answer["manifest"]
    for file in manifest.files:
        data = b"".join(chunks.get(c.digest) for c in file.chunks)
        assert data == (model / file.path).read_bytes()
    assert not (home / "cache" / "images").exists()


def test_an_import_of_wrong_bytes_leaves_no_manifest(home, hub, model):
    hub.wrong = lambda name, data: data[:-1] + bytes([data[-1] ^ 1])
    result = CliRunner().invoke(weights, ["import", "hf://org/toy"])
    assert result.exit_code == 1 and "integrity" in result.output and "the source says" in result.output
    assert not list(ChunkStore(LocalStore(home / "store")).manifests())
