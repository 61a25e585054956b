"""`quickthaw weights` and `quickthaw mount` without a mount: refused input, and reports on a damaged store."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import os
import threading

import pytest
from click.testing import CliRunner

from checkpoint.errors import Failed
from lazyfs.cli.mount import mount, resolve
from lazyfs.cli.options import Duration
from lazyfs.cli.weights import weights
from lazyfs.content.chunk_store import ChunkStore, chunk_key
from lazyfs.content.manifest import RAW, Chunk, File, Manifest, encode
from lazyfs.content.stat_index import import_directory
from lazyfs.errors import LazyfsError
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.models import make_model

pytestmark = [pytest.mark.t0, pytest.mark.usefixtures("home")]


@pytest.fixture
def chunks(home):
    return ChunkStore(LocalStore(home / "store"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Serve a folder over HTTP; return the URL."""
    servers = []

    def start(folder):
        folder.mkdir(exist_ok=True)
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def run(command, *words, code=0):
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def a_chunk_of(chunks, digest):
    """Return the path of the first chunk of a manifest's largest file, as it was imported: uncompressed."""
    file = max(chunks.get_manifest(digest).files, key=lambda f: f.size)
    return chunks.store.path(chunk_key(file.chunks[0].digest, RAW))


@pytest.mark.parametrize("words", [
    ["", "/mnt/x"], ["model:v1", ""], ["model:v1"], ["--unmount", ""], ["--status", "/x", "--unmount", "/x"],
    ["model:v1", "--status", "/x"], ["model:v1", "/mnt/x", "--force"], ["model:v1", "/mnt/x", "--cache-limit", "nan"],
    ["model:v1", "/mnt/x", "--cache-limit", "inf"], ["model:v1", "/mnt/x", "--idle-exit", "nan"],
    ["model:v1", "/mnt/x", "--idle-exit", "-1"], ["model:v1", "/mnt/x", "--idle-exit", "5x"], ["model:v1", "/mnt/x", "--idle-exit", "s"], ["s3://", "/mnt/x"], ["model:v1", "/mnt/x", "--store", "s3://"],
    ["--unmount", "--force", "/mnt/x"], ["model:v1", "/mnt/x", "--store", "http://[::1"], ["model:v1", "/mnt/x", "--store", "http://h:99999/"],
    ["model:v1", "/mnt/x", "--store", "file://"], ["model:v1", "/mnt/x", "--store", "file://host/x"],
    ["model:v1", "/mnt/x", "--store", "file:x"],
])  # fmt: skip
def test_invalid_mount_arguments_are_refused(words):
    result = run(mount, *words, code=2)
    assert "Traceback" not in result.output and not isinstance(result.exception, KeyError)


@pytest.mark.parametrize(
    "words", [["gc", "--grace", "nan"], ["gc", "--grace", "-1"], ["import", ""], ["ls", "--store", "s3://"]]
)
def test_invalid_weights_arguments_are_refused(words):
    run(weights, *words, code=2)


@pytest.mark.parametrize(
    ("text", "bare", "seconds"),
    [("90s", "s", 90), ("10m", "s", 600), ("24h", "h", 86400), ("24", "h", 86400), ("1.5", "s", 1.5), ("0", "h", 0)],
)
def test_a_duration_without_a_unit_has_the_options_unit(text, bare, seconds):
    assert Duration(bare=bare).convert(text, None, None) == seconds


@pytest.mark.parametrize("words", [["ls"], ["verify"], ["gc"], ["rm", "model"]])
def test_a_missing_store_directory_is_an_error(tmp_path, words):
    assert "quickthaw: not-found: " in run(weights, *words, "--store", tmp_path / "none", code=1).output
    assert not (tmp_path / "none").exists()


def test_a_new_homes_store_is_empty():
    assert "nothing in" in run(weights, "ls").output
    assert "quickthaw: not-found: " in run(weights, "rm", "0" * 64, code=1).output
    assert "8 digits" in run(weights, "rm", "0" * 7, code=1).output


def test_a_file_in_place_of_a_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "file"))
    assert "quickthaw: not-a-folder: " in run(weights, "ls", code=1).output
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "file" / "below"))
    assert "quickthaw: not-a-folder: " in run(weights, "ls", code=1).output


@pytest.mark.parametrize("spoil", ["missing", "short", "manifest", "manifest missing"])
def test_importing_again_restores_lost_chunks(tmp_path, chunks, spoil):
    """The directory is unchanged, but its copy in the store is not."""
    model = make_model(tmp_path / "model", megabytes=5)
    digest = import_directory(model)
    assert "unchanged" in run(weights, "import", model).output
    path = chunks.store.path(f"manifests/{digest}") if spoil.startswith("manifest") else a_chunk_of(chunks, digest)
    if spoil.endswith("missing"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert "unchanged" not in run(weights, "import", model).output
    assert "clean" in run(weights, "verify").output
    assert "unchanged" in run(weights, "import", model).output


def test_the_remedy_that_verify_names_works(tmp_path, chunks):
    model = make_model(tmp_path / "model", megabytes=5)
    path = a_chunk_of(chunks, import_directory(model))
    body = bytearray(path.read_bytes())
    body[5] ^= 1
    path.write_bytes(body)
    found = run(weights, "verify", code=1).output
    assert "damaged chunk" in found and "NOT clean" in found
    assert "`quickthaw weights verify --repair`, then `quickthaw weights import`" in found
    run(weights, "verify", "--repair", code=1)
    assert "remedy: `quickthaw weights import`" in run(weights, "verify", code=1).output
    run(weights, "import", model)
    assert run(weights, "verify").output.endswith("clean\n")


def test_damaged_entries_do_not_hide_the_others(tmp_path, chunks):
    good = import_directory(make_model(tmp_path / "good", seed=1, megabytes=1), tag="good")
    bad = import_directory(make_model(tmp_path / "bad", seed=2, megabytes=1), tag="bad")
    chunks.set_ref("tags", "torn:v1", good)
    chunks.set_ref("tags", "lost:v1", "0" * 64)
    chunks.store.path("refs/tags/torn@v1").write_bytes(b"{")
    chunks.store.path(f"manifests/{bad}").write_bytes(b"{}")
    lines = run(weights, "ls").output.splitlines()
    assert [line for line in lines if line.startswith(good[:16]) and "DAMAGED" not in line]
    assert [line for line in lines if line.startswith(bad[:16]) and "DAMAGED" in line and "bad:latest" in line]
    assert [line for line in lines if "DAMAGED" in line and "torn:v1" in line]
    assert [line for line in lines if "DAMAGED" in line and "lost:v1" in line]
    by_kind = {e["kind"]: e for e in json.loads(run(weights, "ls", "--json").output)}
    assert (
        by_kind.keys() == {"weights", "damaged"} and by_kind["damaged"]["damage"] and not by_kind["weights"]["damage"]
    )
    found = run(weights, "verify", code=1).output
    assert f"manifest {bad[:16]}" in found and "tag torn:v1: " in found and "tag lost:v1: " in found
    # While a name or a manifest is unreadable, garbage cannot be determined.
    assert "quickthaw: integrity: " in run(weights, "gc", "--grace", "0", code=1).output
    assert run(weights, "rm", "torn:v1").output == "removed tag torn:v1\n"
    assert run(weights, "rm", "lost:v1").output == "removed tag lost:v1\n"
    assert f"removed manifest {bad}" in run(weights, "rm", bad).output
    assert run(weights, "verify").output.endswith("clean\n")
    run(weights, "gc", "--grace", "0")
    assert run(weights, "verify").output.endswith("clean\n")


def test_gc_keeps_manifests_that_a_damaged_tag_may_name(tmp_path, chunks):
    digest = import_directory(make_model(tmp_path / "model", megabytes=1), tag="toy:v1")
    chunks.set_ref("tags", "toy:v2", digest)
    chunks.store.path("refs/tags/toy@v2").write_bytes(b"{")
    assert run(weights, "rm", "toy:v1").output == "removed tag toy:v1\n"
    assert f"removed manifest {digest}" in run(weights, "rm", digest).output


def test_a_store_behind_http_is_verified_by_digest(tmp_path, chunks, serve):
    """An HTTP store cannot be listed, and need not be."""
    digest = import_directory(make_model(tmp_path / "model", megabytes=5))
    url = serve(chunks.store.root)
    assert run(weights, "verify", digest, "--store", url).output.endswith("clean\n")
    assert "quickthaw: no-listing: " in run(weights, "verify", "--store", url, code=1).output
    a_chunk_of(chunks, digest).unlink()
    assert "missing chunk" in run(weights, "verify", digest, "--store", url, code=1).output


def test_a_web_page_is_not_a_store(tmp_path, serve):
    folder = tmp_path / "site" / "manifests"
    folder.mkdir(parents=True)
    (folder / ("0" * 64)).write_text("<!doctype html><title>Not here</title>")
    url = serve(tmp_path / "site")
    assert "quickthaw: not-a-store: " in run(weights, "verify", "0" * 64, "--store", url, code=1).output


def test_a_tag_names_the_last_import(tmp_path, chunks):
    """Importing an unchanged directory sets the tag too, because it may have been moved or removed meanwhile."""
    first, second = (make_model(tmp_path / name, seed=seed, megabytes=1) for name, seed in (("a", 1), ("b", 2)))
    digest = import_directory(first, tag="x:1")
    import_directory(second, tag="x:1")
    run(weights, "import", first, "--tag", "x:1")
    assert chunks.get_ref("tags", "x:1") == digest
    import_directory(first, tag="y")
    assert run(weights, "rm", "x:1").output == "removed tag x:1\n"
    run(weights, "import", first, "--tag", "x:1")
    assert chunks.get_ref("tags", "x:1") == digest == chunks.get_ref("tags", "y:latest")
    chunks.store.path("refs/tags/x@1").write_bytes(b"garbage")
    run(weights, "import", first, "--tag", "x:1")
    assert chunks.get_ref("tags", "x:1") == digest


@pytest.mark.parametrize("spoil", ["gone", "a file", "a link to nothing", "a loop"])
@pytest.mark.parametrize("folder", ["manifests", "refs/tags"])
def test_gc_refuses_a_store_that_cannot_be_listed(tmp_path, chunks, folder, spoil):
    import_directory(make_model(tmp_path / "model", megabytes=1), tag="toy:v1")
    path, kept = chunks.store.path(folder), tmp_path / "kept"
    path.rename(kept)
    if spoil == "a file":
        path.touch()
    elif spoil != "gone":
        path.symlink_to(path if spoil == "a loop" else "nothing")
    if (folder, spoil) == ("refs/tags", "gone"):
        # It looks like a store without tags; its manifests are kept nevertheless.
        assert "deleted 0 chunks" in run(weights, "gc", "--grace", "0").output
    else:
        for words in ([], ["--untagged"], ["--dry-run"]):
            assert "deleted" not in run(weights, "gc", "--grace", "0", *words, code=1).output
    if path.is_symlink() or path.exists():
        path.unlink()
    kept.rename(path)
    assert run(weights, "verify").output.endswith("clean\n")


def test_a_dry_run_writes_nothing_and_other_folders_are_refused(tmp_path, chunks):
    import_directory(make_model(tmp_path / "model", megabytes=1))
    lock = chunks.store.root / ".lock"
    lock.unlink()
    run(weights, "gc", "--dry-run")
    assert not lock.exists()
    (tmp_path / "folder").mkdir()
    for words in (["ls"], ["verify"], ["gc"]):
        assert "quickthaw: not-found: " in run(weights, *words, "--store", tmp_path / "folder", code=1).output
    assert not list((tmp_path / "folder").iterdir())


def test_tags_with_invalid_names_are_removed(tmp_path, chunks):
    import_directory(make_model(tmp_path / "model", megabytes=1), tag="toy:v1")
    for name in ("evil", "extra%3A1"):
        chunks.store.path(f"refs/tags/{name}").write_bytes(b"x")
        assert "quickthaw: integrity: " in run(weights, "gc", "--grace", "0", code=1).output
        assert run(weights, "rm", name).output == f"removed tag {name}\n"
    assert "deleted 0 chunks" in run(weights, "gc", "--grace", "0").output


def test_verify_names_an_unreadable_chunk_and_goes_on(tmp_path, chunks, monkeypatch):
    digest = import_directory(make_model(tmp_path / "model", megabytes=9))
    path, preadv = a_chunk_of(chunks, digest), os.preadv

    def bad_sector(fd, buffers, offset):
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr("lazyfs.stores.local.os.preadv", bad_sector)
    found = json.loads(run(weights, "verify", "--json", code=1).output)
    assert list(found["bad"]) == [path.name] and found["chunks"] > 2
    run(weights, "verify", "--repair", code=1)
    assert not path.exists()


def test_a_plain_name_is_a_tag_even_if_a_folder_has_it(tmp_path, chunks, monkeypatch):
    """Without the mount itself: only what would be mounted counts."""
    model = make_model(tmp_path / "imported", megabytes=1)
    digest = import_directory(model, tag="model:latest")
    other = make_model(tmp_path / "here" / "model", megabytes=1, seed=2)
    (other / "sub").rename(other / "v1")
    monkeypatch.chdir(other.parent)
    assert resolve("model", None)[0] == digest
    in_place = resolve("./model", None)[0]
    assert in_place != digest and in_place == resolve("model/", None)[0] == resolve(str(other), None)[0]
    other.rename(other.with_name("other"))
    for name in ("other", "other/v1"):
        result = run(mount, name, tmp_path / "mnt", code=1)
        assert f"write ./{name}" in result.output and "quickthaw: not-found: " in result.output


def test_an_unreadable_file_is_reported_in_one_line(tmp_path, monkeypatch):
    model = make_model(tmp_path / "model", megabytes=1)
    real = os.open

    def refuse(path, *arguments, **more):
        if str(path).endswith("tokenizer.json"):
            # Root can read every file; other users, or a failing disk, get this error.
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    result = run(mount, model, tmp_path / "mnt", code=1)
    assert "tokenizer.json" in result.output and "quickthaw: permission-denied: " in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("command", ["ls", "gc"])
def test_any_other_os_error_is_reported_in_one_line(chunks, monkeypatch, command):
    def fail(*_):
        raise OSError(errno.ENFILE, "Too many open files in system", "/somewhere")

    monkeypatch.setattr("lazyfs.cli.weights.open_chunks", fail)
    result = run(weights, command, code=1)
    assert "/somewhere: Too many open files" in result.output and len(result.output.splitlines()) == 1


def test_listing_shows_chunks_without_a_manifest(tmp_path, chunks):
    assert "nothing in" in run(weights, "ls").output
    digest = import_directory(make_model(tmp_path / "model", megabytes=5))
    run(weights, "rm", digest)
    shown = run(weights, "ls").output
    assert "nothing in" not in shown and "chunks (5." in shown and "weights gc" in shown
    run(weights, "gc", "--grace", 0)
    assert "nothing in" in run(weights, "ls").output


EVIL = "a\x1b]0;owned\x07\nquickthaw: ready\x9b2J\u202e$(id)"


def test_names_from_a_store_are_escaped_on_the_terminal(tmp_path, home, chunks):
    run(weights, "import", make_model(tmp_path / "model"), "--tag", "sound")
    manifest = Manifest(1, "weights", (), (File(EVIL, 0o644, 5, (Chunk("0" * 64, 5),)),), ())
    digest, data = encode(manifest)
    chunks.store.put(f"manifests/{digest}", data)
    chunks.store.put(f"refs/tags/{EVIL}@latest", b"{}")
    said = (
        run(weights, "ls").output + run(weights, "verify", code=1).output + run(weights, "verify", EVIL, code=1).output
    )
    assert not [c for c in said if c != "\n" and not c.isprintable()]
    assert not [line for line in said.splitlines() if line.startswith("quickthaw: ready")]
    assert "rm '" in said, "commands to type are quoted for a shell"


def test_errors_are_one_line_for_any_quoted_text():
    for error in (LazyfsError(EVIL), Failed("some-code", EVIL)):
        assert str(error).isprintable() and "owned" in str(error)
