"""Durations as people write them: `90s`, `10m`, `24h`."""

from __future__ import annotations

import math

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str, unit: str = "s") -> float:
    """Return `90s`, `10m` or `24h` as seconds. `unit`: the unit of a number without one. Raises ValueError."""
    given = text[-1:] if text[-1:] in UNITS else ""
    try:
        value = float(text.removesuffix(given)) * UNITS[given or unit]
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise invalid(text)
    return value


def limit(text: str, unit: str = "s") -> float:
    """Return a duration as `seconds` does; `0` and `none` mean no limit (infinity). Raises ValueError."""
    return (math.inf if text.lower() == "none" else seconds(text, unit)) or math.inf


def invalid(value: object) -> ValueError:
    """Return the error that says how a duration is written."""
    return ValueError(f"{value!r} is not a duration of 0 or more; write 90s, 10m or 24h")
