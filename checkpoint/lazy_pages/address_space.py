"""One address space being filled: a restored process, or a child that it has forked since.

This module neither waits nor reads events. The daemon's one thread does both in turn, which makes placing pages safe
(see fault_handler). Standard library only.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from checkpoint.criu.pagemap import PAGE, ProcessImage
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.copy_plan import CHUNK, DONE, OPEN, Plan
from checkpoint.lazy_pages.readahead import Source

# Below this many spans, a map is cut span by span (10 µs each). One pass over a map costs as much as a hundred cuts.
_FEW = 64


class Gone(Exception):
    """The process has exited; nothing is left to fill."""


class Again(Exception):
    """Nothing can be placed now.

    An event is unread, CRIU has not registered this memory yet, or pages are still arriving.
    """


class PendingPages:
    """Which pages of an address space must still be copied from the image: disjoint intervals [start, end) → offset, in bytes.

    Pages outside it need nothing from the image: they are in place already, or the process dropped them and they read
    as zeros. Correctness requires three things: an interval is cut when its pages are placed; it is cut when they are
    dropped or unmapped, before any listed page is placed; and it moves when the process moves it.
    tests/t0/checkpoint/criu/test_pagemap.py compares it with a reference implementation.
    """

    __slots__ = ("_ends", "_offsets", "_starts")

    def __init__(self, runs: Iterable[tuple[int, int, int]] = ()) -> None:
        """Build a map from `runs`, which are disjoint, ascending (start, end, offset)."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._offsets: list[int] = []
        for start, end, offset in runs:
            self._starts.append(start)
            self._ends.append(end)
            self._offsets.append(offset)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return iter(list(zip(self._starts, self._ends, self._offsets, strict=True)))

    @property
    def size(self) -> int:
        """Bytes still to be copied."""
        return sum(self._ends) - sum(self._starts)

    def copy(self) -> PendingPages:
        """Copy the map for a forked child."""
        twin = PendingPages()
        twin._starts, twin._ends, twin._offsets = self._starts[:], self._ends[:], self._offsets[:]
        return twin

    def find(self, address: int) -> tuple[int, int, int] | None:
        """Return the interval that contains `address`."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._ends[index]:
            return self._starts[index], self._ends[index], self._offsets[index]
        return None

    def at_or_after(self, address: int) -> tuple[int, int, int] | None:
        """Return the first interval, or remainder of one, at or above `address`."""
        index = bisect_right(self._ends, address)
        if index == len(self._starts):
            return None
        start, end, offset = self._starts[index], self._ends[index], self._offsets[index]
        if start < address:
            return address, end, offset + address - start
        return start, end, offset

    def within(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return the parts of intervals that lie in [start, end), ascending."""
        found = []
        index = bisect_right(self._ends, start)
        while index < len(self._starts) and self._starts[index] < end:
            low, high = max(start, self._starts[index]), min(end, self._ends[index])
            found.append((low, high, self._offsets[index] + low - self._starts[index]))
            index += 1
        return found

    def cut(self, start: int, end: int) -> None:
        """Remove [start, end): placed, dropped or unmapped."""
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        if low >= high:
            return
        starts, ends, offsets = [], [], []
        if self._starts[low] < start:
            starts.append(self._starts[low])
            ends.append(start)
            offsets.append(self._offsets[low])
        if self._ends[high - 1] > end:
            starts.append(end)
            ends.append(self._ends[high - 1])
            offsets.append(self._offsets[high - 1] + end - self._starts[high - 1])
        self._starts[low:high], self._ends[low:high], self._offsets[low:high] = starts, ends, offsets

    def cut_all(self, spans: Sequence[tuple[int, int]]) -> None:
        """Remove many disjoint spans, given in ascending order, in one pass over the map."""
        starts, ends, offsets = [], [], []
        at, count = 0, len(spans)
        for start, end, offset in zip(self._starts, self._ends, self._offsets, strict=True):
            low = start
            while at < count and spans[at][0] < end:
                first, last = spans[at]
                if first > low:
                    starts.append(low)
                    ends.append(first)
                    offsets.append(offset + low - start)
                low = max(low, last)
                if last > end:
                    break  # it reaches into the next interval
                at += 1
            if low < end:
                starts.append(low)
                ends.append(end)
                offsets.append(offset + low - start)
        self._starts, self._ends, self._offsets = starts, ends, offsets

    def move(self, source: int, target: int, length: int) -> None:
        """Apply an mremap: the pages due at `source` are now due at `target`, and none are due at `source`."""
        moved = self.within(source, source + length)
        self.cut(source, source + length)
        self.cut(target, target + length)
        if not moved:
            return
        shift = target - source
        index = bisect_left(self._starts, target)
        self._starts[index:index] = [start + shift for start, _, _ in moved]
        self._ends[index:index] = [end + shift for _, end, _ in moved]
        self._offsets[index:index] = [offset for _, _, offset in moved]


class Space:
    """An address space (see the module's docstring). `map` lists what must still be copied from the image."""

    __slots__ = (
        "_uncut",
        "changed",
        "fd",
        "image",
        "number",
        "open",
        "pid",
        "placing",
        "rough_map",
        "settled",
        "source",
    )

    def __init__(
        self, number: int, pid: int, fd: int, pages: PendingPages, image: ProcessImage, source: Source
    ) -> None:
        self.number = number
        self.pid = pid
        self.fd = fd
        self.rough_map = pages
        """Like `map`, but may still list what `burst` has placed. The kernel refuses to place such pages again."""
        self._uncut: list[tuple[int, int]] = []
        self.image = image
        self.source = source
        self.settled = False
        """Whether every mapping is registered. Before, ENOENT means not yet registered; after, no longer registered."""
        self.changed = False
        """Whether the process has dropped, moved or unmapped anything. From then on every placement consults the map."""
        self.open = True
        self.placing = threading.Lock()
        """Lock held by the second copier while it places, and by the daemon while it reads events or closes the descriptor."""

    @property
    def map(self) -> PendingPages:
        """The part of the image still to be copied.

        The first access after a burst takes about a millisecond.
        """
        if self._uncut:
            spans, self._uncut = sorted(self._uncut), []
            if len(spans) < _FEW:
                for start, end in spans:
                    self.rough_map.cut(start, end)
            else:
                self.rough_map.cut_all(spans)
        return self.rough_map

    def burst(self, plan: Plan, pieces: int, size: int) -> tuple[int, int]:
        """Place up to `pieces` extents, or about `size` bytes, of a plan with all sources in memory.

        Return (image bytes, zero bytes). Only for a space whose mappings have not changed. Stops before an extent that
        the kernel refuses; `run` handles it.
        """
        fd, address, done = self.fd, plan.address, plan.done
        starts, ends, zero, uncut = plan.starts, plan.ends, plan.zero, self._uncut
        copied = zeros = 0
        for _ in range(pieces):
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

        Raises Again, Gone, OSError.
        """
        placed = 0
        for low, high, offset in self.map.within(start, end):
            if self.source.absent(offset, high - low):
                raise Again  # moved here from memory that has not arrived yet
            placed += self._place(low, high, self.source.address + offset)
        return placed

    def unmoved(self, start: int, end: int, offset: int) -> bool:
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
            self.map.cut(start, start + done)
            start, source = start + done, source + done
        return placed

    def zero(self, start: int, end: int, zeros: int) -> int:
        """Place zero pages where none exist in [start, end), none of which is in the map.

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
        """Place one extent of the plan and return its bytes. Raises Again, Gone, OSError."""
        start, end = plan.starts[index], plan.ends[index]
        if not self.changed and uffd.request(self.fd, plan.address + uffd.REQUEST_BYTES * index) == 0:
            return self.placed(plan, index)
        placed, position = 0, start
        for low, high, offset in self.map.within(start, end):
            placed += self.zero(position, low, zeros)
            if not plan.zero[index] and self.unmoved(low, high, offset) and not self.source.absent(offset, high - low):
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

        Returns if the page exists already or is no longer ours. Raises Again, Gone or OSError otherwise.
        """
        if code == errno.EEXIST or (code == errno.ENOENT and self.settled):
            return
        if code in (errno.EAGAIN, errno.ENOENT):
            raise Again
        if code == errno.ESRCH:
            raise Gone
        raise OSError(code, f"{what} in process {self.pid}: {os.strerror(code)}")


@functools.cache
def zero_source() -> int:
    """Return our own address of CHUNK zero bytes."""
    return uffd.zero_pages(CHUNK)
