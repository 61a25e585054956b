"""Read source pages into the page cache ahead of the copier, so that the copier never waits for a disk or a network.

Standard library only. A fetcher's threads touch only this process's read-only mappings of image files. Only the
copier places pages and reads events, so they need no common lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections import deque
from collections.abc import Callable

from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.residency import ResidencyBitmap

# Readahead size: large enough for full disk speed, small enough that a fault's own read does not wait long behind it.
_ADVISE = 8 << 20
# Maximum bytes requested but not yet waited for: the disk's queue must not run empty, nor memory fill with pages read
# too early.
_WINDOW = 512 << 20


class Bell:
    """Wakes one daemon's loop from any thread.

    Every object that may ring keeps the descriptor open, so its number is never reused.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.fd, 1)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def fingerprint(info: os.stat_result) -> list[int]:
    """Return a file's device, inode, size, mtime and ctime in ns."""
    return [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]


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

    def fingerprint(self) -> list[int]:
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


class ArrivingSource(Source):
    """A page file that is being filled. No page is read before it is in place."""

    def __init__(self, path: str, presence: ResidencyBitmap) -> None:
        super().__init__(path)
        self.name = f"images/{os.path.basename(path)}"
        self.presence = presence

    def resident(self, offset: int, length: int) -> bool:
        return self.presence.has(self.name, offset, length)

    def absent(self, offset: int, length: int) -> bool:
        return not self.presence.has(self.name, offset, length)


def open_source(path: str, presence: ResidencyBitmap | None) -> Source:
    """Open the page file at `path`; with a bitmap, as one that is being filled."""
    return ArrivingSource(path, presence) if presence else Source(path)


FAILED = -1
"""Reserved job number: a fetcher's thread has ended."""
Job = tuple[int, list[tuple[Source, int, int]]]
"""(a number chosen by the caller, [(source, offset, length)])"""


class Fetcher(threading.Thread):
    """Populates its jobs' ranges in order, and reports each finished job's number.

    A second thread requests the following jobs from the disk: one job at a time, with a wait after each, reads at
    half the disk's speed. `done` is a queue that the caller reads after `notify` was called: (number, errno, bytes
    that were not in the page cache before).
    """

    def __init__(self, name: str, notify: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.done: deque[tuple[int, int, int]] = deque()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[tuple[Job, int] | None] = queue.SimpleQueue()
        self._notify = notify
        self._under_way = 0  # bytes requested and not yet waited for
        self._room = threading.Condition()
        self._stopping = False

    def submit(self, number: int, parts: list[tuple[Source, int, int]]) -> None:
        self._jobs.put((number, parts))

    def stop(self) -> None:
        """Drop the jobs not yet begun. Both threads end, but are not joined."""
        with self._room:
            self._stopping = True
            self._room.notify()
        self._jobs.put(None)

    def run(self) -> None:
        try:
            threading.Thread(target=self._told_of, args=(self._ask,), name=f"{self.name}-ask", daemon=True).start()
        except RuntimeError:  # no more threads
            self._fail(errno.EAGAIN)
            return
        self._told_of(self._populate)

    def _told_of(self, work: Callable[[], None]) -> None:
        """Run one thread's work, and report an error to the caller as a FAILED job."""
        try:
            work()
        except OSError as error:
            self._fail(error.errno or errno.EIO)
        except Exception:
            self._fail(errno.EIO)
            raise

    def _fail(self, code: int) -> None:
        self.done.append((FAILED, code, 0))
        self._notify()

    def _populate(self) -> None:
        while True:
            asked = self._asked.get()
            if asked is None or self._stopping:
                return
            (number, parts), cold = asked
            failed = 0
            for source, offset, length in parts:
                failed = source.populate(offset, length) or failed
            with self._room:
                self._under_way -= cold
                self._room.notify()
            self.done.append((number, failed, cold))
            self._notify()

    def _ask(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None or self._stopping:
                self._asked.put(None)
                return
            absent = [part for part in job[1] if not part[0].resident(part[1], part[2])]
            cold = sum(length for _, _, length in absent)
            with self._room:
                self._room.wait_for(lambda: self._under_way < _WINDOW or self._stopping)
                self._under_way += cold
            for source, offset, length in absent:
                source.advise(offset, length)
            self._asked.put((job, cold))


class Waiting:
    """Jobs that wait for pages to arrive; replaces checkpoint.lazy_pages.readahead.Fetcher, without a thread.

    `ask`, if given, is called for missing pages: (name of the file, offset, length).
    """

    def __init__(self, notify: Callable[[], None], ask: Callable[[str, int, int], None] | None = None) -> None:
        self.done: deque[tuple[int, int, int]] = deque()
        self._notify = notify
        self._ask = ask
        # Each job, its missing parts (the last is checked first), and the bytes that were missing.
        self._jobs: list[tuple[Job, list[tuple[Source, int, int]], int]] = []

    def start(self) -> None:
        return

    def stop(self) -> None:
        """Drop all jobs and request nothing more."""
        self._ask, self._jobs = None, []

    def submit(self, number: int, parts: list[tuple[Source, int, int]]) -> None:
        absent = [part for part in reversed(parts) if not part[0].resident(part[1], part[2])]
        if self._ask:
            for source, offset, length in absent:
                assert isinstance(source, ArrivingSource)
                self._ask(source.name, offset, length)
        self._jobs.append(((number, parts), absent, sum(length for _, _, length in absent)))
        if not absent:
            self.look()

    def look(self) -> None:
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
            self.done.append((number, failed, cold))
        self._jobs = waiting
        if self.done:
            self._notify()
