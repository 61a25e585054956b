"""Render a mount's metrics in Prometheus text format: bytes by tier, hits, fetch latency, queue, and read waits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lazyfs.fetch.wire import BUCKETS_S, SOURCES

_COUNTERS = {
    "reads": ("reads_total", "Reads that the kernel sent"),
    "bytes_read": ("read_bytes_total", "Bytes answered"),
    "hits": ("read_hits_total", "Reads answered at once, from what was here"),
    "waits": ("read_waits_total", "Reads that had to wait for a chunk"),
    "failed": ("read_failures_total", "Reads answered with an error"),
    "opens": ("opens_total", "Files opened"),
    "native_opens": ("native_opens_total", "Files opened that the kernel passes through"),
    "streamed": ("streamed_bytes_total", "Bytes answered out of memory since the disk was full"),
}
_FETCHER = {
    "fetches": ("fetches_total", "Chunks fetched"),
    "retries": ("fetch_retries_total", "Attempts repeated after a temporary failure"),
    "quarantined": ("quarantined_total", "Bodies that did not hash to their digest"),
}
_TIERS = {"store_bytes": "store", "origin_bytes": "origin", "proven_bytes": "disk"}


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


def render(status: dict[str, Any], waits: Histogram) -> str:
    """Return the text of one scrape, from the result of `status`."""
    label = f'{{manifest="{status["manifest"][:16]}"}}'
    out: list[str] = []

    def metric(name: str, kind: str, text: str, value: float, labels: str = label) -> None:
        out.append(f"# HELP quickthaw_lazyfs_{name} {text}\n# TYPE quickthaw_lazyfs_{name} {kind}")
        out.append(f"quickthaw_lazyfs_{name}{labels} {value:g}")

    for key, (name, text) in _COUNTERS.items():
        metric(name, "counter", text, status["counters"][key])
    metric("first_byte_seconds", "gauge", "From the mount to the first byte read", status["counters"]["first_byte_s"])
    metric("cached_bytes", "gauge", "Bytes of the manifest that are on this host", status["cached_bytes"])
    metric("bytes", "gauge", "Bytes of the manifest", status["bytes"])
    metric("open_files", "gauge", "Files open now", status["open_files"])
    metric("waiting_reads", "gauge", "Reads that wait now", status["waiting"])
    metric("fetcher_restarts_total", "counter", "Fetchers started after one died", status["fetcher_restarts"])
    fetcher = status["fetcher"]
    for key, (name, text) in _FETCHER.items():
        metric(name, "counter", text, fetcher.get(key, 0))
    metric("queued_chunks", "gauge", "Chunks waiting to be fetched", fetcher.get("queued", 0))
    out.append("# HELP quickthaw_lazyfs_tier_bytes_total Bytes by where they came from")
    out.append("# TYPE quickthaw_lazyfs_tier_bytes_total counter")
    for key, tier in _TIERS.items():
        out.append(f'quickthaw_lazyfs_tier_bytes_total{{tier="{tier}"}} {fetcher.get(key, 0):g}')
    counters = status["counters"]
    out.append("# HELP quickthaw_lazyfs_answered_bytes_total Bytes answered to readers, by where they lay")
    out.append("# TYPE quickthaw_lazyfs_answered_bytes_total counter")
    for tier, value in (("memory", counters["streamed"]), ("disk", counters["bytes_read"] - counters["streamed"])):
        out.append(f'quickthaw_lazyfs_answered_bytes_total{{tier="{tier}"}} {value:g}')
    out.append("# HELP quickthaw_lazyfs_waited_seconds_total What reads waited for")
    out.append("# TYPE quickthaw_lazyfs_waited_seconds_total counter")
    for source in SOURCES:
        out.append(
            f'quickthaw_lazyfs_waited_seconds_total{{source="{source}"}} {status["waited_for"].get(source, 0):g}'
        )
    fetches = [fetcher.get(f"fetches_{i}", 0) for i in range(len(BUCKETS_S) + 1)]
    out += _histogram("fetch_seconds", "How long fetches of chunks took", fetches, fetcher.get("fetch_ms", 0) / 1000)
    out += _histogram("wait_seconds", "How long reads waited for chunks", waits.counts, waits.total)
    return "\n".join(out) + "\n"


def _histogram(name: str, text: str, counts: Iterable[int], total: float) -> list[str]:
    name = f"quickthaw_lazyfs_{name}"
    out, running = [f"# HELP {name} {text}\n# TYPE {name} histogram"], 0
    for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), counts, strict=True):
        running += count
        out.append(f'{name}_bucket{{le="{bound}"}} {running}')
    return [*out, f"{name}_sum {total:g}\n{name}_count {running}"]
