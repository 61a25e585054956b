"""Whether there is memory for a second engine: what is available to this process, and how much the host suffers already."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoint.control_groups import PROC
from checkpoint.host_memory import Room, room

__all__ = ["Room", "room", "short", "stalled"]

STALLED, AMPLE_SHARE = 10.0, 0.25
"""Percent of the last ten seconds in which every process waited for memory (PSI, `full avg10`), above which memory is short, unless
this share of it is available: then the memory that they wait for is that of another group, at its own limit."""


def stalled(proc: Path = PROC) -> float:
    """Return the percent of the last ten seconds in which every process waited for memory; 0 where the kernel does not say."""
    try:
        found = re.search(r"^full avg10=([\d.]+)", (proc / "pressure" / "memory").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return float(found[1]) if found else 0.0


def short(needed: int, proc: Path = PROC) -> str:
    """Return in words why `needed` bytes more would be too much, or ""."""
    found = room(proc)
    if found.available < needed + found.margin:
        return (
            f"{found.available / 1e9:.1f} GB of memory are available, "
            f"and {needed / 1e9:.1f} GB with a margin of {found.margin / 1e9:.1f} GB are needed"
        )
    if found.available - needed < AMPLE_SHARE * found.total and (waits := stalled(proc)) > STALLED:
        return f"processes waited for memory in {waits:.0f} % of the last ten seconds"
    return ""
