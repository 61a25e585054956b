"""Bringing source pages into the page cache ahead of the copier, so that the copier never waits for a disk or a network.

Standard library only. A fetcher thread touches nothing but this process's own read-only mappings of image files; placing pages and
reading events is the copier's alone, which is why no lock is needed between them.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable

from checkpoint.pages import uffd

# The granularity of reading ahead from a disk: large enough for full speed, small enough that a fault's own read is not stuck behind it.
_ADVISE = 8 << 20


class Source:
    """One image file: mapped shared, so that every replica on a host reads the one copy in the page cache."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.address, self.size = uffd.map_file(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def resident(self, offset: int, length: int) -> bool:
        """Whether a copy from there would not wait for a disk."""
        return uffd.resident(self.address + offset, length)

    def absent(self, offset: int, length: int) -> bool:
        """Whether the range must not be read yet, since the file is still being filled (checkpoint.pages.arrival)."""
        return False

    def advise(self, offset: int, length: int) -> None:
        """Start reading; returns before it is there."""
        for at in range(offset, offset + length, _ADVISE):
            os.posix_fadvise(self._fd, at, min(_ADVISE, offset + length - at), os.POSIX_FADV_WILLNEED)

    def populate(self, offset: int, length: int) -> int:
        """Wait until the range is in the page cache and mapped here; an errno when it cannot be read."""
        return uffd.populate(self.address + offset, length)


Job = tuple[int, list[tuple[Source, int, int]]]
"""(a number that the caller gave it, [(source, offset, length)])"""


class Fetcher(threading.Thread):
    """Populates what it is given, in order, and tells the number of each job when it is there.

    `done` is a queue the caller reads after `notify` was called: (number, errno, bytes that were not in the page cache before).
    """

    def __init__(self, name: str, notify: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.done: deque[tuple[int, int, int]] = deque()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._notify = notify

    def submit(self, number: int, parts: list[tuple[Source, int, int]]) -> None:
        self._jobs.put((number, parts))

    def run(self) -> None:
        while True:
            number, parts = self._jobs.get()
            failed = cold = 0
            absent = [part for part in parts if not part[0].resident(part[1], part[2])]
            for source, offset, length in absent:
                source.advise(offset, length)
                cold += length
            for source, offset, length in parts:
                failed = source.populate(offset, length) or failed
            self.done.append((number, failed, cold))
            self._notify()
