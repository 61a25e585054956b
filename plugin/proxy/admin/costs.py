"""Measure what serving replicas hold: memory of their processes on the host, and on GPUs through NVML.

Measured on request only, in a thread, at most every `EVERY_S` seconds. A replica that starts is not measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from plugin.proxy.process_tree import process_tree
from plugin.runtime.phases import Phase

if TYPE_CHECKING:
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.pool.replica import Replica

EVERY_S = 5.0
_MEASURED = frozenset({Phase.SERVING, Phase.SUSPECT, Phase.STANDBY})
_NVIDIA = Path("/dev/nvidiactl")
_HELD = ("RssAnon:", "RssShmem:", "VmSwap:")


async def measure(pools: Iterable[ReplicaPool]) -> None:
    """Set `memory_bytes` and `gpu_bytes` of each replica that serves or is in standby, if its processes are known; clear all others."""
    now = time.monotonic()
    due: list[tuple[Replica, int]] = []
    for pool in pools:
        for replica in pool.replicas.values():
            pid = replica.engine_pid() if replica.tracker.phase in _MEASURED else None
            if pid is None:
                replica.memory_bytes = replica.gpu_bytes = None
                replica.measured_at = 0.0
            elif now - replica.measured_at >= EVERY_S:
                replica.measured_at = now
                due.append((replica, pid))
    if due:
        held = await asyncio.to_thread(_held, {pid for _, pid in due})
        for replica, pid in due:
            replica.memory_bytes, replica.gpu_bytes = held[pid]


def _held(roots: set[int]) -> dict[int, tuple[int, int | None]]:
    gpu = _gpu_bytes() if _NVIDIA.exists() else {}
    found = {}
    for root in roots:
        pids = process_tree(root)
        on_gpu = sum(gpu.get(pid, 0) for pid in pids)
        found[root] = (sum(memory_bytes(pid) for pid in pids), on_gpu or None)
    return found


def memory_bytes(pid: int) -> int:
    """Return the memory that a process holds, in bytes; 0 if it has ended.

    Anonymous and shared memory and swap. Pages of files do not count: the kernel can drop them.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_HELD))


def _gpu_bytes() -> dict[int, int]:
    """Return the GPU memory of each process in bytes, by its number on the host. Empty if NVML does not say."""
    found: dict[int, int] = {}
    try:
        import pynvml
    except ImportError:  # installed without the extra `cuda`
        return found
    try:
        pynvml.nvmlInit()
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                device = pynvml.nvmlDeviceGetHandleByIndex(index)
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
                    found[process.pid] = found.get(process.pid, 0) + (process.usedGpuMemory or 0)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return {}
    return found
