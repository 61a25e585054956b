"""One address space being filled: a restored process, or a child that it has forked since.

This module neither waits nor reads events. The daemon's one thread does both in turn, which makes placing pages safe
(see fault_handler). Standard library only.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from array import array
from bisect import bisect_right

from checkpoint.criu.pagemap import PAGE, ProcessImage
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.copy_plan import PageMap
from checkpoint.lazy_pages.readahead import Source

# Most bytes placed in one call: 0.2 ms, and a fault waits for at most one call.
CHUNK = 512 << 10
# Below this many spans, a map is cut span by span (10 µs each). One pass over a map costs as much as a hundred cuts.
_FEW = 64
# State of an extent.
OPEN, DONE, CLAIMED = 0, 1, 2


class Gone(Exception):
    """The process has exited; nothing is left to fill."""


class Again(Exception):
    """Nothing can be placed now.

    An event is unread, CRIU has not registered this memory yet, or pages are still arriving.
    """


class Plan:
    """The extents one process needs, in order, stored as ready-made kernel requests.

    Extents are disjoint, at most CHUNK long, and never cross the border of a mapping. Each one is image data or
    zeros. `batches` holds, for each extent, the number of the fetcher's job that loads its source. `resident`:
    whether all sources are in memory already.
    """

    __slots__ = (
        "_buffer",
        "_by_address",
        "_sorted",
        "address",
        "batches",
        "cursor",
        "done",
        "ends",
        "left",
        "resident",
        "starts",
        "zero",
    )

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.zero: list[bool] = []
        self.batches: list[int] = []
        self.resident = False
        self.done = bytearray()
        self.cursor = 0
        self.left = 0
        self.address = 0
        self._buffer = array("Q")
        self._sorted: list[int] = []
        self._by_address: list[int] = []

    def add(self, start: int, end: int, source: int, zero: bool, batch: int) -> None:
        """Append [start, end), to be copied from our own address `source`."""
        while start < end:
            stop = min(end, start + CHUNK)
            self.starts.append(start)
            self.ends.append(stop)
            self.zero.append(zero)
            self.batches.append(batch)
            self._buffer.extend((start, source, stop - start, 0, 0))
            if not zero:
                source += stop - start
            start = stop

    def seal(self) -> None:
        """Freeze the plan: no more extents, and the requests keep their addresses."""
        self.done = bytearray(len(self.starts))
        self.left = len(self.starts)
        self.address = self._buffer.buffer_info()[0]
        self._by_address = sorted(range(len(self.starts)), key=self.starts.__getitem__)
        self._sorted = [self.starts[index] for index in self._by_address]

    @classmethod
    def sealed(
        cls, starts: array[int], ends: array[int], sources: array[int], zero: list[bool], by_address: array[int]
    ) -> Plan:
        """Build a sealed plan, with all sources in memory, from the parts of an earlier one."""
        plan = cls()
        plan.resident = True
        plan.starts, plan.ends, plan.zero = starts.tolist(), ends.tolist(), zero
        plan._buffer = array("Q", bytes(uffd.REQUEST_BYTES * len(starts)))
        plan._buffer[0::5], plan._buffer[1::5] = starts, sources
        plan._buffer[2::5] = array("Q", map(int.__sub__, plan.ends, plan.starts))
        plan.address = plan._buffer.buffer_info()[0]
        plan.done, plan.left = bytearray(len(starts)), len(starts)
        plan._by_address = by_address.tolist()
        plan._sorted = list(map(plan.starts.__getitem__, plan._by_address))
        return plan

    def parts(self) -> tuple[array[int], array[int], array[int], list[bool], array[int]]:
        """Return the arguments from which `sealed` builds a plan."""
        return (
            array("Q", self.starts),
            array("Q", self.ends),
            self._buffer[1::5],
            self.zero,
            array("Q", self._by_address),
        )

    def source(self, index: int) -> int:
        """Return our own address from which an extent is copied."""
        return self._buffer[5 * index + 1]

    def find(self, address: int) -> int | None:
        """Return the index of the extent that contains `address`, unless it is done (it may be reserved)."""
        at = bisect_right(self._sorted, address) - 1
        if at < 0:
            return None
        index = self._by_address[at]
        return index if address < self.ends[index] and self.done[index] != DONE else None

    def next(self) -> int | None:
        """Return the first extent that is neither done nor reserved."""
        done = self.done.find(OPEN, self.cursor)
        if done < 0:
            self.cursor = len(self.done)
            return None
        self.cursor = done
        return done

    def finish(self, index: int) -> None:
        if self.done[index] != DONE:
            self.done[index] = DONE
            self.left -= 1

    def claim(self, index: int) -> None:
        """Reserve an extent for the second copier, which places it outside the daemon's turn."""
        if self.done[index] == OPEN:
            self.done[index] = CLAIMED

    def give_back(self, index: int) -> None:
        """Release a reserved extent that was not placed."""
        if self.done[index] == CLAIMED:
            self.done[index] = OPEN
            self.cursor = min(self.cursor, index)


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

    def __init__(self, number: int, pid: int, fd: int, pages: PageMap, image: ProcessImage, source: Source) -> None:
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
    def map(self) -> PageMap:
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
