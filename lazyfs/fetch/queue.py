"""Choose what the fetcher fetches next: the queue of chunks by urgency, the number of concurrent fetches, the background rate."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable

from lazyfs.content.chunking import MAX_CHUNK
from lazyfs.fetch import wire


class Queue:
    """Chunks to fetch, most urgent first; a repeated put with higher urgency moves a chunk up. Thread-safe."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, tuple[int, int]]] = []
        self._urgency: dict[tuple[int, int], int] = {}
        self._taken: dict[int, int] = {}
        self._order = 0
        lock = threading.Lock()
        self._ready = threading.Condition(lock)
        # Workers limited to on-demand chunks wait on their own condition, so that other chunks do not wake them.
        self._on_demand = threading.Condition(lock)
        self.closed = False

    def put(self, key: tuple[int, int], urgency: int) -> None:
        """Add a chunk, or raise its urgency."""
        with self._ready:
            if self._urgency.get(key, 99) <= urgency:
                return
            self._urgency[key] = urgency
            self._order += 1
            heapq.heappush(self._heap, (urgency, self._order, key))
            self._ready.notify()
            if urgency == wire.ON_DEMAND:
                self._on_demand.notify()

    def get(
        self, least_urgent: Callable[[], int], limit_s: float, pause: Callable[[], float] = lambda: 0.0
    ) -> tuple[tuple[int, int], int] | None:
        """Take the most urgent chunk if it is at least as urgent as `least_urgent()`; None after `limit_s` seconds or when closed.

        The caller must call `done` afterwards. `pause()`: seconds after which `least_urgent()` may have changed by itself; 0: it
        does not change.
        """
        with self._ready:
            deadline = time.monotonic() + limit_s
            while not self.closed:
                while self._heap and self._urgency.get(self._heap[0][2]) != self._heap[0][0]:
                    heapq.heappop(self._heap)
                if self._heap and self._heap[0][0] <= least_urgent():
                    urgency, _, key = heapq.heappop(self._heap)
                    del self._urgency[key]
                    self._taken[key[0]] = self._taken.get(key[0], 0) + 1
                    return key, urgency
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                (self._on_demand if least_urgent() == wire.ON_DEMAND else self._ready).wait(min(left, pause() or left))
            return None

    def done(self, file: int) -> None:
        """Mark one taken chunk of the file as handled."""
        with self._ready:
            self._taken[file] -= 1

    def taken(self, file: int) -> int:
        """Return how many taken chunks of the file are not done."""
        return self._taken.get(file, 0)

    def forget(self, file: int) -> list[tuple[int, int]]:
        """Remove and return the file's queued chunks that no reader waits for."""
        with self._ready:
            keys = [k for k, u in self._urgency.items() if k[0] == file and u != wire.ON_DEMAND]
            for key in keys:
                del self._urgency[key]
            return keys

    def wake(self) -> None:
        """Wake all waiting workers: the result of `least_urgent()` has changed."""
        with self._ready:
            self._ready.notify_all()
            self._on_demand.notify_all()

    def close(self) -> None:
        """Close the queue and wake all waiting workers."""
        with self._ready:
            self.closed = True
            self._ready.notify_all()
            self._on_demand.notify_all()

    def __len__(self) -> int:
        return len(self._urgency)


class Window:
    """Adapt the number of concurrent readahead and background fetches: double it as long as throughput grows.

    Every chunk in flight takes bandwidth from the one that a reader will want first, so filling more than the link costs
    latency at the start and at the end. A store that is slow per connection needs many fetches. Two batches are measured at
    each width (the first one fills the pipe). The widening ends when the second one gains less than a fifth.
    """

    START, GAIN = 4, 1.2

    def __init__(self, most: int) -> None:
        self.most = most
        self.width = min(self.START, most)
        self._best = 0.0
        self._batch = 0
        self._bytes = 0
        self._since = time.monotonic()
        self._settled = self.width == most
        self._lock = threading.Lock()

    def fetched(self, size: int) -> bool:
        """Count a finished fetch of `size` bytes. Return whether the width has changed."""
        with self._lock:
            if self._settled:
                return False
            self._bytes += size
            if self._bytes < self.width * MAX_CHUNK:
                return False
            now = time.monotonic()
            rate = self._bytes / max(1e-6, now - self._since)
            self._bytes, self._since, self._batch = 0, now, self._batch + 1
            if self._batch % 2:
                return False
            if rate < self.GAIN * self._best:
                self.width = max(self.START, self.width // 2)
                self._settled = True
            else:
                self._best = rate
                self.width = min(self.most, self.width * 2)
                self._settled = self.width == self.most
            return True


class RateLimit:
    """Rate limit in bytes per second for background fetches; 0: no limit. Thread-safe."""

    def __init__(self, megabytes_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_s = megabytes_s * 1e6
        self.clock = clock
        self._next = 0.0
        self._lock = threading.Lock()

    def wait_s(self) -> float:
        """Return the seconds until more may be taken."""
        return max(0.0, self._next - self.clock())

    def take(self, size: int) -> bool:
        """Take `size` bytes now; return False if it is too early."""
        with self._lock:
            now = self.clock()
            if now < self._next:
                return False
            if self.bytes_s > 0:
                self._next = now + size / self.bytes_s
            return True
