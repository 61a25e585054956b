"""Check this host's free memory (for GPU contents) and free disk space (for a snapshot)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from checkpoint.errors import Failed

_MARGIN = 64 << 20
"""Bytes beyond the pages: images of descriptors, shared memory, temporary files."""
_CGROUP = Path("/sys/fs/cgroup")


def check_disk(folder: Path, wanted: int) -> None:
    """Raise Failed (disk-full) unless `folder` has room for a snapshot of `wanted` bytes of memory."""
    require_free(folder, int(wanted * 1.05) + _MARGIN)


def require_free(folder: Path, wanted: int) -> None:
    """Raise Failed (disk-full) unless the file system of `folder` has `wanted` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise Failed(
            "disk-full",
            f"the snapshot needs about {wanted / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; "
            "make room (quickthaw snapshot rm, quickthaw weights gc) or set QUICKTHAW_HOME",
        )


def tmpfs_bytes(root: Path, folders: Sequence[str]) -> int:
    """Sum the bytes used on the file systems of these sandbox folders, including deleted files that are still open."""
    used = {}
    for folder in folders:
        stat = os.statvfs(f"{root}{folder}")
        used[stat.f_fsid or folder] = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    return sum(used.values())


def check_memory(wanted: int, cgroup: Path = _CGROUP) -> None:
    """Raise Failed (host-memory-short) unless `wanted` more bytes fit into this host's memory and this container's limit."""
    free = memory_available(cgroup)
    if wanted and free < wanted + _MARGIN:
        raise Failed(
            "host-memory-short",
            f"the dump moves {wanted / 1e9:.1f} GB of GPU memory into host memory, which has {free / 1e9:.1f} GB free; "
            "exclude the weights (--weights excluded), or give the container more memory",
        )


def memory_available(cgroup: Path = _CGROUP) -> int:
    """Return the available bytes of memory (MemAvailable, proc(5)), capped by the control group's limit (version 2)."""
    free = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        # Page cache counts as used but can be reclaimed.
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        if limit != "max":
            free = min(free, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no such group, or version 1: use the host's figure
    return free
