"""The residency bitmap of images that are still arriving from a remote store: which pages are in place.

The owner (checkpoint.store.download) fills sparse page files with verified pages and marks each in the residency
bitmap, a file of one byte per page that page servers have mapped. A page is read here only after it was marked.
Missing pages are requested through the owner's socket, and the owner reports new arrivals. Standard library only.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping

_MAGIC = b"QTPM"
PAGE = 4096


class ResidencyBitmap:
    """The residency bitmap.

    File format: `QTPM`, a 32-bit length, a JSON head (pages of each file), then a byte for every page, 1 once it is in
    place.
    """

    def __init__(self, memory: mmap.mmap, base: int, pages: Mapping[str, int]) -> None:
        self._memory = memory
        self._start: dict[str, int] = {}
        for name, count in pages.items():
            self._start[name] = base
            base += count
        self._one = b"\1" * 4096

    @classmethod
    def make(cls, path: str, sizes: Mapping[str, int]) -> ResidencyBitmap:
        """Create a bitmap with no page in place; `sizes` in bytes.

        Raises OSError when the disk has no room for all of it.
        """
        pages = {name: -(-size // PAGE) for name, size in sizes.items()}
        head = json.dumps(pages).encode()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, _MAGIC + struct.pack("<I", len(head)) + head)
            # Not sparse: marking or reading a page on a full disk would kill the process (SIGBUS).
            os.posix_fallocate(fd, 0, 8 + len(head) + sum(pages.values()))
            return cls(mmap.mmap(fd, 0), 8 + len(head), pages)
        finally:
            os.close(fd)

    @classmethod
    def open(cls, path: str) -> ResidencyBitmap:
        """Open a bitmap that another process fills. Raises OSError, or ValueError for an invalid file."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        if memory[:4] != _MAGIC:
            raise ValueError(f"{path} is no map of pages")
        (size,) = struct.unpack_from("<I", memory, 4)
        return cls(memory, 8 + size, json.loads(memory[8 : 8 + size]))

    def mark(self, name: str, offset: int, length: int) -> None:
        """Mark the pages of [offset, offset + length) of a file as in place.

        Files without a page map are skipped.
        """
        start = self._start.get(name)
        if start is not None:
            low, high = start + offset // PAGE, start + (offset + length) // PAGE
            for at in range(low, high, 4096):
                end = min(high, at + 4096)
                self._memory[at:end] = self._one[: end - at]

    def has(self, name: str, offset: int, length: int) -> bool:
        """Return whether all pages of [offset, offset + length) are in place."""
        low = self._start[name] + offset // PAGE
        return self._memory.find(b"\0", low, low + -(-length // PAGE)) < 0

    def close(self) -> None:
        self._memory.close()
