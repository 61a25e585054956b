"""A mount's figures in Prometheus's text form: bytes by tier, hits, fetch latency, queue, and what readers waited
for.
"""

from __future__ import annotations

from typing import Any

# Upper bounds in seconds of the histogram of waits: from a local chunk to a store in trouble.
WAIT_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)

_COUNTERS = {
    "reads": ("reads_total", "Reads that the kernel sent"),
    "bytes_read": ("read_bytes_total", "Bytes answered"),
    "hits": ("read_hits_total", "Reads answered, at once or after a wait"),
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
    """Counts of waits by duration. Losing one to a race of threads would not matter; none is lost under the GIL."""

    def __init__(self) -> None:
        self.counts = [0] * (len(WAIT_BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        place = next((i for i, bound in enumerate(WAIT_BUCKETS) if seconds <= bound), len(WAIT_BUCKETS))
        self.counts[place] += 1
        self.total += seconds


def render(status: dict[str, Any], waits: Histogram) -> str:
    """The text of one scrape, from what `status` answers."""
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
    metric("fetch_seconds_total", "counter", "Time spent in fetches", fetcher.get("fetch_ms", 0) / 1000)
    metric("queued_chunks", "gauge", "Chunks waiting to be fetched", fetcher.get("queued", 0))
    out.append("# HELP quickthaw_lazyfs_tier_bytes_total Bytes by where they came from")
    out.append("# TYPE quickthaw_lazyfs_tier_bytes_total counter")
    for key, tier in _TIERS.items():
        out.append(f'quickthaw_lazyfs_tier_bytes_total{{tier="{tier}"}} {fetcher.get(key, 0):g}')
    out.append("# HELP quickthaw_lazyfs_wait_seconds How long reads waited for chunks")
    out.append("# TYPE quickthaw_lazyfs_wait_seconds histogram")
    running = 0
    for bound, count in zip((*map(str, WAIT_BUCKETS), "+Inf"), waits.counts, strict=True):
        running += count
        out.append(f'quickthaw_lazyfs_wait_seconds_bucket{{le="{bound}"}} {running}')
    out.append(f"quickthaw_lazyfs_wait_seconds_sum {waits.total:g}\nquickthaw_lazyfs_wait_seconds_count {running}")
    return "\n".join(out) + "\n"
