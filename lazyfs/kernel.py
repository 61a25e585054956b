"""The kernel's side of a mount: the mount and umount2 calls, the mount table, read-ahead, and the abort switch.

Nothing here touches a path below the mount: a process that serves it must not wait for itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from lazyfs.errors import Busy, HostLacks, NotFound, from_os_error

FSTYPE = "fuse.quickthaw"
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
# Requests of 1 MiB instead of 128 KiB: 2.3 times the throughput (docs/lazyfs.md); 16 MiB is slower again.
READ_AHEAD_KIB = 1024


class MountEntry(NamedTuple):
    """A line of /proc/self/mountinfo."""

    device: str
    mountpoint: str
    fstype: str
    source: str


def _unescape(text: str) -> str:
    return (
        text.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
        if "\\" in text
        else text
    )


def mount_at(mountpoint: str) -> MountEntry | None:
    """The topmost mount at exactly that path, or None."""
    found = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.split(" ")
            if _unescape(fields[4]) == mountpoint:
                rest = fields[fields.index("-") + 1 :]
                found = MountEntry(fields[2], mountpoint, rest[0], _unescape(rest[1]))
    return found


def mount_fuse(fd: int, mountpoint: str, source: str) -> None:
    """Mount the connection of an open /dev/fuse, read-only, for all users. HostLacks without the privilege."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other,default_permissions"
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    if libc.mount(source.encode(), os.fsencode(mountpoint), FSTYPE.encode(), flags, data.encode()) != 0:
        number = ctypes.get_errno()
        if number in (1, 13):
            raise HostLacks(
                f"cannot mount at {mountpoint}: CAP_SYS_ADMIN is needed; run as root or use --transport pyfuse3"
            )
        raise from_os_error(OSError(number, os.strerror(number)), f"cannot mount at {mountpoint}")


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Detach the mount. Busy while something has files open below it (unless lazy), NotFound if nothing is mounted."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)) != 0:
        number = ctypes.get_errno()
        if number == 16:
            raise Busy(f"{mountpoint} is in use; stop what reads it, or unmount with force")
        if number in (2, 22):
            raise NotFound(f"nothing is mounted at {mountpoint}")
        if number == 1:
            raise HostLacks(f"cannot unmount {mountpoint}: CAP_SYS_ADMIN is needed")
        raise from_os_error(OSError(number, os.strerror(number)), f"cannot unmount {mountpoint}")


def set_read_ahead(mountpoint: str, kib: int = READ_AHEAD_KIB) -> bool:
    """Set the mount's read-ahead; must come before the first open. False where sysfs does not allow it."""
    entry = mount_at(mountpoint)
    if entry is None:
        return False
    try:
        Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").write_text(str(kib))
    except OSError:
        return False
    return True


def abort(device: str) -> bool:
    """Cut a FUSE connection: everything waiting in it gets an error. `device` is major:minor. False if it is not
    there.
    """
    try:
        Path(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/abort").write_text("1")
    except OSError:
        return False
    return True
