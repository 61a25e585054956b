"""Learn demand from a trace: rates in bins, a forecast of their quantiles, and the history from which growth is read.

A bin is as long as a queue may even out arrivals: a request's service time and its target wait, but no longer than a start
on a fresh instance takes. The forecast of a step is the quantiles of the bins of the hour before the plan, of the same
hour of earlier days, or of the same hour of earlier weeks (a seasonal-naive forecast): whichever had the least error in a
backtest that sees only the past. Growth is counted from the demand that each past moment would have been planned for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from capacity.errors import InputError
from capacity.inputs import trace as traces
from capacity.inputs.document import Field, integer, quantity
from capacity.inputs.lead_times import expand
from capacity.inputs.trace import Trace
from capacity.inputs.units import duration_text
from capacity.model import Demand, Floats, Forecast, History, Pool, Service, quantile

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
FEWEST = 40  # bins from which a quantile is read
TESTS = 12  # fewest steps of a backtest
MOST_TESTS = 200
SHORTEST = 1.0  # seconds
DAY = 86400.0
SEASONS = {"day": DAY, "week": 7 * DAY}


def learn(
    field: Field, services: tuple[Service, ...], pools: tuple[Pool, ...], level: float, step: float, path: Path
) -> Demand:
    """Learn demand from `trace: {path, service, bin, steps, start}`.

    `service` names the service if the CSV has no Service column; `start`, an ISO time or `now`, is the first step's time
    (default: where the trace ends). Raises InputError.
    """
    readers = {
        "path": Field.text,
        "service": Field.text,
        "bin": quantity("duration", 0.0, 3600.0, open_low=True),
        "steps": integer(1, 1000),
        "start": Field.stamp,
    }
    given = field.record(readers, "path")
    entries = field.mapping()
    trace = traces.read(path.parent / Path(expand(given["path"])))
    try:
        works = trace.arrivals(services, given.get("service", ""))
    except InputError as bad:
        if trace.services != ("",):
            raise entries["path"].error(bad.code, bad.message) from bad
        text = "the trace has no Service column: give the service of its requests in `service`"
        raise entries.get("service", field).error(bad.code, text) from bad
    widths, reason = _widths(services, pools, [work for _, work in works])
    width = given.get("bin", min(widths))
    notes = [f"Demand is read in bins of {duration_text(width)}: " + ("as the file says" if "bin" in given else reason)]
    end = max(width, trace.seconds // width * width)  # whole bins
    rates = np.array([traces.rates(at[at < end], work[at < end], width, end) for at, work in works])
    for j, own in enumerate(widths if "bin" not in given else ()):
        rates[j] = traces.rolling_mean(rates[j], max(1, round(own / width)))
    start = given.get("start")
    if start is not None and trace.start is None:
        raise entries["start"].error("wrong-type", "the trace has seconds, no times of day; leave start out")
    begin = (trace.start or 0.0) + end if start is None else trace.clock(start)
    return forecast(
        History(width, rates), services, level, step, given.get("steps", 1), begin - (trace.start or 0.0), trace, notes
    )


def _widths(services: tuple[Service, ...], pools: tuple[Pool, ...], works: list[Floats]) -> tuple[list[float], str]:
    """Return the bin of each service in seconds, and the reason of the shortest one."""
    widths, reasons = [], []
    for service, work in zip(services, works, strict=True):
        boot = max((quantile(pool.boot, 0.9) for pool in pools if service.fits(pool)), default=0.0)
        lead = boot + quantile(service.restored, 0.9)
        each = (float(work.mean()) if len(work) else 1.0) * service.concurrency / max(service.rates.values())
        why = (
            f"a request of {service.name} takes {duration_text(each)} and may wait {duration_text(service.target_wait)}"
        )
        width = each + service.target_wait
        if width > max(each, lead):
            width, why = max(each, lead), why + f", but a fresh replica is there after {duration_text(lead)}"
        if width < SHORTEST:
            width, why = SHORTEST, why + f"; at least {duration_text(SHORTEST)}"
        widths.append(float(f"{min(width, 3600.0):.2g}"))
        reasons.append(why)
    return widths, reasons[int(np.argmin(widths))]


@dataclass(frozen=True)
class _Blocks:
    """The bins of a trace cut where the clock begins a new step. `edges[k]` to `edges[k + 1]` are the bins of block k."""

    rates: Floats  # [service, bin]
    edges: list[int]
    full: list[bool]  # at least half of the block was observed
    seconds: float

    def like(self, k: int, end: int, method: str) -> list[int]:
        """Return the blocks before `end` from which block k is forecast."""
        if method == "last":
            before = [b for b in range(min(end, len(self.full)) - 1, -1, -1) if self.full[b]]
            return before[:1] or list(range(min(end, 1)))
        lag = round(SEASONS[method] / self.seconds)
        first = k - lag * max(1, -(-(k - end + 1) // lag))
        return [b for b in range(first, -1, -lag) if b < len(self.full) and self.full[b]]

    def bins(self, blocks: list[int]) -> Floats:
        """Return the rates of the bins of some blocks, [service, bin]."""
        return np.concatenate([self.rates[:, self.edges[b] : self.edges[b + 1]] for b in blocks], axis=1)


def _blocks(history: History, step: float, start: float) -> _Blocks:
    width, count = history.bin_seconds, history.rates.shape[1]
    seconds = step * max(1, -(-FEWEST * width // step))
    number = np.floor((start + np.arange(count) * width) / seconds + 1e-9).astype(np.int64)
    edges = [*np.flatnonzero(np.diff(number, prepend=number[0] - 1)).tolist(), count]
    full = [(b - a) * width >= seconds / 2 for a, b in pairwise(edges)]
    return _Blocks(history.rates, edges, full, seconds)


def forecast(
    history: History,
    services: tuple[Service, ...],
    level: float,
    step: float,
    steps: int,
    begin: float,
    trace: Trace,
    notes: list[str],
) -> Demand:
    """Return the demand of `steps` steps from `begin`, in seconds after the first request."""
    start = trace.start or 0.0
    blocks = _blocks(history, step, start)
    first = int(np.floor(start / blocks.seconds + 1e-9))
    future = [int(np.floor((start + begin + t * step) / blocks.seconds + 1e-9)) - first for t in range(steps)]
    methods = [
        name
        for name, season in SEASONS.items()
        if season % blocks.seconds < 1e-6 and all(blocks.like(k, len(blocks.full), name) for k in future)
    ]
    method, note = _backtest(blocks, ["last", *methods], level, steps, history.bin_seconds)
    recent = history.rates[:, -round(blocks.seconds / history.bin_seconds) :]  # not cut by the clock
    tables, means = [], []
    for k in future:
        bins = recent if method == "last" else blocks.bins(blocks.like(k, len(blocks.full), method))
        tables.append(np.quantile(bins, LEVELS, axis=1, method="higher"))  # [level, service]
        means.append(bins.mean(axis=1))
    forecasts = {
        service.name: Forecast(
            LEVELS,
            tuple(tuple(float(table[i, j]) for table in tables) for i in range(len(LEVELS))),
            tuple(float(mean[j]) for mean in means),
        )
        for j, service in enumerate(services)
    }
    planned = np.empty_like(history.rates)
    for k in range(len(blocks.full)):
        alike = {k, *blocks.like(k, len(blocks.full), method)} if method != "last" else blocks.like(k, k, method) or {k}
        value = np.quantile(blocks.bins(sorted(alike)), level, axis=1, method="higher")
        planned[:, blocks.edges[k] : blocks.edges[k + 1]] = value[:, None]
    clock = None if trace.start is None else start + begin
    past = History(history.bin_seconds, history.rates, planned)
    return Demand(level, forecasts, past, clock, (*notes, note))


def _backtest(blocks: _Blocks, methods: list[str], level: float, steps: int, width: float) -> tuple[str, str]:
    """Return the method with the least error on the last half of the trace, and a sentence that says so.

    Each step is forecast from what was known half a plan before it. The error is the quantile loss over the mean rate.
    """
    total = len(blocks.full)
    ahead = (steps - 1) // 2
    while True:
        tests = [
            k
            for k in range(max(1, total // 2), total)
            if blocks.full[k] and all(blocks.like(k, k - ahead, name) for name in methods)
        ]
        if len(tests) >= TESTS or len(methods) == 1:
            break
        methods = methods[:-1]
    bins = blocks.rates.shape[1]
    whole = blocks.seconds > bins * width
    words = {
        "last": f"of the {f'whole trace, {duration_text(bins * width)}' if whole else f'last {duration_text(blocks.seconds)}'}",
        "day": "by time of day",
        "week": "by time of the week",
    }
    if not tests:
        few = f", and too few bins ({bins}) for a quantile" if bins < FEWEST else ""
        return "last", f"It is forecast {words['last']}; the trace is too short for a backtest{few}"
    tests = tests[:: max(1, len(tests) // MOST_TESTS)]
    errors, covered = {}, {}
    for name in methods:
        loss = below = count = 0.0
        for k in tests:
            expected = np.quantile(blocks.bins(blocks.like(k, k - ahead, name)), level, axis=1, method="higher")[
                :, None
            ]
            found = blocks.bins([k])
            over = found - expected
            loss += float(np.maximum(level * over, (level - 1) * over).mean(axis=1).sum())
            below += float((over <= 0).sum())
            count += found.size
        mean = float(blocks.bins(tests).mean(axis=1).sum()) * len(tests)
        errors[name], covered[name] = loss / mean if mean else 0.0, below / count
    best = min(methods, key=lambda name: errors[name])
    others = "".join(f"; {words[name]} it would be {errors[name]:.0%}" for name in methods if name != best)
    return best, (
        f"It is forecast {words[best]}: in a backtest of {len(tests)} steps the quantile loss was {errors[best]:.0%} of the mean rate, "
        f"and {covered[best]:.0%} of the bins were at or below the {level:.0%} forecast{others}"
    )
