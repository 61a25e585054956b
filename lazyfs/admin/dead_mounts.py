"""Unmount what killed daemons left mounted: every access to such a mount fails."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

from lazyfs.mount import kernel
from lazyfs.mount.client import unmount
from lazyfs.paths import home

_ANSWER_S = 5.0


def remove_dead_mounts() -> list[str]:
    """Unmount the mounts of this state folder whose daemon is gone, and return their mount points.

    A mount whose daemon lives stays, even if it does not answer; so do those that this mount namespace does not show.
    Raises HostLacks without the privilege.
    """
    removed = []
    for record in sorted((home() / "mounts").glob("*.json")):
        try:
            where = str(json.loads(record.read_bytes())["mountpoint"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # replaced or removed meanwhile
        entry = kernel.mount_at(where)
        if entry is not None and entry.fstype == kernel.FSTYPE and _disconnected(where):
            unmount(Path(where), force=True)
            removed.append(where)
    return removed


def _disconnected(where: str) -> bool:
    """Return whether the daemon of a FUSE mount is gone. One that hangs is not."""
    gone: list[bool] = []

    def ask() -> None:
        try:
            os.statvfs(where)  # never answered by the kernel alone, unless the daemon is gone
        except OSError as error:
            gone.append(error.errno == errno.ENOTCONN)

    thread = threading.Thread(target=ask, daemon=True)  # it may hang
    thread.start()
    thread.join(_ANSWER_S)
    return gone == [True]
