"""Unmount what killed daemons left mounted: every access to such a mount fails."""

from __future__ import annotations

import errno
import json
import os
import threading

from lazyfs.mount import kernel
from lazyfs.mount.client import mount_lock
from lazyfs.paths import state_dir

_ANSWER_S = 5.0


def recorded_mount_points() -> list[str]:
    """Return every mount point that a record of this state folder names, mounted now or not."""
    found = set()
    for record in state_dir("mounts").glob("*.json"):
        try:
            found.add(str(json.loads(record.read_bytes())["mountpoint"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # replaced or removed meanwhile
    return sorted(found)


def remove_dead(where: str) -> bool:
    """Unmount quickthaw's mounts at `where` as long as the topmost one's daemon is gone; return whether there was one.

    A mount whose daemon lives stays, even if it does not answer, and so does one below it. Nothing is mounted there by this state
    folder meanwhile. Raises HostLacks without the privilege, Temporary (mount-locked).
    """
    if not _is_dead(where):
        return False
    removed = False
    with mount_lock(where):
        while _is_dead(where):  # a launch may have replaced it before the lock
            kernel.unmount(where, lazy=True)
            removed = True
    return removed


def _is_dead(where: str) -> bool:
    entry = kernel.mount_at(where)
    return entry is not None and entry.fstype == kernel.FSTYPE and _disconnected(where)


def _disconnected(where: str) -> bool:
    """Return whether the daemon of a FUSE mount is gone. One that hangs is not."""
    gone: list[bool] = []

    def ask() -> None:
        try:
            os.statvfs(where)  # never answered by the kernel alone, unless the daemon is gone
        except OSError as error:
            gone.append(error.errno in (errno.ENOTCONN, errno.ECONNABORTED))

    thread = threading.Thread(target=ask, daemon=True)  # it may hang
    thread.start()
    thread.join(_ANSWER_S)
    return gone == [True]
