"""Generate synthetic days of requests with a daily rhythm, bursts and launches; the same seed gives the same day.

Arrivals are a Poisson process of varying rate, drawn per second. A burst multiplies a service's rate for minutes; a launch
adds a permanent step that rises over ten minutes. Token counts are log-normal.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capacity.errors import InputError
from capacity.files import replacing
from capacity.inputs.trace import Trace
from capacity.model import Floats


@dataclass(frozen=True)
class Day:
    """Parameters of a day.

    `requests`: expected total. `swing`: the daily rhythm's share of the mean, in [0, 1).
    """

    services: tuple[str, ...] = ("chat", "code", "embed")
    requests: int = 100_000
    hours: float = 24.0
    swing: float = 0.6
    bursts: float = 6.0  # per service and day
    launches: int = 1
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.services or len(set(self.services)) != len(self.services):
            raise InputError("repeated-name", "services need names, each once")
        if self.requests < 1 or not 0 < self.hours <= 24 * 31 or not 0 <= self.swing < 1 or self.bursts < 0:
            raise InputError("out-of-range", "requests >= 1, 0 < hours <= 744, 0 <= swing < 1, bursts >= 0")


def rates(day: Day) -> Floats:
    """Return requests per second, [service, second]."""
    random = np.random.default_rng(day.seed)
    seconds = max(1, round(day.hours * 3600))
    clock = np.arange(seconds) / 3600
    shares = random.dirichlet(np.full(len(day.services), 3.0))
    rows = []
    for k in range(len(day.services)):
        phase = random.normal(15.0, 2.0)  # hour of the peak
        rate = 1 + day.swing * np.cos((clock - phase) / 24 * 2 * np.pi)
        for _ in range(random.poisson(day.bursts * day.hours / 24)):
            begin, length = int(random.integers(seconds)), int(random.integers(60, 600))
            rate[begin : begin + length] *= random.uniform(2.0, 5.0)
        if k < day.launches:
            launch = random.uniform(0.3, 0.7) * seconds
            rate += random.uniform(0.5, 1.5) * np.clip((np.arange(seconds) - launch) / 600, 0.0, 1.0)
        rows.append(rate / rate.sum() * shares[k] * day.requests)
    return np.array(rows)


def generate(day: Day) -> Trace:
    """Generate the day as a trace. Raises InputError if it has no request."""
    random = np.random.default_rng([day.seed, 1])
    at, who = [], []
    for k, rate in enumerate(rates(day)):
        counts = random.poisson(rate)
        times: Floats = np.repeat(np.arange(len(rate), dtype=np.float64), counts) + random.random(int(counts.sum()))
        at.append(times)
        who.append(np.full(len(times), k, dtype=np.int64))
    times, services = np.concatenate(at), np.concatenate(who)
    if not len(times):
        raise InputError("empty", "the day has no request; ask for more")
    order = np.argsort(times, kind="stable")
    context = np.round(random.lognormal(7.2, 0.8, len(times))) + 1
    generated = np.round(random.lognormal(4.0, 1.0, len(times))) + 1
    times = times[order]
    return Trace(times - times[0], context, generated, services[order], day.services)


def write(trace: Trace, path: Path) -> None:
    """Write the trace as CSV. Raises OSError."""
    names = [trace.services[k] for k in trace.service]
    with replacing(path) as file:
        rows = csv.writer(file)
        rows.writerow(("TIMESTAMP", "ContextTokens", "GeneratedTokens", "Service"))
        rows.writerows(
            (f"{t:.6f}", int(c), int(g), name)
            for t, c, g, name in zip(trace.at, trace.context, trace.generated, names, strict=True)
        )
