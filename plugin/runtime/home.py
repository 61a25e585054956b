"""Locate the state folder. A module of its own, because commands need it before other imports."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from checkpoint.files import private_folder as private_folder

LEAST_ROOM = 64 << 20
"""Bytes that a cold start needs in the state folder: compiled code, manifests, the engine's site folder."""
_PROBE = bytes(1 << 16)


def state_home() -> Path:
    """Return `$QUICKTHAW_HOME`, or `~/.cache/quickthaw`."""
    return Path(os.environ.get("QUICKTHAW_HOME") or Path.home() / ".cache" / "quickthaw")


def unusable(home: Path) -> str | None:
    """Return why `home` is not writable, with the remedy, in one line; None if it is. Writes a probe file, in under 1 ms."""
    remedy = "make room there, or set QUICKTHAW_HOME to a folder on a disk with room"
    try:
        run = home / "run"
        private_folder(run)
        probe = run / f".room-{os.urandom(6).hex()}"
        try:
            probe.write_bytes(_PROBE)
        finally:
            probe.unlink(missing_ok=True)
        there = os.statvfs(home)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"state-folder-full: {home} is full; {remedy}"
        return f"state-folder-unwritable: {home}: {error.strerror}; set QUICKTHAW_HOME to a folder that can be written"
    if there.f_bavail * there.f_frsize < LEAST_ROOM:
        return f"state-folder-full: {home} has {there.f_bavail * there.f_frsize / 1e6:.0f} MB free; {remedy}"
    return None


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
