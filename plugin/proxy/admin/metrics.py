"""Convert the `/-/status` document to Prometheus' text format. All workers' counters are already added up in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from plugin.runtime.phases import Phase

_SOURCES = {
    "ahead": "bytes_ahead",
    "fault": "bytes_faulted",
    "rest": "bytes_rest",
    "zero": "bytes_zero",
    "disk": "bytes_cold",
}
_P = "quickthaw_proxy_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Document:
    """A collector that converts one document to metric families."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; called by the registry."""
        doc = self.document
        requests = CounterMetricFamily(_P + "requests", "Requests by outcome.", labels=["outcome"])
        for outcome, count in doc["outcomes"].items():
            requests.add_metric([outcome], count)
        yield requests
        ended = CounterMetricFamily(
            _P + "finished", "Requests that ended, answered or not; no probes.", labels=["pool"]
        )
        for pool in doc["pools"]:
            ended.add_metric([pool["name"]], doc["finished"].get(pool["name"], 0))
        yield ended
        errors = CounterMetricFamily(_P + "upstream_errors", "Failures of replicas by code.", labels=["code"])
        for code, count in doc["upstream_errors"].items():
            errors.add_metric([code], count)
        yield errors
        yield CounterMetricFamily(_P + "held_requests", "Requests that had to wait.", value=doc["held_total"])
        yield CounterMetricFamily(_P + "sent_bytes", "Bytes of answers sent to clients.", value=doc["bytes_out"])
        yield GaugeMetricFamily(_P + "clients", "Open client connections.", value=doc["clients"])
        yield GaugeMetricFamily(_P + "held_bytes", "Bytes of bodies kept for held requests.", value=doc["held_bytes"])
        yield _histogram("held_seconds", "How long requests were held.", doc["held_seconds"])
        yield _histogram("first_byte_seconds", "From a request's head to its answer's.", doc["first_byte_seconds"])
        yield from self._pools(doc["pools"])

    def _pools(self, pools: list[dict[str, Any]]) -> Iterator[Metric]:
        held = GaugeMetricFamily(_P + "held", "Requests waiting now.", labels=["pool"])
        outstanding = GaugeMetricFamily(_P + "outstanding", "Requests being answered now.", labels=["pool", "replica"])
        phase = GaugeMetricFamily(
            _P + "replica_phase", "1 for the phase that the replica is in.", labels=["pool", "replica", "phase"]
        )
        wakes = CounterMetricFamily(_P + "wakes", "Wakes begun.", labels=["pool"])
        sleeps = CounterMetricFamily(_P + "sleeps", "Times put to sleep.", labels=["pool"])
        standbys = CounterMetricFamily(_P + "standbys", "Times put in standby.", labels=["pool"])
        failed = CounterMetricFamily(_P + "failed_starts", "Starts that failed for good.", labels=["pool"])
        last = GaugeMetricFamily(
            _P + "last_start_phase_seconds", "Phases of the last start.", labels=["pool", "kind", "phase"]
        )
        for pool in pools:
            name = pool["name"]
            held.add_metric([name], pool["held"])
            wakes.add_metric([name], pool["wakes"])
            sleeps.add_metric([name], pool["sleeps"])
            standbys.add_metric([name], pool["standbys"])
            failed.add_metric([name], pool["failed_starts"])
            for replica in pool["replicas"]:
                outstanding.add_metric([name, replica["name"]], replica["outstanding"])
                for value in Phase:
                    phase.add_metric([name, replica["name"], str(value)], float(replica["phase"] == value))
            for kind, spans in pool["starts"].items():
                took: dict[str, float] = {}
                for span in spans:
                    took[span["phase"]] = took.get(span["phase"], 0.0) + span["took_s"]
                for of, seconds in took.items():
                    last.add_metric([name, kind, str(of)], seconds)
        yield from (held, outstanding, phase, wakes, sleeps, standbys, failed, last)
        yield from self._pages([(pool["name"], replica) for pool in pools for replica in pool["replicas"]])

    @staticmethod
    def _pages(replicas: list[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
        """Yield the page server metrics of restored replicas (checkpoint.lazy_pages)."""
        of = ["pool", "replica"]
        faults = CounterMetricFamily("quickthaw_page_faults", "Faults on pages not yet in place.", labels=of)
        stall = CounterMetricFamily("quickthaw_page_stall_seconds", "Time that those faults waited.", labels=of)
        lost = CounterMetricFamily(
            "quickthaw_pages_lost", "Restores ended since their pages would not all come.", labels=of
        )
        left = GaugeMetricFamily("quickthaw_pages_left_bytes", "What is still to be put in place.", labels=of)
        size = CounterMetricFamily(
            "quickthaw_page_bytes",
            "Bytes put in place: ahead of faults, by a fault, the rest, zeros; disk: of all these, read from a disk.",
            labels=[*of, "source"],
        )
        for pool, replica in replicas:
            if counts := replica["pages"]:
                who = [pool, replica["name"]]
                faults.add_metric(who, counts["faults"])
                stall.add_metric(who, counts["stall_s"])
                lost.add_metric(who, counts["lost"])
                left.add_metric(who, counts["left"])
                for source, name in _SOURCES.items():
                    size.add_metric([*who, source], counts[name])
        yield from (faults, stall, size, left, lost)


def _histogram(name: str, text: str, data: dict[str, Any]) -> HistogramMetricFamily:
    buckets, running = [], 0
    for bound, count in zip([*data["bounds"], float("inf")], data["counts"], strict=True):
        running += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(running)))
    return HistogramMetricFamily(_P + name, text, buckets=buckets, sum_value=data["sum"])


def exposition(document: dict[str, Any]) -> bytes:
    """Return the document in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Document(document))
    return generate_latest(registry)
