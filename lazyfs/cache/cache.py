"""The cache on local disk: one sparse cache file per file, filled chunk by chunk, shared by all mounts of a host.

    images/ab/<file digest>/data    the file itself, with holes where a chunk is absent
    images/ab/<file digest>/have    the chunk bitmap: a header, then one byte per chunk: ABSENT, PRESENT or UNPROVEN
    images/ab/<file digest>/lock    locked shared by each process that pins the file, exclusively by an evicting process
    quarantine/                     bodies that failed verification, for a post-mortem
    claims/                         reservations of the processes that share the cache (`lazyfs.cache.reservations`)

Guarantees:
- A byte of `have` becomes PRESENT only after the whole chunk was written and matched its digest. Killing any process at any
  moment loses only work.
- A power cut may lose written pages. `have` records the boot in which it was written. In another boot, every PRESENT of a
  cache file that was not sealed (fsynced when complete) becomes UNPROVEN (unverified), to be hashed before it is served.
- One byte-range lock per chunk on `have` makes fetching single-flight across processes. The kernel releases it when its
  holder dies.
- A complete cache file has no holes, so the kernel may pass reads through to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lazyfs.cache.reservations import Claim, counting, kept, others
from lazyfs.content.manifest import File
from lazyfs.errors import DiskFull, LazyfsError, NotFound, Permanent, Temporary, from_os_error
from lazyfs.paths import private_dir

log = logging.getLogger("lazyfs.cache.cache")
ABSENT, PRESENT, UNPROVEN = 0, 1, 2
_HEADER = struct.Struct("<4sI36sI16x")
_MAGIC = b"QTI1"
_FLAGS, _SEALED = 44, 1
# This header byte changes when a present chunk is revoked; readers then check again whether the file is complete.
_REVOKED = 48
# An evicting process may remove the folder while another opens it, repeatedly.
_OPEN_TRIES = 100
_FLOCK = struct.Struct("hhqqi4x")


def boot_id() -> bytes:
    """Return the kernel's boot id (36 bytes)."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


class Image:
    """One open sparse cache file. Safe to share between threads; `close` when done."""

    def __init__(self, folder: Path, file: File) -> None:
        self.folder = folder
        self.file = file
        opened: list[int] = []
        try:
            private_dir(folder)
            for name in ("lock", "data", "have"):
                opened.append(os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self.lock_fd, self.data_fd, self.have_fd = opened
            self._prepare()
        except BaseException as error:
            for fd in opened:
                os.close(fd)
            if not isinstance(error, OSError):
                raise
            raise from_os_error(error, f"cannot open the cache image {folder}") from error
        self._complete = False
        self._seen = -1
        self._busy: set[int] = set()
        self._free = threading.Condition()

    def _prepare(self) -> None:
        count = len(self.file.chunks)
        size = _HEADER.size + count
        fcntl.flock(self.have_fd, fcntl.LOCK_EX)
        try:
            header = os.pread(self.have_fd, _HEADER.size, 0)
            good = len(header) == _HEADER.size and os.fstat(self.have_fd).st_size == size
            magic, n, boot, flags = _HEADER.unpack(header) if good else (b"", 0, b"", 0)
            if magic != _MAGIC or n != count or os.fstat(self.data_fd).st_size != self.file.size:
                os.ftruncate(self.have_fd, 0)
                os.ftruncate(self.data_fd, self.file.size)
                os.pwrite(self.have_fd, _HEADER.pack(_MAGIC, count, boot_id(), 0) + bytes(count), 0)
            elif boot != boot_id() and not flags & _SEALED:
                states = os.pread(self.have_fd, count, _HEADER.size)
                states = states.replace(bytes([PRESENT]), bytes([UNPROVEN]))
                os.pwrite(self.have_fd, states, _HEADER.size)
                os.pwrite(self.have_fd, _HEADER.pack(_MAGIC, count, boot_id(), 0), 0)
            self.states = mmap.mmap(self.have_fd, size)
        finally:
            fcntl.flock(self.have_fd, fcntl.LOCK_UN)

    # -- state

    def state(self, index: int) -> int:
        """Return ABSENT, PRESENT or UNPROVEN (unverified)."""
        return self.states[_HEADER.size + index]

    def complete(self) -> bool:
        """Return whether every chunk is present."""
        revoked = self.states[_REVOKED]
        if not self._complete or revoked != self._seen:
            self._seen = revoked
            self._complete = self.states[_HEADER.size :].count(PRESENT) == len(self.file.chunks)
        return self._complete

    def sealed(self) -> bool:
        """Return whether the complete file was fsynced."""
        return bool(self.states[_FLAGS] & _SEALED)

    def present_bytes(self) -> int:
        """Return how many bytes of the file are present."""
        if self.complete():
            return self.file.size
        states = self.states[_HEADER.size :]
        return sum(c.length for c, s in zip(self.file.chunks, states, strict=True) if s == PRESENT)

    def read(self, index: int) -> bytes:
        """Return the chunk's bytes as stored on disk, unverified."""
        return os.pread(self.data_fd, self.file.chunks[index].length, self.file.offsets[index])

    # -- modification

    def write(self, index: int, data: bytes | memoryview, *, hole: bool = False) -> None:
        """Store a chunk that the caller has verified. `hole`: the chunk is all zeros.

        Raises DiskFull if it does not fit, or what `from_os_error` maps the OSError to.
        """
        if not (hole and self.state(index) == ABSENT):
            view, offset = memoryview(data), self.file.offsets[index]
            try:
                while view:
                    n = os.pwrite(self.data_fd, view, offset)
                    view, offset = view[n:], offset + n
            except OSError as error:
                raise from_os_error(error, f"cannot write to the cache image {self.folder}") from error
        self.mark(index, PRESENT)

    def mark(self, index: int, state: int) -> None:
        """Set a chunk's state."""
        self.states[_HEADER.size + index] = state
        if state != PRESENT:
            self.states[_REVOKED] = (self.states[_REVOKED] + 1) % 256
            # Later writes are not fsynced yet, so clear the seal.
            self.states[_FLAGS : _FLAGS + 4] = struct.pack("<I", 0)

    def seal(self) -> None:
        """fsync a complete cache file, so that it need not be verified again after a power cut."""
        os.fdatasync(self.data_fd)
        os.pwrite(self.have_fd, struct.pack("<I", _SEALED), _FLAGS)
        os.fdatasync(self.have_fd)

    @contextlib.contextmanager
    def chunk_lock(self, index: int, limit_s: float) -> Iterator[None]:
        """Lock the chunk against other threads and processes.

        Raises Temporary (cache-locked) after `limit_s` seconds.
        """
        deadline, pause = time.monotonic() + limit_s, 0.001
        spot = _HEADER.size + index
        # The kernel's lock belongs to the descriptor, which all threads share; this set excludes threads from each other.
        with self._free:
            if not self._free.wait_for(lambda: index not in self._busy, limit_s):
                raise Temporary(f"chunk {index} of {self.file.path} is being fetched already", code="cache-locked")
            self._busy.add(index)
        try:
            while not self._lock(spot, fcntl.F_WRLCK):
                if time.monotonic() > deadline:
                    raise Temporary(f"chunk {index} of {self.file.path} is held elsewhere", code="cache-locked")
                time.sleep(pause)
                pause = min(0.05, pause * 1.5)
            try:
                yield
            finally:
                self._lock(spot, fcntl.F_UNLCK)
        finally:
            with self._free:
                self._busy.discard(index)
                self._free.notify_all()

    def _lock(self, spot: int, kind: int) -> bool:
        try:
            fcntl.fcntl(self.have_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, spot, 1, 0))
        except BlockingIOError:
            return False
        return True

    def pin(self) -> None:
        """Protect the cache file from eviction until it is closed, and mark it as used now."""
        fcntl.flock(self.lock_fd, fcntl.LOCK_SH)
        os.utime(self.lock_fd)

    def read_only(self) -> None:
        """Close the chunk bitmap's descriptor, which only writers need: a mount may read thousands of files."""
        os.close(self.have_fd)
        self.have_fd = -1

    def close(self) -> None:
        """Close all descriptors, which also releases locks and pins."""
        self.states.close()
        for fd in (self.data_fd, self.have_fd, self.lock_fd):
            if fd >= 0:
                os.close(fd)


class NoImage:
    """Stand-in for a cache file when the disk has no room even for an empty one; every chunk is absent."""

    data_fd = -1

    def __init__(self, file: File) -> None:
        self.file = file

    def state(self, index: int) -> int:
        return ABSENT

    def complete(self) -> bool:
        return False

    def present_bytes(self) -> int:
        return 0

    def read(self, index: int) -> bytes:
        return b""

    def write(self, index: int, data: bytes | memoryview, *, hole: bool = False) -> None:
        raise DiskFull("no room for a cache image")

    def mark(self, index: int, state: int) -> None:
        return

    def sealed(self) -> bool:
        return False

    def seal(self) -> None:
        return

    @contextlib.contextmanager
    def chunk_lock(self, index: int, limit_s: float) -> Iterator[None]:
        yield

    def read_only(self) -> None:
        return

    def close(self) -> None:
        return


AnyImage = Image | NoImage


class Cache:
    """The folder of sparse cache files.

    `limit`: maximum bytes of disk blocks they occupy plus memory reserved by mounts of this cache, in total (None: only the
    disk limits).
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root = private_dir(root)
        self.limit = limit
        self._room = 0
        self._unwritten = 0
        self._reserving = threading.Lock()
        self._claim: Claim | None = None
        self._pins: Claim | None = None
        self._touched: Claim | None = None
        self._touched_files: set[str] = set()
        self._touching = threading.Lock()

    def folder(self, file: File) -> Path:
        """Return the folder of the file's sparse cache file."""
        return self.root / "images" / file.digest[:2] / file.digest

    def open(self, file: File) -> Image:
        """Open the file's sparse cache file, created empty if needed; it stays pinned while it is open.

        Raises DiskFull, Permanent, or Temporary (cache-locked).
        """
        for attempt in range(_OPEN_TRIES):
            try:
                image = Image(self.folder(file), file)
            except NotFound:
                # An evicting process removed the folder after it was created.
                if attempt == _OPEN_TRIES - 1:
                    raise
                continue
            image.pin()
            # It may also have removed the folder between our open and our pin.
            try:
                if os.fstat(image.lock_fd).st_ino == (image.folder / "lock").stat().st_ino:
                    return image
            except FileNotFoundError:
                pass
            image.close()
        raise Temporary(f"the cache image {self.folder(file)} is evicted as fast as it is made", code="cache-locked")

    def open_any(self, file: File) -> AnyImage:
        """Open the sparse cache file, or return a stand-in if it cannot be created (full or read-only disk)."""
        try:
            return self.open(file)
        except (DiskFull, Permanent) as error:
            log.warning("no cache for %s: %s", file.path, error)
            return NoImage(file)

    def present_bytes(self, file: File) -> int:
        """Return how many bytes of the file are present and verified, without opening or pinning the cache file."""
        try:
            body = (self.folder(file) / "have").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return 0
        states = body[_HEADER.size :]
        if len(states) != len(file.chunks):
            return 0
        return sum(c.length for c, s in zip(file.chunks, states, strict=True) if s == PRESENT)

    def usage(self) -> int:
        """Return the bytes of disk that the cache files occupy."""
        total = 0
        for data in self.root.glob("images/*/*/data"):
            with contextlib.suppress(FileNotFoundError):
                total += data.stat().st_blocks * 512
        return total

    def need_room(self, more: int, held: int) -> None:
        """Raise DiskFull if `more` bytes to fetch exceed the free disk space, or `held` bytes in total exceed the limit."""
        free = shutil.disk_usage(self.root).free
        if more > free:
            raise DiskFull(
                f"{more} bytes are to be fetched and the disk of {self.root} has {free} left; free some space first"
            )
        if self.limit is not None and held > self.limit:
            raise DiskFull(
                f"{held} bytes do not fit into the cache's limit of {self.limit}; mount with a larger --cache-limit"
            )

    def claim_memory(self, size: int) -> None:
        """Reserve `size` bytes of memory out of the limit for the life of this process.

        Call once, before using it.
        """
        try:
            self._claim = Claim(self.root, memory=size)
        except (OSError, LazyfsError) as error:
            # Continue without the reservation: the memory matters most when the disk is full.
            log.warning("the memory tier is not counted: %s", error)

    def pin_files(self, digests: Iterable[str], *, keep: bool = False) -> None:
        """Protect the cache files of these files from eviction, existing or not, until this process ends or calls again.

        `keep`: protect them from other mounts' `drop` as well.
        """
        before = self._pins
        try:
            self._pins = Claim(self.root, pins=(f"={d}" if keep else d for d in digests))
        except (OSError, LazyfsError) as error:
            log.warning("nothing is pinned: %s", error)
            return
        if before is not None:
            before.close()

    def touched(self, file: File) -> None:
        """Protect the file's cache file from eviction for the life of this process, without a descriptor per file."""
        with self._touching:
            if file.digest in self._touched_files:
                return
            try:
                self._touched = self._touched or Claim(self.root)
                self._touched.add(file.digest)
            except (OSError, LazyfsError) as error:
                log.warning("%s is not pinned: %s", file.path, error)
            self._touched_files.add(file.digest)

    def reserve(self, need: int) -> bool:
        """Reserve room for `need` more bytes under the limit, evicting least recently used cache files.

        Return False if impossible. The caller must return a granted reservation with `written`, whether it wrote the bytes
        or not.
        """
        if self.limit is None:
            return True
        # One thread at a time: two that count the same usage would both find too little, or both take the same room.
        with self._reserving:
            if self._room < need:
                # Counting walks the folder: reserve 64 MiB at a time, and let one process count at a time.
                batch = max(need, min(64 << 20, self.limit // 8))
                with counting(self.root):
                    free = self.limit - self.usage() - self._unwritten - others(self.root, self._own())[0]
                    if free < batch:
                        free += self.evict(batch - free)
                    if free < need:
                        return False
                    self._room = min(free, batch)
                    self._account()
            self._room -= need
            self._unwritten += need
        return True

    def written(self, need: int) -> None:
        """Return a reservation: its bytes are on disk, where `usage` counts them, or will not be written."""
        if self.limit is not None:
            with self._reserving:
                self._unwritten -= need
                self._account()

    def _own(self) -> Claim | None:
        if self._claim is None:
            try:
                self._claim = Claim(self.root)
            except (OSError, LazyfsError) as error:
                log.warning("others cannot see what is being written: %s", error)
        return self._claim

    def _account(self) -> None:
        if self._claim is not None:
            self._claim.granted = self._room + self._unwritten

    def evict(self, amount: int) -> int:
        """Remove cache files, least recently used first, until `amount` bytes are free; return the bytes freed.

        Skips files that a process has open and files pinned by a live mount.
        """
        pinned = others(self.root)[1]
        ages = []
        for lock in self.root.glob("images/*/*/lock"):
            if lock.parent.name not in pinned:
                with contextlib.suppress(FileNotFoundError):
                    ages.append((lock.stat().st_mtime_ns, lock))
        freed = 0
        for _, lock in sorted(ages):
            if freed >= amount:
                break
            freed += self._remove(lock)
        return freed

    @staticmethod
    def _remove(lock: Path) -> int:
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = (lock.parent / "data").stat().st_blocks * 512
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
        return 0 if file.digest in kept(self.root) else self._remove(self.folder(file) / "lock")

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

    def clear(self) -> None:
        """Remove every cache file that is not in use, and the quarantine."""
        for lock in self.root.glob("images/*/*/lock"):
            self._remove(lock)
        self.clear_quarantine()

    def clear_quarantine(self) -> None:
        """Remove quarantined bodies and their reasons."""
        for name in ("quarantine", "reasons"):
            shutil.rmtree(self.root / name, ignore_errors=True)
