"""A real process tree restored from a store while its snapshot is still arriving: right memory, little fetched, and no way to hang."""

from __future__ import annotations

import fcntl
import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint.criu.binary import Criu
from checkpoint.errors import Busy, CheckpointError, Failed, HostLacks, Integrity, NotFound
from checkpoint.sandbox.sandbox import TMP_DIR, Sandbox
from checkpoint.snapshot import digests, signatures
from checkpoint.snapshot.dump import take
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.restore import LazyRestore, Restored, restore
from checkpoint.store import archive, download, layout
from checkpoint.store import remote_restore as remotes
from checkpoint.store.archive import open_chunks, pull, push
from checkpoint.store.remote_restore import DownloadingLibrary, RemoteSnapshot
from tests.kits import faulty_store
from tests.kits.checkpoint_kit import LIMIT_S, draft, inside, wait_for

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("criu")]

HOME = Path(os.environ.get("QUICKTHAW_HOME", Path.home() / ".cache" / "quickthaw"))
TOUCHED = 1500  # pages that the recorded restore read


def order(sandbox: Sandbox, **what: int) -> None:
    folder = inside(sandbox)
    (folder / "go.tmp").write_text(json.dumps(what))
    (folder / "go.tmp").rename(folder / "go")


def result(sandbox: Sandbox) -> list[str]:
    """What the tree found wrong with its memory."""
    path = inside(sandbox) / "result"
    found = json.loads(wait_for(path))
    path.unlink()
    errors: list[str] = found["errors"]
    return errors


class Host:
    """A host of its own: a home, replicas that are closed at the end, and what they were told."""

    def __init__(self, home: Path, criu: Criu) -> None:
        home.mkdir(exist_ok=True)
        (home / "compile").mkdir(exist_ok=True)
        self.library, self.criu = Library(home), criu
        self.deaths: list[str] = []
        self.warnings: list[str] = []
        self.lost: list[str] = []
        self.replicas: list[Restored] = []
        self.remotes: list[RemoteSnapshot] = []

    def fetch(self, url: str, **how: object) -> RemoteSnapshot:
        found = RemoteSnapshot.open(self.library, url, "workload", **how)  # type: ignore[arg-type]
        self.remotes.append(found)
        found.begin()
        return found

    def restore(self, remote: RemoteSnapshot | None = None, record: bool = False) -> Restored:
        library = DownloadingLibrary(self.library.home, remote) if remote else self.library
        snapshot = library.load("workload")
        known = library.working_set("workload")
        lazy = LazyRestore(None if record else known, record, self.deaths.append, self.warnings.append, remote)
        found = restore(library, self.criu, snapshot, [], self.library.home / "compile", {}, lazy=lazy)
        self.replicas.append(found)
        if remote:
            # What a launcher does: end who would wait for ever.
            def lost(reason: str) -> None:
                self.lost.append(reason)
                found.sandbox.close()

            remote.on_failure(lost)
        return found

    def close(self) -> None:
        for replica in self.replicas:
            replica.close()
        for remote in self.remotes:
            remote.close()


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a snapshot whose working set is recorded."""
    try:
        criu = Criu.find(HOME)
        assert criu.version
    except HostLacks as error:
        pytest.skip(str(error))
    host = Host(tmp_path_factory.mktemp("origin"), criu)
    with Sandbox() as sandbox:
        program = str(Path(__file__).parents[3] / "programs" / "pages_workload.py")
        pid = sandbox.start([os.path.realpath(sys.executable), "-I", "-S", program, TMP_DIR], {}, "/")
        wait_for(inside(sandbox) / "ready")
        take(host.library, criu, sandbox, draft("workload", pid), host.library.home / "compile", digests.digest_folder)
    replica = host.restore(record=True)
    assert replica.pages
    order(replica.sandbox, seed=1, touch=TOUCHED)
    assert result(replica.sandbox) == []
    replica.pages.first_token()
    replica.pages.requests_done(save=host.library.working_set("workload"))
    assert replica.pages.wait_saved(LIMIT_S)
    host.close()
    assert not host.deaths
    yield host.library.path("workload")


@pytest.fixture(scope="module")
def store(taken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        # The workload's snapshot is small, and so are its chunks, lest everything come at once.
        patch.setattr(layout, "REST_CHUNK", 64 << 10)
        patch.setattr(layout, "CHUNK", 256 << 10)
        push(taken, open_chunks(f"file://{folder}"))
    return folder


@pytest.fixture
def host(tmp_path: Path, taken: Path) -> Iterator[Host]:
    found = Host(tmp_path / "home", Criu.find(HOME))
    yield found
    found.close()
    assert not found.deaths
    assert not found.warnings
    assert not list((tmp_path / "home/run").glob("restore-*"))


@pytest.fixture
def faulty(store: Path, tmp_path: Path) -> Callable[..., str]:
    control = tmp_path / "faults.json"

    def set_fault(**fault: object) -> str:
        faulty_store.set_fault(control, store, **fault)
        return f"faulty://{control}"

    return set_fault


class Slow(http.server.SimpleHTTPRequestHandler):
    """A far store: 20 ms before every answer, and resets where it is told to."""

    protocol_version = "HTTP/1.1"
    resets = 0
    asked: list[str] = []

    def do_GET(self) -> None:
        time.sleep(0.02)
        type(self).asked.append(self.path)
        if "/chunks/" in self.path and type(self).resets > 0:
            type(self).resets -= 1
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def far(store: Path) -> Iterator[str]:
    Slow.resets, Slow.asked = 0, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Slow, directory=str(store)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mode)
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(digests.LEDGER)
    }


def test_pushed_by_working_set_and_pulled_byte_for_byte(taken: Path, store: Path, tmp_path: Path) -> None:
    chunks = open_chunks(f"file://{store}")
    opened = archive.OpenedArchive.of("workload", chunks)
    assert opened.layout
    assert opened.layout.start < opened.layout.first <= opened.layout.size
    # What the first token needs is a part of the whole, and lies nowhere else.
    assert opened.layout.first - opened.layout.start >= TOUCHED * 4096
    paths = {file.path for file in opened.archive.files}
    assert {layout.BYTES, layout.INDEX} < paths
    assert not any(path.startswith("images/") and path.endswith(".img") for path in paths if "pages-" in path)
    pull("workload", chunks, tmp_path / "there/workload")
    assert tree(tmp_path / "there/workload") == tree(taken)


def test_a_working_set_costs_its_pages_once(taken: Path, store: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(taken, tmp_path / "workload", symlinks=True)
    (bare / "working-set").unlink()
    plain = push(bare, open_chunks(f"file://{tmp_path}/plain"))
    stored = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert stored < plain.stored * 1.1 + (1 << 20)


def test_a_replica_runs_before_the_rest_has_come(host: Host, store: Path) -> None:
    remote = host.fetch(f"file://{store}")
    remote.wait_startup()
    replica = host.restore(remote)
    order(replica.sandbox, seed=1, touch=TOUCHED)
    assert result(replica.sandbox) == []
    assert remote.download and remote.opened.layout and replica.pages
    total = remote.download.size
    assert remote.download.fetched < remote.opened.layout.first + 2 * layout.CHUNK < total
    assert not remote.complete.is_set()
    replica.pages.first_token()
    remote.first_token()
    replica.pages.requests_done()
    assert replica.pages.wait_complete(LIMIT_S)
    order(replica.sandbox, seed=5, steps=60)
    assert result(replica.sandbox) == []
    remote.wait_complete()
    assert host.library.has("workload")
    assert [p.name for p in host.library.folder.iterdir()] == ["workload"]
    # The next restore is a local one, and its digests need not be computed again.
    assert digests.verify(host.library.path("workload"), remote.snapshot.files).hashed == 0
    again = host.restore()
    order(again.sandbox, seed=3, touch=TOUCHED)
    assert result(again.sandbox) == []


@pytest.mark.parametrize("rate", [4e6, 40e6])
def test_memory_is_as_it_was_while_pages_arrive_over_http(
    host: Host, far: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random munmap, mremap, madvise and fork, while what they move is not there yet."""
    monkeypatch.setattr(remotes, "BACKGROUND_BYTES_PER_S", rate)
    Slow.resets = 3
    remote = host.fetch(far)
    remote.wait_startup()
    replica = host.restore(remote)
    assert replica.pages
    order(replica.sandbox, seed=int(rate), steps=240)
    replica.pages.first_token()
    remote.first_token()
    assert result(replica.sandbox) == []
    replica.pages.requests_done()
    assert replica.pages.wait_complete(LIMIT_S)
    order(replica.sandbox, seed=2, steps=100)
    assert result(replica.sandbox) == []
    counts = replica.pages.stats()
    assert counts["moved"] and counts["forks"] and counts["faults"]
    remote.wait_complete()
    assert Slow.resets == 0


def test_several_replicas_share_what_arrives(host: Host, far: str) -> None:
    remote = host.fetch(far)
    assert host.fetch(far) is remote
    remote.wait_startup()
    replicas = [host.restore(remote) for _ in range(2)]
    for replica in replicas:
        order(replica.sandbox, seed=1, touch=TOUCHED)
    for replica in replicas:
        assert result(replica.sandbox) == []
    remote.first_token()
    for replica in replicas:
        assert replica.pages
        replica.pages.first_token()
        replica.pages.requests_done()
        assert replica.pages.wait_complete(LIMIT_S)
    remote.wait_complete()
    chunks = [path for path in Slow.asked if path.startswith("/chunks/")]
    assert len(chunks) - len(set(chunks)) <= 1  # the manifest is read once to be judged, and once to be kept


def test_a_flip_on_the_way_is_kept_aside_and_fetched_again(host: Host, faulty: Callable[..., str]) -> None:
    try:
        remote = host.fetch(faulty(fault="corrupt", share=0.2, only="chunks/"))
        time.sleep(0.3)
        faulty()
        remote.wait_complete()
    except Integrity:
        return  # the same chunk flipped twice, which is the next test's: refused
    assert remote.download
    kept = list((host.library.home / "cache/quarantine").glob("*"))
    assert len(kept) == min(16, remote.download.quarantined)


def test_a_wrong_chunk_ends_the_replica(host: Host, faulty: Callable[..., str]) -> None:
    """What is wrong in the store is fetched twice, and then the replica that waits for it is ended; nothing of it is kept."""
    remote = host.fetch(faulty())
    remote.wait_startup()
    remote.download.wait(download.FIRST_TOKEN)  # type: ignore[union-attr]
    replica = host.restore(remote)
    order(replica.sandbox, seed=1, touch=100)
    assert result(replica.sandbox) == []
    faulty(fault="corrupt", only="chunks/")
    order(replica.sandbox, seed=1, steps=200)  # needs pages of the rest
    limit = time.monotonic() + LIMIT_S
    while not host.lost:
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert "does not match its digest" in host.lost[0] or "does not decompress" in host.lost[0]
    assert isinstance(remote.failure, Integrity)
    assert not (inside(replica.sandbox) / "result").exists()
    with pytest.raises(Integrity):
        remote.wait_complete()
    assert list((host.library.home / "cache/quarantine").iterdir())
    assert not list(host.library.folder.glob("*work*"))


def test_what_criu_reads_is_never_wrong(host: Host, store: Path, tmp_path: Path) -> None:
    """An archive that agrees with itself and not with the snapshot's manifest: refused before CRIU sees a byte of it."""
    there = pull_and_change(store, tmp_path, "images/files.img")
    remote = host.fetch(f"file://{there}")
    with pytest.raises(Integrity, match="file-digest-differs"):
        remote.wait_startup()
    remote.close(discard=True)
    assert not list(host.library.folder.iterdir())


def test_a_page_that_differs_from_the_manifest_ends_the_replica(host: Host, store: Path, tmp_path: Path) -> None:
    there = pull_and_change(store, tmp_path, "images/pages-1.img")
    remote = host.fetch(f"file://{there}")
    remote.wait_startup()
    replica = host.restore(remote)
    remote.first_token()
    with pytest.raises(Integrity, match="file-digest-differs"):
        remote.wait_complete()
    assert host.lost
    assert not host.library.has("workload")
    assert replica.sandbox.exit_code(replica.root_pid) is None or host.lost


def pull_and_change(store: Path, tmp_path: Path, name: str) -> Path:
    """A store whose archive holds a changed file under an unchanged snapshot manifest."""
    folder = tmp_path / "changed/workload"
    pull("workload", open_chunks(f"file://{store}"), folder)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    push(folder, open_chunks(f"file://{tmp_path}/changed-store"))
    return tmp_path / "changed-store"


def test_a_store_that_goes_silent_ends_the_replica_in_time(host: Host, faulty: Callable[..., str]) -> None:
    remote = host.fetch(faulty())
    remote.wait_startup()
    remote.download.wait(download.FIRST_TOKEN)  # type: ignore[union-attr]
    remote.download.limit_s = 2.0  # type: ignore[union-attr]
    replica = host.restore(remote)
    faulty(fault="stall", seconds=0.5, only="chunks/")
    began = time.monotonic()
    order(replica.sandbox, seed=1, steps=200)
    while not host.lost:
        assert time.monotonic() - began < 30
        time.sleep(0.01)
    assert isinstance(remote.failure, Failed)
    with pytest.raises(Failed):
        remote.wait_complete()
    remote.close()
    # What has come is worth keeping: the next attempt goes on from it.
    assert (host.library.folder / ".pull-workload").is_dir()
    faulty()
    again = host.fetch(faulty())
    again.wait_complete()
    assert again.download and again.download.kept > 0
    assert host.library.has("workload")


def test_a_full_disk_ends_it_and_leaves_nothing(host: Host, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = download._write_fully, []

    def full(fd: int, view: memoryview, offset: int) -> None:
        written.append(len(view))
        if sum(written) > 1 << 20:
            raise OSError(28, "No space left on device")
        real(fd, view, offset)

    monkeypatch.setattr(download, "_write_fully", full)
    remote = host.fetch(f"file://{store}")
    with pytest.raises(Failed) as caught:
        remote.wait_complete()
    assert caught.value.code == "disk-full"
    assert not list(host.library.folder.iterdir())


def test_a_store_without_it(host: Host, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="archive-not-found"):
        host.fetch(f"file://{tmp_path}/empty")


def test_one_process_at_a_time(host: Host, store: Path) -> None:
    partial = host.library.folder / ".pull-workload"
    partial.mkdir(parents=True)
    fd = os.open(partial, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(Busy):
            host.fetch(f"file://{store}")
    finally:
        os.close(fd)
    host.fetch(f"file://{store}").wait_complete()


CHILD = """
import sys, time
from pathlib import Path
from checkpoint.snapshot.library import Library
from checkpoint.store.remote_restore import RemoteSnapshot
remote = RemoteSnapshot.open(Library(Path(sys.argv[1])), sys.argv[2], "workload")
remote.begin()
remote.wait_startup()
remote.first_token()
print("begun", flush=True)
remote.wait_complete()
print("complete", flush=True)
"""


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.15, 0.3])
def test_killed_at_any_moment(host: Host, faulty: Callable[..., str], moment: float, taken: Path) -> None:
    """Nobody sees a part; the next attempt goes on from what is there, or a sweep removes it."""
    url = faulty(fault="slow", seconds=0.05, only="chunks/")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(host.library.home), url],
        env={**os.environ, "PYTHONPATH": faulty_store.PYTHONPATH},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout and child.stdout.readline() == "begun\n"
    time.sleep(moment)
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    child.stdout.close()
    if host.library.has("workload"):
        assert tree(host.library.path("workload")) == tree(taken)
        return
    assert host.library.names() == []
    assert host.library.sweep() == 0  # it is young: somebody may go on
    if moment == 0.15:
        assert host.library.sweep(pulls_older_s=0.0) == 1
        assert not list(host.library.folder.glob(".pull-*"))
    faulty()
    remote = host.fetch(url)
    remote.wait_complete()
    assert tree(host.library.path("workload")) == tree(taken)


def test_a_trust_key_vouches_for_every_chunk(host: Host, taken: Path, tmp_path: Path) -> None:
    """A signed snapshot in an archive that nobody signed is fetched whole before a process sees a byte; a signed archive need not be."""
    key = tmp_path / "key"
    signatures.keygen(key)
    folder = shutil.copytree(taken, tmp_path / "signed/workload", symlinks=True)
    (folder / "manifest.sig").write_bytes(signatures.signer(key)((folder / "manifest.json").read_bytes()))
    trusted = [tmp_path / "key.pub"]
    url = f"file://{tmp_path}/signed-store"
    push(folder, open_chunks(url))
    assert "not signed" in RemoteSnapshot.open(host.library, url, "workload", trust_keys=trusted).complete_first
    push(folder, open_chunks(url), sign=signatures.signer(key))
    remotes._open.clear()
    assert RemoteSnapshot.open(host.library, url, "workload", trust_keys=trusted).complete_first == ""
    remotes._open.clear()
    other = tmp_path / "other"
    signatures.keygen(other)
    with pytest.raises(Integrity, match="signature-wrong"):
        RemoteSnapshot.open(host.library, url, "workload", trust_keys=[tmp_path / "other.pub"])
    assert remotes._open == {}


def test_an_archive_without_working_set_is_fetched_whole(host: Host, taken: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(taken, tmp_path / "bare/workload", symlinks=True)
    (bare / "working-set").unlink()
    url = f"file://{tmp_path}/bare-store"
    push(bare, open_chunks(url))
    remote = host.fetch(url)
    assert "working set" in remote.complete_first
    remote.wait_complete()
    assert tree(host.library.path("workload")) == tree(bare)


def test_closing_it_while_it_arrives_leaves_what_has_come(host: Host, far: str) -> None:
    remote = host.fetch(far)
    remote.wait_startup()
    remote.close()
    assert isinstance(remote.failure, CheckpointError)
    assert not [t for t in threading.enumerate() if t.name.startswith("download-")]
    again = host.fetch(far)
    again.wait_complete()
    assert again.download and again.download.kept > 0
