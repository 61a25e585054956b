"""Measure how fast this host restores images; `--weights auto` compares this with the engine's own speed of loading weights.

Every restore appends a line to `$QUICKTHAW_HOME/restore-rates.jsonl`: bytes restored and the seconds that took (the
page server's copying of the working set, or CRIU's whole run if it restored every page). Before the first measurement,
`probe` copies a file from the page cache into fresh memory, the least work that any restore does.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from plugin.records import jsonl

FILE = "restore-rates.jsonl"
KEPT = 20
LEAST_BYTES = 128 << 20
"""Smaller restores measure fixed costs, not a rate."""
PROBE_BYTES = 64 << 20


def remember(home: Path, size: float, seconds: float, gpu: bool) -> None:
    """Record a restore of `size` bytes in `seconds`, unless it is too small. `gpu`: it included GPU state."""
    if size < LEAST_BYTES or seconds <= 0:
        return
    jsonl.append(home / FILE, {"bytes": int(size), "seconds": round(seconds, 4), "gpu": gpu})


def measured(home: Path, gpu: bool) -> tuple[float, int] | None:
    """Return (bytes per second, number of restores) of this host's latest restores with or without GPU state, or None.

    The rate is the upper quartile: a slow restore that shared the cores tells how busy the host was, not what copying
    costs.
    """
    found = []
    for entry in jsonl.latest(home / FILE, 2 * KEPT):
        try:
            if entry["gpu"] is gpu:
                found.append(float(entry["bytes"]) / float(entry["seconds"]))
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            continue  # written by another version
    found = found[-KEPT:]
    if len(found) < 2:
        return (found[0], 1) if found else None
    import statistics  # the import takes 5 ms, which a restore need not wait for

    return statistics.quantiles(found, n=4, method="inclusive")[2], len(found)


def probe(home: Path) -> float:
    """Return bytes per second of copying PROBE_BYTES from the page cache to fresh memory, best of 3. Raises OSError on a full disk."""
    import tempfile

    with tempfile.TemporaryFile(dir=home) as file:
        block = bytes(1 << 20)
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        return max(_copy(file.fileno()) for _ in range(3))


def _copy(fd: int) -> float:
    with mmap.mmap(-1, PROBE_BYTES) as target, memoryview(target) as view:
        began = time.perf_counter()
        done = 0
        while done < PROBE_BYTES:
            done += os.preadv(fd, [view[done : done + (2 << 20)]], done)
        return PROBE_BYTES / max(time.perf_counter() - began, 1e-9)
