"""Storing an archive's chunks, several at a time, each named by the BLAKE3 of its plain bytes; and what pushing and
pulling share.

What checkpoint.store.archive is built of; how chunks come back is in checkpoint.store.download. Memory is bounded by WORKERS * 2 chunks;
every wait
ends with the store's own limits.
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
from checkpoint.sparse import extents
from checkpoint.store.layout import Piece

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.content.manifest import Chunk

WORKERS = 4
_ATTEMPTS = 3
_HOLE = 256 << 10
"""Bytes. A shorter hole costs less as zeros than the further chunk would."""
# Key of an archive manifest's `meta`: names that are one file. CRIU keeps deleted files that are still mapped as `link_remap.N` beside the
# name another process opened (POSIX semaphores): as two files, the processes would no longer share them. A mount shows them as two.
LINKS = "hard-links"
# The same for modification times in ns since the epoch, by path: of compile caches only (checkpoint.store.cache_archive).
MTIMES = "mtimes"


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
    mtimes: dict[str, int] = field(default_factory=dict)  # of files
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
        self.files: list[tuple[str, list[str]]] = []  # of the archive, with the digests of their chunks
        self.known: dict[str, Chunk] = {}
        self.claimed: set[str] = set()
        self.lock = threading.Lock()

    def file(self, folder: Path, path: str, size: int, lengths: list[int] | None) -> None:
        """Store one file as it is."""
        if lengths is None or sum(lengths) != size:
            lengths = by_holes(folder / path, size)
        self.gathered(folder, path, lengths, lambda offset, length: [(path, offset, 0, length)], {path: size})

    def gathered(
        self,
        folder: Path,
        path: str,
        lengths: list[int],
        pieces: Callable[[int, int], list[Piece]],
        sizes: Mapping[str, int],
    ) -> None:
        """Store a file of the archive that consists of pieces of the folder's files, and of zeros between them.

        `sizes`: of the files it is made of. Raises Integrity (file-changed) when one of them changes meanwhile.
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
                for name, at, within, size in pieces(offset, length):
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

    def made(self, path: str, data: bytes) -> None:
        """Store a file of the archive that is in no folder."""
        from lazyfs.content.chunking import MAX_CHUNK

        parts = [memoryview(data)[at : at + MAX_CHUNK] for at in range(0, len(data), MAX_CHUNK)]
        digests = [""] * len(parts)
        for index, part in enumerate(parts):
            self.pending.add(self.pool.submit(self._put, part, digests, index))
        self.files.append((path, digests))

    def _put(self, data: bytes | memoryview, digests: list[str], index: int) -> tuple[int, int]:
        """Store one chunk unless it was met in this push; returns its plain bytes and the bytes written."""
        from lazyfs.content.chunk_store import digest_of, zero_digest
        from lazyfs.stores.retry import RetryPolicy, retrying

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

    def finish(self, listing: Listing, kind: str, name: str, modes: Mapping[str, int], times: bool) -> Pushed:
        """Write the archive's manifest and set its name. `modes`: of the archive's files. `times`: record theirs."""
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
        self.chunks.set_ref("snapshots", name, digest)
        size = sum(size for _, size, _ in listing.files)
        return Pushed(digest, len(listing.files), self.count, size, self.zero, self.copies, self.shared, self.stored)


def by_holes(path: Path, size: int) -> list[int]:
    """Lengths of the chunks of a file of `size` bytes: its holes are chunks of their own, which are neither stored nor fetched.

    A restore waits for shared memory as a whole, and engines write a few pages of hundreds of megabytes. Raises OSError.
    """
    from lazyfs.content.chunking import MAX_CHUNK

    borders, at = {0, size}, 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for start, end in (*extents(fd, size), (size, size)):
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


def get(chunks: ChunkStore, chunk: Chunk) -> bytes:
    """The plain bytes of a chunk, verified; asked for again when the store or the way to it fails."""
    import lazyfs.errors
    from lazyfs.stores.retry import RetryPolicy, retrying

    def once() -> bytes:
        return retrying(lambda: chunks.get(chunk.digest, chunk.length, chunk.encoding), RetryPolicy())

    for _ in range(_ATTEMPTS - 1):
        # Flipped on the way, perhaps; when the store itself holds it so, the last attempt says so.
        with contextlib.suppress(lazyfs.errors.Integrity):
            return once()
    return once()


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """lazyfs' errors and the operating system's, as this package's."""
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
