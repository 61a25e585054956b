"""Whether there is memory for a second engine: what is available to this process, and how much the host suffers already.

The least of the host's MemAvailable and of what each of this process's control groups (version 1 or 2) still allows,
with page cache that can be dropped counted as available.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARGIN, MARGIN_SHARE = 512 << 20, 0.05
"""Memory that stays available beside a rehearsal: bytes, and the share of what the host or the group has; the larger counts."""
STALLED, AMPLE_SHARE = 10.0, 0.25
"""Percent of the last ten seconds in which every process waited for memory (PSI, `full avg10`), above which memory is short, unless
this share of it is available: then the memory that they wait for is that of another group, at its own limit."""
CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")


@dataclass(frozen=True)
class Room:
    """Bytes available, and the bytes that there are in all."""

    available: int
    total: int

    @property
    def margin(self) -> int:
        """Return the bytes that must stay available."""
        return max(MARGIN, int(self.total * MARGIN_SHARE))


def room(proc: Path = PROC, cgroups: Path = CGROUPS) -> Room:
    """Return the tightest of the limits on this process's memory."""
    fields = dict(re.findall(r"^(\w+): +(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE))
    host = Room(int(fields["MemAvailable"]) << 10, int(fields["MemTotal"]) << 10)
    return min((host, *_groups(proc, cgroups, host.total)), key=lambda one: one.available - one.margin)


def _groups(proc: Path, cgroups: Path, host: int) -> Iterator[Room]:
    """Yield the room in each control group of this process that has a limit below the host's memory."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, base = ("memory.max", "memory.current", "inactive_file", "active_file"), cgroups
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
            base = cgroups / "memory"
        else:
            continue
        folder = base / path.lstrip("/")
        # In a container the path may be the host's, while only the container's own group is mounted.
        for one in (folder, *folder.parents) if folder.is_dir() else (base,):
            with contextlib.suppress(OSError, ValueError):  # a group without this file, or with the limit `max`
                most, used = (int((one / name).read_text()) for name in names[:2])
                cached = re.findall(
                    rf"^(?:{'|'.join(names[2:])}) (\d+)", (one / "memory.stat").read_text(), re.MULTILINE
                )
                if most < host:
                    yield Room(most - used + sum(map(int, cached)), most)
            if one == base:
                break


def stalled(proc: Path = PROC) -> float:
    """Return the percent of the last ten seconds in which every process waited for memory; 0 where the kernel does not say."""
    try:
        found = re.search(r"^full avg10=([\d.]+)", (proc / "pressure" / "memory").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return float(found[1]) if found else 0.0


def short(needed: int, proc: Path = PROC, cgroups: Path = CGROUPS) -> str:
    """Return in words why `needed` bytes more would be too much, or ""."""
    found = room(proc, cgroups)
    if found.available < needed + found.margin:
        return (
            f"{found.available / 1e9:.1f} GB of memory are available, "
            f"and {needed / 1e9:.1f} GB with a margin of {found.margin / 1e9:.1f} GB are needed"
        )
    if found.available - needed < AMPLE_SHARE * found.total and (waits := stalled(proc)) > STALLED:
        return f"processes waited for memory in {waits:.0f} % of the last ten seconds"
    return ""
