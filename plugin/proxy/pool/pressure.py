"""When this host is short of memory, put what is in standby to sleep: the model that was idle for longest first.

Short means: processes waited for memory in a fifth of the last ten seconds (PSI, proc_pressure(5)), or less than a
twentieth of the host's memory, or of this container's limit, is available. A pool that no snapshot restores refuses to
sleep and stays in standby.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.rehearsal.memory import Room

log = logging.getLogger("quickthaw.proxy")
EVERY_S = 1.0
STALLED = 20.0
"""Percent of the last ten seconds."""
LEAST_AVAILABLE = 0.05
PRESSURE = (Path("/sys/fs/cgroup/memory.pressure"), Path("/proc/pressure/memory"))
"""The first that can be read counts: that of a container, else that of the host."""


def memory_room() -> Room | None:
    """Return the memory that is available to this process, by its control groups' limits too; None if this host does not say."""
    from plugin.rehearsal.memory import room  # needed only while something is in standby

    try:
        return room()
    except (OSError, LookupError, ValueError):
        return None


def shortage(pressure: Iterable[Path] = PRESSURE, memory: Callable[[], Room | None] = memory_room) -> str:
    """Return why memory is short, or "" if it is not, or if this host does not say."""
    for file in pressure:
        try:
            some = file.read_text().splitlines()[0]
            stalled = float(some.split("avg10=")[1].split()[0])
        except (OSError, IndexError, ValueError):
            continue
        if stalled >= STALLED:
            return f"processes waited for memory in {stalled:.0f} % of the last 10 s"
        break
    found = memory()
    if found is not None and found.available < found.total * LEAST_AVAILABLE:
        return f"{found.available >> 20} of {found.total >> 20} MiB are available"
    return ""


def longest_in_standby(pools: Iterable[ReplicaPool]) -> list[ReplicaPool]:
    """Return the pools in standby, the one that was idle for longest first."""
    return sorted((pool for pool in pools if pool.sleeper.in_standby), key=lambda pool: pool.last_active)


async def relieve(
    pools: Callable[[], Iterable[ReplicaPool]], short: Callable[[], str] = shortage, every_s: float = EVERY_S
) -> None:
    """Put one pool in standby to sleep every `every_s` seconds while memory is short. Runs until cancelled."""
    while True:
        await asyncio.sleep(every_s)
        resting = longest_in_standby(pools())
        why = await asyncio.to_thread(short) if resting else ""
        for pool in resting if why else ():
            if await pool.sleep():
                fields = {"pool": pool.name, "reason": why}
                text = "%s: memory-short: %s; it went from standby to sleep"
                log.warning(text, pool.name, why, extra={"event": "memory-short", "fields": fields})
                break
