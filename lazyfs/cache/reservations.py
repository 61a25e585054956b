"""Reservations of the processes that share one cache: memory, disk space not written yet, and pins.

    claims/<random>   16 bytes (memory, granted; both in bytes, little-endian), then the digests of pinned files, one per line;
                      "=" before a digest: other mounts' commands may not drop its cache file either
    claims/.lock      locked while a process counts, so that no two processes are granted the same room

A reservation counts as long as its owner holds the file's lock, which the kernel releases when the owner dies. It is
written before it is renamed to its final name, so readers never see a partial one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lazyfs.errors import LazyfsError
from lazyfs.paths import flock_within, open_fd, private_dir

log = logging.getLogger("lazyfs.cache.reservations")
_HEAD = 16
# Counting walks a folder and removes files. A process stopped while counting must not block all others forever.
_COUNT_S = 10.0


class Reservation:
    """One process's reservation on the cache at `root`, until `close` or process exit.

    Raises OSError if the disk has no room for it.
    """

    def __init__(self, root: Path, *, memory: int = 0, pins: Iterable[str] = ()) -> None:
        folder = private_dir(root / "claims")
        self.path = folder / os.urandom(8).hex()
        temporary = folder / f".{self.path.name}"
        body = memory.to_bytes(8, "little") + bytes(8) + "".join(f"{pin}\n" for pin in pins).encode()
        self.fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            if os.write(self.fd, body) != len(body):
                raise OSError(errno.ENOSPC, "no room for a reservation on the cache")
            self._map = mmap.mmap(self.fd, _HEAD)
            temporary.rename(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            os.close(self.fd)
            raise
        self._numbers = memoryview(self._map).cast("Q")

    @property
    def granted(self) -> int:
        """Bytes of disk granted to this process and not written yet."""
        return self._numbers[1]

    @granted.setter
    def granted(self, value: int) -> None:
        # One aligned store: other processes read either the old or the new number.
        self._numbers[1] = value

    def add(self, pin: str) -> None:
        """Add one pin. Raises OSError if the disk has no room for it."""
        line = f"{pin}\n".encode()
        if os.write(self.fd, line) != len(line):
            raise OSError(errno.ENOSPC, "no room for a reservation on the cache")

    def close(self) -> None:
        """Remove the reservation."""
        self.path.unlink(missing_ok=True)
        self._numbers.release()
        self._map.close()
        os.close(self.fd)


def reserved_by_others(root: Path, own: Reservation | None = None) -> tuple[int, set[str]]:
    """Return the bytes reserved by live processes (memory and granted; only the memory of `own`), and the digests they pin."""
    taken, pins = _live_reservations(root, own)
    return taken, {pin.removeprefix("=") for pin in pins}


def kept_digests(root: Path) -> set[str]:
    """Return the digests of files whose cache files no command may drop, because a live mount keeps them."""
    return {pin[1:] for pin in _live_reservations(root, None)[1] if pin.startswith("=")}


def _live_reservations(root: Path, own: Reservation | None) -> tuple[int, set[str]]:
    taken, pinned = 0, set[str]()
    for path in (root / "claims").glob("[!.]*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if own is None or path != own.path:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    # The owner died and left the file behind.
                    path.unlink(missing_ok=True)
                    continue
            body = os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
        taken += int.from_bytes(body[:8], "little")
        if own is None or path != own.path:
            taken += int.from_bytes(body[8:_HEAD], "little")
        pinned.update(body[_HEAD:].decode().split())
    return taken, pinned


@contextlib.contextmanager
def count_lock(root: Path) -> Iterator[None]:
    """Hold the cache's count lock while counting and granting.

    Continues without the lock after 10 s, or if the disk has no room for a lock file.
    """
    with contextlib.ExitStack() as held:
        try:
            fd = held.enter_context(open_fd(private_dir(root / "claims") / ".lock", os.O_RDWR | os.O_CREAT))
            if not flock_within(fd, _COUNT_S):
                log.warning(
                    "another process has held the count lock of %s for %.0f s; continuing without it", root, _COUNT_S
                )
        except (OSError, LazyfsError) as error:
            log.warning("cannot lock %s/claims: %s", root, error)
        yield
