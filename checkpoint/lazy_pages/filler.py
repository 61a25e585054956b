"""Fill whole address spaces with several threads, while their processes are stopped.

The CUDA driver pins the memory of a process and needs every page of it; `--no-lazy` asks for the same. CRIU alone copies
with one thread per process. Standard library only.

Why memory cannot be corrupted: the kernel places a page only where none exists, and these processes run nothing but
CRIU's restorer, which neither drops nor moves restored memory. If one does, the fault handler fails the restore.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from checkpoint.criu.pagemap import PAGE
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.address_space import Space

# Bytes placed between two looks at the queue: 0.5 ms.
_RANGE = 2 << 20
# Bytes requested from a disk ahead of a range that is not in the page cache.
_AHEAD = 64 << 20
# More threads than this wait for the memory and for the kernel's locks, not for a processor.
_MOST_THREADS = 8
_RETRY_S = 0.0005
# The server's own priority is the highest. CRIU, which is still at work, must not wait for these threads.
_NICE = 0


class _Job:
    """One address space: the ranges (start, end, offset in its pages file) not begun yet, and the number not done."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.size = space.pending.size
        self.parts = deque(
            (low, min(low + _RANGE, end), offset + low - start)
            for start, end, offset in space.pending
            for low in range(start, end, _RANGE)
        )
        self.left = len(self.parts)
        self.not_before = 0.0


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

    def add(self, space: Space) -> None:
        """Begin to fill a space, whose memory CRIU may not have registered yet. Starts the threads with the first one."""
        job = _Job(space)
        self._active.add(space.number)
        if not job.left:
            self._filled.append((space, 0))
            self._wake()
            return
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        while len(self._threads) < min(len(os.sched_getaffinity(0)), _MOST_THREADS):
            thread = threading.Thread(target=self._work, name="filler", daemon=True)
            thread.start()
            self._threads.append(thread)

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
                job, (start, end, offset) = taken
                done = _place(job.space, start, end, offset)
                self._count(job, start + done, end, offset + done)
        except Exception as error:  # noqa: BLE001 - whatever it is, the server's loop raises it
            self._failure = self._failure or error
            self.stop()
            self._wake()

    def _take(self) -> tuple[_Job, tuple[int, int, int]] | None:
        """Wait for the next range, of the first space that can be filled now. Return None when stopped."""
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                waiting = [job for job in self._jobs if job.parts]
                for job in waiting:
                    if job.not_before <= now:
                        return job, job.parts.popleft()
                self._changed.wait(min((job.not_before - now for job in waiting), default=None))
        return None

    def _count(self, job: _Job, start: int, end: int, offset: int) -> None:
        """Count a range as done, or put back the rest of it."""
        with self._changed:
            if start < end:
                job.parts.appendleft((start, end, offset))
                job.not_before = time.monotonic() + _RETRY_S
                return
            job.left -= 1
            if job.left:
                return
            self._jobs.remove(job)
        self._filled.append((job.space, job.size))
        self._wake()


def _place(space: Space, start: int, end: int, offset: int) -> int:
    """Copy a range into place. Return its bytes, or fewer where the rest cannot be placed yet. Raises OSError, RuntimeError."""
    source = space.source
    if not source.resident(offset, end - start):
        source.advise(offset, min(_AHEAD, source.size - offset))
    if code := source.populate(offset, end - start):
        raise OSError(code, f"{os.strerror(code)}, while {source.path} was read")
    at = start
    while at < end:
        settled = space.settled  # before the call: it may be set during it
        done, code = uffd.copy(space.fd, at, source.address + offset + at - start, end - at)
        at += done
        if done:
            continue
        if code == errno.EEXIST:  # a fault of CRIU's restorer was served
            at += PAGE
        elif code == errno.EAGAIN or (code == errno.ENOENT and not settled):
            break
        elif code == errno.ESRCH:
            raise RuntimeError(f"process {space.pid} ended while its pages were filled")
        else:
            raise OSError(code, f"UFFDIO_COPY in process {space.pid}: {os.strerror(code)}")
    return at - start
