"""The extents that one process needs, in order: what is placed from where. Standard library only."""

from __future__ import annotations

from array import array
from bisect import bisect_right

from checkpoint.lazy_pages import uffd

# Most bytes placed in one call: 0.2 ms, and a fault waits for at most one call.
CHUNK = 512 << 10
# State of an extent.
OPEN, DONE, CLAIMED = 0, 1, 2


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
