"""Download an archive's chunks into a snapshot's folder, the most urgent first.

Each is verified before any byte of it can be read.

    download = Download(chunks, archive, layout, folder, links)
    download.begin(FIRST_TOKEN)             # workers fetch the files that CRIU reads, and the working set
    download.wait(STARTUP)                  # until everything of that or a higher urgency is in place
    download.prioritize(path, offset, n)    # a process waits for these bytes: fetch them next
    download.allow(BACKGROUND)              # now fetch the rest, at a limited rate

A chunk is named by the BLAKE3 of its plain bytes, which is checked after decompression. A chunk that differs is
quarantined and fetched once more, and a second mismatch is an error. The residency bitmap shared with page servers
(checkpoint.lazy_pages.residency) marks the pages in place. Data left by an earlier attempt is hashed before it is
used. A chunk with several places is fetched once. The first failure that outlasts its retries ends the download:
`failure` holds it, and listeners are called.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import stat
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError, Failed
from checkpoint.files import private_folder
from checkpoint.lazy_pages.residency import ResidencyBitmap
from checkpoint.store.layout import BYTES, INDEX, REST, Extent, Layout
from checkpoint.store.upload import Progress, translate_errors

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.content.manifest import Chunk, Manifest

log = logging.getLogger("quickthaw")

ON_DEMAND, STARTUP, FIRST_TOKEN, WARM, BACKGROUND = range(5)
"""Urgencies: a process waits for it; CRIU reads it; needed before the first token; needed soon after it; the rest."""
_ORDER = (ON_DEMAND, STARTUP, FIRST_TOKEN, WARM, BACKGROUND)
_WORKING_SET_FIRST = (ON_DEMAND, FIRST_TOKEN, STARTUP, WARM, BACKGROUND)
"""Every other worker prefers the working set, so that neither kind waits for the other's round trips."""
WORKERS = 12
"""Concurrent fetches while a process waits: enough to fill a link of 1 Gbit/s over 20 ms, few enough not to delay each other."""
WORKERS_BACKGROUND = 4
LIMIT_S = 30.0
"""Timeout of one chunk with all its retries, seconds: as long as a process may wait for a page."""
_GRACE_S = 5.0
_QUARANTINED_KEPT = 16
PAGE = 4096
_SMALL = 64 << 10
"""Writes up to this many bytes keep the interpreter lock. A working-set chunk has dozens of places; if each small write
to the page cache released the lock, a worker would wait for it each time among a dozen others, and the link was less
than half full."""
_pwrite = ctypes.PyDLL(None).pwrite
_pwrite.restype = ctypes.c_ssize_t
_pwrite.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]


class _Job:
    """One chunk and its places, as (file of the archive, offset there)."""

    __slots__ = ("chunk", "done", "places", "taken", "urgency")

    def __init__(self, chunk: Chunk, urgency: int) -> None:
        self.chunk = chunk
        self.urgency = urgency
        self.places: list[tuple[str, int]] = []
        self.taken = self.done = False


class Download:
    """A running download (see the module's docstring). Thread-safe.

    `folder` holds every directory of the archive, and possibly data of an earlier attempt. `rate` limits background
    fetches, in plain bytes per second; 0 means no limit.
    """

    def __init__(
        self,
        chunks: ChunkStore,
        archive: Manifest,
        layout: Layout | None,
        folder: Path,
        links: dict[str, str],
        *,
        rate: float = 0.0,
        workers: int = WORKERS,
        limit_s: float = LIMIT_S,
        quarantine: Path | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.chunks, self.archive, self.layout, self.folder = chunks, archive, layout, folder
        self.name = folder.name.removeprefix(".pull-")
        self.rate, self.workers, self.limit_s = rate, workers, limit_s
        self.quarantine, self.progress = quarantine, progress
        self.kept = self.fetched = self.moved = self.quarantined = 0
        self.failure: CheckpointError | None = None
        self.residency: ResidencyBitmap | None = None
        self.files: dict[str, tuple[int, int]] = {}
        """Files of the folder: size and mode."""
        self._listeners: list[Callable[[], None]] = []
        self._fds: dict[str, int] = {}
        self._fresh: set[str] = set()  # files that were empty before
        self._allowed = BACKGROUND
        self._closed = False
        self._residency_open = True
        self._not_before = 0.0
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._notifying = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._queues: list[deque[_Job]] = [deque() for _ in range(BACKGROUND + 1)]
        self._left = [0] * (BACKGROUND + 1)
        self._offsets: dict[str, tuple[int, ...]] = {}
        self._chunks: dict[str, tuple[Chunk, ...]] = {}
        self.size = self.done = 0
        for file in archive.files:
            if file.path not in links:
                self._plan(file.path, file.mode, file.size, file.chunks, file.offsets)
        for path, what in (layout.small if layout else {}).items():
            self.files[path] = what
        for job in self._jobs.values():
            self._queues[job.urgency].append(job)
            self._left[job.urgency] += 1

    def _plan(self, path: str, mode: int, size: int, chunks: tuple[Chunk, ...], offsets: tuple[int, ...]) -> None:
        if path == INDEX and self.layout:
            return
        if path != BYTES or not self.layout:
            self.files[self.layout.target(path) if self.layout else path] = (size, mode)
        self._offsets[path], self._chunks[path] = offsets, chunks
        self.size += size
        for chunk, offset in zip(chunks, offsets, strict=False):
            urgency = self._urgency(path, offset)
            job = self._jobs.get(chunk.digest)
            if job is None:
                job = self._jobs[chunk.digest] = _Job(chunk, urgency)
            job.urgency = min(job.urgency, urgency)
            job.places.append((path, offset))

    def _urgency(self, path: str, offset: int) -> int:
        if self.layout is None:
            return STARTUP
        if path == BYTES:
            return STARTUP if offset < self.layout.start else FIRST_TOKEN if offset < self.layout.first else WARM
        return BACKGROUND if path.endswith(REST) and self.layout.target(path) in self.layout.holes else STARTUP

    # The owner's side

    def begin(self, allowed: int = BACKGROUND, residency: Path | None = None) -> None:
        """Create the files, and start to fetch up to urgency `allowed`.

        `residency` is the path of the residency bitmap to create. Raises OSError, Integrity.
        """
        self._allowed = allowed
        for path, (size, _) in self.files.items():
            with self._opened(path) as fd:
                if os.fstat(fd).st_size != size or not _holds_data(fd, size):
                    self._fresh.add(path)
                    os.ftruncate(fd, 0)
                    os.ftruncate(fd, size)
        if residency is not None and self.layout is not None:
            self.residency = ResidencyBitmap.make(str(residency), self.layout.index.sizes)
        for index in range(self.workers):
            thread = threading.Thread(target=self._run_worker, args=(index,), name=f"download-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def on_progress(self, callback: Callable[[], None]) -> None:
        """Call `callback` from a worker's thread whenever pages have arrived, and at the end."""
        with self._changed:
            self._listeners.append(callback)

    def allow(self, allowed: int, rate: float | None = None) -> None:
        """Allow the workers to fetch less urgent chunks, too."""
        with self._changed:
            self._allowed = max(self._allowed, allowed)
            if rate is not None:
                self.rate = rate
            self._changed.notify_all()

    def prioritize(self, path: str, offset: int, length: int) -> None:
        """Fetch these bytes of a page file before anything else."""
        assert self.layout is not None
        end = offset + length
        with self._changed:
            while offset < end:
                stored, at, following = self.layout.locate(path, offset)
                job = self._jobs[self._chunks[stored][bisect_right(self._offsets[stored], at) - 1].digest]
                if not job.taken and job.urgency != ON_DEMAND:
                    self._left[job.urgency] -= 1
                    job.urgency = ON_DEMAND
                    self._left[ON_DEMAND] += 1
                    self._queues[ON_DEMAND].append(job)
                    self._changed.notify()
                offset += following

    def in_place(self, urgency: int) -> bool:
        """Return whether everything of this or higher urgency is in place."""
        return not any(self._left[: urgency + 1])

    def wait(self, urgency: int, limit_s: float | None = None) -> None:
        """Wait until everything of this or higher urgency is in place.

        Ends, because every fetch has a timeout.

        Raises the error that ended the download, or Failed (remote-slow) after `limit_s`.
        """
        deadline = time.monotonic() + limit_s if limit_s is not None else None
        with self._changed:
            while not self.in_place(urgency):
                self._raise_failure()
                left = 1.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise Failed(
                        "remote-slow",
                        f"{self.chunks.store.url} took longer than {limit_s:g} s; check the link, or pull the snapshot first",
                    )
                self._changed.wait(min(1.0, left))

    def wait_file(self, paths: Sequence[str]) -> str:
        """Wait until one of these files is complete, and return it. Raises the same errors as `wait`."""
        with self._changed:
            while True:
                for path in paths:
                    if self.is_complete(path):
                        return path
                self._raise_failure()
                self._changed.wait(1.0)

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._threads and not any(thread.is_alive() for thread in self._threads) and any(self._left):
            raise Failed("remote-failed", f"fetching {self.name}: every worker thread has ended")
        if self._closed:
            raise Failed("remote-stopped", f"fetching {self.name} was stopped")

    def close(self) -> None:
        """Stop the download. Workers finish their current chunk; nothing is written after this returns. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + self.limit_s + _GRACE_S
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in others):
            log.warning("fetching %s: a worker thread does not end; its files stay open", self.name)
            return
        with self._changed:  # both the owner and the thread in `RemoteSnapshot._run` may close
            fds, self._fds = self._fds, {}
            residency, self._residency_open = (self.residency if self._residency_open else None), False
        for fd in fds.values():
            os.close(fd)
        if residency:
            residency.close()

    def sync(self) -> None:
        """Set the modes and fsync the contents, once everything has arrived. Raises OSError."""
        for path, (_, mode) in self.files.items():
            with self._opened(path) as fd:
                if stat.S_IMODE(os.fstat(fd).st_mode) != mode & 0o777:
                    os.fchmod(fd, mode & 0o777)
                os.fdatasync(fd)

    def set_modes(self) -> None:
        """Set the files' modes before everything has arrived. Raises OSError."""
        for path, (_, mode) in self.files.items():
            (self.folder / path).chmod(mode & 0o777)

    def is_complete(self, path: str) -> bool:
        """Return whether a file is complete that is neither a page file nor a small file."""
        return all(self._jobs[chunk.digest].done for chunk in self._chunks.get(path, ()))

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Yield a descriptor of a file. Page files stay open, because they have many chunks."""
        fd = self._fds.get(path)
        if fd is not None:
            yield fd
            return
        fd = os.open(self.folder / path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if self.layout and path in self.layout.holes:
            self._fds[path] = fd  # first opened by `begin`, before there are workers
            yield fd
            return
        try:
            yield fd
        finally:
            os.close(fd)

    # The workers

    def _run_worker(self, index: int) -> None:
        order = _ORDER if index % 2 else _WORKING_SET_FIRST
        while (job := self._next(index, order)) is not None:
            try:
                with translate_errors(f"cannot fetch {self.name}"):
                    self._process(job)
            except CheckpointError as error:
                self._fail(error)
                return
            except Exception as error:
                if self._closed:
                    return  # `close` closed its connection
                log.exception("fetching %s", self.name)
                self._fail(Failed("remote-failed", f"fetching {self.name}: {error}"))
                return
            with self._changed:
                job.done = True
                self._left[job.urgency] -= 1
                self.done += job.chunk.length * len(job.places)
                self._changed.notify_all()
                listeners = list(self._listeners)
                progress = Progress(self.size, self.done, self.moved)
            self._notify(listeners, progress)

    def _notify(self, listeners: Sequence[Callable[[], None]], progress: Progress | None = None) -> None:
        """Call the listeners.

        Log exceptions: this worker must continue, because processes wait for its chunks.
        """
        try:
            for listener in listeners:
                listener()
            if self.progress and progress:
                with self._notifying:
                    self.progress(progress)
        except Exception:
            log.exception("fetching %s: a listener failed", self.name)

    def _next(self, index: int, order: tuple[int, ...]) -> _Job | None:
        with self._changed:
            while not self._closed and self.failure is None:
                now = time.monotonic()
                for urgency in order:
                    if urgency > self._allowed:
                        continue
                    queue = self._queues[urgency]
                    while queue and (queue[0].taken or queue[0].urgency != urgency):
                        queue.popleft()
                    if not queue:
                        continue
                    if urgency == BACKGROUND and self.rate and (index >= WORKERS_BACKGROUND or now < self._not_before):
                        continue
                    job = queue.popleft()
                    job.taken = True
                    if urgency == BACKGROUND and self.rate:
                        self._not_before = max(self._not_before, now - 0.5) + job.chunk.length / self.rate
                    return job
                if not any(self._left):
                    return None
                self._changed.wait(max(0.001, self._not_before - now) if self._not_before > now else 1.0)
            return None

    def _fail(self, error: CheckpointError) -> None:
        with self._changed:
            if self.failure is None and not self._closed:
                self.failure = error
            self._changed.notify_all()
            listeners = list(self._listeners)
        self._notify(listeners)

    def _extents(self, path: str, offset: int, length: int) -> list[Extent]:
        return self.layout.extents(path, offset, length) if self.layout else [(path, offset, 0, length)]

    def _process(self, job: _Job) -> None:
        from lazyfs.content.chunk_store import zero_digest

        chunk = job.chunk
        zero = chunk.digest == zero_digest(chunk.length)
        missing = []
        for path, offset in job.places:
            extents = self._extents(path, offset, chunk.length)
            fresh = all(name in self._fresh for name, _, _, _ in extents)
            if fresh and zero:
                self._mark(extents)
            elif not fresh and self._already_has(extents, chunk):
                self.kept += chunk.length
                self._mark(extents)
            else:
                missing.append(extents)
        if not missing:
            return
        data = bytes(chunk.length) if zero else self._fetch(chunk)
        for extents in missing:
            self._write(data, extents)
            self._mark(extents)

    def _write(self, data: bytes | bytearray | memoryview, extents: list[Extent]) -> None:
        view = memoryview(data)
        address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value if isinstance(data, bytes) else None
        for name, at, source, length in extents:
            fd = self._fds.get(name)
            if address and fd is not None and length <= _SMALL and _pwrite(fd, address + source, length, at) == length:
                continue
            with self._opened(name) as fd:
                _write_fully(fd, view[source : source + length], at)

    def _already_has(self, extents: list[Extent], chunk: Chunk) -> bool:
        from lazyfs.content.chunk_store import digest_of

        found = bytearray(chunk.length)
        view = memoryview(found)
        for name, at, source, length in extents:
            with self._opened(name) as fd:
                if os.preadv(fd, [view[source : source + length]], at) != length:
                    return False
        return digest_of(view) == chunk.digest

    def _mark(self, extents: list[Extent]) -> None:
        if self.residency:
            for name, at, _, length in extents:
                self.residency.mark(name, at, length)

    def _fetch(self, chunk: Chunk) -> bytes | bytearray | memoryview:
        import lazyfs.errors
        from lazyfs.content.chunk_store import digest_of
        from lazyfs.content.manifest import RAW, ZSTD
        from lazyfs.fetch.chunk import scratch
        from lazyfs.stores.retry import RetryPolicy, retrying

        deadline = time.monotonic() + self.limit_s

        def body() -> tuple[int, bytes | memoryview]:
            if self._closed:
                raise lazyfs.errors.Permanent("stopped")
            for encoding in (chunk.encoding, ZSTD if chunk.encoding == RAW else RAW):
                with contextlib.suppress(lazyfs.errors.NotFound):
                    return encoding, self.chunks.body(chunk.digest, encoding, scratch())
            raise lazyfs.errors.NotFound(f"chunk {chunk.digest[:12]} is not in {self.chunks.store.url}")

        for last in (False, True):
            encoding, stored = retrying(body, RetryPolicy(limit=max(0.1, deadline - time.monotonic())))
            try:
                data = self.chunks.decode(chunk.digest, stored, encoding, chunk.length)
                if digest_of(data) != chunk.digest:
                    raise lazyfs.errors.Integrity(
                        f"chunk {chunk.digest[:12]} in {self.chunks.store.url} does not match its digest"
                    )
            except lazyfs.errors.Integrity as error:
                where = self._quarantine(chunk.digest, stored)
                if last:
                    raise
                log.warning("%s%s; fetching it once more", error, f"; kept as {where}" if where else "")
                continue
            with self._changed:
                self.fetched += chunk.length
                self.moved += len(stored)
            return data
        raise AssertionError("unreachable")

    def _quarantine(self, digest: str, stored: bytes | memoryview) -> Path | None:
        with self._changed:
            self.quarantined += 1
        if self.quarantine is None:
            return None
        try:
            private_folder(self.quarantine)
            path = self.quarantine / f"{digest}.{time.time_ns()}"
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(stored)
            for old in sorted(self.quarantine.iterdir(), key=lambda p: p.name.rpartition(".")[2])[:-_QUARANTINED_KEPT]:
                old.unlink(missing_ok=True)
        except OSError:
            return None  # the copy only serves for inspection
        return path


def _holds_data(fd: int, size: int) -> bool:
    if not size:
        return True
    try:
        return os.lseek(fd, 0, os.SEEK_DATA) < size
    except OSError:
        return False  # one hole


def _write_fully(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
