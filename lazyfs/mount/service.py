"""Answer a mount's reads, independent of the transport: at once, or when the missing chunks have arrived.

A read whose chunks are present is answered at once with a Span of the sparse cache file, which the transport passes to the
kernel: the bytes need not pass through this process. Any other read is deferred, the fetcher gets a request, and the thread
that receives the last missing chunk answers. No thread ever blocks, so a stalled network cannot stop reads of present chunks.
Every deferred read has a deadline.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lazyfs.cache.cache import Cache
from lazyfs.cache.slots import SlotMemory
from lazyfs.cache.sparse_file import PRESENT, AnySparseFile
from lazyfs.content.manifest import Manifest
from lazyfs.counters import Counters, Histogram
from lazyfs.fetch import wire
from lazyfs.fetch.access_log import AccessLog
from lazyfs.fetch.supervisor import FetcherLink
from lazyfs.logs import RepeatLimiter
from lazyfs.mount.config import MountConfig
from lazyfs.mount.open_files import OpenFile, OpenFiles, Span, read_span
from lazyfs.mount.tree import Tree

log = logging.getLogger("lazyfs.mount.service")
# A reply is data, a span, or an errno. It is called exactly once, from any thread.
Reply = Callable[[Span | bytes | int], None]
# Least and most chunks that are read ahead of a sequential reader.
_READAHEAD = (2, 32)
_EXPIRED_S = 1.0
# A fetcher sends its counters every second, once it has the manifest (within the fetch limit).
_SILENT_S = 10.0


@dataclass
class DeferredRead:
    """A read that waits for chunks."""

    reply: Reply
    opened: OpenFile
    offset: int
    size: int
    missing: set[int]
    deadline: float
    started: float
    unique: int


class Service:
    """State and request handling of one mount.

    `link` is the fetcher. All public methods may be called from any thread.
    """

    def __init__(
        self, config: MountConfig, manifest: Manifest, cache: Cache, link: FetcherLink, memory: SlotMemory
    ) -> None:
        self.config = config
        self.tree = Tree(manifest)
        self.link = link
        self.memory = memory
        self.counters = Counters()
        self.files = OpenFiles(cache, self.counters)
        # Chunks that neither the disk nor a memory slot had room for.
        self.without_slot: list[tuple[int, int]] = []
        # Chunks that readers wait for but that could not be requested: the fetcher's socket was full, or it is being replaced.
        self.unsent: dict[tuple[int, int], None] = {}
        self.repeats = RepeatLimiter(log)
        self.streaming = False
        self.waits = Histogram()
        self.waited_for = dict.fromkeys(wire.SOURCES, 0.0)
        self.started = time.monotonic()
        self.lock = threading.Lock()
        self.waiting: dict[tuple[int, int], list[DeferredRead]] = {}
        self.by_unique: dict[int, DeferredRead] = {}
        # Chunks that a read has just failed to get in time, and until when that is remembered.
        self.expired: dict[tuple[int, int], float] = {}
        self.access_log = AccessLog(config.access_log, record=config.record)
        self.fetcher_stats: dict[str, int] = {}
        link.on_answer = self._on_answer

    # -- reading

    def read(self, opened: OpenFile, offset: int, size: int, unique: int, reply: Reply) -> None:
        """Answer a read, now or when its chunks are present."""
        counters = self.counters
        counters.reads += 1
        if opened.complete and opened.backing.complete():
            # The fast path for complete files: it decides their throughput.
            size = max(0, min(size, opened.file.size - offset))
            counters.bytes_read += size
            counters.hits += 1
            reply(Span(opened.backing.fd, offset, size) if size else b"")
            return
        self._read(opened, offset, size, unique, reply, time.monotonic())

    def _read(self, opened: OpenFile, offset: int, size: int, unique: int, reply: Reply, started: float) -> None:
        backing, file = opened.backing, opened.file
        end = min(file.size, offset + size)
        if offset >= end:
            reply(b"")
            return
        sparse_file = backing.sparse_file
        if sparse_file is None or sparse_file.complete():
            # While an access log is recorded, first touches of complete files are recorded too.
            opened.complete = not self.access_log.recording or len(opened.touched) == len(file.chunks)
            self.counters.hits += 1
            self._serve(opened, offset, end, unique, reply, started)
            if self.access_log.recording:
                self._touch(opened, file.chunk_range(offset, end))
            return
        wanted = file.chunk_range(offset, end)
        self._touch(opened, wanted)
        missing = {i for i in wanted if not self._available(opened, sparse_file, i)}
        if not missing:
            self.counters.hits += 1
            self._serve(opened, offset, end, unique, reply, started)
            self._read_ahead(opened, sparse_file, wanted)
            return
        if any(key[0] == opened.node.index and key[1] in missing for key in self.expired):
            # After a failed readahead the kernel repeats the page that the reader wanted: do not wait a second time.
            self.counters.failed += 1
            reply(errno.ETIMEDOUT)
            return
        deadline = started + self.config.read_limit_s
        read = DeferredRead(reply, opened, offset, end - offset, missing, deadline, started, unique)
        with self.lock:
            self.counters.waits += 1
            self.by_unique[unique] = read
            for index in missing:
                self.waiting.setdefault((opened.node.index, index), []).append(read)
        for index in sorted(missing):
            self._request(wire.ON_DEMAND, opened.node.index, index)
        self._read_ahead(opened, sparse_file, wanted)
        # A chunk may have arrived between the check and the registration.
        for index in missing.copy():
            if self._available(opened, sparse_file, index):
                self._on_chunk(opened.node.index, index)

    def _available(self, opened: OpenFile, sparse_file: AnySparseFile, index: int) -> bool:
        return sparse_file.state(index) == PRESENT or self.memory.holds((opened.node.index, index))

    def _request(self, kind: int, file: int, chunk: int) -> None:
        slot = self.memory.allocate((file, chunk))
        if not self.link.request(kind, file, chunk, slot):
            self.memory.free((file, chunk), slot)
            if kind == wire.ON_DEMAND:
                with self.lock:
                    self.unsent[file, chunk] = None

    def _serve(self, opened: OpenFile, offset: int, end: int, unique: int, reply: Reply, started: float) -> None:
        """Answer a read whose chunks are present, from the cache file or, if the disk was full, from memory."""
        counters = self.counters
        data: Span | bytes | None = Span(opened.backing.fd, offset, end - offset)
        if not opened.backing.complete():
            try:
                data = self._gather(opened, offset, end)
            except OSError as error:
                # This may be the thread that receives the fetcher's answers, which every other reader depends on.
                log.error(
                    "cannot read %d bytes at %d of %s: %s", end - offset, offset, opened.file.path, error.strerror
                )
                counters.failed += 1
                reply(error.errno or errno.EIO)
                return
        if data is None:
            # A slot was reused between arrival and answer: defer the read again with the same deadline.
            self._read(opened, offset, end - offset, unique, reply, started)
            return
        counters.bytes_read += end - offset
        if not counters.first_byte_s:
            counters.first_byte_s = time.monotonic() - self.started
        reply(data)

    def _gather(self, opened: OpenFile, offset: int, end: int) -> Span | bytes | None:
        sparse_file, file = opened.backing.sparse_file, opened.file
        assert sparse_file is not None
        wanted = file.chunk_range(offset, end)
        if all(sparse_file.state(i) == PRESENT for i in wanted):
            return Span(opened.backing.fd, offset, end - offset)
        parts: list[bytes] = []
        for index in wanted:
            low, high = max(offset, file.offsets[index]), min(end, file.offsets[index + 1])
            if sparse_file.state(index) == PRESENT:
                parts.append(read_span(Span(opened.backing.fd, low, high - low)))
                continue
            base = file.offsets[index]
            part = self.memory.copy((opened.node.index, index), low - base, high - base, file.chunks[index].length)
            if part is None:
                return None
            parts.append(part)
        self.counters.streamed += end - offset
        return b"".join(parts)

    def _touch(self, opened: OpenFile, wanted: range) -> None:
        for index in wanted:
            if index not in opened.touched:
                opened.touched.add(index)
                self.access_log.touch(opened.node.index, index)

    def _read_ahead(self, opened: OpenFile, sparse_file: AnySparseFile, wanted: range) -> None:
        """Request chunks ahead of a sequential reader, in a window that doubles as long as the reader stays sequential."""
        last = wanted[-1]
        if last == opened.last_chunk:
            return
        low, high = _READAHEAD
        if self.streaming:
            # Without the disk, readahead must fit beside the chunks being read.
            high = max(1, min(high, self.memory.count // 4))
        opened.window = min(high, opened.window * 2) if 0 <= wanted[0] - opened.last_chunk <= 1 else low
        opened.last_chunk = last
        for index in range(last + 1, min(last + 1 + opened.window, len(opened.file.chunks))):
            if not self._available(opened, sparse_file, index):
                self._request(wire.READAHEAD, opened.node.index, index)

    # -- waiting

    def _on_answer(self, kind: int, file: int, chunk: int, argument: int, slot: int, began: float) -> None:
        key = (file, chunk)
        if kind == wire.STATS:
            self.fetcher_stats[wire.STAT_NAMES[file]] = chunk << 31 | argument
            return
        if kind == wire.SLOT:
            self.streaming = True
            self.memory.filled(key, slot)
        else:
            self.memory.free(key, slot)
        if kind == wire.FAILED and argument == errno.ENOSPC:
            # No room on disk and no slot: wait for a slot, within the deadline.
            with self.lock:
                if key in self.waiting and key not in self.without_slot:
                    self.without_slot.append(key)
        elif kind == wire.FAILED:
            self._on_failure(file, chunk, argument or errno.EIO, began)
        else:
            self._on_chunk(file, chunk, wire.SOURCES[argument])
        self._retry_without_slot()

    def _send_unsent(self) -> None:
        """Repeat the requests that could not be sent, as far as the socket has room."""
        while self.unsent:
            with self.lock:
                key = next(iter(self.unsent), None)
                if key is None:
                    return
                del self.unsent[key]
                wanted = key in self.waiting
            if wanted:
                self._request(wire.ON_DEMAND, *key)
                if key in self.unsent:
                    return

    def _retry_without_slot(self) -> None:
        if self.unsent:
            self._send_unsent()
        with self.lock:
            keys, self.without_slot = self.without_slot, []
        for key in keys:
            if self.memory.holds(key):
                self._on_chunk(*key)
            elif key in self.waiting and not self.memory.allocated(key):
                slot = self.memory.allocate(key)
                if slot < 0 or not self.link.request(wire.ON_DEMAND, *key, slot):
                    self.memory.free(key, slot)
                    with self.lock:
                        self.without_slot.append(key)

    def _on_chunk(self, file: int, chunk: int, source: str = "other") -> None:
        ready: list[DeferredRead] = []
        with self.lock:
            for read in self.waiting.pop((file, chunk), ()):
                read.missing.discard(chunk)
                if not read.missing and self.by_unique.pop(read.unique, None) is read:
                    ready.append(read)
        for read in ready:
            waited = time.monotonic() - read.started
            self.counters.wait_seconds += waited
            self.waits.add(waited)
            # A read that spans chunks waited for the last one.
            self.waited_for[source] += waited
            end = read.offset + read.size
            self._serve(read.opened, read.offset, end, read.unique, read.reply, read.started)

    def _on_failure(self, file: int, chunk: int, number: int, began: float) -> None:
        """Fail the reads that began before this fetch.

        The failure does not apply to later ones: repeat their request.
        """
        with self.lock:
            reads = self.waiting.pop((file, chunk), [])
            failed = [read for read in reads if read.started <= began and self.by_unique.pop(read.unique, None) is read]
            later = [read for read in reads if read.started > began]
            if later:
                self.waiting[file, chunk] = later
        for read in failed:
            self._fail(read, number)
        if later:
            self._request(wire.ON_DEMAND, file, chunk)

    def _fail(self, read: DeferredRead, number: int) -> None:
        self.counters.failed += 1
        with self.lock:
            for index in read.missing:
                key = (read.opened.node.index, index)
                others = [other for other in self.waiting.get(key, ()) if other is not read]
                if others:
                    self.waiting[key] = others
                else:
                    self.waiting.pop(key, None)
        read.reply(number)

    def interrupt(self, unique: int) -> None:
        """Fail a deferred read with EINTR, because its reader got a signal."""
        with self.lock:
            read = self.by_unique.pop(unique, None)
        if read is not None:
            self._fail(read, errno.EINTR)

    def expire(self) -> None:
        """Fail reads past their deadline; called about once a second."""
        self.repeats.tick()
        self._retry_without_slot()
        now = time.monotonic()
        with self.lock:
            late = [read for read in self.by_unique.values() if read.deadline < now]
            expired = {key: until for key, until in self.expired.items() if until > now}
            for read in late:
                del self.by_unique[read.unique]
                expired |= {(read.opened.node.index, index): now + _EXPIRED_S for index in read.missing}
            self.expired = expired
            waits = bool(self.by_unique)
        for read in late:
            path, limit = read.opened.file.path, self.config.read_limit_s
            self.repeats.log(
                logging.ERROR, "late", f"{path}: the read at {read.offset} got no data within {limit:.0f} s"
            )
            self._fail(read, errno.ETIMEDOUT)
        if waits:
            self.link.replace_silent(self.config.fetch_limit_s + _SILENT_S)

    def resend(self) -> None:
        """Repeat the requests of all waiting reads, after the fetcher was replaced."""
        self.memory.reset()
        with self.lock:
            keys = list(self.waiting)
        for file, chunk in keys:
            self._request(wire.ON_DEMAND, file, chunk)
