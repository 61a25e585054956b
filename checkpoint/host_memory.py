"""How much memory is available to this process.

The least of the host's MemAvailable and of what each of this process's control groups (version 1 or 2) still allows,
with page cache that can be dropped counted as available.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoint.control_groups import PROC, groups

MARGIN, MARGIN_SHARE = 512 << 20, 0.05
"""Memory that stays available beside a second engine: bytes, and the share of what the host or the group has; the larger counts."""
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file|total_active_file"),
    2: ("memory.max", "memory.current", "inactive_file|active_file"),
}
"""By version: the files of a group's limit and use, and the fields of memory.stat that count its page cache."""


@dataclass(frozen=True)
class Room:
    """Bytes available, and the bytes that there are in all."""

    available: int
    total: int

    @property
    def margin(self) -> int:
        """Return the bytes that must stay available."""
        return max(MARGIN, int(self.total * MARGIN_SHARE))


def room(proc: Path = PROC) -> Room:
    """Return the tightest of the limits on this process's memory. Raises OSError, LookupError or ValueError if /proc does not say."""
    fields = dict(re.findall(r"^(\w+): +(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE))
    host = Room(int(fields["MemAvailable"]) << 10, int(fields["MemTotal"]) << 10)
    return min((host, *_limits(proc, host.total)), key=lambda one: one.available - one.margin)


def _limits(proc: Path, host: int) -> Iterator[Room]:
    """Yield the room in each control group of this process that has a limit below the host's memory."""
    for group in groups("memory", proc):
        limit, use, cache = _FILES[group.version]
        for folder in group.and_above():
            with contextlib.suppress(OSError, ValueError):  # a group without this file, or with the limit `max`
                most, used = (int((folder / name).read_text()) for name in (limit, use))
                cached = re.findall(rf"^(?:{cache}) (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                if most < host:
                    yield Room(most - used + sum(map(int, cached)), most)
