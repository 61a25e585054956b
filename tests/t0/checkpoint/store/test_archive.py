"""Archives: a pulled snapshot equals the pushed one byte for byte, equal content is stored once, damage is refused."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from checkpoint.errors import Busy, CheckpointError, Failed, Integrity, NotFound
from checkpoint.snapshot import digests
from checkpoint.snapshot.digests import digest_folder, verify
from checkpoint.store import archive, archive_entries, download, upload
from checkpoint.store.archive import Progress, discard, open_chunks, pull, push
from checkpoint.store.cache_archive import pull_cache, push_cache
from lazyfs.admin.verify import verify as verify_store
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.stores.retry import RetryPolicy

pytestmark = pytest.mark.t0

PAGE = 4096


def pages(count: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(count * PAGE)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "RACY_NS", 20_000_000)
    quick = RetryPolicy(attempts=2, base=0.001, cap=0.002, limit=1.0)
    monkeypatch.setattr("lazyfs.stores.retry.RetryPolicy", lambda **_: quick)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "snap"
    for name in ("images", "shm", "tmp/deep", "cache"):
        (folder / name).mkdir(parents=True, mode=0o700)
    shared = pages(64, 1)
    (folder / "images/pages-1.img").write_bytes(pages(10, 2) + shared + bytes(40 * PAGE))
    (folder / "images/pages-2.img").write_bytes(pages(3, 3) + shared[PAGE:])
    (folder / "images/core-7.img").write_bytes(b"core")
    (folder / "images/empty.img").write_bytes(b"")
    (folder / "shm/sem.a").write_bytes(bytes(32))
    (folder / "shm/link_remap.1").hardlink_to(folder / "shm/sem.a")
    with (folder / "shm/psm").open("wb") as file:
        file.truncate(20 << 20)
        file.seek(9 << 20)
        file.write(b"in the middle")
    (folder / "tmp/deep/link").symlink_to("../nowhere")
    (folder / "cache/code.so").write_bytes(b"\x7fELF")
    (folder / "cache/code.so").chmod(0o755)
    here = Path.cwd()
    os.chdir(folder / "tmp")
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("sock")
    finally:
        os.chdir(here)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.suffix == ".img":
            file.chmod(0o600)
    files = {name: msgspec.to_builtins(f) for name, f in digest_folder(folder).items()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "name": "snap", "files": files, "canary": {}}))
    return folder


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStore:
    return open_chunks(f"file://{tmp_path}/store")


def tree(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        name = str(path.relative_to(folder))
        if name.startswith(digests.LEDGER) or stat.S_ISSOCK(info.st_mode):
            continue
        content = str(path.readlink()) if path.is_symlink() else b"" if path.is_dir() else path.read_bytes()
        found[name] = (stat.S_IMODE(info.st_mode), content)
    return found


def chunk_files(chunks: ChunkStore) -> list[Path]:
    root = Path(chunks.store.url.removeprefix("file://"))
    return [f for f in (root / "chunks").rglob("*") if f.is_file()]


def test_a_pulled_snapshot_is_equal_byte_for_byte(snapshot: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    pushed = push(snapshot, chunks)
    pulled = pull("snap", chunks, tmp_path / "other/snap")
    copy = tmp_path / "other/snap"
    assert tree(copy) == tree(snapshot)
    assert pulled.digest == pushed.digest
    assert pushed.files == pulled.files == 9
    assert copy.stat().st_mode & 0o777 == 0o700
    assert (copy / "shm/sem.a").stat().st_ino == (copy / "shm/link_remap.1").stat().st_ino
    assert (copy / "shm/psm").stat().st_blocks * 512 < 10 << 20
    assert [p.name for p in copy.parent.iterdir()] == ["snap"]


def test_a_pulled_snapshots_first_verification_hashes_nothing(
    snapshot: Path, chunks: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "RACY_NS", 0)
    push(snapshot, chunks)
    pull("snap", chunks, tmp_path / "other/snap")
    files = msgspec.json.decode((snapshot / "manifest.json").read_bytes(), type=archive_entries.Essentials).files
    assert verify(tmp_path / "other/snap", files).hashed == 0


def test_equal_pages_are_stored_and_fetched_once_and_zeros_never(
    snapshot: Path, chunks: ChunkStore, tmp_path: Path
) -> None:
    pushed = push(snapshot, chunks)
    assert pushed.copies >= 63 * PAGE
    assert pushed.zero >= 40 * PAGE + (12 << 20)
    assert pushed.stored < (10 + 64 + 3 + 8) * PAGE + (1 << 20)
    pulled = pull("snap", chunks, tmp_path / "other/snap")
    assert pulled.fetched <= pushed.size - pushed.zero - pushed.copies + 4 * PAGE


def test_a_second_push_stores_nothing(snapshot: Path, chunks: ChunkStore) -> None:
    first = push(snapshot, chunks)
    again = push(snapshot, chunks)
    assert (again.stored, again.digest) == (0, first.digest)
    assert again.shared > 0


def test_snapshots_of_one_engine_share_equal_content(snapshot: Path, chunks: ChunkStore) -> None:
    first = push(snapshot, chunks)
    (snapshot / "images/core-7.img").write_bytes(b"other")
    other = push(snapshot, chunks, "other")
    assert other.digest != first.digest
    assert other.stored < 1000


def test_progress_reaches_the_end(snapshot: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    seen: list[Progress] = []
    push(snapshot, chunks, progress=seen.append)
    assert seen[-1].done == seen[-1].total > 20 << 20
    seen.clear()
    pull("snap", chunks, tmp_path / "other/snap", progress=seen.append)
    assert 0 < seen[-1].done <= seen[-1].total
    assert all(a.done <= b.done for a, b in itertools.pairwise(seen))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda p: os.truncate(p, p.stat().st_size // 2), lambda p: p.write_bytes(b""), lambda p: p.unlink()],
)
def test_a_pull_from_a_damaged_store_leaves_nothing(
    snapshot: Path, chunks: ChunkStore, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    push(snapshot, chunks)
    damage(max(chunk_files(chunks), key=lambda f: f.stat().st_size))
    with pytest.raises((Integrity, NotFound)) as caught:
        pull("snap", chunks, tmp_path / "other/snap")
    assert caught.value.code in ("archive-integrity", "archive-not-found")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "other").iterdir()) == []


def test_verify_and_another_push_repair_a_damaged_store(snapshot: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    """The remedy that the refusal names: a push does not read stored chunks, so the damaged ones must be removed first."""
    push(snapshot, chunks)
    for path in chunk_files(chunks):
        flip(path)
    flip(next((chunks.store.root / "manifests").iterdir()))  # type: ignore[attr-defined]
    push(snapshot, chunks)  # writes only the manifest again
    with pytest.raises(Integrity, match="verify --repair"):
        pull("snap", chunks, tmp_path / "other/snap")
    assert not verify_store(chunks, repair=True).clean
    push(snapshot, chunks)
    assert verify_store(chunks).clean
    pull("snap", chunks, tmp_path / "other/snap")
    assert tree(tmp_path / "other/snap") == tree(snapshot)


def test_a_chunk_damaged_in_transit_is_fetched_again(snapshot: Path, tmp_path: Path, chunks: ChunkStore) -> None:
    push(snapshot, chunks)
    attempts: list[str] = []
    real = chunks.store.get

    def once_flipped(key: str, *args: object, **kwargs: object) -> bytes:
        data = bytearray(real(key, *args, **kwargs))  # type: ignore[arg-type]
        attempts.append(key)
        if key.startswith("chunks/") and attempts.count(key) == 1:
            data[0] ^= 1
        return bytes(data)

    chunks.store.get = once_flipped  # type: ignore[method-assign]
    pull("snap", chunks, tmp_path / "other/snap")
    assert tree(tmp_path / "other/snap") == tree(snapshot)


def break_after(chunks: ChunkStore, reads: int) -> Callable[[], None]:
    """Let the store fail like a lost connection after some chunk reads; return a function that repairs it."""
    from lazyfs.errors import Temporary

    real, seen = chunks.store.get, []

    def get(key: str, *args: object, **kwargs: object) -> bytes:
        if key.startswith("chunks/"):
            seen.append(key)
            if len(seen) > reads:
                raise Temporary("connection reset by peer")
        return real(key, *args, **kwargs)  # type: ignore[arg-type]

    chunks.store.get = get  # type: ignore[method-assign]

    def mend() -> None:
        chunks.store.get = real  # type: ignore[method-assign]

    return mend


def test_an_interrupted_pull_resumes(snapshot: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    push(snapshot, chunks)
    mend = break_after(chunks, 6)
    with pytest.raises(Failed) as caught:
        pull("snap", chunks, tmp_path / "other/snap")
    assert caught.value.code == "temporary"
    assert not (tmp_path / "other/snap").exists()
    mend()
    pulled = pull("snap", chunks, tmp_path / "other/snap")
    assert pulled.kept > 0
    assert tree(tmp_path / "other/snap") == tree(snapshot)


def test_a_partial_folders_content_is_verified(snapshot: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    push(snapshot, chunks)
    mend = break_after(chunks, 5)
    with pytest.raises(Failed):
        pull("snap", chunks, tmp_path / "other/snap")
    mend()
    partial = tmp_path / "other/.pull-snap"
    for file in [f for f in partial.rglob("*") if f.is_file() and f.stat().st_size]:
        data = bytearray(file.read_bytes())
        data[:] = b"\xff" * len(data)
        file.write_bytes(data)
    (partial / "images/foreign").write_bytes(b"x")
    (partial / "tmp").mkdir(exist_ok=True)
    (partial / "tmp/evil").symlink_to("/etc")
    assert pull("snap", chunks, tmp_path / "other/snap").kept == 0
    assert tree(tmp_path / "other/snap") == tree(snapshot)


def test_a_partial_pull_can_be_discarded(snapshot: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    push(snapshot, chunks)
    break_after(chunks, 6)
    with pytest.raises(Failed):
        pull("snap", chunks, tmp_path / "other/snap")
    discard(tmp_path / "other/snap")
    assert list((tmp_path / "other").iterdir()) == []
    discard(tmp_path / "other/snap")


def test_no_descriptor_is_left_open(snapshot: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    push(snapshot, chunks)
    before = len(os.listdir("/proc/self/fd"))
    break_after(chunks, 6)
    with pytest.raises(Failed):
        pull("snap", chunks, tmp_path / "other/snap")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_manifest_is_validated_before_anything_else_is_fetched(
    snapshot: Path, chunks: ChunkStore, tmp_path: Path
) -> None:
    (snapshot / "manifest.sig").write_bytes(b"signature")
    push(snapshot, chunks)
    seen: list[object] = []

    def refuse(document: bytes, signature: bytes | None) -> None:
        seen.extend([document, signature, list((tmp_path / "other/.pull-snap").iterdir())])
        raise Integrity("signature-wrong", "no")

    with pytest.raises(Integrity, match="signature-wrong"):
        pull("snap", chunks, tmp_path / "other/snap", accept=refuse)
    assert seen == [(snapshot / "manifest.json").read_bytes(), b"signature", []]
    assert list((tmp_path / "other").iterdir()) == []


def test_an_archive_that_does_not_match_its_own_manifest_is_refused(
    snapshot: Path, chunks: ChunkStore, tmp_path: Path
) -> None:
    flip(snapshot / "images/core-7.img")
    push(snapshot, chunks)
    with pytest.raises(Integrity, match=r"file-digest-differs.*core-7"):
        pull("snap", chunks, tmp_path / "other/snap")
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "target", "kind", "code"),
    [
        ("nothing", "snap", NotFound, "archive-not-found"),
        ("snap", "renamed", Integrity, "manifest-misplaced"),
        ("weights", "snap", NotFound, "not-a-snapshot"),
    ],
)
def test_wrong_names_are_refused(
    snapshot: Path, chunks: ChunkStore, tmp_path: Path, name: str, target: str, kind: type[CheckpointError], code: str
) -> None:
    push(snapshot, chunks)
    push_cache(snapshot / "cache", chunks, "weights")
    with pytest.raises(kind) as caught:
        pull(name, chunks, tmp_path / "other" / target)
    assert caught.value.code == code
    assert list((tmp_path / "other").iterdir()) == []


def test_an_existing_snapshot_is_not_overwritten(snapshot: Path, chunks: ChunkStore) -> None:
    push(snapshot, chunks)
    before = tree(snapshot)
    with pytest.raises(Failed, match="snapshot-exists"):
        pull("snap", chunks, snapshot)
    assert tree(snapshot) == before


def test_a_second_concurrent_pull_is_refused(snapshot: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    push(snapshot, chunks)
    (tmp_path / "other/.pull-snap").mkdir(parents=True)
    fd = os.open(tmp_path / "other/.pull-snap", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="snapshot-being-pulled"):
            pull("snap", chunks, tmp_path / "other/snap")
    finally:
        os.close(fd)
    assert pull("snap", chunks, tmp_path / "other/snap").files == 9


def test_a_full_disk_is_reported_before_fetching(
    snapshot: Path, chunks: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(snapshot, chunks)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Failed) as caught:
        pull("snap", chunks, tmp_path / "other/snap")
    assert caught.value.code == "disk-full"
    assert list((tmp_path / "other").iterdir()) == []


def test_a_disk_that_fills_up_during_a_pull_leaves_nothing(
    snapshot: Path, chunks: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(snapshot, chunks)

    def full(fd: int, data: bytes, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_write_fully", full)
    with pytest.raises(Failed) as caught:
        pull("snap", chunks, tmp_path / "other/snap")
    assert caught.value.code == "disk-full"
    assert list((tmp_path / "other").iterdir()) == []


def test_a_file_that_changes_during_a_push_fails_it(
    snapshot: Path, chunks: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = upload._read_fully

    def growing(fd: int, offset: int, into: memoryview, path: str) -> None:
        if path == "images/pages-2.img":
            with (snapshot / path).open("ab") as file:
                file.write(b"more")
        real(fd, offset, into, path)

    monkeypatch.setattr(upload, "_read_fully", growing)
    with pytest.raises(Integrity, match="file-changed"):
        push(snapshot, chunks)
    assert list(chunks.refs("snapshots")) == []


def test_a_push_to_a_read_only_store_fails(snapshot: Path, chunks: ChunkStore) -> None:
    from lazyfs.errors import Permanent

    def refuse(key: str, data: bytes) -> None:
        raise Permanent("forbidden", code="permission-denied")

    chunks.store.put = refuse  # type: ignore[method-assign]
    with pytest.raises(Failed) as caught:
        push(snapshot, chunks)
    assert caught.value.code == "permission-denied"


def test_pulled_compile_caches_add_missing_files(chunks: ChunkStore, tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "inductor/x").mkdir(parents=True)
    (source / "inductor/x/k.py").write_text("kernel")
    (source / "inductor/x/k.so").write_bytes(b"so")
    (source / "inductor/x/k.so").chmod(0o755)
    push_cache(source, chunks, "compile-vllm")
    (target / "inductor/x").mkdir(parents=True)
    (target / "inductor/x/k.py").write_text("newer")
    assert pull_cache("compile-vllm", chunks, target) == 1
    assert (target / "inductor/x/k.py").read_text() == "newer"
    assert (target / "inductor/x/k.so").stat().st_mode & 0o777 == 0o755
    assert pull_cache("compile-vllm", chunks, target) == 0
    with pytest.raises(NotFound):
        pull_cache("nothing", chunks, target)


def test_the_compression_level_depends_on_the_stores_location(tmp_path: Path) -> None:
    assert open_chunks(f"file://{tmp_path}").zstd == archive.LEVEL_LOCAL
    assert open_chunks(f"file://{tmp_path}", 9).zstd == 9
    with pytest.raises(Failed):
        open_chunks("gopher://x")
