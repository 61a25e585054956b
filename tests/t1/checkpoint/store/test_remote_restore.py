"""A real process tree restored from a store during the download: correct memory, and little fetched before it runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoint.errors import Integrity
from checkpoint.snapshot import digests, signatures
from checkpoint.store import archive, layout
from checkpoint.store import remote_restore as remotes
from checkpoint.store.archive import open_chunks, pull, push
from checkpoint.store.remote_restore import RemoteSnapshot
from tests.kits.checkpoint.remote_restore import TOUCHED, Host, Slow, order, result, tree
from tests.kits.checkpoint.snapshots import LIMIT_S

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("criu")]


def test_an_archive_by_working_set_is_pulled_exactly(taken: Path, store: Path, tmp_path: Path) -> None:
    chunks = open_chunks(f"file://{store}")
    opened = archive.OpenedArchive.of("workload", chunks)
    assert opened.layout
    assert opened.layout.start < opened.layout.first <= opened.layout.size
    # The pages of the first token are a part of the snapshot and are stored once.
    assert opened.layout.first - opened.layout.start >= TOUCHED * 4096
    paths = {file.path for file in opened.archive.files}
    assert {layout.BYTES, layout.INDEX} < paths
    assert not any(path.startswith("images/") and path.endswith(".img") for path in paths if "pages-" in path)
    pull("workload", chunks, tmp_path / "there/workload")
    assert tree(tmp_path / "there/workload") == tree(taken)


def test_a_working_sets_pages_are_stored_once(taken: Path, store: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(taken, tmp_path / "workload", symlinks=True)
    (bare / "working-set").unlink()
    plain = push(bare, open_chunks(f"file://{tmp_path}/plain"))
    stored = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert stored < plain.stored * 1.1 + (1 << 20)


def test_a_replica_runs_before_the_download_is_complete(host: Host, store: Path) -> None:
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
    # The next restore is local, and its digests need not be computed again.
    assert digests.verify(host.library.path("workload"), remote.snapshot.files).hashed == 0
    again = host.restore()
    order(again.sandbox, seed=3, touch=TOUCHED)
    assert result(again.sandbox) == []


@pytest.mark.parametrize("rate", [4e6, 40e6])
def test_memory_is_exact_while_pages_are_downloaded_over_http(
    host: Host, far: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random munmap, mremap, madvise and fork on memory whose pages are not downloaded yet."""
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


def test_several_replicas_share_a_download(host: Host, far: str) -> None:
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
    assert len(chunks) - len(set(chunks)) <= 1  # the manifest is read once for validation and once to be stored


def test_with_a_trust_key_every_chunk_is_verified(host: Host, taken: Path, tmp_path: Path) -> None:
    """A signed snapshot in an unsigned archive is fetched completely before a process reads a byte; a signed archive need not be."""
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


def test_an_archive_without_working_set_is_fetched_completely(host: Host, taken: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(taken, tmp_path / "bare/workload", symlinks=True)
    (bare / "working-set").unlink()
    url = f"file://{tmp_path}/bare-store"
    push(bare, open_chunks(url))
    remote = host.fetch(url)
    assert "working set" in remote.complete_first
    remote.wait_complete()
    assert tree(host.library.path("workload")) == tree(bare)
