"""The cache images that a fetcher has open: a bounded number of them, however many files a mount has.

An open image takes four descriptors. What was used longest ago is closed first; what is in use is never closed. That an image was
touched keeps it from eviction without being open (`Cache.touched`).
"""

from __future__ import annotations

import contextlib
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazyfs.cache.cache import AnyImage, Cache, Image
from lazyfs.content.manifest import File

_FDS_EACH = 4
# More would only make the process larger: opening one again takes a tenth of a millisecond.
_MOST = 256


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as it may have. The usual soft limit of 1024 is for programs that call select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass
class _Entry:
    image: AnyImage
    users: int = 0


class OpenImages:
    """Images by the file's index in the manifest. Thread-safe."""

    def __init__(self, cache: Cache, files: Sequence[File]) -> None:
        self.cache = cache
        self.files = files
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # A quarter of what the process may open: the rest is for the store.
        self.most = _MOST if soft == resource.RLIM_INFINITY else max(8, min(_MOST, soft // (4 * _FDS_EACH)))
        self._open: OrderedDict[int, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def use(self, index: int) -> Iterator[AnyImage]:
        """The file's image, opened if it is not. Raises what `Cache.open_any` raises."""
        with self._lock:
            entry = self._open.get(index)
            if entry is None:
                image = self.cache.open_any(self.files[index])
                if isinstance(image, Image):
                    self.cache.touched(image.file)
                entry = self._open[index] = _Entry(image)
            self._open.move_to_end(index)
            entry.users += 1
        try:
            yield entry.image
        finally:
            with self._lock:
                entry.users -= 1
                self._trim()

    def _trim(self) -> None:
        idle = (index for index, entry in list(self._open.items()) if not entry.users)
        while len(self._open) > self.most and (index := next(idle, None)) is not None:
            self._open.pop(index).image.close()

    def close(self, index: int) -> bool:
        """Close the file's image unless it is in use; whether it is closed."""
        with self._lock:
            entry = self._open.get(index)
            if entry is None:
                return True
            if entry.users:
                return False
            del self._open[index]
            entry.image.close()
            return True

    def close_all(self) -> None:
        """Close what is not in use."""
        for index in list(self._open):
            self.close(index)

    def __len__(self) -> int:
        return len(self._open)
