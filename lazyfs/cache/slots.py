"""The cache's memory tier: slots of one chunk each, in memory shared by the server and its fetcher.

Used when the disk has no room: the fetcher writes a verified chunk into the slot that the server allocated with the
request, and the server answers readers from it. Only the server allocates slots, and it copies out under the lock, so no
reader sees a slot that is being written.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable

from lazyfs.content.chunking import MAX_CHUNK

Key = tuple[int, int]
# With fewer, a read that spans chunks could wait for slots held by the read before it.
LEAST_MB = 64


def tier_mb(memory_mb: int, limit: int) -> int:
    """Return the size of a mount's memory tier in MB: `memory_mb`, at most an eighth of a bounded cache, at least LEAST_MB.

    An unbounded cache (`limit` 0) gets `memory_mb`.
    """
    return max(LEAST_MB, min(memory_mb, limit >> 23)) if limit else memory_mb


class SlotMemory:
    """The server's side.

    A slot is free, allocated to the fetcher for writing, or holds a chunk; held slots are reused LRU. `on_first_use` is
    called once, before the first slot is allocated.
    """

    def __init__(self, megabytes: int, on_first_use: Callable[[], None] | None = None) -> None:
        self.on_first_use = on_first_use
        self.count = (megabytes << 20) // MAX_CHUNK
        self.fd = os.memfd_create("quickthaw-slots", os.MFD_CLOEXEC)
        # Sparse: a page is allocated at its first write, so an unused tier costs nothing.
        os.ftruncate(self.fd, max(1, self.count) * MAX_CHUNK)
        self._view = memoryview(mmap.mmap(self.fd, max(1, self.count) * MAX_CHUNK))
        self._free = list(range(self.count))
        self._allocated: dict[Key, int] = {}
        self._held: OrderedDict[Key, int] = OrderedDict()
        self._lock = threading.Lock()

    def allocate(self, key: Key) -> int:
        """Allocate a slot for the fetcher to fill with that chunk; -1 if no slot is free or the chunk already has one.

        Only the answer to that very request ends the allocation: a second worker on the same chunk must never write where
        another chunk has moved in.
        """
        with self._lock:
            if key in self._held or key in self._allocated:
                return -1
            if self.on_first_use is not None:
                first, self.on_first_use = self.on_first_use, None
                first()
            if not self._free and self._held:
                self._free.append(self._held.popitem(last=False)[1])
            if not self._free:
                return -1
            self._allocated[key] = self._free.pop()
            return self._allocated[key]

    def filled(self, key: Key, slot: int) -> None:
        """Mark the allocated slot as holding the chunk."""
        with self._lock:
            if self._allocated.get(key) == slot:
                del self._allocated[key]
                self._held[key] = slot

    def free(self, key: Key, slot: int) -> None:
        """Free an allocated slot that the fetcher did not need or failed to fill."""
        with self._lock:
            if self._allocated.get(key) == slot:
                del self._allocated[key]
                self._free.append(slot)

    def allocated(self, key: Key) -> bool:
        """Return whether a slot is allocated for the chunk, so that an answer will come."""
        return key in self._allocated

    def reset(self) -> None:
        """Free all allocated slots after the fetcher died."""
        with self._lock:
            self._free.extend(self._allocated.values())
            self._allocated.clear()

    def copy(self, key: Key, begin: int, end: int, length: int) -> bytes | None:
        """Return bytes `begin` to `end` of a held chunk of `length` bytes, or None if it is not held."""
        with self._lock:
            slot = self._held.get(key)
            if slot is None:
                return None
            # A reader that reached the chunk's end hardly comes back: the kernel's page cache has it. Unread readahead
            # must outlive it.
            self._held.move_to_end(key, last=end < length)
            base = slot * MAX_CHUNK
            return bytes(self._view[base + begin : base + end])

    def holds(self, key: Key) -> bool:
        """Return whether a slot holds the chunk."""
        return key in self._held

    @property
    def used(self) -> int:
        """Number of slots that hold a chunk."""
        return len(self._held)


class SlotWriter:
    """The fetcher's side: write chunks into allocated slots."""

    def __init__(self, fd: int) -> None:
        self._view = memoryview(mmap.mmap(fd, os.fstat(fd).st_size))

    def write(self, slot: int, data: bytes | memoryview) -> None:
        """Write a verified chunk into an allocated slot."""
        base = slot * MAX_CHUNK
        self._view[base : base + len(data)] = data
