"""How fast this host brings images back, measured: what `--weights auto` weighs against how fast the engine reads its weights.

Every restore leaves a line in `$QUICKTHAW_HOME/restore-rates.jsonl`: bytes put in place and the seconds that took (the page server's
copying of the working set, or CRIU's whole run where it put every page in place). Where none has been measured yet, `probe` copies a
file from the page cache into fresh memory, which is the least that a restore has to do.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path

from plugin import journal

FILE = "restore-rates.jsonl"
KEPT = 20
LEAST_BYTES = 32 << 20
"""Less than this measures fixed costs, not a rate."""
PROBE_BYTES = 64 << 20


def remember(home: Path, size: float, seconds: float, gpu: bool) -> None:
    """Add a restore that put `size` bytes in place in `seconds`; too small ones are left out. `gpu`: with state of a GPU among them."""
    if size < LEAST_BYTES or seconds <= 0:
        return
    journal.append(home / FILE, {"bytes": int(size), "seconds": round(seconds, 4), "gpu": gpu})


def measured(home: Path, gpu: bool) -> tuple[float, int] | None:
    """Median bytes a second of this host's latest restores with or without a GPU, and of how many; None where there was none."""
    found = []
    for entry in journal.latest(home / FILE, 2 * KEPT):
        try:
            if entry["gpu"] is gpu:
                found.append(float(entry["bytes"]) / float(entry["seconds"]))
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            continue  # of another version
    return (statistics.median(found[-KEPT:]), len(found[-KEPT:])) if found else None


def probe(home: Path) -> float:
    """Bytes a second of copying PROBE_BYTES from the page cache into fresh memory (about 50 ms). Raises OSError where there is no room."""
    with tempfile.TemporaryFile(dir=home) as file:
        block = bytes(1 << 20)
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        with mmap.mmap(-1, PROBE_BYTES) as target:
            began = time.perf_counter()
            view = memoryview(target)
            done = 0
            while done < PROBE_BYTES:
                done += os.preadv(file.fileno(), [view[done : done + (2 << 20)]], done)
            took = time.perf_counter() - began
            view.release()
    return PROBE_BYTES / max(took, 1e-9)
