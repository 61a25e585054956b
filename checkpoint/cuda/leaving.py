"""Take processes off the GPU before they are killed, where the driver hangs at the end of one that it restored.

Driver 595 was seen to hang the whole host some 30 s after a restored process was killed, and not once if it was
checkpointed before (https://github.com/NVIDIA/cuda-checkpoint/issues/53). That costs the move of its GPU memory into host
memory, some 1.4 GB/s: it is done only where it is needed or asked for, and never beyond a time limit.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Sequence

from checkpoint import host_memory
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
"""Seconds for running GPU work to end; that of an engine which is killed because it hangs never does."""
RATE = 1.4e9
"""Bytes per second of a checkpoint, the slowest that was measured (docs/gpu.md)."""


def numbers(version: str) -> tuple[int, ...]:
    """Return a driver's version as numbers, for comparisons."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def hangs_at_kill(version: str) -> bool:
    """Return whether a driver was seen to hang a host at the end of a process that it had restored."""
    return any(numbers(version)[:1] == (branch,) for branch in HANGS_AT_KILL)


def take_off(
    driver: Driver,
    pids: Sequence[int],
    limit_s: float | None = None,
    offload: Callable[[], object] | None = None,
) -> bool:
    """Checkpoint every process that holds a context; return True if none is on the GPU any more after `limit_s` seconds.

    `offload` is called first if they hold more than half the time allows, or an unknown amount: the engine drops its
    weights and KV cache. Never raises, as the processes are about to be killed in any case: a line says why they are
    killed on the GPU. A driver's call that takes longer ends with them, or with the driver's helper.
    """
    limit_s = LIMIT_S if limit_s is None else limit_s
    begun, off, late = time.monotonic(), threading.Event(), threading.Event()

    def stays(why: object) -> None:
        if not late.is_set():
            log.warning("gpu-not-left: an engine is killed while it is on the GPU: %s", why)

    def move() -> None:
        try:
            running = [pid for pid in pids if driver.state(pid) in (State.RUNNING, State.LOCKED)]
            if offload and running and not 0 < _held(driver, running) <= limit_s * RATE / 2:
                offload()
            if why := _too_much(_held(driver, running), limit_s):
                stays(why)
                return
            for pid in running:
                if driver.state(pid) is State.RUNNING:
                    driver.lock(pid, int(LOCK_TIMEOUT_S * 1000))
            for pid in running:
                driver.checkpoint(pid)
            off.set()
        except (DriverError, HostLacks) as error:
            stays(error)

    worker = threading.Thread(target=move, name="gpu-leave", daemon=True)
    worker.start()
    worker.join(limit_s)
    if worker.is_alive():
        stays(f"that took over {limit_s:g} s")
        late.set()
    elif off.is_set():
        log.debug("an engine left the GPU before its end, in %.2f s", time.monotonic() - begun)
    return off.is_set()


def _held(driver: Driver, pids: Sequence[int]) -> int:
    """Return the bytes of GPU memory that processes hold; 0 if NVML does not report it (another PID namespace)."""
    return sum(sum(driver.usage(pid).values()) for pid in pids)


def _too_much(size: int, limit_s: float) -> str:
    if size > limit_s * RATE:
        return f"{size / 1e9:.1f} GB take over {limit_s:.0f} s"
    try:
        room = host_memory.room()
    except (OSError, LookupError, ValueError):
        return ""  # this host does not say
    return "" if size + room.margin <= room.available else f"{size / 1e9:.1f} GB do not fit into host memory"
