"""Bringing source pages into the page cache ahead of the copier, so that the copier never waits for a disk or a network.

Standard library only. A fetcher's threads touch nothing but this process's own read-only mappings of image files; placing pages and
reading events is the copier's alone, which is why no lock is needed between them.
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

# The granularity of reading ahead from a disk: large enough for full speed, small enough that a fault's own read is not stuck behind it.
_ADVISE = 8 << 20
# How much is asked of the disk beyond what has been waited for: its queue must never run empty, nor memory fill with what comes too early.
_WINDOW = 512 << 20


class Bell:
    """Wakes the loop of one daemon, from any thread. Whoever may ring keeps the descriptor open: its number never becomes another's."""

    def __init__(self) -> None:
        self.fd = -1
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.fd, 1)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Source:
    """One image file: mapped shared, so that every replica on a host reads the one copy in the page cache.

    It stays mapped for as long as somebody refers to it: a thread that still reads ahead never finds another mapping in its place.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = self.address = self.size = -1
        self.address, self.size = uffd.map_file(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def stamp(self) -> tuple[int, int, int, int, int]:
        """Which file this is: device, inode, size, mtime and ctime in ns. Raises OSError."""
        info = os.fstat(self._fd)
        return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns

    def resident(self, offset: int, length: int) -> bool:
        """Whether a copy from there would not wait for a disk."""
        return uffd.resident(self.address + offset, length)

    def absent(self, offset: int, length: int) -> bool:
        """Whether the range must not be read yet, since the file is still being filled (checkpoint.lazy_pages.residency)."""
        return False

    def advise(self, offset: int, length: int) -> None:
        """Start reading; returns before it is there."""
        for at in range(offset, offset + length, _ADVISE):
            os.posix_fadvise(self._fd, at, min(_ADVISE, offset + length - at), os.POSIX_FADV_WILLNEED)

    def populate(self, offset: int, length: int) -> int:
        """Wait until the range is in the page cache and mapped here; an errno when it cannot be read."""
        return uffd.populate(self.address + offset, length)

    def __del__(self) -> None:
        if self.size > 0:
            uffd.unmap(self.address, self.size)
        if self._fd >= 0:
            os.close(self._fd)


FAILED = -1
"""The number of the job that never was: a fetcher's thread has ended."""
Job = tuple[int, list[tuple[Source, int, int]]]
"""(a number that the caller gave it, [(source, offset, length)])"""


class Fetcher(threading.Thread):
    """Populates what it is given, in order, and tells the number of each job when it is there.

    A second thread asks the disk for the jobs that follow: one job at a time, with a wait at its end, reads at half the disk's speed.
    `done` is a queue the caller reads after `notify` was called: (number, errno, bytes that were not in the page cache before).
    """

    def __init__(self, name: str, notify: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.done: deque[tuple[int, int, int]] = deque()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[tuple[Job, int] | None] = queue.SimpleQueue()
        self._notify = notify
        self._under_way = 0  # bytes asked for and not waited for yet
        self._room = threading.Condition()
        self._stopping = False

    def submit(self, number: int, parts: list[tuple[Source, int, int]]) -> None:
        self._jobs.put((number, parts))

    def stop(self) -> None:
        """Leave aside what has not been begun; both threads end, without being waited for."""
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
        """Run one of the two threads' work; where it ends with an error, the caller finds that among what is done."""
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
