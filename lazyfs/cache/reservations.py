"""What the processes that share one cache have claimed of it: memory, room on the disk that is not written yet, and pins.

    claims/<random>   16 bytes (memory, granted; both in bytes, little-endian), then the digests of pinned files, one a line;
                      "=" before one: its image is not dropped by another mount's command either
    claims/.lock      held by whoever counts, so that no two processes are granted the same room

A claim counts as long as its owner holds the file's lock, which the kernel frees when the owner dies, however it dies.
It is written before it gets its name, so nobody ever sees half of one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lazyfs.paths import private_dir

log = logging.getLogger("lazyfs.cache.reservations")
_HEAD = 16
# Counting walks a folder and removes files. Whoever is stopped while it counts must not stop all others for good.
_COUNT_S = 10.0


class Claim:
    """One process's claim on the cache at `root`, until `close` or its end. OSError where the disk has no room for it."""

    def __init__(self, root: Path, *, memory: int = 0, pins: Iterable[str] = ()) -> None:
        folder = private_dir(root / "claims")
        self.path = folder / os.urandom(8).hex()
        temporary = folder / f".{self.path.name}"
        body = memory.to_bytes(8, "little") + bytes(8) + "".join(f"{pin}\n" for pin in pins).encode()
        self.fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            if os.write(self.fd, body) != len(body):
                raise OSError(errno.ENOSPC, "no room for a claim on the cache")
            self._map = mmap.mmap(self.fd, _HEAD)
            temporary.rename(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            os.close(self.fd)
            raise
        self._numbers = memoryview(self._map).cast("Q")

    @property
    def granted(self) -> int:
        """Bytes of disk that this process was granted and has not written yet."""
        return self._numbers[1]

    @granted.setter
    def granted(self, value: int) -> None:
        # One aligned store: other processes read the old number or the new one.
        self._numbers[1] = value

    def add(self, pin: str) -> None:
        """Pin one more. OSError where the disk has no room for it."""
        line = f"{pin}\n".encode()
        if os.write(self.fd, line) != len(line):
            raise OSError(errno.ENOSPC, "no room for a claim on the cache")

    def close(self) -> None:
        """Give it up."""
        self.path.unlink(missing_ok=True)
        self._numbers.release()
        self._map.close()
        os.close(self.fd)


def others(root: Path, own: Claim | None = None) -> tuple[int, set[str]]:
    """Bytes that living claims take (memory and granted; `own` with its memory alone), and what they pin."""
    taken, pins = _living(root, own)
    return taken, {pin.removeprefix("=") for pin in pins}


def kept(root: Path) -> set[str]:
    """The files whose images no command may drop, since a living mount was told to keep them."""
    return {pin[1:] for pin in _living(root, None)[1] if pin.startswith("=")}


def _living(root: Path, own: Claim | None) -> tuple[int, set[str]]:
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
                    # Its owner is gone, and left it behind.
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
def counting(root: Path) -> Iterator[None]:
    """Alone among processes while counting and granting; after 10 s, or on a disk without room for a lock, not alone."""
    fd = -1
    try:
        fd = os.open(private_dir(root / "claims") / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline, pause = time.monotonic() + _COUNT_S, 0.0005
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(pause)
                pause = min(0.02, pause * 2)
        else:
            log.warning("another process has been counting %s for %.0f s; going on without it", root, _COUNT_S)
    except OSError as error:
        log.warning("cannot lock %s/claims: %s", root, error)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)
