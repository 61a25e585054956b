"""Moving an archive's chunks: several at a time between files and a store, each named by the BLAKE3 of its plain bytes.

What checkpoint.archive is built of. Memory is bounded by WORKERS * 2 chunks; every wait ends with the store's own limits.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import blake3
import msgspec

from checkpoint.errors import Integrity

if TYPE_CHECKING:
    from lazyfs.chunkstore import ChunkStore
    from lazyfs.manifest import Chunk, File

WORKERS = 4
_ATTEMPTS = 3
# Key of an archive manifest's `meta`: names that are one file. CRIU keeps deleted files that are still mapped as `link_remap.N` beside the
# name another process opened (POSIX semaphores): as two files, the processes would no longer share them. A mount shows them as two.
LINKS = "hard-links"


@dataclass(frozen=True)
class Progress:
    """Bytes: `done` of `total` dealt with, of which `moved` went over the store's link (compressed)."""

    total: int
    done: int
    moved: int


@dataclass(frozen=True)
class Pushed:
    """What a push did. Bytes: `size` of all files; `zero` in chunks of zeros; `copies` in chunks met before in this archive; `shared` in
    chunks the store had already; `stored` written, compressed."""

    digest: str
    files: int
    chunks: int
    size: int
    zero: int
    copies: int
    shared: int
    stored: int


@dataclass
class Listing:
    directories: list[tuple[str, int]] = field(default_factory=list)
    files: list[tuple[str, int, int]] = field(default_factory=list)  # path, size, mode
    symlinks: list[tuple[str, str]] = field(default_factory=list)
    names: dict[tuple[int, int], list[str]] = field(
        default_factory=dict
    )  # of files with several names, by device and inode


class Push:
    """One push: what is in flight, what was met, and the counts."""

    def __init__(self, chunks: ChunkStore, total: int, progress: Callable[[Progress], None] | None) -> None:
        self.chunks = chunks
        self.total, self.done, self.stored, self.shared, self.copies, self.zero, self.count = total, 0, 0, 0, 0, 0, 0
        self.progress = progress
        self.pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="push")
        self.pending: set[Future[tuple[int, int]]] = set()
        self.files: list[tuple[str, list[Future[tuple[int, int]]], list[str]]] = []
        self.known: dict[str, Chunk] = {}
        self.claimed: set[str] = set()
        self.lock = threading.Lock()

    def file(self, folder: Path, path: str, size: int, lengths: list[int] | None) -> None:
        from lazyfs.chunking import MAX_CHUNK

        if lengths is None or sum(lengths) != size:
            lengths = [min(MAX_CHUNK, size - at) for at in range(0, size, MAX_CHUNK)]
        digests = [""] * len(lengths)
        futures = []
        fd = os.open(folder / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            before = os.fstat(fd)
            offset = 0
            for index, length in enumerate(lengths):
                while len(self.pending) >= 2 * WORKERS:
                    self._collect()
                data = _read_fully(fd, offset, length, path)
                future = self.pool.submit(self._put, data, digests, index)
                futures.append(future)
                self.pending.add(future)
                offset += length
            after = os.fstat(fd)
        finally:
            os.close(fd)
        if before.st_size != size or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise Integrity("file-changed", f"{path} was written to while it was pushed; push again")
        self.files.append((path, futures, digests))

    def _put(self, data: bytes, digests: list[str], index: int) -> tuple[int, int]:
        """Store one chunk unless it was met in this push; returns its plain bytes and the bytes written."""
        from lazyfs.chunkstore import digest_of, zero_digest
        from lazyfs.retry import RetryPolicy, retrying

        digest = digests[index] = digest_of(data)
        with self.lock:
            self.count += 1
            if digest == zero_digest(len(data)):
                self.zero += len(data)
            elif digest in self.claimed:
                self.copies += len(data)
            if digest in self.claimed:
                return len(data), 0
            self.claimed.add(digest)
        result = retrying(lambda: self.chunks.put_chunk(data, digest), RetryPolicy())
        with self.lock:
            self.known[digest] = result.chunk
            if not result.stored:
                self.shared += len(data)
        return len(data), result.stored

    def drain(self) -> None:
        while self.pending:
            self._collect()

    def _collect(self) -> None:
        # Every put has a limit of its own (the store's, times the attempts), so this ends.
        ready, self.pending = wait(self.pending, return_when=FIRST_COMPLETED)
        for future in ready:
            plain, stored = future.result()
            self.done += plain
            self.stored += stored
        if self.progress:
            self.progress(Progress(self.total, self.done, self.stored))

    def finish(self, listing: Listing, kind: str, name: str) -> Pushed:
        from lazyfs.manifest import VERSION, Directory, File, Manifest, Symlink

        modes = {path: (size, mode) for path, size, mode in listing.files}
        manifest = Manifest(
            VERSION,
            kind,
            tuple(Directory(path, mode) for path, mode in listing.directories),
            tuple(
                File(path, modes[path][1], modes[path][0], tuple(self.known[digest] for digest in digests))
                for path, _, digests in self.files
            ),
            tuple(Symlink(path, target) for path, target in listing.symlinks),
            {
                "snapshot": name,
                LINKS: msgspec.json.encode([names for names in listing.names.values() if len(names) > 1]).decode(),
            },
        )
        digest = self.chunks.put_manifest(manifest)
        self.chunks.set_ref("snapshots", name, digest)
        size = sum(size for _, size, _ in listing.files)
        return Pushed(digest, len(listing.files), self.count, size, self.zero, self.copies, self.shared, self.stored)


def _read_fully(fd: int, offset: int, length: int, path: str) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise Integrity("file-changed", f"{path} became shorter while it was pushed; push again")
        data += more
    return data


def get(chunks: ChunkStore, chunk: Chunk) -> bytes:
    """The plain bytes of a chunk, verified; asked for again when the store or the way to it fails."""
    import lazyfs.errors
    from lazyfs.retry import RetryPolicy, retrying

    def once() -> bytes:
        return retrying(lambda: chunks.get(chunk.digest, chunk.length, chunk.encoding), RetryPolicy())

    for _ in range(_ATTEMPTS - 1):
        # Flipped on the way, perhaps; when the store itself holds it so, the last attempt says so.
        with contextlib.suppress(lazyfs.errors.Integrity):
            return once()
    return once()


class Pull:
    """One pull: chunks into files, each compared with its digest before it is written. A chunk that is there several times is
    fetched once and copied from the first file that has it."""

    def __init__(
        self, chunks: ChunkStore, partial: Path, total: int, progress: Callable[[Progress], None] | None
    ) -> None:
        self.chunks, self.partial, self.total, self.progress = chunks, partial, total, progress
        self.done = self.kept = self.fetched = 0
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="pull")
        self.pending: set[Future[int]] = set()
        self.first: dict[str, tuple[Future[int], Path, int]] = {}
        self.open: dict[int, int] = {}  # descriptor → chunks still to be written

    def file(self, file: File) -> None:
        """Start writing one file; what is in flight is waited for when it is too much."""
        path = self.partial / file.path
        resumed = path.exists() and path.stat().st_size == file.size
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with self.lock:
            self.open[fd] = max(1, len(file.chunks))
        if not resumed:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, file.size)
        if not file.chunks:
            self._written(fd, file.mode)
        for chunk, offset in zip(file.chunks, file.offsets, strict=False):
            while len(self.pending) >= 2 * WORKERS:
                self._collect()
            before = self.first.get(chunk.digest)
            future = self.pool.submit(self._one, fd, file.mode, chunk, offset, resumed, before)
            self.pending.add(future)
            if before is None:
                self.first[chunk.digest] = (future, path, offset)

    def _one(
        self, fd: int, mode: int, chunk: Chunk, offset: int, resumed: bool, before: tuple[Future[int], Path, int] | None
    ) -> int:
        from lazyfs.chunkstore import digest_of, zero_digest

        if resumed and digest_of(os.pread(fd, chunk.length, offset)) == chunk.digest:
            with self.lock:
                self.kept += chunk.length
        elif chunk.digest == zero_digest(chunk.length):
            if resumed:  # something else lies there
                _write_fully(fd, bytes(chunk.length), offset)
        else:
            data = self._copy(chunk, before) or self._fetch(chunk)
            _write_fully(fd, data, offset)
        self._written(fd, mode)
        return chunk.length

    def _copy(self, chunk: Chunk, before: tuple[Future[int], Path, int] | None) -> bytes | None:
        if before is None:
            return None
        future, path, offset = before
        future.result()  # submitted earlier, so running or done: the pool starts tasks in their order
        with path.open("rb") as source:
            data = os.pread(source.fileno(), chunk.length, offset)
        return data if blake3.blake3(data).hexdigest() == chunk.digest else None

    def _fetch(self, chunk: Chunk) -> bytes:
        data = get(self.chunks, chunk)
        with self.lock:
            self.fetched += chunk.length
        return data

    def _written(self, fd: int, mode: int) -> None:
        with self.lock:
            self.open[fd] -= 1
            if self.open[fd]:
                return
        os.fchmod(fd, mode & 0o777)
        os.fdatasync(fd)
        with self.lock:
            del self.open[fd]
        os.close(fd)

    def drain(self) -> None:
        """Wait until everything is written."""
        while self.pending:
            self._collect()

    def close(self) -> None:
        """End the workers (each finishes the chunk it is at) and close what a failure left open."""
        self.pool.shutdown(cancel_futures=True)
        for fd in self.open:
            os.close(fd)

    def _collect(self) -> None:
        # Every get has a limit of its own (the store's, times the attempts), so this ends.
        ready, self.pending = wait(self.pending, return_when=FIRST_COMPLETED)
        for future in ready:
            self.done += future.result()
        if self.progress:
            self.progress(Progress(self.total, self.done, self.fetched))


def _write_fully(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
