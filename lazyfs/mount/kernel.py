"""Kernel calls of a mount: mount and umount2 (or libfuse's helper), the mount table, readahead, and FUSE abort.

No function here touches a path below the mount: the process that serves it would deadlock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lazyfs.errors import Busy, HostLacks, NotFound, from_os_error

FSTYPE = "fuse.quickthaw"
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
# Requests of 1 MiB instead of 128 KiB give 2.3 times the throughput (docs/lazyfs.md); 16 MiB is slower again.
READ_AHEAD_KIB = 1024
# How long `fusermount3` may take.
_HELPER_S = 10.0
_UNENDED = "fusermount3 did not end in time; check that the file system of the mount point answers"


class MountEntry(NamedTuple):
    """One line of mountinfo (proc_pid_mountinfo(5)). `number` is the mount's own; copies of a mount have the same `device`.

    `root` is the folder of the file system that is mounted; `options` are those of the file system.
    """

    number: str
    device: str
    mountpoint: str
    fstype: str
    source: str
    root: str = "/"
    options: str = ""


def _unescape(text: str) -> str:
    return (
        text.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
        if "\\" in text
        else text
    )


def mount_at(mountpoint: str) -> MountEntry | None:
    """Return the topmost mount at exactly that path, or None."""
    found = None
    for entry in mount_table():
        if entry.mountpoint == mountpoint:
            found = entry
    return found


def place_of(mount: MountEntry) -> str | None:
    """Return the path of a mount now, after its folder may have been renamed, or None if it is gone from this namespace."""
    return next((e.mountpoint for e in mount_table() if (e.number, e.device) == (mount.number, mount.device)), None)


def mount_table(file: str | Path = "/proc/self/mountinfo") -> Iterator[MountEntry]:
    """Yield every mount of this process's namespace, those that cover others last. Raises OSError."""
    with open(file, encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.split(" ")
            fstype, source, options = fields[fields.index("-") + 1 :]
            root, mountpoint = map(_unescape, fields[3:5])
            yield MountEntry(fields[0], fields[2], mountpoint, fstype, _unescape(source), root, options.rstrip("\n"))


def connect(mountpoint: str, source: str, *, allow_other: bool = False) -> int:
    """Mount a new connection, read-only, and return its descriptor: by mount(2), or without that privilege through `fusermount3`.

    Raises HostLacks if the host allows neither, else what `mount_fuse` raises.
    """
    if not may_mount():
        return _mount_through_helper(mountpoint, source, allow_other=allow_other)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostLacks(
            f"cannot open /dev/fuse: {error.strerror}; load the fuse module or pass the device in"
        ) from error
    try:
        mount_fuse(fd, mountpoint, source, allow_other=allow_other)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount_through_helper(mountpoint: str, source: str, *, allow_other: bool) -> int:
    """Let libfuse's setuid helper mount; it sends the descriptor over the socket that _FUSE_COMMFD names. Raises HostLacks."""
    import socket
    import subprocess

    options = f"ro,nosuid,nodev,default_permissions,subtype={FSTYPE.partition('.')[2]},fsname={source}"
    options += ",allow_other" if allow_other else ""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(_HELPER_S)
        with theirs:
            environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
            command = ["fusermount3", "-o", options, "--", mountpoint]
            try:
                helper = subprocess.Popen(
                    command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE, text=True, errors="replace",
                )  # fmt: skip
            except (FileNotFoundError, PermissionError) as error:  # some hosts keep it for the group `fuse`
                what = f"cannot mount at {mountpoint}: CAP_SYS_ADMIN and /dev/fuse, or fusermount3, are needed"
                raise HostLacks(f"{what} (fusermount3: {error.strerror}); run as root, or install fuse3") from None
        fds: list[int] = []
        with helper:
            try:
                fds = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)[1]
                said = helper.communicate(timeout=_HELPER_S)[1].strip()
            except (TimeoutError, subprocess.TimeoutExpired):
                helper.kill()
                for fd in fds:
                    os.close(fd)
                raise HostLacks(f"cannot mount at {mountpoint}: {_UNENDED}") from None
    if helper.returncode != 0 or not fds:
        for fd in fds:
            os.close(fd)
        why = said.splitlines()[-1].removeprefix("fusermount3: ") if said else f"it ended with {helper.returncode}"
        raise HostLacks(f"cannot mount at {mountpoint}: fusermount3: {why}")
    return fds[0]


def mount_fuse(fd: int, mountpoint: str, source: str, *, allow_other: bool = False) -> None:
    """Mount the connection of an open /dev/fuse, read-only, for this user or (`allow_other`) for all.

    Raises HostLacks without the privilege, else what `from_os_error` maps the OSError to.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    data += ",allow_other" if allow_other else ""
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    if libc.mount(source.encode(), os.fsencode(mountpoint), FSTYPE.encode(), flags, data.encode()) != 0:
        number = ctypes.get_errno()
        if number in (1, 13):
            raise HostLacks(f"cannot mount at {mountpoint}: CAP_SYS_ADMIN is needed; run as root")
        raise from_os_error(OSError(number, os.strerror(number)), f"cannot mount at {mountpoint}")


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount; `lazy` detaches the mount while it is in use.

    Raises Busy while files are open below it (unless lazy), NotFound if nothing is mounted, HostLacks without the privilege.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)) != 0:
        number = ctypes.get_errno()
        if number == 16:
            raise _in_use(mountpoint)
        if number in (2, 22):
            raise NotFound(f"nothing is mounted at {mountpoint}")
        if number == 1:
            _fusermount(mountpoint, lazy=lazy)
            return
        raise from_os_error(OSError(number, os.strerror(number)), f"cannot unmount {mountpoint}")


def _in_use(mountpoint: str) -> Busy:
    return Busy(
        f"{mountpoint} is in use; stop its readers, or cut them off with `quickthaw mount --unmount {mountpoint} --force`"
    )


def may_mount() -> bool:
    """Return whether this process has CAP_SYS_ADMIN (bit 21 of its effective set) and can open /dev/fuse."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        caps = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    return bool(caps >> 21 & 1) and os.access("/dev/fuse", os.R_OK | os.W_OK)


def _fusermount(mountpoint: str, *, lazy: bool) -> None:
    """Unmount without privilege, through libfuse's setuid helper. Raises HostLacks or Busy."""
    import subprocess

    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_HELPER_S, check=False)
    except (FileNotFoundError, PermissionError) as error:
        what = f"cannot unmount {mountpoint}: CAP_SYS_ADMIN or fusermount3 is needed"
        raise HostLacks(f"{what} (fusermount3: {error.strerror}); run as root, or install fuse3") from None
    except subprocess.TimeoutExpired:
        raise HostLacks(f"cannot unmount {mountpoint}: {_UNENDED}") from None
    if done.returncode != 0:
        if "busy" in done.stderr.lower():
            raise _in_use(mountpoint)
        raise HostLacks(f"cannot unmount {mountpoint}: {done.stderr.strip() or 'fusermount3 failed'}")


def exists(device: str) -> bool:
    """Return whether any namespace, or an open file, still keeps the mount. `device` is major:minor."""
    return Path(f"/sys/class/bdi/{device}").exists()


def set_read_ahead(mountpoint: str, kib: int = READ_AHEAD_KIB) -> bool:
    """Set the mount's readahead; call before the first open. Return False if sysfs does not allow it."""
    entry = mount_at(mountpoint)
    if entry is None:
        return False
    try:
        Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").write_text(str(kib))
    except OSError:
        return False
    return True


def read_ahead(mountpoint: str) -> int:
    """Return the mount's readahead in KiB, 0 if unknown."""
    entry = mount_at(mountpoint)
    try:
        return int(Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").read_text()) if entry else 0
    except (OSError, ValueError):
        return 0


def abort(device: str) -> bool:
    """Abort a FUSE connection: every request waiting in it fails.

    `device` is major:minor. Return False if it does not exist. Also works where fusectl is not mounted (containers): a
    mount attached to no namespace serves as well.
    """
    name = f"{device.partition(':')[2]}/abort"
    try:
        Path(f"/sys/fs/fuse/connections/{name}").write_text("1")
    except OSError:
        return _abort_detached(name)
    return True


# <linux/mount.h> and asm-generic/unistd.h: the same numbers on every architecture of Linux >= 5.2
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6


def _abort_detached(name: str) -> bool:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(_FSOPEN, b"fusectl", 1)
    if context < 0:
        return False
    try:
        if libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) != 0:
            return False
        folder = libc.syscall(_FSMOUNT, context, 1, 0)
        if folder < 0:
            return False
    finally:
        os.close(context)
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        os.close(folder)
    return True
