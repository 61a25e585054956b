"""Which pages of one address space must still be copied from the image, and from where.

A `PageMap` is a set of disjoint address intervals, each with the image offset of its first byte. Addresses outside
it need nothing from the image: either they are in place already, or the process dropped them and they read as zeros.
Correctness requires three things: an interval is cut when its pages are placed; it is cut when they are dropped or
unmapped, before any listed page is placed; and it moves when the process moves it.

Standard library only. tests/t0/checkpoint/criu/test_pagemap.py compares it with a reference implementation.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence


class PageMap:
    """Disjoint intervals [start, end) → offset, with the operations the kernel reports.

    Addresses and offsets are in bytes.
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

    def copy(self) -> PageMap:
        """Copy the map for a forked child."""
        twin = PageMap()
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
