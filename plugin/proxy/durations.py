"""Parse durations on the command line and in the models' file."""

from __future__ import annotations

import math

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Return `90`, `90s`, `10m` or `1h` as seconds. Raises ValueError."""
    unit = _UNITS.get(text[-1:])
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a time; write 90, 90s, 10m or 1h")
    if value < 0:
        raise ValueError("a time must not be negative")
    return value


def limit(text: str) -> float:
    """Return a duration parsed by `seconds`; `0` and `none` mean no limit (infinity). Raises ValueError."""
    return (math.inf if text.lower() == "none" else seconds(text)) or math.inf
