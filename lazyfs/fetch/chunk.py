"""Fetch one verified chunk into the cache: from the original on this disk, or from the store.

`ChunkFetcher.fill` is the only way bytes enter the cache. It admits only chunks that match their digest. A body that fails
is quarantined and fetched once more before Integrity is raised. Every wait has a limit.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from lazyfs.cache.cache import Cache
from lazyfs.cache.sparse_file import PRESENT, UNVERIFIED, AnySparseFile
from lazyfs.content.chunk_store import ChunkStore, digest_of, mismatch, zero_digest
from lazyfs.content.chunking import MAX_CHUNK
from lazyfs.content.manifest import RAW, ZSTD, File
from lazyfs.content.source_digests import DigestLog
from lazyfs.content.whole_file import mismatch_in_memory, mismatch_of
from lazyfs.counters import Histogram
from lazyfs.errors import DiskFull, Integrity, NotFound, Permanent, Temporary
from lazyfs.logs import RepeatLimiter
from lazyfs.paths import fingerprint
from lazyfs.stores.base import Store
from lazyfs.stores.retry import RetryPolicy, retrying

log = logging.getLogger("lazyfs.fetch.chunk")
_local = threading.local()


class Undecodable(Integrity):
    """A body that cannot be decoded or has the wrong length.

    `body` is valid until the thread's next fetch.
    """

    def __init__(self, message: str, body: bytes | memoryview) -> None:
        super().__init__(message)
        self.body = body


class ByteSource(Protocol):
    """Source of plain chunk bytes. `fresh` asks to bypass any cache in between."""

    store: Store

    def fetch(self, file: File, index: int, *, fresh: bool = False) -> bytes | memoryview: ...

    def checked(self) -> bool:
        """Return whether this thread's last fetch was verified, and came from a peer."""

    def close(self) -> None:
        """Close connections that are not the store's."""


@dataclass
class FetchStats:
    """Counters of one process, by tier; in bytes unless named otherwise."""

    tiers: dict[str, int] = field(default_factory=lambda: {"origin": 0, "store": 0, "proven": 0, "peer": 0})
    retries: int = 0
    quarantined: int = 0
    fetches: int = 0
    latency: Histogram = field(default_factory=Histogram)


def scratch() -> memoryview:
    """Return this thread's buffer of one chunk.

    A fetch may return a view of it, valid until the thread's next fetch.
    """
    view: memoryview | None = getattr(_local, "scratch", None)
    if view is None:
        # Page-aligned: some processors copy unaligned memory at a third of the speed.
        view = _local.scratch = memoryview(mmap.mmap(-1, MAX_CHUNK))
    return view


class StoreSource:
    """Chunks of an imported manifest, from a chunk store."""

    def __init__(self, chunks: ChunkStore) -> None:
        self.chunks = chunks
        self.store = chunks.store

    def fetch(self, file: File, index: int, *, fresh: bool = False) -> bytes | memoryview:
        """Return the plain bytes, not verified. Raises NotFound, Undecodable, or what the store raises."""
        chunk = file.chunks[index]
        missing: NotFound | None = None
        for encoding in (chunk.encoding, ZSTD if chunk.encoding == RAW else RAW):
            try:
                body = self.chunks.body(chunk.digest, encoding, scratch())
            except NotFound as error:
                missing = missing or error
                continue
            try:
                return self.chunks.decode(chunk.digest, body, encoding, chunk.length)
            except Integrity as error:
                raise Undecodable(str(error), body) from error
        assert missing is not None
        raise missing

    def checked(self) -> bool:
        return False

    def close(self) -> None:
        return


class ReadThroughSource:
    """Plain bytes by range from the source, pinned to the version in the manifest."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def fetch(self, file: File, index: int, *, fresh: bool = False) -> bytes | memoryview:
        """Return the chunk.

        Raises Permanent (source-changed) if the source is not the one that the manifest describes.
        """
        length = file.chunks[index].length
        data = self.store.get(file.path, file.offsets[index], length, file.version, scratch())
        if len(data) != length:
            raise Permanent(
                f"{file.path} is shorter than before: the source changed; mount it again", code="source-changed"
            )
        return data

    def checked(self) -> bool:
        return False

    def close(self) -> None:
        return


class ChunkFetcher:
    """Fills cache files with verified chunks. Safe to use from many threads."""

    def __init__(
        self,
        cache: Cache,
        source: ByteSource,
        origins: dict[str, tuple[str, list[int]]],
        limit_s: float,
        digests: DigestLog | None = None,
    ) -> None:
        self.cache = cache
        self.source = source
        self.origins = origins
        self.limit_s = limit_s
        self.digests = digests
        self.stats = FetchStats()
        self.repeats = RepeatLimiter(log)
        # How often a whole file was not what its source says, by the file's digest.
        self.wrong: dict[str, int] = {}
        # A reader is blocked: retry Temporary errors up to the time limit, however many attempts that takes.
        self.policy = RetryPolicy(attempts=None, limit=limit_s)

    def close(self) -> None:
        """Close the connections of the source."""
        close = getattr(self.source.store, "close", None)
        if close is not None:
            close()
        self.source.close()

    def fill(self, sparse_file: AnySparseFile, index: int, *, or_memory: bool = True) -> bytes | memoryview | None:
        """Make the chunk PRESENT in the sparse file and return None; if the disk has no room, return the verified bytes instead.

        `or_memory` False: raise DiskFull then, before anything is fetched if the cache's bound leaves no room. Raises
        Integrity, NotFound, Temporary (limit reached) or Permanent. Afterwards `source_of_last` returns the chunk's source.
        """
        _local.source = "other"
        if sparse_file.state(index) == PRESENT:
            return None
        if self.wrong.get(sparse_file.file.digest, 0) > 1:
            raise Integrity(f"{sparse_file.file.path}: {self.source.store.url} has not what it says; mount it again")
        with sparse_file.chunk_lock(index, self.limit_s):
            state = sparse_file.state(index)
            if state == PRESENT:
                return None
            file, chunk = sparse_file.file, sparse_file.file.chunks[index]
            if state == UNVERIFIED and self._verify(file, index, sparse_file.read(index)):
                sparse_file.mark(index, PRESENT)
                self.stats.tiers["proven"] += chunk.length
                _local.source = "proof"
                return None
            if not self.cache.reserve_room(chunk.length):
                why = f"{file.path} is streamed, not cached: {self.cache.why_full()}"
                if not or_memory:
                    raise DiskFull(why, code="cache-full")
                self.repeats.log(logging.WARNING, "cache-full", why)
                return self._get(file, index)
            try:
                data = self._get(file, index)
                try:
                    sparse_file.write(index, data, hole=chunk.digest == zero_digest(chunk.length))
                except DiskFull as error:
                    self.repeats.log(logging.WARNING, error.code, f"{file.path} is served from memory: {error}")
                    return data
            finally:
                self.cache.release_room(chunk.length)
        return None

    @staticmethod
    def source_of_last() -> str:
        """Return the source of the chunk of this thread's last `fill`: one of `wire.SOURCES`."""
        source: str = getattr(_local, "source", "other")
        return source

    def _get(self, file: File, index: int) -> bytes | memoryview:
        chunk = file.chunks[index]
        start = time.monotonic()
        data = self._from_origin(file, index)
        if data is None:
            data = self._from_store(file, index)
            _local.source = "peer" if self.source.checked() else "store"
            self.stats.tiers[_local.source] += chunk.length
        else:
            self.stats.tiers["origin"] += chunk.length
            _local.source = "origin"
        self.stats.latency.add(time.monotonic() - start)
        self.stats.fetches += 1
        return data

    def _from_store(self, file: File, index: int) -> bytes | memoryview:
        chunk = file.chunks[index]

        def attempt(fresh: bool) -> bytes | memoryview:
            try:
                data = retrying(
                    lambda: self.source.fetch(file, index, fresh=fresh), self.policy, on_retry=self._retried
                )
            except Undecodable as error:
                raise self._quarantine(file, index, error.body, str(error)) from error
            if not self.source.checked() and not self._matches(file, index, data):
                expected = chunk.digest or (self.digests.expected(file, index) if self.digests else "")
                raise self._quarantine(file, index, data, mismatch(data, expected, chunk.length))
            return data

        try:
            return attempt(False)
        except Integrity as error:
            self.repeats.log(logging.WARNING, error.code, f"{error}; fetching it once more")
            return attempt(True)

    def _verify(self, file: File, index: int, data: bytes) -> bool:
        """Return whether bytes that survived a power cut are the chunk.

        Without a recorded digest nothing can be verified: the next fetch records it again.
        """
        if not file.chunks[index].digest and (self.digests is None or not self.digests.expected(file, index)):
            return False
        return self._matches(file, index, data)

    def verify_whole(self, sparse_file: AnySparseFile) -> None:
        """Hash a complete file of a source that gives a digest of whole files; forget all of it if it differs.

        Raises Integrity then. After a second time the file is refused: the source does not have what it says.
        """
        file = sparse_file.file
        why = mismatch_of(file, sparse_file.data_fd)
        if not why:
            return
        sparse_file.revoke()
        if self.digests is not None:
            self.digests.forget(file)
        self.stats.quarantined += 1
        again = "; it is refused from now on" if file.digest in self.wrong else "; it is fetched again"
        self.wrong[file.digest] = self.wrong.get(file.digest, 0) + 1
        raise Integrity(f"{file.path}, all of it from {self.source.store.url}, {why}{again}")

    def _quarantine(self, file: File, index: int, body: bytes | memoryview, why: str) -> Integrity:
        """Quarantine a body and return the Integrity error that reports it."""
        self.stats.quarantined += 1
        name = file.chunks[index].digest or f"{file.digest}-{index}"
        where = self.cache.quarantine(name, body, f"chunk {index} of {file.path}, from {self.source.store.url}: {why}")
        return Integrity(f"chunk {name[:12]} of {file.path} does not hash to its digest: {why}; kept as {where}")

    def _matches(self, file: File, index: int, data: bytes | memoryview) -> bool:
        """Return whether `data` is the chunk. The first read of a read-through chunk records its digest."""
        chunk = file.chunks[index]
        if len(data) != chunk.length:
            return False
        if chunk.digest:
            return digest_of(data) == chunk.digest
        if len(file.chunks) == 1 and mismatch_in_memory(file, data):
            return False
        assert self.digests is not None
        expected = self.digests.expected(file, index)
        if not expected:
            self.digests.record(file, index, data)
            return True
        return digest_of(data) == expected

    def _from_origin(self, file: File, index: int) -> bytes | memoryview | None:
        """Read and verify the chunk from the file it was imported from; None if that file has changed."""
        found = self.origins.get(file.path)
        if found is None:
            return None
        with open_origin(*found) as fd:
            if fd is None:
                return None
            chunk = file.chunks[index]
            data = os.pread(fd, chunk.length, file.offsets[index])
            return data if self._matches(file, index, data) else None

    def _retried(self, error: Temporary, attempt: int) -> None:
        self.stats.retries += 1
        self.repeats.log(logging.WARNING, error.code, f"retrying: {error}")


@contextlib.contextmanager
def open_origin(path: str, stats: list[int]) -> Iterator[int | None]:
    """Yield a descriptor of the original file, or None if it is gone or its size, mtime, ctime or inode differ."""
    try:
        # Not blocking: a pipe may be in the original's place, and opening a pipe blocks forever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield fd if fingerprint(os.fstat(fd)) == stats else None
    finally:
        os.close(fd)
