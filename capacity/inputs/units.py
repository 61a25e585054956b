"""Parse quantities with units: `97s`, `2m`, `80GiB`, `31.2 $/h`, `15%`. A unit of the wrong kind is an error.

Plain numbers are in the base unit: seconds, GiB, dollars per hour, a fraction.
"""

from __future__ import annotations

import math
import re

from capacity.errors import InputError

_SECONDS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_GIB = {
    "MiB": 1 / 1024,
    "MB": 1e6 / 2**30,
    "GiB": 1.0,
    "GB": 1e9 / 2**30,
    "TiB": 1024.0,
    "Mi": 1 / 1024,
    "Gi": 1.0,
    "G": 1e9 / 2**30,
}
_DOLLARS_PER_HOUR = {"$/h": 1.0, "$/min": 60.0, "$/s": 3600.0, "$/d": 1 / 24, "$": 1.0, "USD/h": 1.0}
_FRACTION = {"%": 0.01}
_PER_HOUR = {"/h": 1.0, "/d": 1 / 24}
_RATE = {"/s": 1.0, "/min": 1 / 60, "/h": 1 / 3600, "rps": 1.0}

_TABLES = {
    "duration": (_SECONDS, "a time such as 97s, 2m or 1h"),
    "memory": (_GIB, "memory such as 80GiB"),
    "price": (_DOLLARS_PER_HOUR, "a price such as 31.2 or 31.2 $/h"),
    "fraction": (_FRACTION, "a fraction such as 0.1 or 10%"),
    "rate_per_hour": (_PER_HOUR, "a rate an hour such as 0.01 or 0.01/h"),
    "rate": (_RATE, "a rate a second such as 12 or 12/s"),
}
_NUMBER = re.compile(r"^\s*([+-]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*)$")


def parse(value: object, kind: str) -> float:
    """Return a number in the base unit of `kind` (duration, memory, price, fraction, rate, …).

    Raises InputError without file and line.
    """
    table, example = _TABLES[kind]
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InputError("wrong-type", f"expected {example}, found {value!r}")
    if isinstance(value, (int, float)):
        number, unit = float(value), ""
    else:
        if value.strip().lower().lstrip("+-.") in ("nan", "inf", "infinity"):
            raise InputError("not-a-number", f"expected {example}, found {value!r}")
        match = _NUMBER.match(value.rstrip())
        if match is None:
            raise InputError("wrong-type", f"expected {example}, found {value!r}")
        number, unit = float(match.group(1).replace("_", "")), match.group(2)
    if not math.isfinite(number):
        raise InputError("not-a-number", f"expected {example}, found {value!r}")
    if not unit:
        return number
    if unit in table:
        return number * table[unit]
    for other, (units, _) in _TABLES.items():
        if other != kind and unit in units:
            raise InputError("wrong-unit", f"{value!r} is a {other.replace('_', ' ')}; expected {example}")
    raise InputError("wrong-unit", f"unknown unit {unit!r} in {value!r}; expected {example}")


def duration_text(seconds: float) -> str:
    """Format seconds for people."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 120:
        return f"{seconds:.3g}s"
    if seconds < 7200:
        return f"{seconds / 60:.3g}m"
    return f"{seconds / 3600:.3g}h"
