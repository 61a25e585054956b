"""Read request traces: CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens (Azure's), and optionally Service.

TIMESTAMP is ISO time or seconds. Times must not decrease; every number must be finite and not negative.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from capacity.errors import InputError
from capacity.model import Floats
from capacity.optimize.program import Ints

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


def read(path: Path) -> Trace:
    """Read a trace. Raises InputError naming file, line and column."""
    try:
        file = path.open(newline="", encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except OSError as bad:
        raise InputError("unreadable", f"cannot be read: {bad}", file=str(path)) from bad
    at: list[float] = []
    context: list[float] = []
    generated: list[float] = []
    who: list[int] = []
    names: dict[str, int] = {}
    dated = zone = False
    with file:
        rows = csv.reader(file)
        try:
            header = [name.strip().lower() for name in next(rows, [])]
            for column in ("timestamp", "contexttokens", "generatedtokens"):
                if column not in header:
                    raise InputError("missing-field", f"no column {column}", file=str(path), line=1)
            i_at, i_in, i_out = (header.index(c) for c in ("timestamp", "contexttokens", "generatedtokens"))
            i_who = header.index("service") if "service" in header else None
            for row in rows:
                line = rows.line_num
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        "bad-row", f"{len(row)} columns, the header has {len(header)}", file=str(path), line=line
                    )
                moment, parsed = _time(row[i_at], path, line)
                if not at and parsed is not None:
                    dated, zone = True, parsed.tzinfo is not None
                if at and moment < at[-1]:
                    raise InputError(
                        "out-of-order",
                        f"goes back by {at[-1] - moment:g} s; sort the trace by time",
                        file=str(path),
                        line=line,
                        where="TIMESTAMP",
                    )
                at.append(moment)
                context.append(_tokens(row[i_in], path, line, "ContextTokens"))
                generated.append(_tokens(row[i_out], path, line, "GeneratedTokens"))
                who.append(names.setdefault(row[i_who].strip() if i_who is not None else "", len(names)))
        except (csv.Error, UnicodeDecodeError) as bad:
            raise InputError("not-csv", str(bad), file=str(path), line=rows.line_num) from bad
    if not at:
        raise InputError("empty", "the trace has no request", file=str(path))
    times = np.array(at) - at[0]
    if times[-1] > LONGEST:
        raise InputError(
            "out-of-range",
            f"spans {times[-1] / 86400:.0f} days, more than {LONGEST / 86400:.0f}; is every time in seconds, or ISO?",
            file=str(path),
            where="TIMESTAMP",
        )
    start = at[0] if dated else None
    return Trace(
        times, np.array(context), np.array(generated), np.array(who, dtype=np.int64), tuple(names), start, zone
    )


def _time(text: str, path: Path, line: int) -> tuple[float, datetime | None]:
    """Return the seconds since 1970, or as written, and the time if it is a date."""
    moment = None
    try:
        value = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(
                text.strip()
            )  # Azure writes seven fractional digits; the seventh is dropped
            value = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
        except ValueError:
            raise InputError(
                "bad-time", f"neither an ISO time nor seconds: {text!r}", file=str(path), line=line, where="TIMESTAMP"
            ) from None
    if not math.isfinite(value):
        raise InputError("not-a-number", f"found {text!r}", file=str(path), line=line, where="TIMESTAMP")
    return value, moment


def _tokens(text: str, path: Path, line: int, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError("wrong-type", f"not a number: {text!r}", file=str(path), line=line, where=column) from None
    if not math.isfinite(value):
        raise InputError("not-a-number", f"found {text!r}", file=str(path), line=line, where=column)
    if value < 0:
        raise InputError("negative", f"must not be negative, found {value:g}", file=str(path), line=line, where=column)
    return value


def rates(at: Floats, work: Floats, bin_seconds: float, until: float) -> Floats:
    """Return units per second in bins of `bin_seconds` over [0, until)."""
    bins = max(1, math.ceil(until / bin_seconds - 1e-9))
    index = np.minimum((at / bin_seconds).astype(np.int64), bins - 1)
    total: Floats = np.bincount(index, work, minlength=bins)[:bins] / bin_seconds
    return total
