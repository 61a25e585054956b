"""A mount's metrics contain every figure of the status, with its tier, and histograms add up."""

from __future__ import annotations

from lazyfs.counters import Counters, Histogram
from lazyfs.fetch import wire
from lazyfs.mount.metrics import render


def scrape(text):
    """Return name with labels → value. Asserts that every sample's family is declared before it."""
    samples, declared = {}, set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            declared.add(line.split()[2])
        elif not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            family = name.partition("{")[0]
            bare = family.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
            assert {family, bare} & declared and name not in samples
            samples[name] = float(value)
    return samples


def test_every_figure_is_shown():
    waits = Histogram()
    for seconds in (0.0005, 0.01, 99.0):
        waits.add(seconds)
    fetched = {name: number for number, name in enumerate(wire.STAT_NAMES, 1)}
    status = {
        "manifest": "ab" * 32, "cached_bytes": 5, "bytes": 10, "open_files": 1, "waiting": 2, "fetcher_restarts": 0,
        "counters": vars(Counters(reads=9, bytes_read=1000, hits=6, waits=3, streamed=300, first_byte_s=0.25)),
        "fetcher": fetched, "waited_for": {"store": 98.0, "proof": 1.0},
    }  # fmt: skip
    shown = scrape(render(status, waits))
    of = '{manifest="abababababababab"}'
    expected = {
        f"reads_total{of}": 9, f"read_hits_total{of}": 6, f"read_waits_total{of}": 3, f"first_byte_seconds{of}": 0.25,
        f"queued_chunks{of}": fetched["queued"], f"waiting_reads{of}": 2,
        'answered_bytes_total{tier="disk"}': 700, 'answered_bytes_total{tier="memory"}': 300,
        'tier_bytes_total{tier="store"}': fetched["store_bytes"],
        'waited_seconds_total{source="store"}': 98, 'waited_seconds_total{source="proof"}': 1,
        'waited_seconds_total{source="origin"}': 0,
        'wait_seconds_bucket{le="0.001"}': 1, 'wait_seconds_bucket{le="10.0"}': 2, 'wait_seconds_bucket{le="+Inf"}': 3,
        "wait_seconds_count": 3, "fetch_seconds_sum": fetched["fetch_ms"] / 1000,
        "fetch_seconds_count": sum(v for k, v in fetched.items() if k.startswith("fetches_")),
    }  # fmt: skip
    for name, value in expected.items():
        assert shown[f"quickthaw_lazyfs_{name}"] == value, name
