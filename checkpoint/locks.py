"""Locking a folder by its name, while others rename, exchange and remove folders of that name. Standard library only."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def locked(folder: Path, operation: int) -> int:
    """A descriptor of a folder with its lock (fcntl.LOCK_SH or LOCK_EX), which its end releases; never waits.

    -1 where the name stands for another folder, or for none, by the time of the lock: then nothing is locked, and whoever needs the folder
    tries again. Raises BlockingIOError where somebody holds it otherwise, FileNotFoundError, OSError.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), folder.stat()):
            found, fd = fd, -1
            return found
    except FileNotFoundError:
        pass
    finally:
        if fd >= 0:
            os.close(fd)
    return -1
