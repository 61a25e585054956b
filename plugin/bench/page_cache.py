"""Warm page caches for who measures: what a start left there is brought back before the next one is timed.

A kernel may drop what nobody has read for a while, even with memory to spare (DAMON's pageout scheme, which some virtual machines run,
does after a minute). Two starts of an engine that are timed in turn lie about as far apart, so what would be measured is the disk.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoint.lazy_pages import uffd

_BLOCK = 8 << 20
_CACHED = bytes(value & 1 for value in range(256))  # of mincore's answer only the lowest bit means anything


class PageCache:
    """Of all files below some folders: which parts were in the page cache whenever `remember` was called."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = tuple(folders)
        self._pages: dict[str, bytes] = {}
        """For each file a byte a page: 1 for one that was cached."""

    def remember(self) -> int:
        """Look what is cached now, and add it to what is known; returns its bytes. Some seconds for an engine's environment."""
        for path in self._files():
            if pages := _cached(path):
                before = self._pages.get(path, b"")
                both = int.from_bytes(pages, "little") | int.from_bytes(before, "little")
                self._pages[path] = both.to_bytes(max(len(pages), len(before)), "little")
        return uffd.PAGE * sum(pages.count(1) for pages in self._pages.values())

    def bring_back(self) -> None:
        """Read again what is known; a file that is gone, or shorter now, is left out."""
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
                for path in (Path(folder, name).resolve() for name in names):  # a hub's model is links to its blobs
                    if path not in seen and path.is_file():
                        seen.add(path)
                        yield str(path)


def _cached(path: str) -> bytes:
    """A byte a page of a file: 1 for what is cached; empty where nothing of it is, or it cannot be read."""
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
