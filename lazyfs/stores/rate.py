"""Bound the rate of fetches, over all threads of one process."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lazyfs.stores.base import Store


class Limiter:
    """At most `bytes_per_s` on the average, and in one moment as many chunks more as there are threads. 0: no limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait until what was fetched so far is within the rate."""
        while (left := self._free_at - time.monotonic()) > 0:
            time.sleep(left)

    def spend(self, size: int) -> None:
        """Count `size` bytes that were fetched."""
        if self.bytes_per_s:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + size / self.bytes_per_s


class Limited:
    """A store whose `get` keeps to a rate."""

    def __init__(self, store: Store, limiter: Limiter) -> None:
        self._store, self._limiter = store, limiter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, *arguments: Any, **options: Any) -> bytes | memoryview:
        """Read as the store does, once there is room in the rate."""
        self._limiter.wait()
        body = self._store.get(*arguments, **options)
        self._limiter.spend(len(body))
        return body
