"""The fetcher's open sparse cache files: a bounded number, however many files a mount has.

An open one takes four descriptors. The least recently used one is closed first; files in use are never closed. A
touched file is protected from eviction without being open (`Cache.pin_touched`).
"""

from __future__ import annotations

import contextlib
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazyfs.cache.cache import Cache
from lazyfs.cache.sparse_file import AnySparseFile, SparseFile
from lazyfs.content.manifest import File

_FDS_EACH = 4
# More would only enlarge the process: reopening a file takes a tenth of a millisecond.
_MOST = 256


def raise_descriptor_limit() -> None:
    """Raise the soft descriptor limit to the hard limit.

    The usual soft limit of 1024 is for programs that call select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass
class _Entry:
    sparse_file: AnySparseFile
    users: int = 0


class OpenSparseFiles:
    """Open cache files by the file's index in the manifest. Thread-safe."""

    def __init__(self, cache: Cache, files: Sequence[File]) -> None:
        self.cache = cache
        self.files = files
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Use a quarter of the descriptor limit; the store needs the rest.
        self.most = _MOST if soft == resource.RLIM_INFINITY else max(8, min(_MOST, soft // (4 * _FDS_EACH)))
        self._open: OrderedDict[int, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def use(self, index: int) -> Iterator[AnySparseFile]:
        """Yield the file's cache file, opened if needed. Raises what `Cache.open_any` raises."""
        with self._lock:
            entry = self._open.get(index)
            if entry is None:
                sparse_file = self.cache.open_any(self.files[index])
                if isinstance(sparse_file, SparseFile):
                    self.cache.pin_touched(sparse_file.file)
                entry = self._open[index] = _Entry(sparse_file)
            self._open.move_to_end(index)
            entry.users += 1
        try:
            yield entry.sparse_file
        finally:
            with self._lock:
                entry.users -= 1
                self._trim()

    def _trim(self) -> None:
        idle = (index for index, entry in list(self._open.items()) if not entry.users)
        while len(self._open) > self.most and (index := next(idle, None)) is not None:
            self._open.pop(index).sparse_file.close()

    def close(self, index: int) -> bool:
        """Close the file's cache file unless it is in use. Return whether it is closed."""
        with self._lock:
            entry = self._open.get(index)
            if entry is None:
                return True
            if entry.users:
                return False
            del self._open[index]
            entry.sparse_file.close()
            return True

    def close_all(self) -> None:
        """Close all cache files that are not in use."""
        for index in list(self._open):
            self.close(index)

    def __len__(self) -> int:
        return len(self._open)
