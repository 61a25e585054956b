"""The cache's memory tier: slots of one chunk each, in memory that the server and its fetcher share.

Used when the disk has no room: the fetcher puts a verified chunk into the slot the server lent with the request, and
the server answers readers out of it. The server alone decides which slot is lent when, and copies out under the lock,
so no reader ever sees a slot that is being written.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable

from lazyfs.content.chunking import MAX_CHUNK

Key = tuple[int, int]
# Fewer, and a read that spans chunks could wait for slots that the read before it holds.
LEAST_MB = 64


def tier_mb(memory_mb: int, limit: int) -> int:
    """How large a mount's tier is: `memory_mb`, of a bounded cache at most an eighth, and never less than streaming needs."""
    return max(LEAST_MB, min(memory_mb, limit >> 23)) if limit else memory_mb


class SlotMemory:
    """The server's side. A slot is free, lent (the fetcher may write it) or holds a chunk; the latter are reused
    LRU. `on_first_use` is called once, before the first slot is lent.
    """

    def __init__(self, megabytes: int, on_first_use: Callable[[], None] | None = None) -> None:
        self.on_first_use = on_first_use
        self.count = (megabytes << 20) // MAX_CHUNK
        self.fd = os.memfd_create("quickthaw-slots", os.MFD_CLOEXEC)
        # Sparse: a page exists only once it was written, so an unused tier costs nothing.
        os.ftruncate(self.fd, max(1, self.count) * MAX_CHUNK)
        self._view = memoryview(mmap.mmap(self.fd, max(1, self.count) * MAX_CHUNK))
        self._free = list(range(self.count))
        self._lent: dict[Key, int] = {}
        self._held: OrderedDict[Key, int] = OrderedDict()
        self._lock = threading.Lock()

    def lend(self, key: Key) -> int:
        """A slot for the fetcher to fill with that chunk; -1 when all are lent, or the chunk has or is one already.

        A slot is lent once, and only the answer to that very request ends the loan: a second worker on the same chunk
        must never write where another chunk has moved in.
        """
        with self._lock:
            if key in self._held or key in self._lent:
                return -1
            if self.on_first_use is not None:
                first, self.on_first_use = self.on_first_use, None
                first()
            if not self._free and self._held:
                self._free.append(self._held.popitem(last=False)[1])
            if not self._free:
                return -1
            self._lent[key] = self._free.pop()
            return self._lent[key]

    def filled(self, key: Key, slot: int) -> None:
        """The fetcher has put the chunk into the slot lent for it."""
        with self._lock:
            if self._lent.get(key) == slot:
                del self._lent[key]
                self._held[key] = slot

    def take_back(self, key: Key, slot: int) -> None:
        """The fetcher did not need the slot, or failed."""
        with self._lock:
            if self._lent.get(key) == slot:
                del self._lent[key]
                self._free.append(slot)

    def pending(self, key: Key) -> bool:
        """Whether a slot is lent for the chunk, so that an answer will come."""
        return key in self._lent

    def reset(self) -> None:
        """The fetcher died: nothing is lent any more."""
        with self._lock:
            self._free.extend(self._lent.values())
            self._lent.clear()

    def copy(self, key: Key, begin: int, end: int, length: int) -> bytes | None:
        """Bytes `begin` to `end` of a held chunk of `length` bytes, or None when it is not here."""
        with self._lock:
            slot = self._held.get(key)
            if slot is None:
                return None
            # A reader that reached the chunk's end hardly comes back: the kernel's page cache has it. What was fetched
            # ahead and is yet unread must outlive it.
            self._held.move_to_end(key, last=end < length)
            base = slot * MAX_CHUNK
            return bytes(self._view[base + begin : base + end])

    def holds(self, key: Key) -> bool:
        """Whether the chunk is here."""
        return key in self._held

    @property
    def used(self) -> int:
        """Slots that hold a chunk."""
        return len(self._held)


class SlotWriter:
    """The fetcher's side: writes where it was told to."""

    def __init__(self, fd: int) -> None:
        self._view = memoryview(mmap.mmap(fd, os.fstat(fd).st_size))

    def write(self, slot: int, data: bytes | memoryview) -> None:
        """Put a verified chunk into a lent slot."""
        base = slot * MAX_CHUNK
        self._view[base : base + len(data)] = data
