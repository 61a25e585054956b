"""The restored process tree, and each address space of it that is being filled.

`Space` neither waits nor reads events. The server's one thread does both in turn, which makes placing pages safe
(see fault_handler). Standard library only.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import select
import socket
import time

from checkpoint.criu.pagemap import PAGE, ProcessImage
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.copy_plan import CHUNK, DONE, OPEN, PendingPages, Plan
from checkpoint.lazy_pages.readahead import Source

# Below this many spans, a map is cut span by span (10 µs each). One pass over a map costs as much as a hundred cuts.
_FEW = 64


class ProcessGone(Exception):
    """The process has exited; nothing is left to fill."""


class TryAgain(Exception):
    """Nothing can be placed now.

    An event is unread, CRIU has not registered this memory yet, or pages are still arriving.
    """


class Space:
    """The address space of a restored process, or of a child that it has forked since.

    `pending` lists what must still be copied from the image.
    """

    __slots__ = (
        "_uncut",
        "changed",
        "fd",
        "image",
        "number",
        "pid",
        "rough_pending",
        "settled",
        "source",
    )

    def __init__(
        self, number: int, pid: int, fd: int, pages: PendingPages, image: ProcessImage, source: Source
    ) -> None:
        self.number = number
        self.pid = pid
        self.fd = fd
        self.rough_pending = pages
        """Like `pending`, but may still list what `place_many` has placed. The kernel refuses to place such pages again."""
        self._uncut: list[tuple[int, int]] = []
        self.image = image
        self.source = source
        self.settled = False
        """Whether every mapping is registered. Before, ENOENT means not yet registered; after, no longer registered."""
        self.changed = False
        """Whether the process has dropped, moved or unmapped anything. From then on every placement consults `pending`."""

    @property
    def pending(self) -> PendingPages:
        """The part of the image still to be copied.

        The first access after `place_many` takes about a millisecond.
        """
        if self._uncut:
            spans, self._uncut = sorted(self._uncut), []
            if len(spans) < _FEW:
                for start, end in spans:
                    self.rough_pending.cut(start, end)
            else:
                self.rough_pending.cut_all(spans)
        return self.rough_pending

    def fill(self) -> None:
        """Record that every page of the image is in place."""
        self.rough_pending, self._uncut = PendingPages(), []

    def place_many(self, plan: Plan, count: int, size: int) -> tuple[int, int]:
        """Place up to `count` extents, or about `size` bytes, of a plan with all sources in memory.

        Return (image bytes, zero bytes). Only for a space whose mappings have not changed. Stops before an extent that
        the kernel refuses; `run` handles it.
        """
        fd, address, done = self.fd, plan.address, plan.done
        starts, ends, zero, uncut = plan.starts, plan.ends, plan.zero, self._uncut
        copied = zeros = 0
        for _ in range(count):
            index = done.find(OPEN, plan.cursor)
            if index < 0:
                plan.cursor = len(done)
                break
            plan.cursor = index
            if uffd.request(fd, address + uffd.REQUEST_BYTES * index):
                break
            done[index] = DONE
            plan.left -= 1
            start, end = starts[index], ends[index]
            if zero[index]:
                zeros += end - start
            else:
                copied += end - start
                uncut.append((start, end))
            if copied + zeros >= size:
                break
        return copied, zeros

    def place(self, start: int, end: int) -> int:
        """Copy the image's part of [start, end) into place and return its bytes.

        Raises TryAgain, ProcessGone, OSError.
        """
        placed = 0
        for low, high, offset in self.pending.within(start, end):
            if self.source.absent(offset, high - low):
                raise TryAgain  # moved here from memory that has not arrived yet
            placed += self._place(low, high, self.source.address + offset)
        return placed

    def is_unmoved(self, start: int, end: int, offset: int) -> bool:
        """Return whether [start, end), listed with this offset, still lies at its original address.

        Moved pages differ from the image's at that address.
        """
        return self.image.within(start, end) == [(start, end, offset)]

    def _place(self, start: int, end: int, source: int) -> int:
        placed = 0
        while start < end:
            done, code = uffd.copy(self.fd, start, source, end - start)
            placed += done
            if not done:
                if code == errno.ENOENT and self.settled and end - start > PAGE:
                    # Mappings were split or unmapped since the snapshot: halve the range to find the border.
                    half = (end - start) // PAGE // 2 * PAGE
                    placed += self._place(start, start + half, source)
                    start, source = start + half, source + half
                    continue
                self._refused(code, "UFFDIO_COPY")
                done = PAGE
            self.pending.cut(start, start + done)
            start, source = start + done, source + done
        return placed

    def zero(self, start: int, end: int, zeros: int) -> int:
        """Place zero pages where none exist in [start, end), none of which is pending.

        `zeros` is our own address of CHUNK zeros.
        """
        placed = 0
        while start < end:
            done, code = uffd.copy(self.fd, start, zeros, min(end - start, CHUNK))
            if not done:
                self._refused(code, "UFFDIO_COPY of zeros")
                start += PAGE
            start += done
            placed += done
        return placed

    def zero_fault(self, address: int, end: int) -> int:
        """Map [address, end) as zeros up to the first existing page, and wake threads that wait for `address`.

        Return bytes.
        """
        done, code = uffd.zero(self.fd, address, end - address)
        if code == errno.ENOENT and end - address > PAGE:
            done, code = uffd.zero(self.fd, address, PAGE)
        if not done:
            self._refused(code, "UFFDIO_ZEROPAGE")
            # A page came meanwhile, or the mapping is gone: waiting threads retry and see the current state.
            uffd.wake(self.fd, address, PAGE)
        return done

    def run(self, plan: Plan, index: int, zeros: int) -> int:
        """Place one extent of the plan and return its bytes. Raises TryAgain, ProcessGone, OSError."""
        start, end = plan.starts[index], plan.ends[index]
        if not self.changed and uffd.request(self.fd, plan.address + uffd.REQUEST_BYTES * index) == 0:
            return self.placed(plan, index)
        placed, position = 0, start
        for low, high, offset in self.pending.within(start, end):
            placed += self.zero(position, low, zeros)
            if (
                not plan.zero[index]
                and self.is_unmoved(low, high, offset)
                and not self.source.absent(offset, high - low)
            ):
                placed += self._place(
                    low, high, plan.source(index) + low - start
                )  # its source may be in memory (the pack) where the image is not
            else:
                placed += self.place(low, high)
            position = high
        placed += self.zero(position, end, zeros)
        plan.finish(index)
        return placed

    def placed(self, plan: Plan, index: int) -> int:
        """Record that a whole extent is in place; return its bytes."""
        start, end = plan.starts[index], plan.ends[index]
        self._uncut.append((start, end))
        plan.finish(index)
        return end - start

    def _refused(self, code: int, what: str) -> None:
        """Interpret the kernel's refusal to place a page.

        Returns if the page exists already or is no longer ours. Raises TryAgain, ProcessGone or OSError otherwise.
        """
        if code == errno.EEXIST or (code == errno.ENOENT and self.settled):
            return
        if code in (errno.EAGAIN, errno.ENOENT):
            raise TryAgain
        if code == errno.ESRCH:
            raise ProcessGone
        raise OSError(code, f"{what} in process {self.pid}: {os.strerror(code)}")


class Stats:
    """Counters reported to the owner, in bytes and seconds.

    Points in time count from when the server received its configuration.
    """

    __slots__ = (
        "bytes_ahead",
        "bytes_cold",
        "bytes_faulted",
        "bytes_rest",
        "bytes_zero",
        "faults",
        "faults_before_first_token",
        "faults_missed",
        "faults_zero",
        "first_placed_s",
        "forks",
        "listening_s",
        "moved",
        "removed",
        "restored_s",
        "spaces_s",
        "stall_s",
        "stall_worst_s",
        "startup_done_s",
    )
    bytes_ahead: float
    bytes_rest: float
    bytes_cold: float
    bytes_faulted: float
    bytes_zero: float
    faults: float
    faults_before_first_token: float
    faults_missed: float
    faults_zero: float
    first_placed_s: float
    forks: float
    listening_s: float
    moved: float
    removed: float
    restored_s: float
    spaces_s: float
    stall_s: float
    stall_worst_s: float
    startup_done_s: float

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    def as_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}


class ProcessTree:
    """The process tree being served: its address spaces, its progress, and the messages to its owner.

    `control` is the owner's socket. `record`: every fault is served and traced page by page. `restored`: CRIU has
    finished; `first_token`, `after_requests`: the owner has reported the first token, and the end of the working set.
    """

    def __init__(self, control: socket.socket, record: bool) -> None:
        self.control = control
        self.record = record
        self.stats = Stats()
        self.epoll = select.epoll()
        self.spaces: dict[int, Space] = {}  # by descriptor
        self.restored = self.first_token = self.after_requests = False
        self.namespace = 0  # of the tree's process numbers, by inode; 0 if unknown
        self._started = time.monotonic()
        self._count = 0

    def now(self) -> float:
        """Return seconds since the start."""
        return time.monotonic() - self._started

    def send(self, fds: tuple[int, ...] = (), **message: object) -> None:
        """Send a message to the owner. Raises OSError if it is gone."""
        socket.send_fds(self.control, [json.dumps(message).encode()], list(fds))

    def warn(self, what: str, error: OSError) -> None:
        """Report a disk error as a warning with a code."""
        from checkpoint.disk import failure  # its imports take 5 ms

        self.send(event="warning", message=str(failure(what, error)))

    def send_stats(self, event: str) -> None:
        left = sum(space.pending.size for space in self.spaces.values())
        self.send(event=event, left=left, **self.stats.as_dict())  # type: ignore[arg-type]  # no count is named fds

    def add(self, space: Space) -> None:
        """Serve another address space, and give the owner a duplicate of its descriptor."""
        os.set_inheritable(space.fd, False)
        self._count += 1
        space.number = self._count
        self.stats.spaces_s = self.now()
        self.spaces[space.fd] = space
        self.send((space.fd,), event="space", number=space.number, pid=space.pid, left=space.pending.size)
        self.epoll.register(space.fd, select.EPOLLIN)

    def drop(self, space: Space) -> None:
        """Serve an address space no longer."""
        if self.spaces.pop(space.fd, None) is not None:
            self.epoll.unregister(space.fd)
            os.close(space.fd)
            self.send(event="gone", number=space.number)

    def close(self) -> None:
        """Close all descriptors but the control socket. Idempotent."""
        for space in self.spaces.values():
            os.close(space.fd)
        self.spaces.clear()
        self.epoll.close()


@functools.cache
def zero_source() -> int:
    """Return our own address of CHUNK zero bytes."""
    return uffd.zero_pages(CHUNK)
