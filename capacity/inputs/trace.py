"""Read request traces: CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens (Azure's), and optionally Service.

TIMESTAMP is ISO time or seconds. Times must not decrease; every number must be finite and not negative.
"""

from __future__ import annotations

import csv
import math
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from capacity.errors import InputError
from capacity.model import Floats, Service
from capacity.optimize.program import Ints

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LONGEST = 62 * 86400.0  # seconds; a longer trace mixes units or epochs, and the simulator would tick through all of it


@dataclass(frozen=True)
class Trace:
    """Arrivals in order: seconds since the first one, tokens in and out, and each request's index into `services`."""

    at: Floats
    context: Floats
    generated: Floats
    service: Ints
    services: tuple[str, ...]
    start: float | None = None  # time of the first request, seconds since 1970 as written; None: the times are no dates
    zone: bool = False  # the times name their time zone

    def clock(self, moment: datetime) -> float:
        """Return a moment in seconds since 1970 on the trace's own clock: as written there, without a zone in local time."""
        if self.zone:
            return moment.timestamp()
        return (moment.astimezone() if moment.tzinfo else moment).replace(tzinfo=UTC).timestamp()

    @property
    def seconds(self) -> float:
        return float(self.at[-1]) if len(self.at) else 0.0

    def units(self, service: int, unit: str) -> tuple[Floats, Floats]:
        """Return the arrival times of one service and the work of each request: 1, or its tokens."""
        mine = self.service == service
        work = self.context[mine] + self.generated[mine] if unit == "tokens" else np.ones(int(mine.sum()))
        return self.at[mine], work

    def arrivals(self, services: tuple[Service, ...], only: str = "") -> list[tuple[Floats, Floats]]:
        """Return the arrival times and the work of each service.

        A trace without a Service column is of the service `only`, or of the only one there is. Raises InputError (unknown-name).
        """
        known, names = [service.name for service in services], list(self.services)
        if names == [""]:
            names = [only or (known[0] if len(known) == 1 else "")]
            if names[0] not in known:
                text = f"the trace has no Service column, and there are {len(known)} services; add the column"
                raise InputError("unknown-name", text)
        for name in names:
            if name not in known:
                raise InputError(
                    "unknown-name", f"the trace has requests of {name}, which is not a service of this file"
                )
        nothing = np.zeros(0), np.zeros(0)
        return [self.units(names.index(s.name), s.unit) if s.name in names else nothing for s in services]


def read(path: Path) -> Trace:
    """Read a trace. Raises InputError naming file, line and column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            return _parse(csv.reader(file), str(path))
    except OSError as bad:
        raise InputError("unreadable", f"cannot be read: {bad}", file=str(path)) from bad


def _parse(rows: Any, path: str) -> Trace:
    """Return the trace of a CSV reader's rows. Raises InputError."""

    def wrong(code: str, text: str, column: str = "") -> InputError:
        return InputError(code, text, file=path, line=max(1, rows.line_num), where=column)

    def number(text: str, column: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise wrong("wrong-type", f"not a number: {text!r}", column) from None
        if not math.isfinite(value):
            raise wrong("not-a-number", f"found {text!r}", column)
        return value

    def tokens(text: str, column: str) -> float:
        if (value := number(text, column)) < 0:
            raise wrong("negative", f"must not be negative, found {value:g}", column)
        return value

    def date(text: str) -> datetime | None:
        """Return the time if it is no number of seconds."""
        with suppress(ValueError):
            float(text)
            return None
        try:
            return datetime.fromisoformat(text.strip())  # Azure writes seven fractional digits; the seventh is dropped
        except ValueError:
            raise wrong("bad-time", f"neither an ISO time nor seconds: {text!r}", "TIMESTAMP") from None

    at: list[float] = []
    context: list[float] = []
    generated: list[float] = []
    who: list[int] = []
    names: dict[str, int] = {}
    dated = zone = False
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        for column in ("timestamp", "contexttokens", "generatedtokens"):
            if column not in header:
                raise wrong("missing-field", f"no column {column}")
        for row in filter(None, rows):
            if len(row) != len(header):
                raise wrong("bad-row", f"{len(row)} columns, the header has {len(header)}")
            cells = dict(zip(header, row, strict=True))
            moment = date(cells["timestamp"])
            if moment is None:
                seconds = number(cells["timestamp"], "TIMESTAMP")
            else:
                seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - EPOCH).total_seconds()
            if not at:
                dated, zone = moment is not None, moment is not None and moment.tzinfo is not None
            elif seconds < at[-1]:
                raise wrong("out-of-order", f"goes back by {at[-1] - seconds:g} s; sort the trace by time", "TIMESTAMP")
            at.append(seconds)
            context.append(tokens(cells["contexttokens"], "ContextTokens"))
            generated.append(tokens(cells["generatedtokens"], "GeneratedTokens"))
            who.append(names.setdefault(cells.get("service", "").strip(), len(names)))
    except (csv.Error, UnicodeDecodeError) as bad:
        raise wrong("not-csv", str(bad)) from bad
    if not at:
        raise InputError("empty", "the trace has no request", file=path)
    times = np.array(at) - at[0]
    if times[-1] > LONGEST:
        text = f"spans {times[-1] / 86400:.0f} days, more than {LONGEST / 86400:.0f}; is every time in seconds, or ISO?"
        raise InputError("out-of-range", text, file=path, where="TIMESTAMP")
    start = at[0] if dated else None
    return Trace(
        times, np.array(context), np.array(generated), np.array(who, dtype=np.int64), tuple(names), start, zone
    )


def rates(at: Floats, work: Floats, bin_seconds: float, until: float) -> Floats:
    """Return units per second in bins of `bin_seconds` over [0, until)."""
    bins = max(1, math.ceil(until / bin_seconds - 1e-9))
    index = np.minimum((at / bin_seconds).astype(np.int64), bins - 1)
    total: Floats = np.bincount(index, work, minlength=bins)[:bins] / bin_seconds
    return total


def rolling_mean(rates: Floats, bins: int) -> Floats:
    """Return the mean over the last `bins` bins, of those there are, along the last axis."""
    total = np.cumsum(rates, axis=-1)
    ends = np.arange(rates.shape[-1])
    total[..., bins:] -= total[..., : max(0, rates.shape[-1] - bins)].copy()
    mean: Floats = total / np.minimum(ends + 1, bins)
    return mean
