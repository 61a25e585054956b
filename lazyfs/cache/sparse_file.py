"""The sparse cache file of one file: filled chunk by chunk, shared by all mounts of a host.

    data    the file itself, with holes where a chunk is absent
    have    the chunk bitmap: a header, then one byte per chunk: ABSENT, PRESENT or UNVERIFIED
    lock    locked shared by each process that pins the file, exclusively by an evicting process

Guarantees:
- A byte of `have` becomes PRESENT only after the whole chunk was written and matched its digest. Killing any process at any
  moment loses only work.
- A power cut may lose written pages. `have` records the boot in which it was written. In another boot, every PRESENT of a
  file that was not fsynced when complete becomes UNVERIFIED, to be hashed before it is served.
- One byte-range lock per chunk on `have` makes fetching single-flight across processes. The kernel releases it when its
  holder dies.
- A complete sparse cache file has no holes, so the kernel may pass reads through to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lazyfs.content.manifest import File
from lazyfs.errors import DiskFull, Temporary, from_os_error, os_errors
from lazyfs.paths import private_dir

ABSENT, PRESENT, UNVERIFIED = 0, 1, 2
HEADER = struct.Struct("<4sI36sI16x")
_MAGIC = b"QTI1"
_FLAGS, _FSYNCED = 44, 1
# This header byte changes when a present chunk is revoked; readers then check again whether the file is complete.
_REVOKED = 48
_FLOCK = struct.Struct("hhqqi4x")


def boot_id() -> bytes:
    """Return the kernel's boot id (36 bytes)."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def sparse_file_header(folder: Path) -> tuple[bool, int]:
    """Return whether a sparse cache file was fsynced when complete, and its count of revoked chunks. Neither opens nor pins it."""
    try:
        with open(folder / "have", "rb", buffering=0) as file:
            header = file.read(HEADER.size)
    except (FileNotFoundError, NotADirectoryError):
        return False, 0
    if len(header) != HEADER.size or not header.startswith(_MAGIC):
        return False, 0
    return bool(header[_FLAGS] & _FSYNCED), header[_REVOKED]


class SparseFile:
    """One open sparse cache file. Safe to share between threads; `close` when done."""

    def __init__(self, folder: Path, file: File) -> None:
        self.folder = folder
        self.file = file
        opened: list[int] = []
        try:
            private_dir(folder)
            for name in ("lock", "data", "have"):
                opened.append(os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self.lock_fd, self.data_fd, self.bitmap_fd = opened
            self._prepare()
        except BaseException as error:
            for fd in opened:
                os.close(fd)
            if not isinstance(error, OSError):
                raise
            raise from_os_error(error, f"cannot open the sparse cache file {folder}") from error
        self._complete = False
        self._seen = -1
        self._busy: set[int] = set()
        self._free = threading.Condition()

    def _prepare(self) -> None:
        count = len(self.file.chunks)
        size = HEADER.size + count
        fcntl.flock(self.bitmap_fd, fcntl.LOCK_EX)
        try:
            header = os.pread(self.bitmap_fd, HEADER.size, 0)
            good = len(header) == HEADER.size and os.fstat(self.bitmap_fd).st_size == size
            magic, n, boot, flags = HEADER.unpack(header) if good else (b"", 0, b"", 0)
            if magic != _MAGIC or n != count or os.fstat(self.data_fd).st_size != self.file.size:
                os.ftruncate(self.bitmap_fd, 0)
                os.ftruncate(self.data_fd, self.file.size)
                os.pwrite(self.bitmap_fd, HEADER.pack(_MAGIC, count, boot_id(), 0) + bytes(count), 0)
            elif boot != boot_id() and not flags & _FSYNCED:
                states = os.pread(self.bitmap_fd, count, HEADER.size)
                states = states.replace(bytes([PRESENT]), bytes([UNVERIFIED]))
                os.pwrite(self.bitmap_fd, states, HEADER.size)
                os.pwrite(self.bitmap_fd, HEADER.pack(_MAGIC, count, boot_id(), 0), 0)
            self.states = mmap.mmap(self.bitmap_fd, size)
        finally:
            fcntl.flock(self.bitmap_fd, fcntl.LOCK_UN)

    # -- state

    def state(self, index: int) -> int:
        """Return ABSENT, PRESENT or UNVERIFIED."""
        return self.states[HEADER.size + index]

    def complete(self) -> bool:
        """Return whether every chunk is present."""
        revoked = self.states[_REVOKED]
        if not self._complete or revoked != self._seen:
            self._seen = revoked
            self._complete = self.states[HEADER.size :].count(PRESENT) == len(self.file.chunks)
        return self._complete

    def fsynced(self) -> bool:
        """Return whether the complete file was fsynced."""
        return bool(self.states[_FLAGS] & _FSYNCED)

    def present_bytes(self) -> int:
        """Return how many bytes of the file are present."""
        if self.complete():
            return self.file.size
        states = self.states[HEADER.size :]
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
            with os_errors(f"cannot write to the sparse cache file {self.folder}"):
                while view:
                    n = os.pwrite(self.data_fd, view, offset)
                    view, offset = view[n:], offset + n
        self.mark(index, PRESENT)

    def mark(self, index: int, state: int) -> None:
        """Set a chunk's state."""
        self.states[HEADER.size + index] = state
        if state != PRESENT:
            self._on_revoked()

    def revoke(self) -> None:
        """Set every chunk ABSENT. It counts as one revocation: one a chunk could leave the count, modulo 256, as it was."""
        self.states[HEADER.size :] = bytes(len(self.file.chunks))
        self._on_revoked()

    def _on_revoked(self) -> None:
        self.states[_REVOKED] = (self.states[_REVOKED] + 1) % 256
        # Later writes are not fsynced.
        self.states[_FLAGS : _FLAGS + 4] = struct.pack("<I", 0)

    def fsync(self) -> None:
        """Write a complete file to disk, so that it need not be verified again after a power cut."""
        os.fdatasync(self.data_fd)
        os.pwrite(self.bitmap_fd, struct.pack("<I", _FSYNCED), _FLAGS)
        os.fdatasync(self.bitmap_fd)

    @contextlib.contextmanager
    def chunk_lock(self, index: int, limit_s: float) -> Iterator[None]:
        """Lock the chunk against other threads and processes.

        Raises Temporary (cache-locked) after `limit_s` seconds.
        """
        deadline, pause = time.monotonic() + limit_s, 0.001
        spot = HEADER.size + index
        # The kernel's lock belongs to the descriptor, which all threads share; this set excludes threads from each other.
        with self._free:
            if not self._free.wait_for(lambda: index not in self._busy, limit_s):
                raise Temporary(
                    f"chunk {index} of {self.file.path} is being fetched by another thread", code="cache-locked"
                )
            self._busy.add(index)
        try:
            while not self._lock(spot, fcntl.F_WRLCK):
                if time.monotonic() > deadline:
                    raise Temporary(
                        f"chunk {index} of {self.file.path} is locked by another process", code="cache-locked"
                    )
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
            fcntl.fcntl(self.bitmap_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, spot, 1, 0))
        except BlockingIOError:
            return False
        return True

    def pin(self) -> None:
        """Protect the cache file from eviction until it is closed, and mark it as used now."""
        fcntl.flock(self.lock_fd, fcntl.LOCK_SH)
        os.utime(self.lock_fd)

    def read_only(self) -> None:
        """Close the chunk bitmap's descriptor, which only writers need: a mount may read thousands of files."""
        os.close(self.bitmap_fd)
        self.bitmap_fd = -1

    def close(self) -> None:
        """Close all descriptors, which also releases locks and pins."""
        self.states.close()
        for fd in (self.data_fd, self.bitmap_fd, self.lock_fd):
            if fd >= 0:
                os.close(fd)


class NoSparseFile:
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
        raise DiskFull("no room for a sparse cache file; free some space")

    def mark(self, index: int, state: int) -> None:
        return

    def revoke(self) -> None:
        return

    def fsynced(self) -> bool:
        return False

    def fsync(self) -> None:
        return

    @contextlib.contextmanager
    def chunk_lock(self, index: int, limit_s: float) -> Iterator[None]:
        yield

    def read_only(self) -> None:
        return

    def close(self) -> None:
        return


AnySparseFile = SparseFile | NoSparseFile
