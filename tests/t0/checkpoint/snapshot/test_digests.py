"""A flipped byte, or a truncated, missing, additional or exchanged file, is refused by name. Verified files are not read again."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import blake3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import Failed, Integrity
from checkpoint.snapshot import digests
from checkpoint.snapshot.digests import LEDGER, digest_file, digest_folder, verify
from checkpoint.snapshot.manifest import SnapshotFile

pytestmark = pytest.mark.t0


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Longer than a tick of any Linux file system's clock; short, because every test waits for it.
    monkeypatch.setattr(digests, "RACY_NS", 20_000_000)
    folder = tmp_path / "s"
    (folder / "images").mkdir(parents=True)
    (folder / "shm/deep").mkdir(parents=True)
    (folder / "images/pages-1.img").write_bytes(os.urandom(300_000))
    (folder / "images/core-1.img").write_bytes(b"core")
    (folder / "images/empty.img").write_bytes(b"")
    (folder / "shm/deep/sem").write_bytes(bytes(32))
    (folder / "shm/link").symlink_to("deep/sem")
    (folder / "manifest.json").write_text("{}")
    with socket.socket(socket.AF_UNIX) as sock:
        here = Path.cwd()
        os.chdir(folder / "shm")  # a socket's path must be short
        try:
            sock.bind("sock")
        finally:
            os.chdir(here)
    return folder


def test_all_files_below_the_subfolders_are_digested_and_verified(snapshot: Path) -> None:
    files = digest_folder(snapshot)
    assert list(files) == ["images/core-1.img", "images/empty.img", "images/pages-1.img", "shm/deep/sem", "shm/link"]
    assert files["images/pages-1.img"].size == 300_000
    assert verify(snapshot, files).files == 5
    assert verify(snapshot, files, always=True).hashed == sum(f.size for f in files.values())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_in_place_with_old_times(path: Path) -> None:
    info = path.stat()
    flip(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(300_000))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit": ("images/pages-1.img", flip, "file-digest-differs"),
    "a flipped bit with the old times": ("images/pages-1.img", flip_in_place_with_old_times, "file-digest-differs"),
    "an exchanged file": ("images/pages-1.img", exchange, "file-digest-differs"),
    "a truncated file": ("images/pages-1.img", lambda p: os.truncate(p, 299_999), "file-size-differs"),
    "a longer file": ("images/core-1.img", lambda p: p.write_bytes(b"core\0"), "file-size-differs"),
    "a missing file": ("images/empty.img", lambda p: p.unlink(), "file-missing"),
    "an additional file": ("images/pages-2.img", lambda p: p.write_bytes(b""), "file-unexpected"),
    "a link that points elsewhere": (
        "shm/link",
        lambda p: (p.unlink(), p.symlink_to("deep/sea")),
        "file-digest-differs",
    ),
    "a file in the place of a link": (
        "shm/link",
        lambda p: (p.unlink(), p.write_bytes(b"deep/sem")),
        "file-digest-differs",
    ),
    "a folder in the place of a file": ("shm/link", lambda p: (p.unlink(), p.mkdir()), "file-missing"),
}


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_by_name(snapshot: Path, what: str, always: bool) -> None:
    name, damage, code = DAMAGE[what]
    files = digest_folder(snapshot)
    damage(snapshot / name)
    with pytest.raises(Integrity) as caught:
        verify(snapshot, files, always=always)
    assert caught.value.code == code
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_is_detected(snapshot: Path) -> None:
    files = digest_folder(snapshot)
    file = snapshot / "images/pages-1.img"
    before = file.read_bytes()

    @settings(max_examples=30, deadline=None)
    @given(place=st.integers(0, 299_999), bit=st.integers(0, 7))
    def flipped(place: int, bit: int) -> None:
        damaged = bytearray(before)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        with pytest.raises(Integrity, match="file-digest-differs"):
            verify(snapshot, files)

    flipped()


def test_files_verified_here_are_not_read_again(snapshot: Path) -> None:
    files = digest_folder(snapshot)
    total = sum(f.size for f in files.values())
    first = verify(snapshot, files)
    assert (first.hashed, first.trusted) == (0, total)
    os.utime(snapshot / "images/pages-1.img")
    again = verify(snapshot, files)
    assert (again.hashed, again.trusted) == (300_000, total - 300_000)


def test_a_copy_is_hashed_completely(snapshot: Path) -> None:
    files = digest_folder(snapshot)
    copy = snapshot.with_name("copy")
    shutil.copytree(snapshot, copy, symlinks=True, ignore=shutil.ignore_patterns("sock"))
    assert (copy / LEDGER).exists()
    assert verify(copy, files).trusted == 0


def test_a_file_changed_just_now_is_not_trusted_next_time(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = digest_folder(snapshot)
    (snapshot / LEDGER).unlink()
    monkeypatch.setattr(digests, "RACY_NS", 10**18)
    assert verify(snapshot, files).trusted == 0
    assert verify(snapshot, files).trusted == 0


def test_a_ledger_of_another_manifest_is_ignored(snapshot: Path) -> None:
    files = digest_folder(snapshot)
    other = {**files, "images/core-1.img": SnapshotFile(4, "0" * 64)}
    with pytest.raises(Integrity, match=r"file-digest-differs.*core-1"):
        verify(snapshot, other)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"sealed": 1, "stamps": {}}'])
def test_a_damaged_ledger_only_costs_time(snapshot: Path, content: bytes) -> None:
    files = digest_folder(snapshot)
    (snapshot / LEDGER).write_bytes(content)
    assert verify(snapshot, files).trusted == 0
    assert verify(snapshot, files).hashed == 0


def test_a_failed_verification_writes_no_ledger(snapshot: Path) -> None:
    files = digest_folder(snapshot)
    (snapshot / LEDGER).unlink()
    flip(snapshot / "images/pages-1.img")
    with pytest.raises(Integrity):
        verify(snapshot, files)
    assert not (snapshot / LEDGER).exists()


def test_the_ledger_is_private_and_leaves_no_temporary_file(snapshot: Path) -> None:
    digest_folder(snapshot)
    assert (snapshot / LEDGER).stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in snapshot.iterdir()) == [LEDGER, "images", "manifest.json", "shm"]


def test_a_file_that_disappears_while_digesting_is_an_error(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(path: Path, size: int) -> str:
        if path.name == "core-1.img":
            path.unlink()
        return digest_file(path, size)

    monkeypatch.setattr(digests, "digest_file", vanish)
    with pytest.raises(Failed) as caught:
        digest_folder(snapshot)
    assert caught.value.code == "seal-failed"
    assert "core-1.img" in str(caught.value)


def test_a_large_file_hashed_by_several_threads_has_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    file.write_bytes(os.urandom(20_000_001))
    monkeypatch.setattr(digests, "_PARALLEL", 1 << 30)
    alone = digest_file(file, file.stat().st_size)
    monkeypatch.setattr(digests, "_PARALLEL", 1)
    assert digest_file(file, file.stat().st_size) == alone


@pytest.mark.parametrize("size", [1, 4096, 3 << 20, 20 << 20])
def test_holes_count_as_zeros(tmp_path: Path, size: int) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as data:
        data.truncate(size)
        for at in range(0, size, 5 << 20):
            data.seek(at + size // 3)
            data.write(b"x" * 5000)
        data.truncate(size)
    assert digest_file(file, size) == blake3.blake3(file.read_bytes()).hexdigest()
