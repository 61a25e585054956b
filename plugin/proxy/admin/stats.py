"""The proxy's counters: plain numbers, so that counting is cheap; `metrics` converts them to Prometheus' text on request."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

HELD_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Histogram:
    """Counts per bucket (upper bounds in seconds), and the sum of all observations."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def document(self) -> dict[str, object]:
        """Return plain data: bounds, counts per bucket (one more than bounds), sum of all observations."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": round(self.total, 6)}


class Stats:
    """The counters of one worker."""

    def __init__(self) -> None:
        self.requests = 0
        self.outcomes: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        """Requests that ended, answered or not, by pool; probes are left out."""
        self.upstream_errors: Counter[str] = Counter()
        self.held_total = 0
        self.bytes_out = 0
        self.held = Histogram(HELD_BUCKETS)
        self.first_byte = Histogram(FIRST_BYTE_BUCKETS)

    def document(self) -> dict[str, object]:
        """Return all counts as plain data, which `merged` can add up."""
        return {
            "requests": self.requests,
            "held_total": self.held_total,
            "bytes_out": self.bytes_out,
            "outcomes": dict(self.outcomes),
            "finished": dict(self.finished),
            "upstream_errors": dict(self.upstream_errors),
            "held_seconds": self.held.document(),
            "first_byte_seconds": self.first_byte.document(),
        }


def merged(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of several workers' documents."""
    total = Stats().document()
    for document in documents:
        total = {key: _add(value, document[key]) for key, value in total.items()}
    return total


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, dict) and "bounds" in left:
        counts = [a + b for a, b in zip(left["counts"], right["counts"], strict=True)]
        return {"bounds": left["bounds"], "counts": counts, "sum": left["sum"] + right["sum"]}
    if isinstance(left, dict):
        return dict(Counter(left) + Counter(right))
    return left + right
