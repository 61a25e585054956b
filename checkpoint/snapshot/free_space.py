"""Check this host's free memory (for GPU contents) and free disk space (for a snapshot)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from checkpoint.errors import Failed

_MARGIN = 64 << 20
"""Bytes beyond the pages: images of descriptors, shared memory, temporary files."""


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


def check_memory(wanted: int, proc: Path = Path("/proc")) -> None:
    """Raise Failed (host-memory-short) unless `wanted` more bytes fit into this host's memory and the limits of control groups."""
    if not wanted:
        return
    from checkpoint.host_memory import room  # needed only with a GPU

    free = room(proc).available
    if free < wanted + _MARGIN:
        raise Failed(
            "host-memory-short",
            f"the dump moves {wanted / 1e9:.1f} GB of GPU memory into host memory, which has {free / 1e9:.1f} GB free; "
            "exclude the weights (--weights excluded), or give the container more memory",
        )
