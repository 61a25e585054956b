"""Retention in a store: what goes, what stays, and when the bytes go."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import Busy, CheckpointError, Integrity
from checkpoint.snapshot import digests
from checkpoint.snapshot.library import Library
from checkpoint.store import archive
from checkpoint.store.archive import open_chunks
from checkpoint.store.cache_archive import push_cache
from checkpoint.store.claim import PREFIX
from checkpoint.store.retention import Retired, retire
from checkpoint.store.upload import NAMELESS
from lazyfs.admin.listing import store_lock
from lazyfs.admin.verify import verify
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.importer import import_tree
from tests.kits.checkpoint.small_snapshot import NEW, OLD, write
from tests.kits.lazyfs.models import make_model

pytestmark = pytest.mark.t0
HOUR, DAY = 3600.0, 24 * 3600.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "RACY_NS", 1_000_000)


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStore:
    return open_chunks(str(tmp_path / "store"))


def age(chunks: ChunkStore, seconds: float, *, below: str = "") -> None:
    """Make every object below a key older."""
    for path in Path(chunks.store.url.removeprefix("file://"), below).rglob("*"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def push(tmp_path: Path, chunks: ChunkStore, name: str, host: Any = OLD, data: bytes | None = None) -> Path:
    """Push a snapshot, older by an hour than the next one will be; return its folder."""
    folder = write(Library(tmp_path / os.urandom(4).hex()), name, host, data)
    archive.push(folder, chunks)
    age(chunks, HOUR)
    return folder


def names(chunks: ChunkStore) -> set[str]:
    """Return the plain names of the snapshots."""
    return {name for name in chunks.ref_names("snapshots") if ":" not in name}


def name(number: int, model: str = "vllm-llama") -> str:
    return f"{model}-{number:010x}"


def intact(chunks: ChunkStore) -> bool:
    found = verify(chunks)
    return not (found.bad or found.missing or found.broken_manifests or found.broken_names)


def emptied(chunks: ChunkStore, **how: Any) -> Retired:
    """Retire until nothing is left to do, days later each time; return the sum."""
    total = Retired()
    for _ in range(2):
        age(chunks, 2 * DAY)
        done = retire(chunks, **how)
        total.names += done.names
        total.archives += done.archives
        total.bytes += done.bytes
    assert intact(chunks)
    return total


def test_the_newest_of_each_model_and_kind_of_host_stay(tmp_path: Path, chunks: ChunkStore) -> None:
    for number in range(4):
        push(tmp_path, chunks, name(number))
    push(tmp_path, chunks, name(0), NEW)  # of another kind of host: the newest there
    push(tmp_path, chunks, name(9, "vllm-qwen"))
    push(tmp_path, chunks, "my-own-name")
    done = emptied(chunks, keep=2)
    assert names(chunks) == {name(0), name(2), name(3), name(9, "vllm-qwen"), "my-own-name"}
    assert sorted(one.partition(":")[0] for one in done.names) == [name(0), name(1)] and done.archives == 2
    assert archive.pull(name(0), chunks, tmp_path / "pulled" / name(0)).files


def test_young_ones_stay_however_many(tmp_path: Path, chunks: ChunkStore) -> None:
    for number in range(5):
        push(tmp_path, chunks, name(number))  # 5, 4, 3, 2, 1 hours old
    assert len(retire(chunks, keep=1, older_than_s=3.5 * HOUR).names) == 2
    assert names(chunks) == {name(2), name(3), name(4)}


def test_by_age_alone_the_newest_stays_unless_none_is_to_be_kept(tmp_path: Path, chunks: ChunkStore) -> None:
    for number in range(2):
        push(tmp_path, chunks, name(number))
    age(chunks, DAY)
    retire(chunks, older_than_s=HOUR)
    assert names(chunks) == {name(1)}
    retire(chunks, keep=0, older_than_s=HOUR)
    assert names(chunks) == set()


def test_the_plain_name_goes_over_to_the_kind_of_host_that_is_left(tmp_path: Path, chunks: ChunkStore) -> None:
    push(tmp_path, chunks, name(1), NEW)
    push(tmp_path, chunks, name(1), OLD)  # and so the plain name
    push(tmp_path, chunks, name(2), OLD)
    emptied(chunks, keep=1)
    (left,) = [one for one in chunks.ref_names("snapshots") if one.startswith(name(1) + ":")]
    assert chunks.get_ref("snapshots", name(1)) == chunks.get_ref("snapshots", left)


def test_bytes_go_after_the_grace_and_what_others_use_stays(tmp_path: Path, chunks: ChunkStore) -> None:
    shared = os.urandom(3 * 4096)
    push(tmp_path, chunks, name(1), data=shared)
    push(tmp_path, chunks, name(2))
    push(tmp_path, chunks, name(3), data=shared)
    import_tree(make_model(tmp_path / "model", megabytes=1), chunks)
    age(chunks, 2 * DAY)
    would = retire(chunks, keep=1, dry_run=True)
    first = retire(chunks, keep=1)
    assert first.names == would.names and len(first.names) == 2
    assert (first.archives, first.bytes, first.waiting) == (0, 0, 2) and intact(chunks)
    assert (retire(chunks, keep=1).archives, len(list(chunks.store.list(NAMELESS)))) == (0, 2)
    age(chunks, HOUR, below=NAMELESS)
    second = retire(chunks, keep=1)
    assert (second.archives, second.bytes) == (2, would.bytes) and second.bytes > 3 * 4096
    assert intact(chunks) and not list(chunks.store.list(NAMELESS)) and len(list(chunks.manifests())) == 2
    assert archive.pull(name(3), chunks, tmp_path / "pulled" / name(3)).files


def test_what_was_replaced_under_its_name_goes_too(tmp_path: Path, chunks: ChunkStore) -> None:
    for _ in range(3):
        push(tmp_path, chunks, name(1))
    done = emptied(chunks, keep=1)
    assert done.names == [] and done.archives == 2 and names(chunks) == {name(1)}


def test_what_was_pushed_again_has_its_grace_anew_when_its_name_goes(tmp_path: Path, chunks: ChunkStore) -> None:
    folder = push(tmp_path, chunks, name(1))
    push(tmp_path, chunks, name(2))
    assert retire(chunks, keep=1).waiting == 1
    again = archive.push(folder, chunks).digest
    push(tmp_path, chunks, name(2))
    age(chunks, 2 * DAY)
    done = retire(chunks, keep=1)
    assert name(1) not in names(chunks) and (done.archives, done.waiting) == (0, 2), done
    assert archive.pull(again, chunks, tmp_path / "pulled" / name(1)).files


def test_a_dry_run_changes_nothing(tmp_path: Path, chunks: ChunkStore) -> None:
    for number in range(3):
        push(tmp_path, chunks, name(number))
    age(chunks, 2 * DAY)
    (chunks.store.path(PREFIX)).mkdir(parents=True)  # type: ignore[attr-defined]
    before = {info.key: info.version for info in chunks.store.list("")}
    assert len(retire(chunks, keep=1, dry_run=True).names) == 2
    assert {info.key: info.version for info in chunks.store.list("")} == before


def test_what_a_launch_has_claimed_stays_and_dead_claims_go(tmp_path: Path, chunks: ChunkStore) -> None:
    for number in range(4):
        push(tmp_path, chunks, name(number))
    (claimed,) = [one for one in chunks.ref_names("snapshots") if one.startswith(name(1) + ":")]
    chunks.store.put(PREFIX + claimed.replace(":", "@"), b"{}")
    chunks.store.put(PREFIX + name(2), b"{}")  # of an older quickthaw
    chunks.store.put(PREFIX + name(0), b"{}")
    then = time.time() - 2 * HOUR
    os.utime(chunks.store.path(PREFIX + name(0)), (then, then))  # type: ignore[attr-defined]
    retire(chunks, keep=1)
    assert names(chunks) == {name(1), name(2), name(3)}
    assert len(list(chunks.store.list(PREFIX))) == 2


def test_compile_caches_go_by_age_alone(tmp_path: Path, chunks: ChunkStore) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "kernel.so").write_bytes(os.urandom(100))
    for one in "abc":
        push_cache(tmp_path / "code", chunks, f"compile-vllm-{one * 16}")
        age(chunks, HOUR)
    retire(chunks, keep=0)
    assert len(names(chunks)) == 3
    assert retire(chunks, keep=9, older_than_s=1.5 * HOUR).names == [f"compile-vllm-{one * 16}" for one in "ab"]


def test_a_push_to_a_folder_is_waited_for_by_nobody(tmp_path: Path, chunks: ChunkStore) -> None:
    push(tmp_path, chunks, name(1))
    with store_lock(chunks, exclusive=False), pytest.raises(Busy, match="running"):
        retire(chunks, keep=0)
    assert names(chunks) == {name(1)}


def test_a_name_that_cannot_be_read_ends_it_before_anything_goes(tmp_path: Path, chunks: ChunkStore) -> None:
    for number in range(3):
        push(tmp_path, chunks, name(number))
    chunks.store.put("refs/snapshots/broken", b"{")
    with pytest.raises(Integrity, match="broken"):
        retire(chunks, keep=0)
    assert names(chunks) == {name(0), name(1), name(2), "broken"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/store"])
def test_a_store_that_can_only_be_read_is_refused_by_name(url: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        retire(open_chunks(url), keep=1)
    assert refused.value.code == "no-listing"


def test_a_snapshot_pushed_again_while_it_goes_stays(
    tmp_path: Path, chunks: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the removal: in a bucket, which has no lock."""
    folder = push(tmp_path, chunks, name(1))
    push(tmp_path, chunks, name(2))
    monkeypatch.setattr(
        "checkpoint.store.retention._claimed", lambda *_: set() if archive.push(folder, chunks) else {""}
    )
    monkeypatch.setattr(type(chunks.store), "remote", True)
    monkeypatch.setattr("checkpoint.store.retention.store_lock", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("lazyfs.admin.listing.store_lock", lambda *_, **__: contextlib.nullcontext())
    assert retire(chunks, keep=1).names == []
    assert names(chunks) == {name(1), name(2)}
