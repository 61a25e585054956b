"""Digest every file of a snapshot, and verify the digests before any byte reaches a process.

`digest_folder` reads a finished snapshot once and returns the size and BLAKE3 of each file, for the manifest. `verify`
compares a folder with them, and names a missing, truncated, longer, changed or additional file. A symbolic link is
digested by its target.

Hashing gigabytes before every restore would cost more than the restore itself. `verify` therefore keeps a ledger of
the files it hashed on this host (`.verified` in the folder). The next call trusts a file whose device, inode, size,
mtime and ctime are unchanged, if it was hashed during this boot and at least RACY_NS after its last change.

This detects every change made through the file system by any program, even if it resets mtime (ctime cannot be set);
a copy or a restored backup (other inodes); and data lost in a power cut (another boot).

It does not detect bits that rot below the file system after the last full verification. Nor does it stop an attacker
who can write to the block device, set the system clock back, or write both a file and the ledger; the last needs the
owner's or root's rights on the folder (0700). For these threats, verify with `always=True` (`--verify=always`),
which hashes every byte. A pulled snapshot is verified in full before it gets its name (checkpoint.store.archive).

Neither mode covers a change between the verification and CRIU's read of the same file.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import msgspec

from checkpoint import disk
from checkpoint.errors import Failed, Integrity
from checkpoint.files import RACY_NS, Fingerprint, boot_id, data_extents, fingerprint, write_private
from checkpoint.snapshot import file_backed
from checkpoint.snapshot.manifest import SnapshotFile
from lazyfs.content.records import ready

LEDGER = ".verified"
_BUFFER = 1 << 20
_PARALLEL = 8 << 20  # files of at least this size are hashed by several threads
_PARALLEL_BUFFER = 8 << 20


class _Ledger(msgspec.Struct, forbid_unknown_fields=True):
    """The ledger's format.

    `listed`: digest of the manifest's file list that it belongs to. `boot`: id of the boot that hashed. `fingerprints`: of
    each file when hashed.
    """

    listed: str = msgspec.field(name="sealed")
    boot: str
    fingerprints: dict[str, Fingerprint] = msgspec.field(name="stamps")


class Verified(msgspec.Struct, frozen=True):
    """Result of a verification: number of files, bytes hashed now, bytes trusted from the ledger, seconds."""

    files: int
    hashed: int
    trusted: int
    took_s: float


def digest_folder(folder: Path) -> dict[str, SnapshotFile]:
    """Return size and digest of every file below the folder's subfolders, by relative path; the bytes must be final.

    Files directly in the folder (manifest, signature, ledger) are not covered. Sockets are skipped because they hold
    no data. Raises Failed (seal-failed) when a file cannot be read.
    """
    found = dict(_walk(folder))
    youngest = max((info.st_ctime_ns for info in found.values()), default=0)
    # Wait so that the ledger can be trusted by the first restore already.
    wait = youngest + RACY_NS - time.time_ns()
    if 0 < wait <= RACY_NS:
        time.sleep(wait / 1e9)
    try:
        digests, fingerprints = _hash(folder, found)
    except OSError as error:
        raise Failed("seal-failed", f"{error.filename}: {error.strerror}; the snapshot is not kept") from error
    files = {name: SnapshotFile(found[name].st_size, digests[name]) for name in sorted(found)}
    _write_ledger(folder, files, fingerprints)
    return files


def verify(folder: Path, files: Mapping[str, SnapshotFile], always: bool = False) -> Verified:
    """Compare the folder with `digest_folder`'s result; without `always`, trust the ledger (see the module's docstring).

    Raises Integrity: file-missing, file-size-differs, file-digest-differs, file-unexpected, file-unreadable.
    """
    began = time.monotonic()
    found = dict(_walk(folder))
    for name in sorted(files.keys() | found.keys()):
        if name not in files:
            raise Integrity("file-unexpected", f"{folder / name} is not in the manifest{_remedy(folder)}")
        if name not in found:
            raise Integrity("file-missing", f"{folder / name} is missing{_remedy(folder)}")
        size = found[name].st_size
        if size != files[name].size:
            raise Integrity(
                "file-size-differs", f"{folder / name} has {size} bytes instead of {files[name].size}{_remedy(folder)}"
            )
    ledger = None if always else _read_ledger(folder, files)
    trusted = {
        name: info for name, info in found.items() if ledger and ledger.fingerprints.get(name) == fingerprint(info)
    }
    doubtful = {name: info for name, info in found.items() if name not in trusted}
    try:
        digests, fingerprints = _hash(folder, doubtful)
    except OSError as error:
        raise Integrity("file-unreadable", f"{error.filename}: {error.strerror}{_remedy(folder)}") from error
    for name in sorted(digests):
        if digests[name] != files[name].blake3:
            raise Integrity("file-digest-differs", f"{folder / name} has changed since it was written{_remedy(folder)}")
    if fingerprints:
        _write_ledger(folder, files, {**{name: fingerprint(info) for name, info in trusted.items()}, **fingerprints})
    return Verified(
        files=len(files),
        hashed=sum(info.st_size for info in doubtful.values()),
        trusted=sum(info.st_size for info in trusted.values()),
        took_s=time.monotonic() - began,
    )


def _remedy(folder: Path) -> str:
    return f"; remove the snapshot (quickthaw snapshot rm {folder.name}) or pull it again"


def _walk(folder: Path, below: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Yield regular files and links below the folder's subfolders, each with its lstat."""
    try:
        entries = list(os.scandir(folder / below))
    except OSError as error:
        raise Integrity("file-unreadable", f"{folder / below}: {error.strerror}{_remedy(folder)}") from error
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        if not below and entry.name.startswith(file_backed.FOLDER):
            continue  # this host's file-backed images, which have digests of their own
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, name)
        elif below and (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
            yield name, entry.stat(follow_symlinks=False)


def _hash(folder: Path, files: Mapping[str, os.stat_result]) -> tuple[dict[str, str], dict[str, Fingerprint]]:
    """Return the files' digests, and the fingerprints of those that may be trusted next time.

    OSError carries the file's name.
    """
    digests: dict[str, str] = {}
    fingerprints: dict[str, Fingerprint] = {}
    order = sorted(files, key=lambda name: -files[name].st_size)

    def one(name: str) -> None:
        path = folder / name
        started = time.time_ns()
        if stat.S_ISLNK(files[name].st_mode):
            digests[name] = digest_symlink(str(path.readlink()))
        else:
            digests[name] = digest_file(path, files[name].st_size)
        after = path.lstat()
        if fingerprint(after) == fingerprint(files[name]) and after.st_ctime_ns + RACY_NS <= started:
            fingerprints[name] = fingerprint(after)

    with ThreadPoolExecutor(max(1, min(4, len(os.sched_getaffinity(0)))), thread_name_prefix="digest") as pool:
        for outcome in [pool.submit(one, name) for name in order]:
            outcome.result()
    return digests, fingerprints


def digest_symlink(target: str) -> str:
    """Return the digest of a symbolic link, which covers its target."""
    return blake3.blake3(b"link\0" + os.fsencode(target)).hexdigest()


def digest_file(path: Path, size: int) -> str:
    """Return the BLAKE3 of the first `size` bytes of a file. Raises OSError with the file's name.

    Holes are not read: untouched shared memory is hundreds of megabytes of them. The file is read, not mapped: if a
    mapped file shrank or its disk failed, the process would be killed.
    """
    several = size >= _PARALLEL
    digest = blake3.blake3(max_threads=blake3.blake3.AUTO if several else 1)
    view = memoryview(bytearray(min(max(size, 1), _PARALLEL_BUFFER if several else _BUFFER)))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        at = 0
        for start, end in (*data_extents(fd, size), (size, size)):
            zeros = bytes(min(start - at, _BUFFER))
            for hole in range(at, start, _BUFFER):
                digest.update(zeros[: start - hole])
            at = start
            while at < end and (read := os.preadv(fd, [view[: end - at]], at)):
                digest.update(view[:read])
                at += read
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)
    return digest.hexdigest()


def _list_digest(files: Mapping[str, SnapshotFile]) -> str:
    return blake3.blake3(msgspec.json.encode(dict(files), order="deterministic")).hexdigest()


def _read_ledger(folder: Path, files: Mapping[str, SnapshotFile]) -> _Ledger | None:
    try:
        ledger = msgspec.json.decode((folder / LEDGER).read_bytes(), type=ready(_Ledger))
    except (OSError, msgspec.MsgspecError):
        return None  # none yet, or damaged: hash everything
    return ledger if ledger.listed == _list_digest(files) and ledger.boot == boot_id() else None


def _write_ledger(folder: Path, files: Mapping[str, SnapshotFile], fingerprints: dict[str, Fingerprint]) -> None:
    data = msgspec.json.encode(_Ledger(_list_digest(files), boot_id(), fingerprints))
    with disk.optional(f"the next restore of {folder.name} hashes every file again", "ledger-not-kept"):
        write_private(folder / LEDGER, data)
