"""Locate the state folder. A module of its own, because commands need it before other imports."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from checkpoint.files import boot_id
from checkpoint.files import private_folder as private_folder
from lazyfs.paths import state_folder

LEAST_ROOM = 64 << 20
"""Bytes that a cold start needs in the state folder: compiled code, manifests, the engine's site folder."""
_PROBE = bytes(1 << 16)
NO_LOCKS = "state-folder-unlockable"
COVERED = ("/dev/shm", "/run/quickthaw", "/proc")
"""Where a sandbox has files of its own (checkpoint.sandbox.namespaces)."""
_REMOTE = (
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "glusterfs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "ocfs2",
    "smb3",
    "wekafs",
)
"""Types of file systems that several hosts may share, beside `fuse.NAME`."""


def state_home() -> Path:
    """Return the absolute path of `$QUICKTHAW_HOME`, or `~/.cache/quickthaw`; `/.cache/quickthaw` for a user who has no home."""
    return state_folder()


def unusable(home: Path) -> str | None:
    """Return why `home` cannot be used, with the remedy, in one line; None if it can. Writes and locks a probe, in under 1 ms."""
    remedy = "make room there, or set QUICKTHAW_HOME to a folder on a disk with room"
    try:
        probe = home / "run" / f".room-{os.urandom(6).hex()}"
        private_folder(probe)
        try:
            (probe / "room").write_bytes(_PROBE)
            locks = _locks(probe)
        finally:
            (probe / "room").unlink(missing_ok=True)
            probe.rmdir()
        there = os.statvfs(home)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"state-folder-full: {home} is full; {remedy}"
        return f"state-folder-unwritable: {home}: {error.strerror}; set QUICKTHAW_HOME to a folder that can be written"
    if there.f_bavail * there.f_frsize < LEAST_ROOM:
        return f"state-folder-full: {home} has {there.f_bavail * there.f_frsize / 1e6:.0f} MB free; {remedy}"
    if not locks:
        return (
            f"{NO_LOCKS}: folders in {home} ({_file_system(home)}) cannot be locked, so starts side by side would break each "
            "other's snapshots; set QUICKTHAW_HOME to a folder on a local disk"
        )
    return None


def _locks(folder: Path) -> bool:
    """Return whether a folder can be locked (flock(2)). Over NFS none can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds a path (proc_pid_mountinfo(5)); "" if it is not known."""
    from lazyfs.mount.kernel import mount_table

    found, longest = "", -1
    with contextlib.suppress(OSError):
        where = path.resolve()
        for mount in mount_table():
            if len(mount.mountpoint) >= longest and where.is_relative_to(mount.mountpoint):
                found, longest = mount.fstype, len(mount.mountpoint)
    return found


def hidden(path: Path) -> str | None:
    """Return the folder of the sandbox's own that covers a path of the host, or None."""
    where = os.path.realpath(path)
    return next((own for own in COVERED if where == own or where.startswith(f"{own}/")), None)


OURS = frozenset(
    {
        "cache", "compile", "criu", "engine-site", "file-digests.json", "index", "lead-times.jsonl", "logs", "model-digests.json",
        "model-digests.lock", "models", "mounts", "restore-rates.jsonl", "run", "snapshots", "store", "traces", "venvs",
        "wake-times.jsonl",
    }
)  # fmt: skip
"""What quickthaw keeps in a state folder, beside the notes of its setup (`.setup…`). A folder with nothing else in it is its own."""


def exposed(home: Path) -> str | None:
    """Return a warning, with the remedy, if other users of this host may enter `home`; None if not, or if it does not exist."""
    try:
        mode = home.stat().st_mode & 0o777
    except OSError:
        return None
    if not mode & 0o077:
        return None
    what = "replace" if mode & 0o022 else "list"
    return f"state-folder-open: {home} has mode {mode:o}, so other users of this host can {what} its files; chmod 700 {home}"


def remote(home: Path) -> str | None:
    """Return a warning, with the remedy, if `home` is on a file system that several hosts may share, else None."""
    kind = _file_system(home)
    if kind not in _REMOTE and not kind.startswith("fuse."):
        return None
    return (
        f"state-folder-remote: {home} is on {kind}, where locks may not reach other hosts; if several hosts use it, set "
        "QUICKTHAW_HOME to a folder of each host's own, and share snapshots by --snapshot-store"
    )


def protect(home: Path) -> list[str]:
    """Close a state folder of our own to other users; return warnings where it is not ours alone, each once.

    A folder is ours if this user owns it, nothing else is in it, and it is no mount point: the mode of a volume belongs to who
    made the volume. Others who can replace files there are warned about at every start. Locks need not reach other hosts, so
    a file system that hosts share is named too.
    """
    found = []
    if warning := exposed(home):
        mode = home.stat().st_mode & 0o777
        if not close_to_others(home) and (_once(home, f".open-{mode:o}") or mode & 0o022):
            found.append(warning)
    if (warning := remote(home)) and _once(home, f".remote-{boot_id()[:8]}"):
        found.append(warning)
    return found


def close_to_others(home: Path) -> bool:
    """Set mode 0700 on a folder that is ours, and return whether it is."""
    try:
        if home.stat().st_uid != os.geteuid() or os.path.ismount(home) or not all(map(_is_ours, os.listdir(home))):
            return False
        home.chmod(0o700)
    except OSError:
        return False
    return True


def _once(home: Path, name: str) -> bool:
    """Return True the first time; False where that cannot be noted down, as nothing else can be kept there."""
    note = home / "run" / name
    try:
        if note.exists():
            return False
        private_folder(note.parent)
        note.touch(mode=0o600)
    except OSError:
        return False
    return True


def _is_ours(name: str) -> bool:
    return name in OURS or name.startswith(".setup")
