"""Keep counters of CPU time from failing after a restore.

A restored process begins with a CPU time of zero. SGLang adds the difference between two readings to a Prometheus counter
(`--enable-metrics`), and a counter refuses a negative amount: the scheduler ended.
"""

import sys


def accept_smaller_readings():
    """Make Prometheus counters of this process count a negative amount as 0. Later calls do nothing."""
    metrics = sys.modules.get("prometheus_client.metrics")
    if metrics is None or metrics.Counter.inc.__module__ == __name__:
        return
    original = metrics.Counter.inc

    def inc(self, amount=1, *args, **kwargs):
        return original(self, amount if amount > 0 else 0, *args, **kwargs)

    metrics.Counter.inc = inc
