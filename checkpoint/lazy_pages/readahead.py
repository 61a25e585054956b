"""Read source pages into the page cache ahead of the copier, so that the copier never waits for a disk or a network.

Standard library only. Readers' threads touch only this process's read-only mappings of image files. Only the main
thread places pages and reads events, so they need no common lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections import deque
from collections.abc import Callable

from checkpoint.files import Fingerprint, fingerprint
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.residency import ResidencyBitmap

# Readahead size: large enough for full disk speed, small enough that a fault's own read does not wait long behind it.
_ADVISE = 8 << 20
# Maximum bytes requested but not yet waited for: the disk's queue must not run empty, nor memory fill with pages read
# too early.
_WINDOW = 512 << 20


class Waker:
    """Wakes the page server's loop from any thread.

    Every object that may wake it keeps the descriptor open, so its number is never reused.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.fd, 1)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Source:
    """One image file, mapped shared, so that all replicas on a host read the same copy in the page cache.

    It stays mapped while it is referenced, so a thread that still reads ahead never meets another mapping in its
    place.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = self.address = self.size = -1
        self.address, self.size = uffd.map_file(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def fingerprint(self) -> Fingerprint:
        """Return the file's fingerprint. Raises OSError."""
        return fingerprint(os.fstat(self._fd))

    def resident(self, offset: int, length: int) -> bool:
        """Return whether a copy from there would not wait for a disk."""
        return uffd.resident(self.address + offset, length)

    def absent(self, offset: int, length: int) -> bool:
        """Return whether the range must not be read yet.

        That is the case while the file is still being filled (checkpoint.lazy_pages.residency).
        """
        return False

    def advise(self, offset: int, length: int) -> None:
        """Start reading the range; return without waiting for it."""
        for at in range(offset, offset + length, _ADVISE):
            os.posix_fadvise(self._fd, at, min(_ADVISE, offset + length - at), os.POSIX_FADV_WILLNEED)

    def populate(self, offset: int, length: int) -> int:
        """Wait until the range is in the page cache and mapped here.

        Return an errno if it cannot be read, else 0.
        """
        return uffd.populate(self.address + offset, length)

    def __del__(self) -> None:
        if self.size > 0:
            uffd.unmap(self.address, self.size)
        if self._fd >= 0:
            os.close(self._fd)


class DownloadingSource(Source):
    """A page file that is being filled. No page is read before it is in place."""

    def __init__(self, path: str, residency: ResidencyBitmap) -> None:
        super().__init__(path)
        self.name = f"images/{os.path.basename(path)}"
        self.residency = residency

    def resident(self, offset: int, length: int) -> bool:
        return self.residency.has(self.name, offset, length)

    def absent(self, offset: int, length: int) -> bool:
        return not self.residency.has(self.name, offset, length)


def open_source(path: str, residency: ResidencyBitmap | None) -> Source:
    """Open the page file at `path`; with a bitmap, as one that is being filled."""
    return DownloadingSource(path, residency) if residency else Source(path)


FAILED = -1
"""Reserved job number: a fetcher's thread has ended."""
Job = tuple[int, list[tuple[Source, int, int]]]
"""(a number chosen by the caller, [(source, offset, length)])"""


class PageReader:
    """Reads the pages of submitted jobs, and notifies its caller of finished ones."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._done: deque[tuple[int, int, int]] = deque()  # (number, errno, bytes that were not resident before)

    def start(self) -> None:
        """Start the threads, if any."""

    def stop(self) -> None:
        """Drop the jobs not yet begun. Threads end, but are not joined."""
        raise NotImplementedError

    def submit(self, number: int, parts: list[tuple[Source, int, int]]) -> None:
        """Add a job. A finished one calls `notify`."""
        raise NotImplementedError

    def collect(self) -> tuple[list[int], int]:
        """Return the numbers of the jobs finished since, and the bytes that were not resident when submitted.

        Raises OSError if an image file cannot be read.
        """
        numbers, cold = [], 0
        while self._done:
            number, code, absent = self._done.popleft()
            if code:
                raise OSError(code, f"an image file cannot be read: {os.strerror(code)}")
            numbers.append(number)
            cold += absent
        return numbers, cold

    def _finish(self, number: int, code: int, absent: int) -> None:
        self._done.append((number, code, absent))
        self._notify()


class Fetcher(PageReader):
    """Reads local files: a thread populates the jobs' ranges in order.

    A second thread requests the following jobs from the disk: one job at a time, with a wait after each, reads at
    half the disk's speed.
    """

    def __init__(self, name: str, notify: Callable[[], None]) -> None:
        super().__init__(notify)
        self.name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._requested: queue.SimpleQueue[tuple[Job, int] | None] = queue.SimpleQueue()
        self._in_flight = 0  # bytes requested and not yet waited for
        self._room = threading.Condition()
        self._stopping = False

    def submit(self, number: int, parts: list[tuple[Source, int, int]]) -> None:
        self._jobs.put((number, parts))

    def stop(self) -> None:
        with self._room:
            self._stopping = True
            self._room.notify()
        self._jobs.put(None)

    def start(self) -> None:
        try:
            for work, name in ((self._populate, self.name), (self._request, f"{self.name}-request")):
                threading.Thread(target=self._run, args=(work,), name=name, daemon=True).start()
        except RuntimeError:  # no more threads
            self._finish(FAILED, errno.EAGAIN, 0)

    def _run(self, work: Callable[[], None]) -> None:
        """Run one thread's work, and report an error to the caller as a FAILED job."""
        try:
            work()
        except OSError as error:
            self._finish(FAILED, error.errno or errno.EIO, 0)
        except Exception:
            self._finish(FAILED, errno.EIO, 0)
            raise

    def _populate(self) -> None:
        while True:
            requested = self._requested.get()
            if requested is None or self._stopping:
                return
            (number, parts), absent = requested
            failed = 0
            for source, offset, length in parts:
                failed = source.populate(offset, length) or failed
            with self._room:
                self._in_flight -= absent
                self._room.notify()
            self._finish(number, failed, absent)

    def _request(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None or self._stopping:
                self._requested.put(None)
                return
            parts = [part for part in job[1] if not part[0].resident(part[1], part[2])]
            absent = sum(length for _, _, length in parts)
            with self._room:
                self._room.wait_for(lambda: self._in_flight < _WINDOW or self._stopping)
                self._in_flight += absent
            for source, offset, length in parts:
                source.advise(offset, length)
            self._requested.put((job, absent))


class DownloadWaiter(PageReader):
    """Waits for pages to arrive, without a thread.

    `ask`, if given, is called for missing pages: (name of the file, offset, length).
    """

    def __init__(self, notify: Callable[[], None], ask: Callable[[str, int, int], None] | None = None) -> None:
        super().__init__(notify)
        self._ask = ask
        # Each job, its missing parts (the last is checked first), and the bytes that were missing.
        self._jobs: list[tuple[Job, list[tuple[Source, int, int]], int]] = []

    def stop(self) -> None:
        self._ask, self._jobs = None, []

    def submit(self, number: int, parts: list[tuple[Source, int, int]]) -> None:
        absent = [part for part in reversed(parts) if not part[0].resident(part[1], part[2])]
        if self._ask:
            for source, offset, length in absent:
                assert isinstance(source, DownloadingSource)
                self._ask(source.name, offset, length)
        self._jobs.append(((number, parts), absent, sum(length for _, _, length in absent)))
        if not absent:
            self.check()

    def check(self) -> None:
        """Finish the jobs whose pages have all arrived."""
        waiting = []
        for job, absent, cold in self._jobs:
            while absent and absent[-1][0].resident(absent[-1][1], absent[-1][2]):
                absent.pop()
            if absent:
                waiting.append((job, absent, cold))
                continue
            number, parts = job
            failed = 0
            for source, offset, length in parts:
                failed = uffd.populate(source.address + offset, length) or failed
            self._finish(number, failed, cold)
        self._jobs = waiting
