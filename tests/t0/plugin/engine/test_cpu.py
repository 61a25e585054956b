"""A restored process has used less CPU time than before its dump; counters of CPU time must not fail."""

import pytest
from prometheus_client import CollectorRegistry, Counter

from plugin.engine import cpu

pytestmark = pytest.mark.t0


def test_a_counter_of_cpu_time_survives_a_restore(monkeypatch):
    monkeypatch.setattr(Counter, "inc", Counter.inc)  # restored after the test
    registry = CollectorRegistry()
    counter = Counter("cpu_seconds", "CPU time", registry=registry)
    counter.inc(21.5)
    with pytest.raises(ValueError, match="non-negative"):
        counter.inc(-21.4)
    cpu.accept_smaller_readings()
    cpu.accept_smaller_readings()
    counter.inc(-21.4)
    counter.inc(2)
    assert registry.get_sample_value("cpu_seconds_total") == 23.5
