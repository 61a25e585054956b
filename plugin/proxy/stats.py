"""What the proxy counts: plain numbers, so that counting costs nothing on the way; `metrics` turns them into
Prometheus' text when asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

HELD_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Histogram:
    """Counts by bucket (upper bounds in seconds), and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def merge(self, other: Histogram) -> None:
        """Add another worker's counts of the same bounds."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


class Stats:
    """The counters of one worker."""

    def __init__(self) -> None:
        self.requests = 0
        self.outcomes: Counter[str] = Counter()
        self.upstream_errors: Counter[str] = Counter()
        self.held_total = 0
        self.bytes_out = 0
        self.held = Histogram(HELD_BUCKETS)
        self.first_byte = Histogram(FIRST_BYTE_BUCKETS)
