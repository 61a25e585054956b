"""Fill whole address spaces with several threads, while their processes are stopped.

The CUDA driver pins the memory of a process and needs every page of it; `--no-lazy` asks for the same. CRIU alone copies
with one thread per process. Standard library only.

Why memory cannot be corrupted: the kernel places a page only where none exists, and these processes run nothing but
CRIU's restorer, which neither drops nor moves restored memory. If one does, the fault handler fails the restore.

Until CRIU has made the processes, the threads map the images' pages into this process, a seventh of what a page costs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable

from checkpoint.criu.pagemap import PAGE
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.address_space import Space
from checkpoint.lazy_pages.readahead import Source

# Bytes, and pieces of them, placed between two looks at the queue: 0.5 ms.
_BATCH_BYTES = 2 << 20
_BATCH_PIECES = 256
# Pieces further apart than this in the pages file are in different batches, because what lies between is read, too.
_GAP = 64 << 10
# Bytes requested from a disk ahead of a batch that is not in the page cache.
_AHEAD = 64 << 20
# More threads than this wait for the memory and for the kernel's locks, not for a processor.
_MOST_THREADS = 8
_RETRY_S = 0.0005
# The server's own priority is the highest. CRIU, which is still at work, must not wait for these threads.
_NICE = 0
# Numbers in a request of UFFDIO_COPY.
_FIELDS = uffd.REQUEST_BYTES // 8
# The last one is the bytes placed, or a negative errno.
_NEGATIVE = 1 << 63


class _Job:
    """One address space: its pieces as ready-made kernel requests, and the batches of them that are not begun yet.

    `space` is None until CRIU has made the process.
    """

    def __init__(self, runs: Iterable[tuple[int, int, int]], source: Source) -> None:
        self.space: Space | None = None
        self.source = source
        self.size = 0
        self.requests = array("Q")
        self.batches: deque[tuple[int, int]] = deque()  # first piece, and the one after the last
        first = size = reached = 0
        for run, end, offset in runs:
            self.size += end - run
            for start in range(run, end, _BATCH_BYTES):
                length = min(_BATCH_BYTES, end - start)
                index, at = len(self.requests) // _FIELDS, offset + start - run
                if index > first and (
                    size + length > _BATCH_BYTES or index - first == _BATCH_PIECES or at - reached > _GAP
                ):
                    self.batches.append((first, index))
                    first, size = index, 0
                self.requests.extend((start, source.address + at, length, 0, 0))
                size, reached = size + length, at + length
        if self.requests:
            self.batches.append((first, len(self.requests) // _FIELDS))
        self.left = len(self.batches)
        self.unmapped = deque(self.batches)
        self.mapped: set[tuple[int, int]] = set()
        self.not_before = 0.0

    def next_unmapped(self) -> tuple[int, int] | None:
        """Take the next batch that is neither mapped here nor begun."""
        while self.unmapped and self.batches:
            if (batch := self.unmapped.popleft()) >= self.batches[0]:
                return batch
        return None

    def map(self, batch: tuple[int, int], ahead: bool = False) -> None:
        """Have the pages of a batch read and mapped into this process; `ahead`: only if no disk is needed for it.

        Raises OSError.
        """
        source, requests = self.source, self.requests
        offset = requests[_FIELDS * batch[0] + 1] - source.address
        last = _FIELDS * (batch[1] - 1)
        length = requests[last + 1] + requests[last + 2] - source.address - offset
        if not source.resident(offset, length):
            source.advise(offset, min(_AHEAD, source.size - offset))
            if ahead:
                return
        if code := source.populate(offset, length):
            raise OSError(code, f"{os.strerror(code)}, while {source.path} was read")
        self.mapped.add(batch)

    def place(self, first: int, last: int) -> int:
        """Place these pieces in order. Return how many are done: fewer where the next one cannot be placed yet.

        Raises OSError, RuntimeError.
        """
        assert self.space
        if (first, last) not in self.mapped:
            self.map((first, last))
        fd, address = self.space.fd, self.requests.buffer_info()[0]
        for index in range(first, last):
            if uffd.request(fd, address + uffd.REQUEST_BYTES * index) and not self._place_rest(self.space, index):
                return index - first
        return last - first

    def _place_rest(self, space: Space, index: int) -> bool:
        """Place what the kernel has not placed of a piece. Return False if that is not possible yet."""
        at, source, left, _, placed = self.requests[_FIELDS * index : _FIELDS * (index + 1)]
        if placed < _NEGATIVE:
            at, source, left = at + placed, source + placed, left - placed
        while left:
            settled = space.settled  # before the call: it may be set during it
            done, code = uffd.copy(space.fd, at, source, left)
            if not done and code == errno.EEXIST:
                done = PAGE  # a fault of CRIU's restorer brought it
            if not done:
                break
            at, source, left = at + done, source + done, left - done
        self.requests[_FIELDS * index : _FIELDS * (index + 1)] = array("Q", (at, source, left, 0, 0))
        if not left:
            return True
        if code == errno.EAGAIN or (code == errno.ENOENT and not settled):
            return False
        if code == errno.ESRCH:
            raise RuntimeError(f"process {space.pid} ended while its pages were filled")
        raise OSError(code, f"UFFDIO_COPY in process {space.pid}: {os.strerror(code)}")


class Filler:
    """Fills the address spaces given to `add`. `wake` is called, in any thread, when `collect` has news."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._filled: deque[tuple[Space, int]] = deque()
        self._failure: Exception | None = None
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._active: set[int] = set()  # numbers of the spaces that are not collected yet
        self._expected: dict[int, _Job] = {}
        self._mapping = 0  # threads that map pages ahead
        self._most = min(len(os.sched_getaffinity(0)), _MOST_THREADS)

    def expect(self, pid: int, runs: Iterable[tuple[int, int, int]], source: Source) -> None:
        """Prepare for process `pid`, which CRIU has not made yet: `runs` is what a space of it will need."""
        job = self._expected[pid] = _Job(runs, source)
        if not job.left:
            return
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        while len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name="filler", daemon=True)
            thread.start()
            self._threads.append(thread)

    def add(self, space: Space) -> None:
        """Begin to fill a space, whose memory CRIU may not have registered yet."""
        if space.pid not in self._expected:
            self.expect(space.pid, space.pending, space.source)
        job = self._expected.pop(space.pid)
        self._active.add(space.number)
        if not job.left:
            self._filled.append((space, 0))
            self._wake()
            return
        with self._changed:
            job.space = space
            self._changed.notify_all()

    def fills(self, space: Space) -> bool:
        """Return whether a space is being filled, so nothing may change its memory."""
        return space.number in self._active

    def collect(self) -> list[tuple[Space, int]]:
        """Return the spaces filled since the last call, with their bytes. Raises the error of a thread that failed."""
        if self._failure is not None:
            raise self._failure
        found = []
        while self._filled:
            found.append(self._filled.popleft())
            self._active.discard(found[-1][0].number)
        return found

    def stop(self) -> None:
        """Stop filling, without joining the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            while (taken := self._take()) is not None:
                job, batch, ready = taken
                if ready:
                    self._count(job, batch[0] + job.place(*batch), batch[1])
                    continue
                job.map(batch, ahead=True)
                with self._changed:
                    self._mapping -= 1
        except Exception as error:  # noqa: BLE001 - whatever it is, the server's loop raises it
            self._failure = self._failure or error
            self.stop()
            self._wake()

    def _take(self) -> tuple[_Job, tuple[int, int], bool] | None:
        """Wait for the next batch: one that can be placed now (True), or one to map ahead. Return None when stopped."""
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                waiting = [job for job in self._jobs if job.batches and job.space]
                for job in waiting:
                    if job.not_before <= now:
                        return job, job.batches.popleft(), True
                if self._mapping + 1 < self._most:  # CRIU is at work on one processor
                    for job in self._jobs:
                        if batch := job.next_unmapped():
                            self._mapping += 1
                            return job, batch, False
                self._changed.wait(min((job.not_before - now for job in waiting), default=None))
        return None

    def _count(self, job: _Job, first: int, last: int) -> None:
        """Count a batch as done, or put back the rest of it."""
        with self._changed:
            if first < last:
                job.batches.appendleft((first, last))
                job.not_before = time.monotonic() + _RETRY_S
                return
            job.left -= 1
            if job.left:
                return
            self._jobs.remove(job)
        assert job.space
        self._filled.append((job.space, job.size))
        self._wake()
