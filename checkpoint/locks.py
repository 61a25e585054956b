"""Lock a folder by its name, while other processes rename, exchange and remove folders of that name.

Standard library only.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def locked(folder: Path, operation: int) -> int:
    """Open a folder and lock it (fcntl.LOCK_SH or LOCK_EX) without waiting.

    Return the descriptor, whose close releases the lock. Returns -1, with nothing locked, if the name refers to another
    folder, or none, by the time of the lock; the caller should then try again. Raises BlockingIOError if another
    process holds a conflicting lock, FileNotFoundError, OSError.
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
