"""Render a mount's status for Prometheus: bytes by tier, hits, fetch latency, queue, and read waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lazyfs.counters import Histogram
from lazyfs.fetch.wire import BUCKETS_S, SOURCES

_P = "quickthaw_lazyfs_"
_COUNTERS = {
    "reads": ("reads", "Reads that the kernel sent"),
    "bytes_read": ("read_bytes", "Bytes answered"),
    "hits": ("read_hits", "Reads answered at once, from chunks on this host"),
    "waits": ("read_waits", "Reads that waited for a chunk"),
    "failed": ("read_failures", "Reads answered with an error"),
    "opens": ("opens", "Files opened"),
    "native_opens": ("native_opens", "Files opened with kernel passthrough"),
    "streamed": ("streamed_bytes", "Bytes answered from memory because the disk was full"),
}
_FETCHER = {
    "fetches": ("fetches", "Chunks fetched"),
    "retries": ("fetch_retries", "Attempts repeated after a temporary failure"),
    "quarantined": ("quarantined", "Bodies that did not hash to their digest"),
}
_GAUGES = {
    "cached_bytes": ("cached_bytes", "Bytes of the manifest that are on this host"),
    "bytes": ("bytes", "Bytes of the manifest"),
    "open_files": ("open_files", "Files open now"),
    "waiting": ("waiting_reads", "Reads that wait now"),
}
_TIERS = {"store_bytes": "store", "origin_bytes": "origin", "proven_bytes": "disk", "peer_bytes": "peer"}


def render(status: dict[str, Any], waits: Histogram) -> str:
    """Return the text of one scrape, from the result of `status`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Status(status, waits))
    return generate_latest(registry).decode()


class _Status(Collector):
    def __init__(self, status: dict[str, Any], waits: Histogram) -> None:
        self.status = status
        self.waits = waits

    def collect(self) -> Iterator[Metric]:
        status, manifest = self.status, self.status["manifest"][:16]
        counters, fetcher = status["counters"], status["fetcher"]
        for names, values in ((_COUNTERS, counters), (_FETCHER, fetcher)):
            for key, (name, text) in names.items():
                yield _labelled(CounterMetricFamily, name, text, "manifest", {manifest: values.get(key, 0)})
        yield _labelled(
            CounterMetricFamily, "fetcher_restarts", "Fetchers started after one died", "manifest",
            {manifest: status["fetcher_restarts"]},
        )  # fmt: skip
        gauges = [(name, text, status[key]) for key, (name, text) in _GAUGES.items()]
        gauges.append(("first_byte_seconds", "From the mount to the first byte read", counters["first_byte_s"]))
        gauges.append(("queued_chunks", "Chunks waiting to be fetched", fetcher.get("queued", 0)))
        for name, text, value in gauges:
            yield _labelled(GaugeMetricFamily, name, text, "manifest", {manifest: value})
        tiers = {tier: fetcher.get(key, 0) for key, tier in _TIERS.items()}
        yield _labelled(CounterMetricFamily, "tier_bytes", "Bytes by the tier that they came from", "tier", tiers)
        streamed = counters["streamed"]
        answered = {"memory": streamed, "disk": counters["bytes_read"] - streamed}
        yield _labelled(CounterMetricFamily, "answered_bytes", "Bytes answered, by where they were", "tier", answered)
        waited = {source: status["waited_for"].get(source, 0) for source in SOURCES}
        yield _labelled(CounterMetricFamily, "waited_seconds", "Time that reads waited, by source", "source", waited)
        fetches = [fetcher.get(f"fetches_{i}", 0) for i in range(len(BUCKETS_S) + 1)]
        yield _histogram("fetch_seconds", "Durations of chunk fetches", fetches, fetcher.get("fetch_ms", 0) / 1000)
        yield _histogram("wait_seconds", "Durations that reads waited for chunks", self.waits.counts, self.waits.total)


def _labelled(kind: Any, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
    family: Metric = kind(_P + name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)  # type: ignore[attr-defined]
    return family


def _histogram(name: str, text: str, counts: Iterable[int], total: float) -> Metric:
    buckets = list(zip((*map(str, BUCKETS_S), "+Inf"), accumulate(counts), strict=True))
    return HistogramMetricFamily(_P + name, text, buckets=buckets, sum_value=total)
