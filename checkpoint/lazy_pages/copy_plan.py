"""Record what must be copied: the pending pages of an address space, and the extents that one process needs, in order.

Standard library only.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from checkpoint.lazy_pages import uffd

# Most bytes placed in one call: 0.2 ms, and a fault waits for at most one call.
CHUNK = 512 << 10
# State of an extent.
OPEN, DONE = 0, 1


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
        """Return the index of the extent that contains `address`, unless it is done."""
        at = bisect_right(self._sorted, address) - 1
        if at < 0:
            return None
        index = self._by_address[at]
        return index if address < self.ends[index] and self.done[index] != DONE else None

    def next(self) -> int | None:
        """Return the first extent that is not done."""
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
