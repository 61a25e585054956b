"""Counters of a mount and of its fetcher: plain numbers, so that counting is cheap."""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs.fetch.wire import BUCKETS_S


@dataclass
class Counters:
    """Counters since the mount began: bytes and reads by how they were answered, and waiting times."""

    reads: int = 0
    bytes_read: int = 0
    hits: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    failed: int = 0
    opens: int = 0
    native_opens: int = 0
    streamed: int = 0
    first_byte_s: float = 0.0


class Histogram:
    """Counts of durations by bucket.

    A count lost to a thread race would not matter; none is lost under the GIL.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        place = next((i for i, bound in enumerate(BUCKETS_S) if seconds <= bound), len(BUCKETS_S))
        self.counts[place] += 1
        self.total += seconds
