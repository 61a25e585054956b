"""Keep page caches warm for benchmarks: read back what a start had cached before the next one is timed.

A kernel may drop pages that were not read for a while, even with memory to spare (DAMON's pageout scheme, which some
virtual machines use, does so after a minute). Alternating starts of an engine are about that far apart, so the disk
would be measured instead.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoint.lazy_pages import uffd

_BLOCK = 8 << 20
_CACHED = bytes(value & 1 for value in range(256))  # only the lowest bit of each mincore byte has a meaning


class PageCache:
    """Track, for all files below some folders, which parts were in the page cache at any call of `remember`."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = tuple(folders)
        self._pages: dict[str, bytes] = {}
        """One byte per page of each file: 1 if it was cached."""

    def remember(self) -> int:
        """Add the pages that are cached now and return the total in bytes. Takes some seconds for an engine's environment."""
        for path in self._files():
            if pages := _cached(path):
                before = self._pages.get(path, b"")
                both = int.from_bytes(pages, "little") | int.from_bytes(before, "little")
                self._pages[path] = both.to_bytes(max(len(pages), len(before)), "little")
        return uffd.PAGE * sum(pages.count(1) for pages in self._pages.values())

    def read_again(self) -> None:
        """Read all remembered pages again; skip files that are missing or shorter now."""
        block = memoryview(bytearray(_BLOCK))
        for path, pages in self._pages.items():
            with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                for run in re.finditer(rb"\x01+", pages):
                    offset, end = run.start() * uffd.PAGE, run.end() * uffd.PAGE
                    while offset < end and (got := os.preadv(file.fileno(), [block[: end - offset]], offset)):
                        offset += got

    def _files(self) -> Iterator[str]:
        seen: set[Path] = set()
        for top in self._folders:
            for folder, _, names in os.walk(top):
                for path in (Path(folder, name).resolve() for name in names):  # a hub model's files are links to blobs
                    if path not in seen and path.is_file():
                        seen.add(path)
                        yield str(path)


def _cached(path: str) -> bytes:
    """Return one byte per page of a file, 1 if cached; empty if no page is cached or the file cannot be read."""
    try:
        address, size = uffd.map_file(path)
        if not size:
            return b""
        try:
            pages = uffd.cached(address, size).translate(_CACHED)
        finally:
            uffd.unmap(address, size)
    except OSError:
        return b""
    return pages if 1 in pages else b""
