"""Private folders, atomic writes, fingerprints, folder locks, the data of sparse files, and the boot id.

Standard library only: every start of a command imports this module (checkpoint.snapshot.speculative).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def private_folder(path: Path) -> None:
    """Make `path` where it is not there, 0700, and its parents too: `mkdir(parents=True)` leaves those to the umask. Raises OSError."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
    except FileNotFoundError:
        private_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


Fingerprint = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, mtime and ctime in ns: the kernel sets ctime at every write, and no program can set it."""
RACY_NS = 100_000_000
"""A file whose last change is younger than this could change again within the same tick of the file system's clock and
keep its times, so its fingerprint is not trusted yet. A tick is at most 10 ms on Linux' own file systems."""


def fingerprint(info: os.stat_result) -> Fingerprint:
    """Return what identifies a file's content without reading it."""
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a new, unique path beside `target`; when the block ends without an error, the file there replaces `target`.

    So readers never see a partial file. The name is random because threads of one process (replicas) write the same
    files, so a process number would not suffice. Raises OSError.
    """
    new = target.with_name(f".{target.name}.{os.urandom(6).hex()}")
    try:
        yield new
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


def write_private(target: Path, data: bytes) -> None:
    """Write a file of mode 0600 that replaces `target` in one step. Raises OSError; then `target` is unchanged."""
    with replacing(target) as new:
        new.touch(mode=0o600)
        new.write_bytes(data)


def lock_folder(folder: Path, operation: int) -> int:
    """Open a folder and lock it (fcntl.LOCK_SH or LOCK_EX) without waiting.

    Return the descriptor, whose close releases the lock. Other processes may rename, exchange and remove folders of
    that name: returns -1, with nothing locked, if the name refers to another folder, or none, by the time of the lock;
    the caller should then try again. Raises BlockingIOError if another process holds a conflicting lock,
    FileNotFoundError, OSError.
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


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each data extent in the first `size` bytes of an open file.

    Extents are ascending, with holes between them. Engines map hundreds of megabytes of shared memory and write a few
    pages of them. Raises OSError.
    """
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # a hole to the end
            raise
        if start >= size:
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, at


def boot_id() -> str:
    """Return the id of this boot. Data written in an earlier boot may have been lost in a power cut."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
