"""Sizes of memory in the file of `quickthaw proxy --config`: `80GB`, `24GiB`, `512 MiB`; 0 needs no unit."""

from __future__ import annotations

import re

_UNITS = {unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))}
_UNITS |= {unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), 1)}


class Bytes(int):
    """A size in bytes, read from a text with a unit."""

    @staticmethod
    def read(text: str) -> int:
        """Return the bytes. Raises ValueError."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?", text.strip(), re.IGNORECASE | re.ASCII)
        unit = found[2].lower() if found and found[2] else ""
        if not found or unit == "ib" or (not unit and float(found[1])):
            raise ValueError(f"{text!r} is not a size such as 80GB or 24GiB")
        return int(float(found[1]) * _UNITS.get(unit, 1))
