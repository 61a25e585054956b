"""Handle a mount's requests, independent of the transport: open, read, wait for chunks, record first touches.

A read whose chunks are present is answered at once with a Span of the cache file, which the transport passes to the kernel:
the bytes need not pass through this process. Any other read is deferred, the fetcher gets a request, and the thread that
receives the last missing chunk answers. No thread ever blocks, so a stalled network cannot stop reads of present chunks.
Every deferred read has a deadline.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lazyfs.cache.cache import PRESENT, AnyImage, Cache
from lazyfs.cache.slots import SlotMemory
from lazyfs.content.manifest import File, Manifest
from lazyfs.content.stat_index import is_unchanged
from lazyfs.errors import Permanent
from lazyfs.fetch import wire
from lazyfs.fetch.access_log import Trace
from lazyfs.fetch.chunk import open_origin
from lazyfs.fetch.supervisor import FetcherLink
from lazyfs.logs import Repeats
from lazyfs.mount.config import MountConfig
from lazyfs.mount.metrics import Histogram
from lazyfs.mount.tree import Node, Tree

log = logging.getLogger("lazyfs.mount.service")


class Span(NamedTuple):
    """Bytes in a file of this host.

    `fd` is valid until the reply is sent: the kernel closes the open only then.
    """

    fd: int
    offset: int
    size: int


def read_span(span: Span) -> bytes:
    """Read the bytes of a span.

    Raises OSError if they cannot be read: a failing disk, or a truncated original.
    """
    data = os.pread(span.fd, span.size, span.offset)
    if len(data) != span.size:
        raise OSError(errno.EIO, "the file is shorter than it was")
    return data


# A reply is data, a span, or an errno. It is called exactly once, from any thread.
Reply = Callable[[Span | bytes | int], None]
_LOOKAHEAD = (2, 32)
_GIVEN_UP_S = 1.0
# A fetcher sends its counters every second, once it has the manifest (within the fetch limit).
_SILENT_S = 10.0


@dataclass
class Waiter:
    """One deferred read."""

    reply: Reply
    opened: Opened
    offset: int
    size: int
    missing: set[int]
    deadline: float
    started: float
    unique: int


@dataclass
class Counters:
    """Counters since the mount began: bytes and reads by how they were answered, and waiting times."""

    reads: int = 0
    bytes_read: int = 0
    hits: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    failed: int = 0
    opens: int = 0
    native_opens: int = 0
    streamed: int = 0
    first_byte_s: float = 0.0


class Backing:
    """An open file that holds (or will hold) the bytes of one manifest file."""

    def __init__(self, fd: int, image: AnyImage | None) -> None:
        self.fd = fd
        self.image = image
        # Only lazyfs writes to a cache file, which may have no descriptor (full disk).
        self._written = self._stamp() if image is None else None

    def _stamp(self) -> tuple[int, int]:
        st = os.fstat(self.fd)
        return st.st_size, st.st_mtime_ns

    def changed(self) -> bool:
        """Return whether an original was written to since it was opened.

        A replaced or removed one keeps its bytes.
        """
        return self.image is None and self._stamp() != self._written

    def complete(self) -> bool:
        """Return whether every byte may be read."""
        return self.image is None or self.image.complete()

    def close(self) -> None:
        """Close the descriptor; a cache file's pin is released with it."""
        if self.image is not None:
            self.image.close()
        else:
            os.close(self.fd)


@dataclass
class Opened:
    """One inode while the kernel has it open.

    `cached` counts opens served by reads, `native` counts passthrough opens.
    """

    node: Node
    file: File
    backing: Backing
    cached: int = 0
    native: int = 0
    backing_id: int = 0
    last_chunk: int = -2
    window: int = _LOOKAHEAD[0]
    # Number of opens in progress, which keep it from being closed.
    holds: int = 0
    whole: bool = False
    touched: set[int] = field(default_factory=set)


class Service:
    """State and request handling of one mount.

    `link` is the fetcher. All public methods may be called from any thread.
    """

    def __init__(
        self, config: MountConfig, manifest: Manifest, cache: Cache, link: FetcherLink, memory: SlotMemory
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.tree = Tree(manifest)
        self.cache = cache
        self.link = link
        self.memory = memory
        self.starved: list[tuple[int, int]] = []
        # Chunks that readers wait for but that could not be requested: the fetcher's socket was full, or it is being replaced.
        self.unsent: dict[tuple[int, int], None] = {}
        self.repeats = Repeats(log)
        # Called after the last close of a file, before its backing is closed.
        self.on_closed: Callable[[Opened], None] = lambda opened: None
        self.streaming = False
        self.counters = Counters()
        self.waits = Histogram()
        self.waited_for = dict.fromkeys(wire.SOURCES, 0.0)
        self.started = time.monotonic()
        self.last_use = self.started
        self.lock = threading.Lock()
        self.open_files: dict[int, Opened] = {}
        self.waiting: dict[tuple[int, int], list[Waiter]] = {}
        self.by_unique: dict[int, Waiter] = {}
        # Chunks that a read has just waited for in vain, and until when that is remembered.
        self.given_up: dict[tuple[int, int], float] = {}
        self.origins: dict[str, tuple[str, list[int]]] = {}
        self.trace = Trace(Path(config.home) / "traces" / f"{config.manifest}.json", record=config.record)
        self.fetcher_stats: dict[str, int] = {}
        link.on_answer = self._answered

    # -- opening

    def open(self, node: Node, *, may_pass: bool) -> tuple[Opened, bool]:
        """Open a file; return its state and whether this open is to be passed through.

        May block on the disk, or on a network file system that holds the original. Raises Permanent (source-changed) if the
        original was written to while open, or what the cache raises.
        """
        opened = self._hold(node)
        try:
            if opened.backing.changed():
                # The kernel's page cache of an open inode may hold the old bytes.
                raise Permanent(
                    f"{opened.file.path}: its original was written to while it is open; "
                    "once nobody has it open, the imported bytes are served again",
                    code="source-changed",
                )
            with self.lock:
                # The kernel refuses to mix both on one inode: while cached opens last, all opens are cached.
                native = may_pass and node.size > 0 and opened.cached == 0 and opened.backing.complete()
                if native:
                    opened.native += 1
                    self.counters.native_opens += 1
                else:
                    opened.cached += 1
                self.counters.opens += 1
            return opened, native
        finally:
            with self.lock:
                opened.holds -= 1
            self._close_unused(opened)

    def _hold(self, node: Node) -> Opened:
        """Return the file's state, which is not closed while it is held."""
        assert node.file is not None
        with self.lock:
            self.last_use = time.monotonic()
            opened = self.open_files.get(node.ino)
            if opened is not None:
                opened.holds += 1
                return opened
        backing = self._backing(node.file)
        with self.lock:
            opened = self.open_files.get(node.ino)
            spare = None if opened is None else backing
            if opened is None:
                opened = self.open_files[node.ino] = Opened(node, node.file, backing)
            opened.holds += 1
        if spare is not None:
            # Another thread has opened it meanwhile.
            spare.close()
        return opened

    def _backing(self, file: File) -> Backing:
        found = self.origins.get(file.path)
        if found is not None:
            with open_origin(*found) as fd:
                if fd is not None:
                    return Backing(os.dup(fd), None)
        image = self.cache.open_any(file)
        image.read_only()
        return Backing(image.data_fd, image)

    def release(self, opened: Opened, *, native: bool) -> None:
        """Count a close of the inode by the kernel. The last one closes the backing."""
        with self.lock:
            self.last_use = time.monotonic()
            if native:
                opened.native -= 1
            else:
                opened.cached -= 1
        self._close_unused(opened)

    def _close_unused(self, opened: Opened) -> None:
        with self.lock:
            if opened.cached or opened.native or opened.holds or self.open_files.get(opened.node.ino) is not opened:
                return
            del self.open_files[opened.node.ino]
        self.on_closed(opened)
        # No reply can still need it: the kernel sends a release only after every read of the open was answered.
        opened.backing.close()

    # -- reading

    def read(self, opened: Opened, offset: int, size: int, unique: int, reply: Reply) -> None:
        """Answer a read, now or when its chunks are present."""
        counters = self.counters
        counters.reads += 1
        if opened.whole and opened.backing.complete():
            # The fast path for complete files: it decides their throughput.
            size = max(0, min(size, opened.file.size - offset))
            counters.bytes_read += size
            counters.hits += 1
            reply(Span(opened.backing.fd, offset, size) if size else b"")
            return
        self._read(opened, offset, size, unique, reply, time.monotonic())

    def _read(self, opened: Opened, offset: int, size: int, unique: int, reply: Reply, started: float) -> None:
        backing, file = opened.backing, opened.file
        end = min(file.size, offset + size)
        if offset >= end:
            reply(b"")
            return
        image = backing.image
        if image is None or image.complete():
            # While an access log is recorded, first touches of complete files are recorded too.
            opened.whole = not self.trace.recording or len(opened.touched) == len(file.chunks)
            self.counters.hits += 1
            self._serve(opened, offset, end, unique, reply, started)
            if self.trace.recording:
                self._touch(opened, offset, end)
            return
        first = bisect_right(file.offsets, offset) - 1
        last = bisect_right(file.offsets, end - 1) - 1
        self._touch(opened, offset, end)
        missing = {i for i in range(first, last + 1) if not self._here(opened, image, i)}
        if not missing:
            self.counters.hits += 1
            self._serve(opened, offset, end, unique, reply, started)
            self._look_ahead(opened, image, first, last)
            return
        if any(key[0] == opened.node.index and key[1] in missing for key in self.given_up):
            # After a failed readahead the kernel repeats the page that the reader wanted: do not wait a second time.
            self.counters.failed += 1
            reply(errno.ETIMEDOUT)
            return
        deadline = started + self.config.read_limit_s
        waiter = Waiter(reply, opened, offset, end - offset, missing, deadline, started, unique)
        with self.lock:
            self.counters.waits += 1
            self.by_unique[unique] = waiter
            for index in missing:
                self.waiting.setdefault((opened.node.index, index), []).append(waiter)
        for index in sorted(missing):
            self._request(wire.DEMAND, opened.node.index, index)
        self._look_ahead(opened, image, first, last)
        # A chunk may have arrived between the check and the registration.
        for index in missing.copy():
            if self._here(opened, image, index):
                self._arrived(opened.node.index, index)

    def _here(self, opened: Opened, image: AnyImage, index: int) -> bool:
        return image.state(index) == PRESENT or self.memory.holds((opened.node.index, index))

    def _request(self, kind: int, file: int, chunk: int) -> None:
        slot = self.memory.lend((file, chunk))
        if not self.link.request(kind, file, chunk, slot):
            self.memory.take_back((file, chunk), slot)
            if kind == wire.DEMAND:
                with self.lock:
                    self.unsent[file, chunk] = None

    def _serve(self, opened: Opened, offset: int, end: int, unique: int, reply: Reply, started: float) -> None:
        """Answer a read whose chunks are present, from the cache file or, if the disk was full, from memory."""
        counters = self.counters
        data: Span | bytes | None = Span(opened.backing.fd, offset, end - offset)
        if not opened.backing.complete():
            try:
                data = self._gather(opened, offset, end)
            except OSError as error:
                # This may be the thread that receives the fetcher's answers, which every other reader depends on.
                log.error("%s: %d bytes at %d: %s", opened.file.path, end - offset, offset, error.strerror)
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

    def _gather(self, opened: Opened, offset: int, end: int) -> Span | bytes | None:
        image, file = opened.backing.image, opened.file
        assert image is not None
        first = bisect_right(file.offsets, offset) - 1
        last = bisect_right(file.offsets, end - 1) - 1
        if all(image.state(i) == PRESENT for i in range(first, last + 1)):
            return Span(opened.backing.fd, offset, end - offset)
        parts: list[bytes] = []
        for index in range(first, last + 1):
            low, high = max(offset, file.offsets[index]), min(end, file.offsets[index + 1])
            if image.state(index) == PRESENT:
                parts.append(read_span(Span(opened.backing.fd, low, high - low)))
                continue
            base = file.offsets[index]
            part = self.memory.copy((opened.node.index, index), low - base, high - base, file.chunks[index].length)
            if part is None:
                return None
            parts.append(part)
        self.counters.streamed += end - offset
        return b"".join(parts)

    def _touch(self, opened: Opened, offset: int, end: int) -> None:
        file = opened.file
        for index in range(bisect_right(file.offsets, offset) - 1, bisect_right(file.offsets, end - 1)):
            if index not in opened.touched:
                opened.touched.add(index)
                self.trace.touch(opened.node.index, index)

    def _look_ahead(self, opened: Opened, image: AnyImage, first: int, last: int) -> None:
        """Request chunks ahead of a sequential reader, in a window that doubles as long as the reader stays sequential."""
        if last == opened.last_chunk:
            return
        low, high = _LOOKAHEAD
        if self.streaming:
            # Without the disk, readahead must fit beside the chunks being read.
            high = max(1, min(high, self.memory.count // 4))
        opened.window = min(high, opened.window * 2) if 0 <= first - opened.last_chunk <= 1 else low
        opened.last_chunk = last
        for index in range(last + 1, min(last + 1 + opened.window, len(opened.file.chunks))):
            if not self._here(opened, image, index):
                self._request(wire.AHEAD, opened.node.index, index)

    # -- waiting

    def _answered(self, kind: int, file: int, chunk: int, argument: int, slot: int, began: float) -> None:
        key = (file, chunk)
        if kind == wire.STATS:
            self.fetcher_stats[wire.STAT_NAMES[file]] = chunk << 31 | argument
            return
        if kind == wire.SLOT:
            self.streaming = True
            self.memory.filled(key, slot)
        else:
            self.memory.take_back(key, slot)
        if kind == wire.FAILED and argument == errno.ENOSPC:
            # No room on disk and no slot: wait for a slot, within the deadline.
            with self.lock:
                if key in self.waiting and key not in self.starved:
                    self.starved.append(key)
        elif kind == wire.FAILED:
            self._failed(file, chunk, argument or errno.EIO, began)
        else:
            self._arrived(file, chunk, wire.SOURCES[argument])
        self._feed_starved()

    def _ask_again(self) -> None:
        """Repeat the requests that could not be sent, as far as the socket has room."""
        while self.unsent:
            with self.lock:
                key = next(iter(self.unsent), None)
                if key is None:
                    return
                del self.unsent[key]
                wanted = key in self.waiting
            if wanted:
                self._request(wire.DEMAND, *key)
                if key in self.unsent:
                    return

    def _feed_starved(self) -> None:
        if self.unsent:
            self._ask_again()
        with self.lock:
            keys, self.starved = self.starved, []
        for key in keys:
            if self.memory.holds(key):
                self._arrived(*key)
            elif key in self.waiting and not self.memory.pending(key):
                slot = self.memory.lend(key)
                if slot < 0 or not self.link.request(wire.DEMAND, *key, slot):
                    self.memory.take_back(key, slot)
                    with self.lock:
                        self.starved.append(key)

    def _arrived(self, file: int, chunk: int, source: str = "other") -> None:
        ready: list[Waiter] = []
        with self.lock:
            for waiter in self.waiting.pop((file, chunk), ()):
                waiter.missing.discard(chunk)
                if not waiter.missing and self.by_unique.pop(waiter.unique, None) is waiter:
                    ready.append(waiter)
        for waiter in ready:
            waited = time.monotonic() - waiter.started
            self.counters.wait_seconds += waited
            self.waits.add(waited)
            # A read that spans chunks waited for the last one.
            self.waited_for[source] += waited
            end = waiter.offset + waiter.size
            self._serve(waiter.opened, waiter.offset, end, waiter.unique, waiter.reply, waiter.started)

    def _failed(self, file: int, chunk: int, number: int, began: float) -> None:
        """Fail the reads that began before this fetch.

        The failure does not apply to later ones: repeat their request.
        """
        with self.lock:
            waiters = self.waiting.pop((file, chunk), [])
            failed = [w for w in waiters if w.started <= began and self.by_unique.pop(w.unique, None) is w]
            later = [w for w in waiters if w.started > began]
            if later:
                self.waiting[file, chunk] = later
        for waiter in failed:
            self._fail(waiter, number)
        if later:
            self._request(wire.DEMAND, file, chunk)

    def _fail(self, waiter: Waiter, number: int) -> None:
        self.counters.failed += 1
        self._forget(waiter)
        waiter.reply(number)

    def _forget(self, waiter: Waiter) -> None:
        with self.lock:
            for index in waiter.missing:
                key = (waiter.opened.node.index, index)
                others = [w for w in self.waiting.get(key, ()) if w is not waiter]
                if others:
                    self.waiting[key] = others
                else:
                    self.waiting.pop(key, None)

    def interrupt(self, unique: int) -> None:
        """Fail a deferred read with EINTR, because its reader got a signal."""
        with self.lock:
            waiter = self.by_unique.pop(unique, None)
        if waiter is not None:
            self._fail(waiter, errno.EINTR)

    def expire(self) -> None:
        """Fail reads past their deadline; called about once a second."""
        self.repeats.tick()
        self._feed_starved()
        now = time.monotonic()
        with self.lock:
            late = [w for w in self.by_unique.values() if w.deadline < now]
            given_up = {key: until for key, until in self.given_up.items() if until > now}
            for waiter in late:
                del self.by_unique[waiter.unique]
                given_up |= {(waiter.opened.node.index, index): now + _GIVEN_UP_S for index in waiter.missing}
            self.given_up = given_up
            waits = bool(self.by_unique)
        for waiter in late:
            path, limit = waiter.opened.file.path, self.config.read_limit_s
            self.repeats.say(
                logging.ERROR, "late", f"{path}: no data within {limit:.0f} s for the read at {waiter.offset}"
            )
            self._fail(waiter, errno.ETIMEDOUT)
        if waits:
            self.link.replace_silent(self.config.fetch_limit_s + _SILENT_S)

    def resend(self) -> None:
        """Repeat the requests of all waiting reads, after the fetcher was replaced."""
        self.memory.reset()
        with self.lock:
            keys = list(self.waiting)
        for file, chunk in keys:
            self._request(wire.DEMAND, file, chunk)

    def in_place(self, file: File) -> bool:
        """Return whether a file is read at the place of its import."""
        origin = self.origins.get(file.path)
        return origin is not None and is_unchanged(*origin)

    def cached_share(self, node: Node) -> float:
        """Return the present share of a file, 0 to 1."""
        if node.file is None or not node.file.size:
            return 1.0
        if self.in_place(node.file):
            return 1.0
        return self.cache.present_bytes(node.file) / node.file.size
