"""Faults while a restored process tree downloads its snapshot: damage, silence, a full disk, kill -9. No wrong memory, no hang."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.errors import Busy, CheckpointError, Failed, Integrity, NotFound
from checkpoint.store import download
from checkpoint.store.archive import open_chunks, pull, push
from tests.kits.checkpoint.remote_restore import Host, order, result, tree
from tests.kits.checkpoint.snapshots import LIMIT_S, sandbox_tmpdir
from tests.kits.lazyfs import faulty_store

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("criu")]


def test_a_chunk_damaged_in_transit_is_quarantined_and_fetched_again(
    host: Host, faulty: Callable[..., str], taken: Path
) -> None:
    remote = host.fetch(faulty(fault="corrupt", only="chunks/", once=True))
    remote.wait_complete()
    assert remote.download and remote.download.quarantined
    kept = list((host.library.home / "cache/quarantine").glob("*"))
    assert len(kept) == min(16, remote.download.quarantined)
    assert tree(host.library.path("workload")) == tree(taken)


def test_a_wrong_chunk_ends_the_replica(host: Host, faulty: Callable[..., str]) -> None:
    """A chunk that is wrong in the store is fetched twice, then the waiting replica is killed; nothing of the chunk is kept."""
    remote = host.fetch(faulty())
    remote.wait_startup()
    remote.download.wait(download.FIRST_TOKEN)  # type: ignore[union-attr]
    replica = host.restore(remote)
    order(replica.sandbox, seed=1, touch=100)
    assert result(replica.sandbox) == []
    faulty(fault="corrupt", only="chunks/")
    order(replica.sandbox, seed=1, steps=200)  # needs background pages
    limit = time.monotonic() + LIMIT_S
    while not host.lost:
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert "does not match its digest" in host.lost[0] or "does not decompress" in host.lost[0]
    assert isinstance(remote.failure, Integrity)
    assert not (sandbox_tmpdir(replica.sandbox) / "result").exists()
    with pytest.raises(Integrity):
        remote.wait_complete()
    assert list((host.library.home / "cache/quarantine").iterdir())
    assert not list(host.library.folder.glob("*work*"))


def test_criu_never_reads_wrong_bytes(host: Host, store: Path, tmp_path: Path) -> None:
    """An archive that is consistent but differs from the snapshot's manifest is refused before CRIU reads a byte of it."""
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
    """Make a store whose archive has a changed file under an unchanged snapshot manifest."""
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
    # Downloaded files are kept: the next attempt resumes from them.
    assert (host.library.folder / ".pull-workload").is_dir()
    faulty()
    again = host.fetch(faulty())
    again.wait_complete()
    assert again.download and again.download.kept > 0
    assert host.library.has("workload")


def test_a_full_disk_ends_the_download_and_leaves_nothing(
    host: Host, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_store_without_the_snapshot(host: Host, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="archive-not-found"):
        host.fetch(f"file://{tmp_path}/empty")


def test_one_process_downloads_at_a_time(host: Host, store: Path) -> None:
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
    """No partial snapshot is visible; the next attempt resumes, or a sweep removes the rest."""
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
    assert host.library.sweep() == 0  # it is young: another process may resume it
    if moment == 0.15:
        assert host.library.sweep(pulls_older_s=0.0) == 1
        assert not list(host.library.folder.glob(".pull-*"))
    faulty()
    remote = host.fetch(url)
    remote.wait_complete()
    assert tree(host.library.path("workload")) == tree(taken)


def test_closing_during_a_download_keeps_the_downloaded_files(host: Host, far: str) -> None:
    remote = host.fetch(far)
    remote.wait_startup()
    remote.close()
    assert isinstance(remote.failure, CheckpointError)
    assert not [t for t in threading.enumerate() if t.name.startswith("download-")]
    again = host.fetch(far)
    again.wait_complete()
    assert again.download and again.download.kept > 0
