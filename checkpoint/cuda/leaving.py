"""Take processes off the GPU before they are killed, where the driver hangs at the end of one that it restored.

Driver 595 was seen to hang the whole host some 30 s after a restored process was killed, and not once it was
checkpointed before (https://github.com/NVIDIA/cuda-checkpoint/issues/53). What this costs is the move of its GPU memory,
some 1.4 GB/s, so it is done for those drivers only, or where it is asked for, and never beyond a time limit.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterable

from checkpoint.cuda.driver import Driver, DriverError, State
from checkpoint.errors import HostLacks

log = logging.getLogger("quickthaw")
LEAST_DRIVER = (570,)
"""The first driver with the checkpoint calls."""
HANGS_AT_KILL = frozenset({595})
"""Branches of the driver that were seen to hang a host."""
LIMIT_S = 10.0
"""Maximum seconds that the end of an engine waits for the driver."""
LOCK_TIMEOUT_S = 2.0
"""Seconds for GPU work that runs to end; an engine that is killed because it hangs has some that never does."""


def numbers(version: str) -> tuple[int, ...]:
    """Return a driver's version as numbers, for comparisons."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def hangs_at_kill(version: str) -> bool:
    """Return whether a driver was seen to hang a host at the end of a process that it had restored."""
    return numbers(version)[:1] in {(branch,) for branch in HANGS_AT_KILL}


def take_off(driver: Driver, pids: Iterable[int], limit_s: float = LIMIT_S) -> bool:
    """Lock and checkpoint every process that holds a context; return True if none is left on the GPU within `limit_s`.

    Never raises: the processes are about to be killed in any case. A call that takes longer goes on, and ends with
    them, or with the driver's helper.
    """
    begun, off = time.monotonic(), threading.Event()

    def move() -> None:
        try:
            for pid in pids:
                if driver.state(pid) is State.RUNNING:
                    driver.lock(pid, int(LOCK_TIMEOUT_S * 1000))
                if driver.state(pid) is State.LOCKED:
                    driver.checkpoint(pid)
            off.set()
        except (DriverError, HostLacks) as error:
            log.warning("gpu-not-left: an engine is killed while it is on the GPU: %s", error)

    worker = threading.Thread(target=move, name="gpu-leave", daemon=True)
    worker.start()
    worker.join(limit_s)
    if worker.is_alive():
        log.warning("gpu-not-left: an engine is killed while it is on the GPU: the driver took over %.0f s", limit_s)
    elif off.is_set():
        log.debug("the engine left the GPU in %.2f s, before its end", time.monotonic() - begun)
    return off.is_set()
