"""Upload an archive's chunks, several at a time, each named by the BLAKE3 of its plain bytes.

Also has helpers shared with downloads. checkpoint.store.archive builds on this module; checkpoint.store.download
fetches chunks. Memory use is limited to WORKERS * 2 chunks. Every wait is limited by the store's own timeouts.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from checkpoint import disk
from checkpoint.errors import Busy, CheckpointError, Failed, HostLacks, Integrity, NotFound
from checkpoint.files import data_extents
from checkpoint.store.layout import Extent

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.content.manifest import Chunk

WORKERS = 4
NAMELESS = "gc/nameless/"
"""Keys of the marks of archives without a name (checkpoint.store.retention), by digest."""
_ATTEMPTS = 3
_HOLE = 256 << 10
"""Smallest hole in bytes with a chunk of its own. A shorter hole costs less as zeros than as an additional chunk."""
# Key of an archive manifest's `meta`: lists of names of the same file. CRIU keeps deleted files that are still mapped
# as `link_remap.N` beside the name that another process opened (POSIX semaphores). As two files, the processes would no
# longer share them. A mount shows them as two.
LINKS = "hard-links"
# Key for modification times in ns since the epoch, by path; only for compile caches (checkpoint.store.cache_archive).
MTIMES = "mtimes"


@dataclass(frozen=True)
class Progress:
    """Progress in bytes: `done` of `total`; `moved` is what went over the store's link (compressed)."""

    total: int
    done: int
    moved: int


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Bytes: `size` of all files; `zero` in chunks of zeros; `copies` in chunks seen before in this archive; `shared`
    in chunks that the store already had; `stored` written, compressed.
    """

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
    mtimes: dict[str, int] = field(default_factory=dict)  # of files
    names: dict[tuple[int, int], list[str]] = field(
        default_factory=dict
    )  # of files with several names, by device and inode


class Push:
    """The state of one push: chunks in flight, chunks seen, and the counts."""

    def __init__(self, chunks: ChunkStore, total: int, progress: Callable[[Progress], None] | None) -> None:
        self.chunks = chunks
        self.total, self.done, self.stored, self.shared, self.copies, self.zero, self.count = total, 0, 0, 0, 0, 0, 0
        self.progress = progress
        self.pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="push")
        self.pending: set[Future[tuple[int, int]]] = set()
        self.files: list[tuple[str, list[str]]] = []  # of the archive, with the digests of their chunks
        self.known: dict[str, Chunk] = {}
        self.seen: set[str] = set()
        self.lock = threading.Lock()

    def add_file(self, folder: Path, path: str, size: int, lengths: list[int] | None) -> None:
        """Store one file unchanged."""
        if lengths is None or sum(lengths) != size:
            lengths = by_holes(folder / path, size)
        self.add_gathered(folder, path, lengths, lambda offset, length: [(path, offset, 0, length)], {path: size})

    def add_gathered(
        self,
        folder: Path,
        path: str,
        lengths: list[int],
        extents: Callable[[int, int], list[Extent]],
        sizes: Mapping[str, int],
    ) -> None:
        """Store an archive file that consists of extents of the folder's files, with zeros between them.

        `sizes`: sizes of the source files. Raises Integrity (file-changed) when one of them changes meanwhile.
        """
        digests = [""] * len(lengths)
        fds = {name: os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW) for name in sizes}
        try:
            before = {name: os.fstat(fd) for name, fd in fds.items()}
            offset = 0
            for index, length in enumerate(lengths):
                while len(self.pending) >= 2 * WORKERS:
                    self._collect()
                data = bytearray(length)
                for name, at, within, size in extents(offset, length):
                    _read_fully(fds[name], at, memoryview(data)[within : within + size], name)
                self.pending.add(self.pool.submit(self._put, memoryview(data), digests, index))
                offset += length
            after = {name: os.fstat(fd) for name, fd in fds.items()}
        finally:
            for fd in fds.values():
                os.close(fd)
        for name, size in sizes.items():
            then, now = before[name], after[name]
            if then.st_size != size or (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                raise Integrity("file-changed", f"{name} was written to while it was pushed; push again")
        self.files.append((path, digests))

    def add_bytes(self, path: str, data: bytes) -> None:
        """Store an archive file that has no counterpart in the folder."""
        from lazyfs.content.chunking import MAX_CHUNK

        parts = [memoryview(data)[at : at + MAX_CHUNK] for at in range(0, len(data), MAX_CHUNK)]
        digests = [""] * len(parts)
        for index, part in enumerate(parts):
            self.pending.add(self.pool.submit(self._put, part, digests, index))
        self.files.append((path, digests))

    def _put(self, data: bytes | memoryview, digests: list[str], index: int) -> tuple[int, int]:
        """Store one chunk unless this push has stored it already.

        Return its plain bytes and the bytes written.
        """
        from lazyfs.content.chunk_store import digest_of, zero_digest
        from lazyfs.stores.retry import RetryPolicy, retrying

        digest = digests[index] = digest_of(data)
        with self.lock:
            self.count += 1
            if digest == zero_digest(len(data)):
                self.zero += len(data)
            elif digest in self.seen:
                self.copies += len(data)
            if digest in self.seen:
                return len(data), 0
            self.seen.add(digest)
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
        # Every put has a timeout (the store's, times the attempts), so this ends.
        ready, self.pending = wait(self.pending, return_when=FIRST_COMPLETED)
        for future in ready:
            plain, stored = future.result()
            self.done += plain
            self.stored += stored
        if self.progress:
            self.progress(Progress(self.total, self.done, self.stored))

    def finish(
        self, listing: Listing, kind: str, name: str, host: str, modes: Mapping[str, int], times: bool
    ) -> Pushed:
        """Write the archive's manifest, and set its name, and that of its `host` class if there is one.

        `modes`: of the archive's files. `times`: whether to record modification times.
        """
        from lazyfs.content.manifest import VERSION, Directory, File, Manifest, Symlink

        meta = {
            "snapshot": name,
            LINKS: msgspec.json.encode([names for names in listing.names.values() if len(names) > 1]).decode(),
        }
        if times:
            meta[MTIMES] = msgspec.json.encode(listing.mtimes, order="deterministic").decode()
        manifest = Manifest(
            VERSION,
            kind,
            tuple(Directory(path, mode) for path, mode in listing.directories),
            tuple(
                File(
                    path, modes[path], sum(self.known[d].length for d in digests), tuple(self.known[d] for d in digests)
                )
                for path, digests in self.files
            ),
            tuple(Symlink(path, target) for path, target in listing.symlinks),
            meta,
        )
        digest = self.chunks.put_manifest(manifest)
        for reference in ([f"{name}:{host}"] if host else []) + [name]:
            self.chunks.set_ref("snapshots", reference, digest)
        mark = NAMELESS + digest
        if self.chunks.store.head(mark):  # else the archive would have no grace when it loses its name again
            self.chunks.store.delete(mark)
        size = sum(size for _, size, _ in listing.files)
        return Pushed(digest, len(listing.files), self.count, size, self.zero, self.copies, self.shared, self.stored)


def by_holes(path: Path, size: int) -> list[int]:
    """Return the chunk lengths of a file of `size` bytes.

    Holes become separate chunks, which are neither stored nor fetched. A restore waits for all of shared memory, and
    engines write a few pages of hundreds of megabytes. Raises OSError.
    """
    from lazyfs.content.chunking import MAX_CHUNK

    borders, at = {0, size}, 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for start, end in (*data_extents(fd, size), (size, size)):
            if start - at >= _HOLE:
                borders |= {at, start}
            at = end
    finally:
        os.close(fd)
    ends = sorted(borders)
    return [min(MAX_CHUNK, high - at) for low, high in pairwise(ends) for at in range(low, high, MAX_CHUNK)]


def _read_fully(fd: int, offset: int, into: memoryview, path: str) -> None:
    while into:
        got = os.preadv(fd, [into], offset)
        if not got:
            raise Integrity("file-changed", f"{path} became shorter while it was pushed; push again")
        into, offset = into[got:], offset + got


def get_chunk(chunks: ChunkStore, chunk: Chunk) -> bytes:
    """Return the plain bytes of a chunk, verified; retry when the store or the connection fails."""
    import lazyfs.errors
    from lazyfs.stores.retry import RetryPolicy, retrying

    def once() -> bytes:
        return retrying(lambda: chunks.get(chunk.digest, chunk.length, chunk.encoding), RetryPolicy())

    for _ in range(_ATTEMPTS - 1):
        # The bytes may have been corrupted in transit. If the store's copy is bad, the last attempt raises.
        with contextlib.suppress(lazyfs.errors.Integrity):
            return once()
    return once()


@contextlib.contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Translate errors of lazyfs and the operating system into this package's errors."""
    from lazyfs import errors as lazy

    kinds: tuple[tuple[type[lazy.LazyfsError], type[CheckpointError]], ...] = (
        (lazy.Integrity, Integrity),
        (lazy.NotFound, NotFound),
        (lazy.Busy, Busy),
        (lazy.HostLacks, HostLacks),
    )
    try:
        yield
    except lazy.LazyfsError as error:
        kind = next((ours for theirs, ours in kinds if isinstance(error, theirs)), Failed)
        raise kind(f"archive-{error.code}" if kind is not Failed else error.code, f"{what}: {error}") from error
    except OSError as error:
        raise disk.failure(what, error, "archive-io") from error
