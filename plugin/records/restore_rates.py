"""How fast this host brings images back, measured: what `--weights auto` weighs against how fast the engine reads its weights.

Every restore leaves a line in `$QUICKTHAW_HOME/restore-rates.jsonl`: bytes put in place and the seconds that took (the page server's
copying of the working set, or CRIU's whole run where it put every page in place). Where none has been measured yet, `probe` copies a
file from the page cache into fresh memory, which is the least that a restore has to do.
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
"""Less than this measures fixed costs, not a rate."""
PROBE_BYTES = 64 << 20


def remember(home: Path, size: float, seconds: float, gpu: bool) -> None:
    """Add a restore that put `size` bytes in place in `seconds`; too small ones are left out. `gpu`: with state of a GPU among them."""
    if size < LEAST_BYTES or seconds <= 0:
        return
    jsonl.append(home / FILE, {"bytes": int(size), "seconds": round(seconds, 4), "gpu": gpu})


def measured(home: Path, gpu: bool) -> tuple[float, int] | None:
    """Bytes a second of this host's latest restores with or without a GPU, and of how many; None where there was none.

    The upper quartile: one that shared the cores with something else says how busy the host was, not what carrying bytes costs.
    """
    found = []
    for entry in jsonl.latest(home / FILE, 2 * KEPT):
        try:
            if entry["gpu"] is gpu:
                found.append(float(entry["bytes"]) / float(entry["seconds"]))
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            continue  # of another version
    found = found[-KEPT:]
    if len(found) < 2:
        return (found[0], 1) if found else None
    import statistics  # 5 ms, with all its numbers, that a restore need not wait for

    return statistics.quantiles(found, n=4, method="inclusive")[2], len(found)


def probe(home: Path) -> float:
    """Bytes a second of copying PROBE_BYTES from the page cache into fresh memory, the best of three. Raises OSError without room."""
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
