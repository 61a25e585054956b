"""The cache on local disk, shared by all mounts of a host: its sparse files, its size limit, its quarantine.

images/ab/<file digest>/    one sparse cache file (`lazyfs.cache.sparse_file`)
quarantine/, reasons/       bodies that failed verification, and why
claims/                     reservations of the processes that share the cache (`lazyfs.cache.reservations`)
limit                       this host's bound, if it has one (`lazyfs.cache.bound`)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from lazyfs.cache.bound import AUTO, UNBOUNDED, blocks_below, host_bound, kept_free, low_water
from lazyfs.cache.reservations import Reservation, count_lock, kept_digests, reserved_by_others
from lazyfs.cache.sparse_file import HEADER, PRESENT, AnySparseFile, NoSparseFile, SparseFile, sparse_file_header
from lazyfs.content.manifest import File
from lazyfs.errors import DiskFull, LazyfsError, NotFound, Permanent, Temporary
from lazyfs.paths import private_dir, state_folder

log = logging.getLogger("lazyfs.cache.cache")
# An evicting process may remove the folder while another opens it, repeatedly.
_OPEN_TRIES = 100
# How often a process that serves files calls `Cache.watch`, seconds.
WATCH_S = 2.0
# Reserve this much at a time: counting walks folders.
_BATCH = 64 << 20
COUNTED = ("snapshots", "compile", "traces")
"""Folders beside the cache of this host's state folder that count under a limit. Only chunks are evicted for it."""
# Counting them walks thousands of files: the sum is kept this long.
_COUNTED_S = 10.0


class Cache:
    """The folder of sparse cache files.

    `limit`: maximum bytes of disk blocks that they and the folders `COUNTED` beside them occupy, plus memory reserved by
    mounts of this cache, in total. AUTO: this host's bound, which is what leaves part of the file system free unless set.
    UNBOUNDED: only the disk limits.
    """

    def __init__(self, root: Path, limit: int = UNBOUNDED) -> None:
        self.root = private_dir(root)
        self.limit = limit
        self._room = 0
        self._unwritten = 0
        self._reserving = threading.Lock()
        self._reservation: Reservation | None = None
        self._pins: Reservation | None = None
        self._touched: Reservation | None = None
        self._touched_files: set[str] = set()
        self._touching = threading.Lock()
        self._beside = (-_COUNTED_S, 0)

    @property
    def bound(self) -> int:
        """Return the bound that applies now: bytes, UNBOUNDED, or AUTO for what leaves part of the file system free."""
        return host_bound(self.root) if self.limit == AUTO else self.limit

    def folder(self, file: File) -> Path:
        """Return the folder of the file's sparse cache file."""
        return self.root / "images" / file.digest[:2] / file.digest

    def open(self, file: File) -> SparseFile:
        """Open the file's sparse cache file, created empty if needed; it stays pinned while it is open.

        Raises DiskFull, Permanent, or Temporary (cache-locked).
        """
        for attempt in range(_OPEN_TRIES):
            try:
                sparse_file = SparseFile(self.folder(file), file)
            except NotFound:
                # An evicting process removed the folder after it was created.
                if attempt == _OPEN_TRIES - 1:
                    raise
                continue
            sparse_file.pin()
            # It may also have removed the folder between our open and our pin.
            try:
                if os.fstat(sparse_file.lock_fd).st_ino == (sparse_file.folder / "lock").stat().st_ino:
                    return sparse_file
            except FileNotFoundError:
                pass
            sparse_file.close()
        raise Temporary(
            f"the sparse cache file {self.folder(file)} was evicted each time it was created; raise --cache-limit",
            code="cache-locked",
        )

    def open_any(self, file: File) -> AnySparseFile:
        """Open the sparse cache file, or return a stand-in if it cannot be created (full or read-only disk)."""
        try:
            return self.open(file)
        except (DiskFull, Permanent) as error:
            log.warning("%s is served without the cache: %s", file.path, error)
            return NoSparseFile(file)

    def holds(self, digest: str) -> bool:
        """Return whether there is a cache file of this digest, with any of its chunks."""
        return (self.root / "images" / digest[:2] / digest).exists()

    def present_bytes(self, file: File) -> int:
        """Return how many bytes of the file are present and verified, without opening or pinning the cache file."""
        try:
            body = (self.folder(file) / "have").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return 0
        states = body[HEADER.size :]
        if len(states) != len(file.chunks):
            return 0
        return sum(c.length for c, s in zip(file.chunks, states, strict=True) if s == PRESENT)

    def verified_whole(self, file: File) -> bool:
        """Return whether the file is complete, was verified as a whole if its source gives a digest, and fsynced."""
        return sparse_file_header(self.folder(file))[0]

    def revoked(self, file: File) -> int:
        """Return how often chunks of the file that readers may have seen were revoked, modulo 256."""
        return sparse_file_header(self.folder(file))[1]

    def usage(self) -> int:
        """Return the bytes of disk that the cache files occupy."""
        total = 0
        for data in self.root.glob("images/*/*/data"):
            with contextlib.suppress(FileNotFoundError):
                total += data.stat().st_blocks * 512
        return total

    def counted(self) -> int:
        """Return the bytes of disk that count under a limit: cache files, quarantine, and the folders `COUNTED` of this host."""
        since, beside = self._beside
        if time.monotonic() - since >= _COUNTED_S:
            folders = [self.root / "quarantine"]
            if self.root == state_folder() / "cache":
                folders += [self.root.parent / name for name in COUNTED]
            beside = sum(map(blocks_below, folders))
            self._beside = (time.monotonic(), beside)
        return self.usage() + beside

    def need_room(self, more: int, held: int) -> None:
        """Raise DiskFull if `more` bytes to fetch find no room even after evicting, or `held` bytes in total exceed the limit."""
        bound = self.bound
        disk = shutil.disk_usage(self.root)
        if bound == AUTO:
            room = disk.free - kept_free(disk.total) + self.evictable()
            if more > room:
                raise DiskFull(
                    f"{more} bytes to fetch, and {max(0, room)} of {disk.free} free bytes are for the cache, which leaves "
                    f"{kept_free(disk.total)} free on the disk of {self.root}; free some space, or give --cache-limit"
                )
        elif more > disk.free:
            raise DiskFull(
                f"{more} bytes to fetch, but only {disk.free} free on the disk of {self.root}; free some space"
            )
        if 0 < bound < held:
            raise DiskFull(
                f"{held} bytes do not fit into the cache limit of {bound}; mount with a larger --cache-limit"
            )

    def reserve_memory(self, size: int) -> None:
        """Reserve `size` bytes of memory out of the limit for the life of this process.

        Call once, before using it.
        """
        try:
            self._reservation = Reservation(self.root, memory=size)
        except (OSError, LazyfsError) as error:
            # Continue without the reservation: the memory matters most when the disk is full.
            log.warning("cannot reserve the memory tier; the cache limit may be exceeded by it: %s", error)

    def pin_files(self, digests: Iterable[str], *, keep: bool = False) -> None:
        """Protect the cache files of these files from eviction, existing or not, until this process ends or calls again.

        `keep`: protect them from other mounts' `drop` as well.
        """
        before = self._pins
        try:
            self._pins = Reservation(self.root, pins=(f"={d}" if keep else d for d in digests))
        except (OSError, LazyfsError) as error:
            log.warning("cannot pin files: %s", error)
            return
        if before is not None:
            before.close()

    def pin_touched(self, file: File) -> None:
        """Protect the file's cache file from eviction for the life of this process, without a descriptor per file."""
        with self._touching:
            if file.digest in self._touched_files:
                return
            try:
                self._touched = self._touched or Reservation(self.root)
                self._touched.add(file.digest)
            except (OSError, LazyfsError) as error:
                log.warning("cannot pin %s: %s", file.path, error)
            self._touched_files.add(file.digest)

    def reserve_room(self, need: int) -> bool:
        """Reserve room for `need` more bytes under the bound, evicting least recently used cache files.

        Return False if impossible. The caller must return a granted reservation with `release_room`, whether it wrote the bytes
        or not.
        """
        bound = self.bound
        if bound == UNBOUNDED:
            return True
        # One thread at a time: two that count the same usage would both find too little, or both take the same room.
        with self._reserving:
            if self._room < need:
                # One process counts at a time.
                with count_lock(self.root):
                    try:
                        free, size = self._ungranted(bound)
                        batch = max(need, min(_BATCH, size // 8))
                        if free < batch:
                            free += self.evict(batch - free)
                    except OSError:
                        # A folder that cannot be read or written: `why_full` has the reason, and readers are served from memory.
                        return False
                    if free < need:
                        return False
                    self._room = min(free, batch)
                    self._account()
            self._room -= need
            self._unwritten += need
        return True

    def release_room(self, need: int) -> None:
        """Return a reservation: its bytes are on disk, where `usage` counts them, or will not be written."""
        with self._reserving:
            # What was reserved while nothing bounded the cache was not counted.
            self._unwritten = max(0, self._unwritten - need)
            self._account()

    def _ungranted(self, bound: int) -> tuple[int, int]:
        """Return the bytes that nobody uses or was granted (negative if too many are), and how many the cache may have in all."""
        taken = self._unwritten + reserved_by_others(self.root, self._own_reservation())[0]
        if bound != AUTO:
            return bound - self.counted() - taken, bound
        disk = shutil.disk_usage(self.root)
        return disk.free - kept_free(disk.total) - taken, disk.total - kept_free(disk.total)

    def why_full(self) -> str:
        """Return, for a log, why `reserve_room` found no room, and the remedy."""
        bound = self.bound
        if bound == AUTO:
            try:
                disk = shutil.disk_usage(self.root)
            except OSError as error:
                return f"{self.root}: {error.strerror}"
            kept = kept_free(disk.total)
            return (
                f"{disk.free / 1e9:.1f} GB of {disk.total / 1e9:.1f} are free on the disk of {self.root}, and the cache leaves "
                f"{kept / 1e9:.1f} free; free some space, or give --cache-limit"
            )
        return f"--cache-limit is {bound / 1e9:g} GB, and nothing unused is left to evict; `quickthaw cache ls` shows what counts"

    def watch(self) -> int:
        """Evict unused cache files if others' writes took the disk below the low-water mark; return the bytes freed.

        Frees up to what AUTO leaves free. Under another bound the disk is not watched.
        """
        if self.bound != AUTO:
            return 0
        disk = shutil.disk_usage(self.root)
        if disk.free >= low_water(disk.total):
            return 0
        with count_lock(self.root):
            # Another process may have evicted meanwhile.
            disk = shutil.disk_usage(self.root)
            return self.evict(max(0, kept_free(disk.total) - disk.free))

    def _own_reservation(self) -> Reservation | None:
        if self._reservation is None:
            try:
                self._reservation = Reservation(self.root)
            except (OSError, LazyfsError) as error:
                log.warning("cannot write a reservation; other processes may exceed the cache limit: %s", error)
        return self._reservation

    def _account(self) -> None:
        if self._reservation is not None:
            self._reservation.granted = self._room + self._unwritten

    def evict(self, amount: int, *, older_than: float = 0.0, dry_run: bool = False) -> int:
        """Remove cache files, least recently used first, until `amount` bytes are free; return the bytes freed.

        Skips files that a process has open, files pinned by a live mount, and files used since `older_than` (seconds since the
        epoch; 0: none). `dry_run` only counts.
        """
        freed = 0
        for used, lock in self._unpinned():
            if freed >= amount or 0 < older_than * 1e9 <= used:
                break
            freed += self._remove(lock, dry_run=dry_run)
        return freed

    def evictable(self) -> int:
        """Return the bytes of cache files that no live mount pins."""
        total = 0
        for _, lock in self._unpinned():
            with contextlib.suppress(FileNotFoundError):
                total += (lock.parent / "data").stat().st_blocks * 512
        return total

    def _unpinned(self) -> list[tuple[int, Path]]:
        """List the cache files that no live mount pins, least recently used first: (last use in ns, lock file)."""
        pinned = reserved_by_others(self.root)[1]
        found = []
        for lock in self.root.glob("images/*/*/lock"):
            if lock.parent.name not in pinned:
                with contextlib.suppress(FileNotFoundError):
                    found.append((lock.stat().st_mtime_ns, lock))
        return sorted(found)

    @staticmethod
    def _remove(lock: Path, *, dry_run: bool = False) -> int:
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = (lock.parent / "data").stat().st_blocks * 512
            if dry_run:
                return size
            # Remove the lock file last: a process that opened it earlier sees that it is gone and starts again.
            for name in ("have", "data", "lock"):
                (lock.parent / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                lock.parent.rmdir()
            return size
        except (BlockingIOError, FileNotFoundError):
            return 0
        finally:
            os.close(fd)

    def drop(self, file: File) -> int:
        """Remove one file's cache file unless it is in use or kept by a mount; return the bytes freed."""
        return 0 if file.digest in kept_digests(self.root) else self._remove(self.folder(file) / "lock")

    def quarantine(self, digest: str, data: bytes | memoryview, why: str, keep: int = 16) -> Path | None:
        """Keep a body that failed verification and the reason: the newest `keep` bodies, without duplicates.

        Return its path, or None if the disk has no room for it.
        """
        folder, reasons = self.root / "quarantine", self.root / "reasons"
        path = folder / f"{digest}.{time.time_ns()}"
        try:
            for same in folder.glob(f"{digest}.*"):
                if same.stat().st_size == len(data) and same.read_bytes() == data:
                    return same
            for each in (folder, reasons):
                private_dir(each)
            path.write_bytes(data)
            path.chmod(0o600)
            (reasons / path.name).write_text(why)
        except (OSError, LazyfsError):
            path.unlink(missing_ok=True)
            return None
        for old in sorted(folder.iterdir(), key=lambda p: p.name.rpartition(".")[2])[:-keep]:
            old.unlink(missing_ok=True)
            (reasons / old.name).unlink(missing_ok=True)
        return path

    def quarantined(self) -> list[tuple[str, str]]:
        """List quarantined bodies, oldest first: (digest and time, reason)."""
        found = []
        for path in sorted((self.root / "quarantine").glob("*"), key=lambda p: p.name.rpartition(".")[2]):
            try:
                found.append((path.name, (self.root / "reasons" / path.name).read_text()))
            except FileNotFoundError:
                # The writer only logged its reason, or the disk had no room for it.
                found.append((path.name, "see the log"))
        return found

    def clear_quarantine(self) -> None:
        """Remove quarantined bodies and their reasons."""
        for name in ("quarantine", "reasons"):
            shutil.rmtree(self.root / name, ignore_errors=True)
